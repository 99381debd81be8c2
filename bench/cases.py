"""What is measured: the data sets that people train on, at their queues' sizes, and inputs for them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHANNELS = 256
TEMPERATURE = 0.1
COUNTS = (1024, 2048)  # positives and negatives of an anchor


@dataclass(frozen=True)
class DataSet:
    """A data set and the queues of the paper: 10 pixels and a region of every training image, or 10,000."""

    name: str
    classes: int
    pixels: int  # slots of a class's pixel queue
    regions: int  # slots of a class's region queue

    def slots(self, share: float = 1.0) -> int:
        """Keys of a class where a share of the queues is kept."""
        return max(1, round((self.pixels + self.regions) * share))

    def keys(self, share: float = 1.0) -> int:
        """Keys of all classes."""
        return self.classes * self.slots(share)


CITYSCAPES = DataSet("Cityscapes", 19, 29_750, 2_975)
CAMVID = DataSet("CamVid", 11, 3_670, 367)
PASCAL_CONTEXT = DataSet("PASCAL-Context", 59, 10_000, 0)
ADE20K = DataSet("ADE20K", 150, 10_000, 0)
COCO_STUFF = DataSet("COCO-Stuff", 171, 10_000, 0)
DATA_SETS = (CITYSCAPES, CAMVID, PASCAL_CONTEXT, ADE20K, COCO_STUFF)


class Pairs(NamedTuple):
    """Anchors and keys, unit rows; the keys lie class by class, all classes of one size."""

    anchors: Tensor  # [A, D] float32
    anchor_labels: Tensor  # [A] int64
    keys: Tensor  # [K, D]
    key_labels: Tensor  # [K] int64


def pairs(
    data_set: DataSet,
    n_anchors: int,
    share: float = 1.0,
    data: str = "clustered",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Pairs:
    """Inputs of `contrast`; `data`: "random" directions, or "clustered" around a centre of each class."""
    g = torch.Generator(device).manual_seed(0)
    centres = torch.randn(data_set.classes, CHANNELS, generator=g, device=device)
    centres *= {"random": 0.0, "clustered": 0.3}[data]
    slots = data_set.slots(share)
    labels = torch.randint(0, data_set.classes, (n_anchors,), generator=g, device=device)
    anchors = torch.randn(n_anchors, CHANNELS, generator=g, device=device) + centres[labels]
    keys = torch.empty(data_set.classes, slots, CHANNELS, dtype=dtype, device=device)
    for rows, centre in zip(keys, centres, strict=True):
        noise = torch.randn(slots, CHANNELS, generator=g, device=device)
        rows.copy_(normalize(noise + centre, dim=1))
    key_labels = torch.arange(data_set.classes, device=device).repeat_interleave(slots)
    return Pairs(normalize(anchors, dim=1), labels, keys.flatten(0, 1), key_labels)


class Images(NamedTuple):
    """What a training step hands to the criterion; labels are blocks of 8 x 8 pixels."""

    embeddings: Tensor  # [B, D, H, W] float32, unit length along D
    labels: Tensor  # [B, H, W] int64
    predictions: Tensor  # [B, H, W] int64, right for about half of the pixels


def images(data_set: DataSet, batch: int, height: int, width: int, device: str = "cpu") -> Images:
    """A batch of unit embeddings around a centre of each class."""
    g = torch.Generator(device).manual_seed(0)

    def blocks() -> Tensor:
        shape = (batch, -(-height // 8), -(-width // 8))
        coarse = torch.randint(0, data_set.classes, shape, generator=g, device=device)
        fine = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return fine[:, :height, :width].contiguous()

    labels, other = blocks(), blocks()
    right = torch.rand(labels.shape, generator=g, device=device) < 0.5
    centres = torch.randn(data_set.classes, CHANNELS, generator=g, device=device) * 0.3
    shape = (batch, CHANNELS, height, width)
    embeddings = torch.randn(shape, generator=g, device=device)
    embeddings += centres[labels].permute(0, 3, 1, 2)
    return Images(normalize(embeddings, dim=1), labels, torch.where(right, labels, other))
