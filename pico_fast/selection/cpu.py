"""Bounds and the hardest keys on a CPU, tile by tile of the keys; nothing of size anchors x keys is held.

A tile is made of neighbouring keys and the anchors that meet them: all anchors, or those of the class.
`tiles` makes its similarities for every op, so that calls for the same layout see the same bits.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast.selection.layout import Bounds, product_dtype

# similarities of one tile, in a size that stays in the caches
_TILE = 2**20
# up to so many anchors keys are multiplied as they lie; for more it pays to take and convert them first
FEW, _FEW_TILE = 16, 2**16

torch.library.define(
    "pico_fast::multiply_few",
    "(Tensor rows, Tensor keys, Tensor? which, Tensor(a!) products) -> ()",
)
torch.library.define(
    "pico_fast::exclude_outside",
    "(Tensor(a!) similarity, Tensor? ceiling, Tensor threshold, Tensor(b!) ties, bool own) -> ()",
)
torch.library.define(
    "pico_fast::keep_hardest",
    "(Tensor similarity, Tensor? name, int first, Tensor? ceiling, bool own, int count,"
    " Tensor(a!) kept, Tensor(b!) tally) -> ()",
)
torch.library.define(
    "pico_fast::bounds_of_kept",
    "(Tensor(a!) kept, Tensor tally, Tensor wanted, bool own, Tensor(b!) threshold,"
    " Tensor(c!) ties) -> ()",
)
torch.library.define(
    "pico_fast::list_kept",
    "(Tensor(a!) kept, Tensor tally, bool own, Tensor(b!) index, Tensor(c!) similarity) -> ()",
)
for _name in ("multiply_few", "exclude_outside", "keep_hardest", "bounds_of_kept", "list_kept"):
    torch.library.register_fake(f"pico_fast::{_name}")(lambda *_: None)
_ops = torch.ops.pico_fast


class Pairs(NamedTuple):
    """Anchors that have a class, and the keys in use, column by column in the order of their positions."""

    queries: Tensor  # [n, D] in the product's dtype
    keys: Tensor  # [K, D] as they lie
    key: Tensor  # [M] int64, the key of each column
    own: list[tuple[slice, int, int]]  # anchors of a class; first and last column of its keys
    own_key: Tensor | None  # [A] int64


class Tile(NamedTuple):
    """Similarities of neighbouring columns; those of pairs that are none of this side are infinite."""

    rows: slice  # of the anchors
    first: int  # column
    where: slice | Tensor  # rows of all keys
    similarity: Tensor  # [n, w]
    keys: Tensor  # [w, D] in the dtype of similarities, or [*, D] as they lie
    which: Tensor | None  # [w] int64, which of these keys; None: all


def pairs_of(
    anchors: Tensor,  # [A, D]
    anchor_class: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_order: Tensor | None,  # [W] int64
    ranges: Tensor,  # [C, G, 2] int64
    own_key: Tensor | None,  # [A] int64
) -> Pairs:
    """The pairs of a layout, whose tensors these are."""
    n = int((anchor_class >= 0).sum())
    # a copy: products may depend on how their rows lie
    queries = anchors[:n].to(product_dtype(anchors, keys), copy=True).contiguous()
    first, length = ranges.flatten(0, 1).unbind(1)
    used = length.nonzero()[:, 0]  # of labels in any order most ranges are empty
    first, length = first[used], length[used]
    before = length.cumsum(0) - length
    key = torch.repeat_interleave(first - before, length)
    key += torch.arange(key.shape[0])
    if key_order is not None:
        key = key_order[key]
    sizes = ranges.select(2, 1).sum(1)
    classes, counts = anchor_class[:n].unique_consecutive(return_counts=True)
    lasts, rows = sizes.cumsum(0)[classes].tolist(), counts.cumsum(0).tolist()
    own = [
        (slice(row - count, row), last - size, last)
        for row, count, last, size in zip(
            rows, counts.tolist(), lasts, sizes[classes].tolist(), strict=True
        )
        if size
    ]
    return Pairs(queries, keys.contiguous(), key, own, own_key)


def _where(key: Tensor) -> slice | Tensor:
    """The rows of these keys [w]: a slice where they are neighbours."""
    first, last = int(key[0]), int(key[-1])
    if last - first == len(key) - 1 and bool((key[1:] - key[:-1] == 1).all()):
        return slice(first, last + 1)
    return key


def own_columns(pairs: Pairs, tile: Tile) -> Iterator[tuple[slice, slice]]:
    """Anchors and columns of a tile that are of one class, class by class."""
    last = tile.first + tile.similarity.shape[1]
    at = bisect_right(pairs.own, tile.first, key=itemgetter(2))
    for rows, start, stop in islice(pairs.own, at, None):
        if start >= last:
            return
        yield rows, slice(max(start - tile.first, 0), stop - tile.first)


def _multiply(pairs: Pairs, rows: slice, first: int, last: int, buffer: Tensor) -> Tile:
    """A tile of inner products, written into the buffer."""
    queries, where = pairs.queries[rows], _where(pairs.key[first:last])
    products = buffer[: len(queries) * (last - first)].view(len(queries), last - first)
    if len(queries) <= FEW and pairs.keys.dtype != torch.float16:
        is_slice = isinstance(where, slice)
        keys, which = (pairs.keys[where], None) if is_slice else (pairs.keys, where)
        _ops.multiply_few(queries, keys, which, products)
    else:
        keys, which = pairs.keys[where].to(queries.dtype), None
        torch.mm(queries, keys.T, out=products)
    return Tile(rows, first, where, products, keys, which)


def tiles(
    pairs: Pairs,
    own: bool,
    excluded: float | None = None,
) -> Iterator[Tile]:
    """All pairs of one side; the others in a tile are `excluded`: None: of hardness -inf.

    The next tile takes the memory of its similarities.
    """
    excluded = (math.inf if own else -math.inf) if excluded is None else excluded
    everything = [(slice(0, len(pairs.queries)), 0, len(pairs.key))]
    steps = []
    for rows, first, last in pairs.own if own else everything:
        n = rows.stop - rows.start
        size = _FEW_TILE if n <= FEW else min(4096, max(256, _TILE // n))
        steps += [(rows, at, min(at + size, last)) for at in range(first, last, size)]
    largest = max(((rows.stop - rows.start) * (last - at) for rows, at, last in steps), default=0)
    buffer = pairs.queries.new_empty(largest)
    for rows, first, last in steps:
        tile = _multiply(pairs, rows, first, last, buffer)
        if not own:
            for there, columns in own_columns(pairs, tile):
                tile.similarity[there, columns] = excluded
        elif pairs.own_key is not None:
            itself = pairs.own_key[rows, None] == pairs.key[first:last]
            tile.similarity.masked_fill_(itself, excluded)
        yield tile


def counted(pairs: Pairs, own: bool, bounds: Bounds) -> Iterator[Tile]:
    """The tiles of one side; what lies outside of the bounds is excluded as well."""
    if bounds.threshold is None:
        yield from tiles(pairs, own)
        return
    ceiling, threshold, ties = bounds
    ties = ties.clone()  # of each anchor those still to come
    for tile in tiles(pairs, own):
        top = None if ceiling is None else ceiling[tile.rows]
        _ops.exclude_outside(tile.similarity, top, threshold[tile.rows], ties[tile.rows], own)
        yield tile


def _keep(
    pairs: Pairs,
    own: bool,
    ceiling: Tensor | None,  # [A]
    count: int,
    by_place: bool,
) -> tuple[Tensor, Tensor]:
    """The `count` hardest of each anchor in C++'s own words [n, room], and a tally [n, 3].

    The tally tells of each anchor how many are kept, how many candidates there were, and the least
    hardness worth keeping.
    """
    queries = pairs.queries
    most = max((last - first for _, first, last in pairs.own), default=0) if own else len(pairs.key)
    count = max(1, min(count, most))
    room = 96 + min(most, count + count // 2 + 256)
    kept = queries.new_empty(len(queries), room * queries.itemsize // 4, dtype=torch.int64)
    tally = torch.zeros(len(queries), 3, dtype=torch.int64)
    for tile in tiles(pairs, own):
        rows, name, first = tile.rows, None, tile.first
        if not by_place:
            is_slice = isinstance(tile.where, slice)
            name, first = (None, tile.where.start) if is_slice else (tile.where, 0)
        top = None if ceiling is None else ceiling[rows]
        state = (kept[rows], tally[rows])
        _ops.keep_hardest(tile.similarity, name, first, top, own, count, *state)
    return kept, tally


def bounds(
    anchors: Tensor,  # [A, D]
    anchor_class: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_order: Tensor | None,  # [W] int64
    ranges: Tensor,  # [C, G, 2] int64
    own_key: Tensor | None,  # [A] int64
    own: bool,
    ceiling: Tensor | None,  # [A]
    count: int,
    fraction: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `bounds`: threshold [A], ties [A] and how many keys of one side count [A]."""
    pairs = pairs_of(anchors, anchor_class, keys, key_order, ranges, own_key)
    kept, tally = _keep(pairs, own, ceiling, count, True)
    n = len(pairs.queries)
    counts, ties = torch.zeros_like(anchor_class), torch.zeros_like(anchor_class)
    threshold = pairs.queries.new_full(anchor_class.shape, -math.inf if own else math.inf)
    counts[:n] = (tally[:, 1].double() * fraction).ceil().clamp(max=count)
    _ops.bounds_of_kept(kept, tally, counts[:n], own, threshold[:n], ties[:n])
    return threshold, ties, counts


def hardest(
    anchors: Tensor,  # [A, D]
    anchor_class: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_order: Tensor | None,  # [W] int64
    ranges: Tensor,  # [C, G, 2] int64
    own_key: Tensor | None,  # [A] int64
    own: bool,
    ceiling: Tensor | None,  # [A]
    count: int,
    by_place: bool,
) -> tuple[Tensor, Tensor]:
    """The op `hardest`: keys of one side [A, count], hardest first, and their similarities."""
    pairs = pairs_of(anchors, anchor_class, keys, key_order, ranges, own_key)
    kept, tally = _keep(pairs, own, ceiling, count, by_place)
    n = len(pairs.queries)
    index = anchor_class.new_full((anchor_class.shape[0], count), -1)
    similarity = pairs.queries.new_zeros(index.shape)
    _ops.list_kept(kept, tally, own, index[:n], similarity[:n])
    if by_place and len(pairs.key):
        index = torch.where(index < 0, -1, pairs.key[index.clamp(min=0)])
    return index, similarity
