"""Layout: whose key is whose. Anchors stand class by class, and so do the positions of keys.

A class is a row of `ranges`, which says where its keys stand: the first position and the length of each
part. A bank has a row for each of its classes and two parts, pixels and regions. Keys with labels in any
order have a row for each label that occurs, and `key_order` brings them class by class. So "same class" is
a range of positions, never a mask of pairs. A layout is made once a step, and no GPU is read back for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_NO_LABEL = _ALL = torch.iinfo(torch.int64).max


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Cut(NamedTuple):
    """Which keys of one side count for an anchor: of the m below its ceiling the min(count, ⌈fraction m⌉)
    hardest, equal ones by place. As it stands: every one."""

    ceiling: Tensor | None = None  # [A] only keys less similar than this
    count: int = _ALL
    fraction: float = 1.0

    @property
    def is_none(self) -> bool:
        """Whether every key counts."""
        return self.ceiling is None and self.count == _ALL

    def wanted(self, m: Tensor) -> Tensor:
        """How many of m keys [A] count: [A] int64."""
        if self.is_none:
            return m
        return (m.double() * self.fraction).ceil().long().clamp(max=self.count)

    def of(self, rows: slice) -> "Cut":
        """The cut of a block of anchors."""
        return self if self.ceiling is None else self._replace(ceiling=self.ceiling[rows])


class Layout(NamedTuple):
    """Anchors class by class, and where the keys of each class stand."""

    anchors: Tensor  # [A, D], 0 in empty slots
    anchor_class: Tensor  # [A] int64 row of `ranges`, ascending; -1 in empty slots, which come last
    keys: Tensor  # [K, D] as they lie
    # [W] int64, the key at each position; parts then follow one another. None: positions are rows of keys
    key_order: Tensor | None
    ranges: Tensor  # [C, G, 2] int64, first position and length of each part of each class
    own_key: Tensor | None  # [A] int64, in batch: the key that an anchor is itself
    # ops are not told these two
    names: Tensor | None = None  # [C] int64, what classes are called in draws: their labels
    order: Tensor | None = None  # [A] int64, which of the caller's anchors stands here

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What every op takes first."""
        return self[:6]

    @property
    def dtype(self) -> torch.dtype:
        """In which dtype similarities are."""
        return product_dtype(self.anchors, self.keys)

    @property
    def sizes(self) -> Tensor:
        """Keys of each class: [C] int64."""
        length = self.ranges.select(2, 1)
        return length.squeeze(1) if length.shape[1] == 1 else length.sum(1)

    def available(self, own: bool) -> Tensor:
        """Positives (`own`) or negatives that each anchor is offered: [A] int64."""
        sizes = self.sizes
        of_class = sizes if own else sizes.sum() - sizes
        # the class of an empty slot is -1, the last one
        found = torch.nn.functional.pad(of_class, (0, 1)).take(self.anchor_class)
        if own and self.own_key is not None:
            found = found - self.has_itself().long()
        return found

    def has_itself(self) -> Tensor:
        """Whether the key that an anchor is itself is among those of the layout: [A] bool."""
        here = torch.zeros_like(self.own_key, dtype=torch.int32)
        position = torch.arange(self.key_order.shape[0], device=here.device)
        key = torch.where(position < self.sizes.sum(), self.key_order, -1)
        here = here.scatter_add(0, key.clamp(min=0), (key >= 0).int())
        return here.gather(0, self.own_key) > 0

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [A, ...] in the caller's order of anchors."""
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def _arranged(
    anchors: Tensor,  # [A, D]
    anchor_class: Tensor,  # [A] int64, -1 in empty slots
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors [A, D] and their classes [A] class by class, empty slots last and 0; and their order [A]."""
    named = torch.where(anchor_class < 0, _NO_LABEL, anchor_class)
    named, order = named.sort(stable=True)
    empty = named == _NO_LABEL
    rows = anchors.index_select(0, order).masked_fill_(empty.unsqueeze(1), 0.0)
    return rows, torch.where(empty, -1, named), order


def of_bank(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64 below C
    keys: Tensor,  # [K, D], class by class
    ranges: Tensor,  # [C, G, 2] int64, rows in use of each part of each class
) -> Layout:
    """The layout of anchors and a bank, whose classes stand where `ranges` says."""
    rows, anchor_class, order = _arranged(anchors, anchor_labels)
    names = torch.arange(ranges.shape[0], device=ranges.device)
    return Layout(rows, anchor_class, keys, None, ranges, None, names, order)


def of_labels(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
) -> Layout:
    """The layout of anchors and keys with labels in any order, up to 2^62."""
    in_batch = keys is None
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    # where the host may look, keys that lie class by class stay as they are, and few labels are few rows
    is_readable = key_labels.device.type == "cpu" and not torch.compiler.is_compiling()
    named = torch.where(key_labels < 0, _NO_LABEL, key_labels)
    if is_readable and not in_batch and bool((named[1:] >= named[:-1]).all()):
        sorted_keys, key_order = named, None
    else:
        sorted_keys, key_order = named.sort(stable=True)
    occurring = sorted_keys.unique_consecutive() if is_readable else sorted_keys
    none = occurring.new_full((1,), _NO_LABEL)  # so that there is a row at all
    if not in_batch:
        occurring = torch.cat([torch.where(anchor_labels < 0, _NO_LABEL, anchor_labels), occurring])
    names = torch.cat([occurring, none]).sort()[0]
    if is_readable:
        names = names.unique_consecutive()
    else:
        first, later = names.split((1, names.shape[0] - 1))
        repeated = later == names.narrow(0, 0, later.shape[0])
        names = torch.cat([first, later.masked_fill(repeated, _NO_LABEL)]).sort()[0]
    first = torch.searchsorted(sorted_keys, names)
    length = torch.searchsorted(sorted_keys, names, right=True) - first
    length = length.masked_fill(names == _NO_LABEL, 0)
    anchor_class = torch.searchsorted(names, anchor_labels).masked_fill(anchor_labels < 0, -1)
    rows, anchor_class, order = _arranged(anchors, anchor_class)
    ranges = torch.stack([first, length], 1).unsqueeze(1)
    own_key = order if in_batch else None
    return Layout(rows, anchor_class, keys, key_order, ranges, own_key, names, order)
