"""Contrast with all keys on a CPU: class by class, tile by tile, nothing of size anchors x keys.

Anchors are sorted by class, keys come (or are taken) class by class, so that "same class" is a range
of rows against a range of columns and no pair needs a mask. One tile of keys feeds both products.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pico_fast.class_order import labels_of_segments
from pico_fast.selection import product_dtype

# similarities of one tile, in a size that stays in the second-level caches
_TILE = 2**20
# sums of exp(s) without a shift are trusted in this range of log(sum); outside, the running maximum
_TRUSTED_LOG = 69.0
# bfloat16 products round s to 8 bits: up to this s the error of exp(s) stays below 6 percent a term
_TRUSTED_LOG_BFLOAT16 = 24.0
# unit rows reach 1/temperature; beyond this the running maximum is taken from the start
_BOUNDED = 60.0
_BOUNDED_BFLOAT16 = 20.0


class _Layout(NamedTuple):
    """Anchors and keys class by class."""

    anchor_order: Tensor  # [n] int64, anchors with a class, sorted by it
    rows: dict[int, slice]  # class -> its anchors within anchor_order
    key_order: Tensor | None  # [m] int64, used keys sorted by class; None: the keys as they lie
    runs: list[tuple[int, int, int]]  # (class, first, last) ranges of keys, without gaps in a class
    in_batch: bool


class _Tile(NamedTuple):
    first: int
    last: int
    own: list[tuple[slice, slice]]  # (anchors, columns) pairs of one class


def _runs(labels: Tensor) -> list[tuple[int, int, int]]:
    """Ranges of equal labels of 0 or more: (label, first, last)."""
    values, lengths = labels.unique_consecutive(return_counts=True)
    lasts = lengths.cumsum(0).tolist()
    return [
        (value, first, last)
        for value, first, last in zip(values.tolist(), [0, *lasts][:-1], lasts, strict=True)
        if value >= 0
    ]


def _layout(anchor_labels: Tensor, key_labels: Tensor | None, tile: int) -> _Layout:
    in_order, order = anchor_labels.sort(stable=True)
    unused = int((in_order < 0).sum())
    order = order[unused:]
    anchor_runs = _runs(in_order[unused:])
    rows = {label: slice(first, last) for label, first, last in anchor_runs}
    if key_labels is None:
        return _Layout(order, rows, order, anchor_runs, True)
    n_runs = int((key_labels[1:] != key_labels[:-1]).sum()) + 1
    # taking rows out costs a copy of each key; many short ranges would cost more in small products
    if n_runs * tile <= 16 * key_labels.numel():
        return _Layout(order, rows, None, _runs(key_labels), False)
    in_order, key_order = key_labels.sort(stable=True)
    unused = int((in_order < 0).sum())
    return _Layout(order, rows, key_order[unused:], _runs(in_order[unused:]), False)


def _tiles(layout: _Layout, size: int) -> Iterator[_Tile]:
    """Tiles of at most `size` neighbouring used keys, with the pairs that are of one class."""
    pieces: list[tuple[int, int, int]] = []
    for label, first, last in layout.runs:
        for start in range(first, last, size):
            stop = min(start + size, last)
            if pieces and (pieces[-1][2] != start or stop - pieces[0][1] > size):
                yield _tile(layout, pieces)
                pieces = []
            pieces.append((label, start, stop))
    if pieces:
        yield _tile(layout, pieces)


def _tile(layout: _Layout, pieces: list[tuple[int, int, int]]) -> _Tile:
    start = pieces[0][1]
    own = [
        (layout.rows[label], slice(first - start, last - start))
        for label, first, last in pieces
        if label in layout.rows
    ]
    return _Tile(start, pieces[-1][2], own)


def _keys_of(layout: _Layout, keys: Tensor, first: int, last: int) -> Tensor:
    return keys[first:last] if layout.key_order is None else keys[layout.key_order[first:last]]


def _tile_size(n_anchors: int) -> int:
    return min(4096, max(256, _TILE // max(1, n_anchors)))


def _negatives(
    queries: Tensor,  # [n, D] anchors / temperature, sorted by class
    keys: Tensor,  # [K, D]
    layout: _Layout,
    shifted: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """log sum of exp(s) over other classes [n], -inf without any, and their softmax mean [n, D]."""
    n, dim = queries.shape
    dtype = queries.dtype if queries.dtype != torch.bfloat16 else torch.float32
    total = queries.new_zeros(n, dtype=dtype)
    mean = queries.new_zeros(n, dim, dtype=dtype)
    top = queries.new_full((n,), -math.inf, dtype=dtype)
    size = _tile_size(n)
    buffer = queries.new_empty(n * size)
    product = torch.empty_like(queries)
    for tile in _tiles(layout, size):
        tile_keys = _keys_of(layout, keys, tile.first, tile.last).to(queries.dtype)
        p = buffer[: n * len(tile_keys)].view(n, len(tile_keys))
        torch.mm(queries, tile_keys.T, out=p)
        if shifted:
            for rows, columns in tile.own:
                p[rows, columns] = -math.inf
            new_top = torch.maximum(top, p.amax(1))
            # a row without a negative yet stays at -inf, and -inf - -inf would be nan
            shift = new_top.clamp(min=torch.finfo(dtype).min)
            fade = torch.exp(top - shift)
            total.mul_(fade)
            mean.mul_(fade[:, None])
            p.sub_(shift[:, None])
            top = new_top
        p.exp_()
        if not shifted:
            for rows, columns in tile.own:
                p[rows, columns] = 0.0
        total += p.sum(1, dtype=dtype)
        if want_gradient and p.dtype == dtype:
            mean.addmm_(p, tile_keys)
        elif want_gradient:
            mean += torch.mm(p, tile_keys, out=product)
    lse = total.log()
    if shifted:
        lse = torch.where(total == 0, -math.inf, lse + top)  # a key of nan makes it nan
    return lse, mean.div_(total.clamp(min=torch.finfo(dtype).tiny)[:, None])


class _Scene(NamedTuple):
    """Anchors and keys as both passes take them; what is said of anchors stands in class order."""

    queries: Tensor  # [n, D] anchors / temperature
    keys: Tensor  # [K, D]
    layout: _Layout
    n_own: Tensor  # [n] int64, keys of the anchor's class
    n_negative: Tensor  # [n] int64
    n_anchors: int

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:
        """Rows [A, ...] of all anchors in their own order; `fill` in empty slots."""
        out = values.new_full((self.n_anchors, *values.shape[1:]), fill)
        return out.index_copy_(0, self.layout.anchor_order, values)


def _scene(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    segments: Tensor | None,  # [C, G, 2] int64, instead of key_labels
    temperature: float,
) -> _Scene:
    if segments is not None:
        key_labels = labels_of_segments(segments, keys.shape[0])
    keys = anchors if keys is None else keys
    layout = _layout(anchor_labels, key_labels, _tile_size(anchors.shape[0]))
    queries = anchors[layout.anchor_order].to(product_dtype(anchors, keys)) / temperature
    n_keys = sum(last - first for _, first, last in layout.runs)
    n_own = queries.new_zeros(queries.shape[0], dtype=torch.int64)
    for label, first, last in layout.runs:
        n_own[layout.rows.get(label, slice(0))] += last - first
    return _Scene(queries, keys, layout, n_own, n_keys - n_own, anchors.shape[0])


def _log_sum(
    scene: _Scene,
    temperature: float,
    want_mean: bool,
) -> tuple[Tensor, Tensor]:
    """`_negatives` in the cheapest arithmetic that holds: bfloat16, then unshifted, then shifted."""
    queries, keys, layout = scene[:3]
    has_negative = scene.n_negative > 0
    scale = 1 / temperature
    attempts = []
    # the bank's own bfloat16 is multiplied as such where the processor can
    if (
        keys.dtype == torch.bfloat16
        and queries.dtype == torch.float32
        and scale <= _BOUNDED_BFLOAT16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        attempts.append((torch.bfloat16, _TRUSTED_LOG_BFLOAT16))
    if scale <= _BOUNDED:
        attempts.append((queries.dtype, _TRUSTED_LOG))
    for dtype, trusted in attempts:
        lse, mean = _negatives(queries.to(dtype), keys, layout, False, want_mean)
        if bool((lse.abs() < trusted)[has_negative].all()):
            return lse, mean
    return _negatives(queries, keys, layout, True, want_mean)


def _sum_of_negatives(scene: _Scene) -> Tensor:
    """Sum of s over the negatives: [n]."""
    queries, keys, layout = scene[:3]
    if layout.key_order is not None:
        keys = keys[layout.key_order]
    spans = [keys[first:last].sum(0, dtype=queries.dtype) for _, first, last in layout.runs]
    own = torch.zeros_like(queries)
    for (label, _, _), span in zip(layout.runs, spans, strict=True):
        own[layout.rows.get(label, slice(0))] += span
    total = torch.stack(spans).sum(0) if spans else 0.0
    return torch.linalg.vecdot(queries, total - own)


class _Positives(NamedTuple):
    loss: Tensor  # [n] sum of softplus(lse - s)
    weight: Tensor  # [n] sum of w = sigmoid(lse - s)
    similar: Tensor  # [n] sum of s
    pull: Tensor  # [n, D] sum of w k


def _positives(
    scene: _Scene,
    lse: Tensor,  # [n]
    want_pull: bool,
) -> _Positives:
    queries, keys, layout = scene[:3]
    loss, weight, similar = (torch.zeros_like(lse) for _ in range(3))
    pull = torch.zeros_like(queries)
    for label, first, last in layout.runs:
        rows = layout.rows.get(label)
        if rows is None:
            continue
        own_keys = _keys_of(layout, keys, first, last).to(queries.dtype)
        s = queries[rows] @ own_keys.T
        above = lse[rows, None] - s
        if layout.in_batch:
            above.fill_diagonal_(-math.inf)
            s.fill_diagonal_(0.0)
        loss[rows] += softplus(above, threshold=40.0).sum(1)
        similar[rows] += s.sum(1)
        if want_pull:
            w = above.sigmoid_()
            weight[rows] += w.sum(1)
            pull[rows] += w @ own_keys
    return _Positives(loss, weight, similar, pull)


def contrast_all(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    mix_lse: Tensor | None,  # [A] log-sum of the synthesised negatives
    mix_mean: Tensor | None,  # [A, D] their softmax mean
    temperature: float,
    want_gradient: bool,
    segments: Tensor | None = None,  # [C, G, 2] int64, instead of key_labels
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_all`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, key_labels, segments, temperature)
    queries, _, layout, n_own, n_negative, _ = scene
    dtype = queries.dtype
    n_positive = n_own - 1 if layout.in_batch else n_own
    lse, mean = _log_sum(scene, temperature, want_gradient)
    if mix_lse is not None:
        order = layout.anchor_order
        both = torch.logaddexp(lse, mix_lse[order])
        safe = both.clamp(min=torch.finfo(dtype).min)[:, None]
        mean = mean * torch.exp(lse[:, None] - safe)
        mean = mean + mix_mean[order] * torch.exp(mix_lse[order, None] - safe)
        lse = both
    found = _positives(scene, lse, want_gradient)
    counted = (n_positive > 0) & (n_negative > 0)
    share = torch.where(counted, 1 / n_positive.clamp(min=1).to(dtype), 0.0)
    similar = found.similar * temperature / n_positive.clamp(min=1)
    away = _sum_of_negatives(scene) * temperature / n_negative.clamp(min=1)
    rows = (found.loss * share, lse, n_positive.clamp(min=0), similar, away)
    if not want_gradient:
        return *map(scene.spread, rows), queries.new_zeros(0)
    gradient = mean.mul_(found.weight[:, None]).sub_(found.pull).mul_(share[:, None] / temperature)
    return *map(scene.spread, rows), scene.spread(gradient)


def contrast_negatives(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    segments: Tensor,  # [C, G, 2] int64
    temperature: float,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_negatives`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, None, segments, temperature)
    lse, mean = _log_sum(scene, temperature, want_mean)
    mean = scene.spread(mean) if want_mean else lse.new_zeros(0)
    away = _sum_of_negatives(scene) * temperature
    return scene.spread(lse, -math.inf), mean, scene.spread(away)


def contrast_positives(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    segments: Tensor,  # [C, G, 2] int64
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_positives`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, None, segments, temperature)
    found = _positives(scene, lse[scene.layout.anchor_order], want_pull)
    pull = scene.spread(found.pull) if want_pull else lse.new_zeros(0)
    similar = scene.spread(found.similar) * temperature
    return scene.spread(found.loss), scene.spread(found.weight), similar, pull


def contrast_all_keys_grad(
    grad_loss: Tensor,  # [A]
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]
    key_labels: Tensor | None,  # [K] int64
    lse: Tensor,  # [A] of the forward
    positive_count: Tensor,  # [A] int64 of the forward
    temperature: float,
) -> Tensor:
    """Gradient of the keys [K, D] (of the anchors in their part as keys, where keys is None)."""
    keys = anchors if keys is None else keys
    dtype = product_dtype(anchors, keys)
    layout = _layout(anchor_labels, key_labels, _tile_size(anchors.shape[0]))
    order = layout.anchor_order
    queries = anchors[order].to(dtype) / temperature
    lse, n_positive = lse[order], positive_count[order]
    usable = (n_positive > 0) & (lse > -math.inf)
    lse = torch.where(usable, lse, 0.0)
    share = torch.where(usable, grad_loss[order].to(dtype) / n_positive.clamp(min=1), 0.0)
    weight = torch.zeros_like(share)
    out = queries.new_zeros(keys.shape)
    place = layout.key_order

    def add(first: int, last: int, rows: Tensor) -> None:
        if place is None:
            out[first:last] += rows
        else:
            out.index_add_(0, place[first:last], rows)

    for label, first, last in layout.runs:
        rows = layout.rows.get(label)
        if rows is None:
            continue
        w = lse[rows, None] - queries[rows] @ _keys_of(layout, keys, first, last).to(dtype).T
        if layout.in_batch:
            w.fill_diagonal_(-math.inf)
        w = w.sigmoid_().mul_(share[rows, None])
        weight[rows] += w.sum(1)
        add(first, last, -(w.T @ queries[rows]))
    for tile in _tiles(layout, _tile_size(len(queries))):
        tile_keys = _keys_of(layout, keys, tile.first, tile.last).to(dtype)
        p = (queries @ tile_keys.T).sub_(lse[:, None])
        for rows, columns in tile.own:
            p[rows, columns] = -math.inf
        # rows that take no part have weight 0, which an infinite exponential would turn into nan
        p.masked_fill_(~usable[:, None], -math.inf)
        p.exp_().mul_(weight[:, None])
        add(tile.first, tile.last, p.T @ queries)
    return out
