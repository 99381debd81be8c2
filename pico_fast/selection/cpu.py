"""Cuts and the hardest keys on a CPU, tile by tile; never all anchors' similarities with all keys at once.

A tile is made of neighbouring keys and the anchors that meet them: all anchors, or those of the class.
Where a cut decides, it holds whole rows: all keys that a block of anchors meets. `tiles` makes the
similarities for every op, so that calls for the same layout see the same bits.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast.selection.layout import Cut, Layout

# similarities of one tile, in a size that stays in the caches; of one that holds whole rows
_TILE, _WHOLE = 2**19, 3 * 2**21
# up to so many anchors keys are multiplied as they lie; for more it pays to take and convert them first
FEW, _FEW_TILE = 16, 2**16

_SCHEMAS = {
    "multiply_few": "(Tensor rows, Tensor keys, Tensor? which, Tensor(a!) products) -> ()",
    "cut_rows": "(Tensor(a!) similarity, Tensor? ceiling, int count, float fraction, bool own,"
    " Tensor(b!) below) -> ()",
    "keep_hardest": "(Tensor similarity, Tensor? name, int first, Tensor? ceiling, bool own, int count,"
    " Tensor(a!) kept, Tensor(b!) tally) -> ()",
    "list_kept": "(Tensor(a!) kept, Tensor tally, bool own, Tensor(b!) index, Tensor(c!) similarity) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"pico_fast::{_name}", _schema)
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
    similarity: Tensor  # [n, w], rows apart
    keys: Tensor  # [w, D] in the dtype of similarities, or [*, D] as they lie
    which: Tensor | None  # [w] int64, which of these keys; None: all


def pairs_of(layout: Layout) -> Pairs:
    """The pairs of a layout."""
    anchors, anchor_class, keys, key_order, ranges, own_key = layout.tensors
    n = int((anchor_class >= 0).sum())
    # a copy: products may depend on how their rows lie
    queries = anchors[:n].to(layout.dtype, copy=True).contiguous()
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
    columns = zip(rows, counts.tolist(), lasts, sizes[classes].tolist(), strict=True)
    own = [(slice(row - count, row), last - size, last) for row, count, last, size in columns if size]
    return Pairs(queries, keys.contiguous(), key, own, own_key)


def _where(key: Tensor) -> slice | Tensor:
    """The rows of these keys [w]: a slice where they are neighbours."""
    first, last = int(key[0]), int(key[-1])
    if last - first == len(key) - 1 and bool((key[1:] - key[:-1] == 1).all()):
        return slice(first, last + 1)
    return key


def own_columns(pairs: Pairs, tile: Tile) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a tile that are of one class, class by class."""
    last, above = tile.first + tile.similarity.shape[1], tile.rows.start
    at = bisect_right(pairs.own, tile.first, key=itemgetter(2))
    for rows, start, stop in islice(pairs.own, at, None):
        if start >= last:
            return
        if rows.stop > above:
            here = slice(max(rows.start - above, 0), rows.stop - above)
            yield here, slice(max(start - tile.first, 0), stop - tile.first)


