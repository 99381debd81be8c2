"""Picking keys for each anchor; the order of the picks, and their sums by weight."""

import math

import torch
from torch import Tensor

from pico_fast import reference

# values of gathered rows, or of a block of dense weights, held at a time
_BLOCK = 2**24
_KEY_TILE = 2**13
# a product with a matrix that is mostly 0 beats reading scattered rows up to so many keys a pick
_DENSE = 64

torch.library.define(
    "pico_fast::pick_keys",
    "(Tensor similarity, Tensor anchor_labels, Tensor key_labels, bool positive, int count,"
    " float pool_fraction, Tensor seed, int stream, int first_row, bool in_batch,"
    " Tensor? key_index=None) -> Tensor",
)
torch.library.define(
    "pico_fast::rank_keys",
    "(Tensor rows, Tensor keys, Tensor index, bool positive) -> (Tensor index, Tensor similarity)",
)
torch.library.define(
    "pico_fast::weighted_rows", "(Tensor keys, Tensor index, Tensor weight) -> Tensor"
)
pick_keys = torch.ops.pico_fast.pick_keys.default
rank_keys = torch.ops.pico_fast.rank_keys.default
weighted_rows = torch.ops.pico_fast.weighted_rows.default


def _ranked(
    hardness: Tensor,  # [n, K]
    candidate: Tensor,  # [n, K] bool
    count: int,
) -> Tensor:
    """The `count` hardest candidates of each row, equal ones by lower index, -1 behind: [n, count]."""
    n_keys = hardness.shape[1]
    if hardness.dtype == torch.float64:
        order = hardness.masked_fill(~candidate, -math.inf).argsort(
            dim=1, descending=True, stable=True
        )
        behind = torch.arange(n_keys, device=order.device) >= candidate.sum(1, keepdim=True)
        return order.masked_fill(behind, -1)[:, :count]
    # one word holds similarity and index: its order is total, so the result does not depend on how
    # topk treats equal values; adding 0 makes -0 and 0 equal
    bits = (hardness + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    column = torch.arange(n_keys, device=bits.device)
    nowhere = torch.iinfo(torch.int64).min
    word = torch.where(candidate, (bits << 32) | (reference.WORD - column), nowhere)
    word = word.topk(count, dim=1)[0]
    return torch.where(word == nowhere, -1, reference.WORD - (word & reference.WORD))


def pick_torch(
    similarity: Tensor,  # [n, K]
    anchor_labels: Tensor,  # [n] int64
    key_labels: Tensor,  # [K] int64
    positive: bool,
    count: int,
    pool_fraction: float,
    seed: Tensor,  # [] int64
    stream: int,
    first_row: int,
    in_batch: bool,
    key_index: Tensor | None = None,  # [K] int64, what each key is called in the draws
) -> Tensor:
    """The op `pick_keys` in PyTorch, nothing read back to the host: [n, count].

    The hardest keys on one side of a block of anchors whose first is anchor `first_row`, or, with a
    pool_fraction above 0, a draw from the hardest of that share; hardest first, -1 behind the last.
    A part of the keys comes with its `key_index`, so that its draws are those from all keys.
    """
    n_keys = similarity.shape[1]
    own = anchor_labels[:, None]
    row = first_row + torch.arange(own.shape[0], device=own.device)[:, None]
    candidate = (own >= 0) & (key_labels >= 0) & ((own == key_labels) == positive)
    if in_batch:
        name = torch.arange(n_keys, device=own.device) if key_index is None else key_index
        candidate &= row != name
    hardness = -similarity if positive else similarity
    width = min(count, n_keys)
    out = key_labels.new_full((own.shape[0], count), -1)
    if pool_fraction == 0:
        out[:, :width] = _ranked(hardness, candidate, width)
        return out
    largest = max(1, math.ceil(pool_fraction * n_keys))
    pool = _ranked(hardness, candidate, min(largest, n_keys))
    n = candidate.sum(1, keepdim=True)
    pool_size = (n.double() * pool_fraction).ceil().long().clamp(min=1)
    rank = torch.arange(pool.shape[1], device=pool.device)
    member = (rank < pool_size) & (pool >= 0)
    name = pool if key_index is None else key_index[pool.clamp(min=0)]
    lot = reference.hash32(seed, stream, row, name)
    lot = torch.where(member, lot, reference.WORD + 1)
    width = min(count, pool.shape[1])
    lot, rank = lot.topk(width, dim=1, largest=False)
    # ranks in ascending order are hardest first again
    rank = torch.where(lot > reference.WORD, pool.shape[1], rank).sort(1)[0]
    picked = pool.gather(1, rank.clamp(max=pool.shape[1] - 1))
    out[:, :width] = torch.where(rank < pool.shape[1], picked, -1)
    return out


torch.library.impl("pico_fast::pick_keys", "CompositeExplicitAutograd", pick_torch)


@torch.library.register_fake("pico_fast::pick_keys")
def _(similarity, anchor_labels, key_labels, positive, count, *_):
    return key_labels.new_empty((similarity.shape[0], count))


def rank_torch(
    rows: Tensor,  # [n, D] in the product's dtype
    keys: Tensor,  # [K, D]
    index: Tensor,  # [n, k] int64, all different in a row, -1 where there is none
    positive: bool,
) -> tuple[Tensor, Tensor]:
    """The op `rank_keys` in PyTorch, a block of gathered rows at a time.

    The same indices, hardest first, equal ones by lower index, -1 behind the last [n, k]; and their
    inner products, 0 behind the last [n, k].
    """
    order, similarity = torch.full_like(index, -1), rows.new_zeros(index.shape)
    block = max(1, _BLOCK // max(1, index.shape[1] * rows.shape[1]))
    for first in range(0, rows.shape[0] if keys.shape[0] else 0, block):
        here = slice(first, first + block)
        there = torch.where(index[here] < 0, keys.shape[0], index[here]).sort(1)[0]
        picked = keys[there.clamp(max=keys.shape[0] - 1)].to(rows.dtype)
        products = torch.bmm(picked, rows[here, :, None])[..., 0]
        behind = there == keys.shape[0]
        hardness = (-products if positive else products).masked_fill(behind, -math.inf)
        rank = hardness.argsort(dim=1, descending=True, stable=True)
        order[here] = torch.where(behind, -1, there).gather(1, rank)
        similarity[here] = products.masked_fill(behind, 0.0).gather(1, rank)
    return order, similarity


torch.library.impl("pico_fast::rank_keys", "CompositeExplicitAutograd", rank_torch)


@torch.library.register_fake("pico_fast::rank_keys")
def _(rows, keys, index, positive):
    return index.new_empty(index.shape), rows.new_empty(index.shape)


def dense_weights(
    index: Tensor,  # [n, k] int64, all different in a row, -1 where there is none
    weight: Tensor,  # [n, k], 0 where there is none
    num_keys: int,
) -> Tensor:
    """The weights as a matrix [n, K], 0 for every key that was not picked."""
    dense = weight.new_zeros(index.shape[0], num_keys + 1)
    # only the column that is cut off takes several
    return dense.scatter_(1, torch.where(index < 0, num_keys, index), weight)[:, :-1]


def rows_torch(
    keys: Tensor,  # [K, D]
    index: Tensor,  # [A, n] int64, all different in a row, -1 where there is none
    weight: Tensor,  # [A, n], 0 where there is none
) -> Tensor:
    """The op `weighted_rows` in PyTorch: the indexed keys by weight, summed in its dtype: [A, D]."""
    n_keys, n = keys.shape[0], index.shape[1]
    out = weight.new_zeros(index.shape[0], keys.shape[1])
    if n_keys <= _DENSE * n:
        block = max(1, _BLOCK // (n_keys + 1))
        for first in range(0, index.shape[0], block):
            here = slice(first, first + block)
            dense = dense_weights(index[here], weight[here], n_keys)
            for start in range(0, n_keys, _KEY_TILE):
                # a slot that nobody picked may hold anything; 0 x nan would still be nan
                tile = keys[start : start + _KEY_TILE].to(weight.dtype).nan_to_num(0.0, 0.0, 0.0)
                out[here].addmm_(dense[:, start : start + _KEY_TILE], tile)
        return out
    # behind the last stands a row's own largest pick: weight 0 on any other row would spread its nan
    none = (index < 0).all(1, keepdim=True)
    index = torch.where(index < 0, index.amax(1, keepdim=True).clamp(min=0), index)
    block = max(1, _BLOCK // (n * keys.shape[1]))
    for first in range(0, index.shape[0], block):
        here = slice(first, first + block)
        rows = keys[index[here]].to(weight.dtype)
        out[here] = torch.bmm(weight[here, None], rows)[:, 0]
    return out.masked_fill(none, 0.0)


torch.library.impl("pico_fast::weighted_rows", "CompositeExplicitAutograd", rows_torch)


@torch.library.register_fake("pico_fast::weighted_rows")
def _(keys, index, weight):
    return weight.new_empty(weight.shape[0], keys.shape[1])
