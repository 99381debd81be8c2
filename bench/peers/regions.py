"""Mean embedding of each class in each image by stock operations: [B, C, D] float32, 0 where empty.

All are differentiable with respect to the features. Labels are all in [0, C). Sums are in float32
whatever the features are, except those of `one_hot` and `loop`, whose output has the features' dtype.
"""

import torch
from torch import Tensor


def _rows_and_regions(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Pixels as rows [B·H·W, D] float32, a transposed copy, and the region of each [B·H·W]."""
    image = torch.arange(len(labels), device=labels.device)[:, None]
    region = (image * num_classes + labels.flatten(1)).flatten()
    rows = features.float().flatten(2).transpose(1, 2).reshape(-1, features.shape[1])
    return rows, region


def index_add(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Tensor:
    """A transposed copy and index_add_."""
    rows, region = _rows_and_regions(features, labels, num_classes)
    regions = len(labels) * num_classes
    sums = rows.new_zeros(regions, rows.shape[1]).index_add_(0, region, rows)
    counts = torch.bincount(region, minlength=regions).clamp(min=1)
    return (sums / counts[:, None]).view(len(labels), num_classes, -1)


def scatter_reduce(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Tensor:
    """A transposed copy and scatter_reduce_, which counts and divides by itself."""
    rows, region = _rows_and_regions(features, labels, num_classes)
    means = rows.new_zeros(len(labels) * num_classes, rows.shape[1])
    target = region[:, None].expand_as(rows)
    means = means.scatter_reduce(0, target, rows, "mean", include_self=False)
    return means.view(len(labels), num_classes, -1)


def one_hot(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Tensor:
    """A batched product with the one-hot labels: B·H·W·C more values, C times the additions."""
    classes = torch.arange(num_classes, device=labels.device)
    member = (labels.flatten(1)[..., None] == classes).to(features.dtype)
    sums = member.mT @ features.flatten(2).mT
    counts = (labels.flatten(1)[:, None] == classes[:, None]).sum(2).clamp(min=1)
    return sums / counts[..., None]


def sorted_segments(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Tensor:
    """Pixels sorted by region, and segment_reduce over their runs."""
    rows, region = _rows_and_regions(features, labels, num_classes)
    lengths = torch.bincount(region, minlength=len(labels) * num_classes)
    means = torch.segment_reduce(rows[region.argsort()], "mean", lengths=lengths, initial=0.0)
    return means.view(len(labels), num_classes, -1)


def loop(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Tensor:
    """For each image, for each class: a boolean mask and a mean, as published code has it."""
    nothing = features.new_zeros(features.shape[1])
    means = []
    for image, label in zip(features, labels, strict=True):
        present = set(label.unique().tolist())
        means += [image[:, label == c].mean(1) if c in present else nothing for c in range(num_classes)]
    return torch.stack(means).view(len(labels), num_classes, -1)