def _padded(columns: int) -> int:
    """Columns from one row to the next: a product is far slower where rows begin within a cache line."""
    return -(-columns // 16) * 16


def _steps(pairs: Pairs, own: bool, whole: bool) -> list[tuple[slice, int, int]]:
    """Rows and columns of the tiles; `whole`: with all columns that an anchor meets."""
    columns = len(pairs.key)
    everything = [(slice(0, len(pairs.queries)), 0, columns)] if columns else []
    steps = []
    for rows, first, last in pairs.own if own else everything:
        n = rows.stop - rows.start
        if whole:
            blocks = -(-n // max(FEW, _WHOLE // (last - first)))
            size = max(1, -(-n // max(1, blocks)))
            starts = range(rows.start, rows.stop, size)
            steps += [(slice(at, min(at + size, rows.stop)), first, last) for at in starts]
        else:
            size = _FEW_TILE if n <= FEW else min(4096, max(256, _TILE // n))
            steps += [(rows, at, min(at + size, last)) for at in range(first, last, size)]
    return steps


def tiles(pairs: Pairs, own: bool, whole: bool = False, excluded: float | None = None) -> Iterator[Tile]:
    """All pairs of one side; the others in a tile are `excluded`: None: of hardness -inf.

    `whole`: a tile holds all columns that its anchors meet. The next tile takes the memory of its
    similarities and of its keys.
    """
    excluded = (math.inf if own else -math.inf) if excluded is None else excluded
    steps = _steps(pairs, own, whole)
    sizes = ((rows.stop - rows.start) * _padded(last - first) for rows, first, last in steps)
    buffer = pairs.queries.new_empty(max(sizes, default=0))
    widest = max((last - first for _, first, last in steps), default=0)
    converted, columns, where, taken = None, None, None, None
    for rows, first, last in steps:
        queries, which = pairs.queries[rows], None
        padded = _padded(last - first)
        products = buffer[: len(queries) * padded].view(len(queries), padded)[:, : last - first]
        if (first, last) != columns:
            columns, where, taken = (first, last), _where(pairs.key[first:last]), None
        if len(queries) <= FEW and pairs.keys.dtype != torch.float16:
            is_slice = isinstance(where, slice)
            keys, which = (pairs.keys[where], None) if is_slice else (pairs.keys, where)
            _ops.multiply_few(queries, keys, which, products)
        else:
            if taken is None and isinstance(where, slice) and pairs.keys.dtype == queries.dtype:
                taken = pairs.keys[where]
            elif taken is None:
                if converted is None:
                    converted = queries.new_empty(widest, queries.shape[1])
                taken = converted[: last - first].copy_(pairs.keys[where])
            keys = taken
            torch.mm(queries, keys.T, out=products)
        tile = Tile(rows, first, where, products, keys, which)
        if not own:
            for there, here in own_columns(pairs, tile):
                products[there, here] = excluded
        elif pairs.own_key is not None:
            itself = pairs.own_key[rows, None] == pairs.key[first:last]
            products.masked_fill_(itself, excluded)
        yield tile


def counted(pairs: Pairs, own: bool, cut: Cut) -> Iterator[tuple[Tile, Tensor | None]]:
    """The tiles of one side without what a cut leaves out; and how many a cut chose from [n]."""
    for tile in tiles(pairs, own, whole=not cut.is_none):
        below = None
        if not cut.is_none:
            below = pairs.key.new_empty(len(tile.similarity))
            _ops.cut_rows(tile.similarity, *cut.of(tile.rows), own, below)
        yield tile, below


def hardest(
    layout: Layout,
    own: bool,
    ceiling: Tensor | None,  # [A]
    count: int,
    by_place: bool,
    in_order: bool = True,  # these always are
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hardest`: keys [A, count] and similarities, hardest first; how many lie below a ceiling."""
    pairs, n_anchors = pairs_of(layout), layout.anchors.shape[0]
    queries, n = pairs.queries, len(pairs.queries)  # behind them stand empty slots
    most = max((last - first for _, first, last in pairs.own), default=0) if own else len(pairs.key)
    least = max(1, min(count, most))
    room = 96 + min(most, least + least // 2 + 256)
    # the hardest in C++'s own words
    kept = queries.new_empty(n, room * queries.itemsize // 4, dtype=torch.int64)
    # how many are kept, how many candidates there were, the least hardness worth keeping
    tally = torch.zeros(n, 3, dtype=torch.int64)
    for tile in tiles(pairs, own, whole=by_place):  # as the sums see them, where a cut decides
        rows, name, first = tile.rows, None, tile.first
        if not by_place:
            is_slice = isinstance(tile.where, slice)
            name, first = (None, tile.where.start) if is_slice else (tile.where, 0)
        top = None if ceiling is None else ceiling[rows]
        _ops.keep_hardest(tile.similarity, name, first, top, own, least, kept[rows], tally[rows])
    index = pairs.key.new_full((n_anchors, count), -1)
    similarity = queries.new_zeros(index.shape)
    _ops.list_kept(kept, tally, own, index[:n], similarity[:n])
    if by_place and len(pairs.key):
        index = torch.where(index < 0, -1, pairs.key[index.clamp(min=0)])
    below = pairs.key.new_zeros(0 if ceiling is None else n_anchors)
    if ceiling is not None:
        below[:n] = tally[:, 1]
    return index, similarity, below
