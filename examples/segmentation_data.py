"""Images and labels from folders, and a training stream that can be cut and continued anywhere.

Which image is drawn and how it is augmented depends on the seed and the number of the draw and
on nothing else: not on workers, not on what was drawn before. A resumed run therefore only has
to start at its own draw to see what the uninterrupted run would have seen.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
SPREAD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True)
class Augmentation:
    """How far a training image may be changed: scale range, share of flips, colour strength."""

    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    colour: float = 0.3


class Folder:
    """Pairs of images/SPLIT/NAME.* and labels/SPLIT/NAME.png (8-bit class numbers).

    Frames of a video are near duplicates: `only` and `without` divide by how names begin, so that a
    sequence is on one side as a whole.
    """

    def __init__(self, root: Path, split: str, only: str | None = None, without: str | None = None):
        images, labels = root / "images" / split, root / "labels" / split
        for folder in (images, labels):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: expected a folder of the data set, found none")
        self.images = sorted(
            p
            for p in images.iterdir()
            if not p.name.startswith("." if without is None else (".", without))
            and p.name.startswith(only or "")
        )
        self.labels = [labels / f"{p.stem}.png" for p in self.images]
        missing = [p for p in self.labels if not p.is_file()]
        if not self.images:
            begin = "" if only is None else f" whose names begin with {only}"
            raise FileNotFoundError(f"{images}: expected images{begin}, found none")
        if missing:
            raise FileNotFoundError(f"{len(missing)} images without labels, first {missing[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and label map (8 bit) as stored."""
        with Image.open(self.images[index]) as image, Image.open(self.labels[index]) as labels:
            if labels.mode not in ("L", "P"):
                path = self.labels[index]
                raise ValueError(f"{path}: expected an 8-bit label image, got {labels.mode}")
            # a palette only colours the class numbers: they are the pixels themselves
            numbers = Image.fromarray(np.array(labels))
            return image.convert("RGB"), numbers


def to_tensor(image: Image.Image) -> Tensor:
    """Normalised image [3, H, W] float32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.float() / 255 - MEAN) / SPREAD


def to_labels(labels: Image.Image) -> Tensor:
    """Class numbers [H, W] int64."""
    return torch.from_numpy(np.array(labels)).long()


class TrainingStream(Dataset):
    """Augmented crops, one for each draw 0, 1, 2, ...; every image once in `len(folder)` draws."""

    def __init__(
        self,
        folder: Folder,
        size: tuple[int, int],  # H, W of the crop; at scale 1 it is the whole image
        seed: int,
        ignore_index: int = 255,
        augmentation: Augmentation | None = None,
    ):
        self.folder = folder
        self.size = size
        self.seed = seed
        self.ignore_index = ignore_index
        self.augmentation = augmentation or Augmentation()

    def image_of(self, draw: int) -> int:
        """The image of a draw: position in the seed's permutation for that epoch."""
        epoch, position = divmod(draw, len(self.folder))
        return int(np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.folder))[position])

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] float32 and labels [H, W] int64."""
        rng = np.random.default_rng((self.seed, 1, draw))
        image, labels = self.folder.load(self.image_of(draw))
        scale = float(np.exp(rng.uniform(*np.log(self.augmentation.scale))))
        full = tuple(max(1, round(scale * side)) for side in self.size)
        image = image.resize(full[::-1], Image.Resampling.BILINEAR)
        labels = labels.resize(full[::-1], Image.Resampling.NEAREST)
        pixels, classes = self._crop(to_tensor(image), to_labels(labels), rng)
        if rng.random() < self.augmentation.flip:
            pixels, classes = pixels.flip(2), classes.flip(1)
        return self._recolour(pixels, rng), classes

    def _crop(self, pixels: Tensor, classes: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A window of `size` somewhere in the image; what lies outside it is ignored."""
        height, width = self.size
        rows, columns = classes.shape
        # a smaller image is placed somewhere inside the window instead
        top, left = (
            int(rng.integers(min(0, have - want), max(0, have - want) + 1))
            for have, want in ((rows, height), (columns, width))
        )
        window = pixels.new_zeros(3, height, width)
        target = classes.new_full((height, width), self.ignore_index)
        source = (slice(max(top, 0), top + height), slice(max(left, 0), left + width))
        place = tuple(
            slice(max(-start, 0), max(-start, 0) + classes[source].shape[axis])
            for axis, start in enumerate((top, left))
        )
        window[(slice(None), *place)] = pixels[(slice(None), *source)]
        target[place] = classes[source]
        return window, target

    def _recolour(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Other contrast, brightness and tint of each channel [3, H, W]."""
        strength = self.augmentation.colour
        contrast = float(np.exp(rng.uniform(-strength, strength)))
        shift = torch.from_numpy(rng.normal(0, strength, 1) + rng.normal(0, strength / 3, 3))
        return pixels * contrast + shift.float().view(3, 1, 1)


class Evaluation(Dataset):
    """Whole images resized to `size` [3, H, W], with labels [h, w] at their own resolution."""

    def __init__(self, folder: Folder, size: tuple[int, int]):
        self.folder = folder
        self.size = size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.folder.load(index)
        image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return to_tensor(image), to_labels(labels)
