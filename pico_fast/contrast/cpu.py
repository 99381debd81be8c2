"""Sums over negatives and positives on a CPU, tile by tile of the keys; see `selection.cpu` for tiles.

One tile of keys feeds both of its products. Where every key counts these are dense; where a cut lets few
pairs of a tile count, C++ reads the keys of those alone.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pico_fast.contrast.weights import Negatives, Positives
from pico_fast.selection.cpu import FEW, Pairs, counted, own_columns, pairs_of, tiles
from pico_fast.selection.layout import Cut, Layout

# sums of exp(s) without a shift are trusted in this range of log(sum); outside, the running maximum
_TRUSTED_LOG = 69.0
# bfloat16 products round s to 8 bits: up to this s the error of exp(s) stays below 6 percent a term
_TRUSTED_LOG_BFLOAT16 = 24.0
# unit rows reach 1/temperature; beyond this the running maximum is taken from the start
_BOUNDED = 60.0
_BOUNDED_BFLOAT16 = 20.0

_SCHEMAS = {
    "add_negatives": "(Tensor similarity, Tensor keys, Tensor? which, float temperature, Tensor(a!) top,"
    " Tensor(b!) total, Tensor(c!) away, Tensor(d!)? mean) -> ()",
    "add_positives": "(Tensor similarity, Tensor keys, Tensor? which, Tensor lse, float temperature,"
    " Tensor(a!) loss, Tensor(b!) weight, Tensor(c!) similar, Tensor(d!)? pull) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"pico_fast::{_name}", _schema)
    torch.library.register_fake(f"pico_fast::{_name}")(lambda *_: None)
_ops = torch.ops.pico_fast


def _sums(pairs: Pairs, shifted: bool, want_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum of exp(s) over all negatives [n], their softmax mean [n, D], sum of s [n].

    The queries are already divided by the temperature.
    """
    n, dim = pairs.queries.shape
    low = pairs.queries.dtype == torch.bfloat16
    dtype = torch.float32 if low else pairs.queries.dtype
    total, away = (pairs.queries.new_zeros(n, dtype=dtype) for _ in range(2))
    mean = pairs.queries.new_zeros(n, dim if want_mean else 0, dtype=dtype)
    top = torch.full_like(total, -math.inf)
    product = torch.empty_like(pairs.queries)
    for tile in tiles(pairs, False, excluded=0.0):
        p = tile.similarity
        away += p.sum(1, dtype=dtype)
        if shifted:
            for rows, columns in own_columns(pairs, tile):
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
            for rows, columns in own_columns(pairs, tile):
                p[rows, columns] = 0.0
        total += p.sum(1, dtype=dtype)
        if want_mean and low:
            mean += torch.mm(p, tile.keys, out=product)
        elif want_mean:
            mean.addmm_(p, tile.keys)
    lse = total.log()
    if shifted:
        lse = torch.where(total == 0, -math.inf, lse + top)  # a key of nan makes it nan
    return lse, mean.div_(total.clamp(min=torch.finfo(dtype).tiny)[:, None]), away


