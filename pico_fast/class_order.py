"""Anchors and keys class by class, on any device and without reading anything back.

Anchors are sorted by class. Keys lie class by class already (the bank, described by its segments: for each
class the first row and the length of each part, rows ascending), or are sorted as well. "Same class" is
then a range of positions: of rows, or of entries of `key_order`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_NO_CLASS = torch.iinfo(torch.int64).max


class ClassOrder(NamedTuple):
    """Anchors and keys class by class; what is said of anchors stands in that order."""

    order: Tensor  # [A] int64, anchors by class, empty slots last
    low: Tensor  # [A] int32, first position of the own class; -1: an empty slot
    high: Tensor  # [A] int32, one past its last position
    low_span: Tensor  # [A] int32, first span of the own class
    high_span: Tensor  # [A] int32, one past its last
    positives: Tensor  # [A] int32, how many
    negatives: Tensor  # [A] int32, how many
    key_order: Tensor | None  # [K] int64, key at each position; None: positions are rows
    spans: Tensor  # [n, 2] int32, first position and length


def class_order(
    anchor_labels: Tensor,  # [A] int64
    key_labels: Tensor | None,  # [K] int64; None: those of the anchors, or segments
    segments: Tensor | None,  # [C, G, 2] int64: first row and length of each part of each class
) -> ClassOrder:
    """The order of these anchors and keys; keys come with labels or with segments, or are the anchors."""
    labels, order = torch.where(anchor_labels < 0, _NO_CLASS, anchor_labels).sort(stable=True)
    empty = labels == _NO_CLASS
    if segments is not None:
        n_classes, parts, _ = segments.shape
        label = labels.clamp(max=n_classes - 1)
        low, high = segments[label, 0, 0], segments[label, -1].sum(1)
        low_span, high_span = label * parts, label * parts + parts
        own = segments[label, :, 1].sum(1)
        key_order, spans = None, segments.flatten(0, 1)
    else:
        if key_labels is None:
            sorted_keys, key_order = labels, order
        else:
            named = torch.where(key_labels < 0, _NO_CLASS, key_labels)
            sorted_keys, key_order = named.sort(stable=True)
        low = torch.searchsorted(sorted_keys, labels)
        high = torch.searchsorted(sorted_keys, labels, right=True)
        low_span, high_span = torch.zeros_like(low), torch.ones_like(low)
        n_used = (sorted_keys != _NO_CLASS).sum()
        own = high - low
        spans = torch.stack([torch.zeros_like(n_used), n_used]).unsqueeze(0)
    in_batch = key_labels is None and segments is None
    n_keys = spans[:, 1].sum()
    return ClassOrder(
        order,
        torch.where(empty, -1, low).int(),
        torch.where(empty, -1, high).int(),
        low_span.int(),
        high_span.int(),
        torch.where(empty, 0, own - 1 if in_batch else own).int(),
        torch.where(empty, 0, n_keys - own).int(),
        key_order,
        spans.int().contiguous(),
    )


def spread_tiles(
    spans: Tensor,  # [n, 2] int32
    tile: int,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles before each span [n + 1], first tile of each split [splits + 1] and its span [splits]."""
    behind = ((spans[:, 1] + tile - 1) // tile).cumsum(0)
    tiles = torch.cat([behind.new_zeros(1), behind])
    part = torch.arange(splits + 1, device=spans.device)
    bounds = part * tiles[-1] // splits
    first_span = torch.searchsorted(behind, bounds[:-1], right=True)
    return tiles.int(), bounds.int(), first_span.int()


def labels_of_segments(
    segments: Tensor,  # [C, G, 2] int64
    n_keys: int,
) -> Tensor:
    """The list of labels [n_keys] int64 that segments stand for, -1 in rows of no segment."""
    first, length = segments.flatten(0, 1).unbind(1)
    row = torch.arange(n_keys, device=segments.device)
    at = (torch.searchsorted(first.contiguous(), row, right=True) - 1).clamp(min=0)
    inside = (row >= first.gather(0, at)) & (row < (first + length).gather(0, at))
    return torch.where(inside, at // segments.shape[1], -1)


def rows_of_places(
    segments: Tensor,  # [C, G, 2] int64
    place: Tensor,  # [...] int64, which of all keys in use, class by class
) -> Tensor:
    """The key at each place [...]: `segments` tell how many lie where; anything behind the last."""
    first, length = segments.flatten(0, 1).unbind(1)
    behind = length.cumsum(0)
    part = torch.searchsorted(behind, place, right=True).clamp(max=behind.numel() - 1)
    return place + (first - behind + length).take(part)