def _all_negatives(pairs: Pairs, temperature: float, want_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """lse [n], mean [n, D] and away [n] in the cheapest arithmetic: bfloat16, unshifted, then shifted."""
    queries, scale = pairs.queries / temperature, 1 / temperature
    has_negative = torch.full((len(queries),), len(pairs.key) > 0)
    for rows, first, last in pairs.own:
        has_negative[rows] = last - first < len(pairs.key)
    attempts = []
    # the bank's own bfloat16 is multiplied as such where the processor can
    if (
        pairs.keys.dtype == torch.bfloat16
        and queries.dtype == torch.float32
        and scale <= _BOUNDED_BFLOAT16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        attempts.append((torch.bfloat16, _TRUSTED_LOG_BFLOAT16))
    if scale <= _BOUNDED:
        attempts.append((queries.dtype, _TRUSTED_LOG))
    for dtype, trusted in attempts:
        lse, mean, away = _sums(pairs._replace(queries=queries.to(dtype)), False, want_mean)
        if bool((lse.abs() < trusted)[has_negative].all()):
            break
    else:
        lse, mean, away = _sums(pairs._replace(queries=queries), True, want_mean)
    return lse, mean, away.mul_(temperature)


def _few_negatives(pairs: Pairs, cut: Cut, temperature: float, want_mean: bool) -> tuple[Tensor, ...]:
    """lse, mean, away and how many lie below the ceiling [n], where few pairs count: key by key."""
    total, away = (pairs.queries.new_zeros(len(pairs.queries)) for _ in range(2))
    top, below = torch.full_like(total, -math.inf), pairs.key.new_zeros(len(total))
    mean = torch.zeros_like(pairs.queries) if want_mean else None
    for tile, found in counted(pairs, False, cut):
        rows, keys = tile.rows, (tile.keys, tile.which)
        if found is not None:
            below[rows] = found
        sums = (*(x[rows] for x in (top, total, away)), None if mean is None else mean[rows])
        _ops.add_negatives(tile.similarity, *keys, temperature, *sums)
    if want_mean:
        mean /= total.clamp(min=torch.finfo(total.dtype).tiny)[:, None]
    return total.log() + top / temperature, mean, away, below


def negatives(layout: Layout, cut: Cut, temperature: float, want_mean: bool) -> Negatives:
    """The op `negatives`."""
    pairs = pairs_of(layout)
    below = pairs.key.new_zeros(0)
    if cut.is_none and len(pairs.queries) > FEW:
        lse, mean, away = _all_negatives(pairs, temperature, want_mean)
    else:
        lse, mean, away, below = _few_negatives(pairs, cut, temperature, want_mean)
    empty = layout.anchors.shape[0] - len(lse)  # slots, which stand last
    lse, away = pad(lse, (0, empty), value=-math.inf), pad(away, (0, empty))
    mean = pad(mean, (0, 0, 0, empty)) if want_mean else lse.new_zeros(0)
    below = below[:0] if cut.ceiling is None else pad(below, (0, empty))
    return Negatives(lse, mean, away, below)


def positives(
    layout: Layout,
    cut: Cut,
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> Positives:
    """The op `positives`."""
    pairs = pairs_of(layout)
    sums = [pairs.queries.new_zeros(layout.anchor_class.shape) for _ in range(3)]
    pull = pairs.queries.new_zeros(layout.anchors.shape if want_pull else 0)
    lse = lse.to(pull.dtype).contiguous()
    for tile, _ in counted(pairs, True, cut):
        keys, rows = (tile.keys, tile.which), tile.rows
        out = (*(x[rows] for x in sums), pull[rows] if want_pull else None)
        _ops.add_positives(tile.similarity, *keys, lse[rows], temperature, *out)
    return Positives(*sums, pull)


def keys_grad(
    layout: Layout,
    cut: Cut,
    own: bool,
    lse: Tensor,  # [A]
    factor: Tensor,  # [A]
    temperature: float,
) -> Tensor:
    """The op `keys_grad`: gradient of the keys [K, D] on one side, rows that nobody meets 0."""
    pairs = pairs_of(layout)
    out = pairs.queries.new_zeros(layout.keys.shape)
    # without a negative there is nothing to share out
    offset = (lse if own else torch.where(lse == -math.inf, math.inf, lse)).to(out.dtype)
    factor = factor.to(out.dtype)
    for tile, _ in counted(pairs, own, cut):
        w, rows = tile.similarity.div_(temperature).sub_(offset[tile.rows, None]), tile.rows
        # a weight is at most 1, however Z is rounded
        w = w.neg_().sigmoid_().neg_() if own else w.clamp_(max=0.0).exp_()
        out[tile.where] += w.mul_(factor[rows, None]).T @ pairs.queries[rows]
    return out
