"""Picked keys on an NVIDIA GPU: launching `pico_fast.kernels.picked`."""

import torch
import triton
from torch import Tensor

from pico_fast import reference
from pico_fast.kernels import configs, contrast, picked, selection

# most channels that a program holds, and most picks that it sorts
MAX_CHANNELS = 1024
MAX_PICKS = 8192


def takes(*tensors: Tensor, picks: int = 0) -> bool:
    """Whether the kernels are for rows [n, D] of these and so many picks: not float64, not too wide."""
    narrow = all(t.dtype != torch.float64 and 0 < t.shape[1] <= MAX_CHANNELS for t in tensors)
    return narrow and picks <= MAX_PICKS and all(t.shape[0] > 0 for t in tensors)


def _sizes(keys: Tensor) -> dict:
    """Constants of kernels that read rows of keys; the values of some rows fit the registers."""
    width = max(16, triton.next_power_of_2(keys.shape[1]))
    return {"D": keys.shape[1], "BD": width, "ROWS": max(4, min(64, 8192 // width))}


def _rows(x: Tensor) -> Tensor:
    """x [n, D] with neighbouring channels; the interpreter has no bfloat16."""
    if contrast.INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def rank_keys(
    rows: Tensor,  # [n, D] float32
    keys: Tensor,  # [K, D]
    index: Tensor,  # [n, k] int64, all different in a row, -1 behind the last
    positive: bool,
) -> tuple[Tensor, Tensor]:
    """The op `rank_keys`: the same indices, hardest first, and their inner products, [n, k] each."""
    rows, keys, index = _rows(rows), _rows(keys), index.contiguous()
    n_rows, n = index.shape
    capacity = triton.next_power_of_2(max(n, 16))
    words = index.new_empty(n_rows, capacity)
    order, products = torch.empty_like(index), rows.new_empty(n_rows, n, dtype=torch.float32)
    sign = -1 if positive else 1
    picked.words_kernel[(n_rows,)](
        rows,
        keys,
        index,
        words,
        n,
        rows.stride(0),
        keys.stride(0),
        SIGN=sign,
        CAPACITY=capacity,
        **_sizes(keys),
    )
    row = torch.arange(n_rows, device=index.device)
    selection.order_kernel[(n_rows,)](
        words,
        (index >= 0).sum(1, dtype=torch.int32),
        torch.zeros_like(row, dtype=torch.int32),
        row,
        order,
        products,
        n,
        SIGN=sign,
        CAPACITY=capacity,
        num_warps=configs.order_warps(capacity),
    )
    return order, products


def weighted_rows(
    keys: Tensor,  # [K, D]
    index: Tensor,  # [A, n] int64, -1 where there is none
    weight: Tensor,  # [A, n] float32
) -> Tensor:
    """The op `weighted_rows`: the indexed keys by weight, summed in float32: [A, D]."""
    keys = _rows(keys)
    out = weight.new_empty(weight.shape[0], keys.shape[1])
    picked.weighted_kernel[(len(out),)](
        keys,
        index.contiguous(),
        weight.contiguous(),
        out,
        index.shape[1],
        keys.stride(0),
        **_sizes(keys),
    )
    return out


def _draws(
    pool_index: Tensor,  # [A, pool] int64, -1 behind the last
    negative_negative: int,
    negative_anchor: int,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """What `reference.synthesise` draws: first part, second part and share of each mix, [A, n] each."""
    hash32, below, uniform = reference.hash32, reference.below, reference.uniform
    n_anchors, width = pool_index.shape
    size = (pool_index >= 0).sum(1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    in_order = pool_index.masked_fill(pool_index < 0, last).sort(1)[0]
    row = torch.arange(n_anchors, device=seed.device)[:, None]

    def member(place: Tensor, exists: Tensor) -> Tensor:
        found = in_order.gather(1, place.clamp(min=0, max=width - 1))
        return torch.where(exists, found, -1)

    draw = torch.arange(negative_negative, device=seed.device)
    first = below(hash32(seed, reference.MIX_FIRST, row, draw), size)
    second = below(hash32(seed, reference.MIX_SECOND, row, draw), size - 1).clamp(min=0)
    second = second + (second >= first)
    two, one = size >= 2, size >= 1
    of_two = uniform(hash32(seed, reference.MIX_SHARE, row, draw))
    draw = torch.arange(negative_anchor, device=seed.device)
    place = below(hash32(seed, reference.MIX_WITH_ANCHOR, row, draw), size)
    of_anchor = uniform(hash32(seed, reference.MIX_ANCHOR_SHARE, row, draw)) * 0.5
    return (
        torch.cat([member(first, two), torch.full_like(place, -1)], 1),
        torch.cat([member(second, two), member(place, one)], 1),
        torch.cat([of_two, of_anchor], 1),
    )


def mix_negatives(
    anchors: Tensor,  # [A, D]
    keys: Tensor | None,  # [K, D]; None: the anchors
    pool_index: Tensor,  # [A, pool] int64 into keys, -1 behind the last
    negative_negative: int,
    negative_anchor: int,
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """The op `mix_negatives`: log-sum of exp(<a, h> / temperature) over the mixes h, and their mean."""
    keys = _rows(anchors if keys is None else keys)
    anchors = _rows(anchors)
    first, second, share = _draws(pool_index, negative_negative, negative_anchor, seed)
    lse = torch.empty(len(anchors), device=anchors.device)
    mean = torch.empty(anchors.shape, device=anchors.device)
    sizes = _sizes(keys)
    sizes["ROWS"] = max(4, sizes["ROWS"] // 2)  # two rows of a mix, and the mix
    picked.mix_kernel[(len(anchors),)](
        anchors,
        keys,
        first,
        second,
        share,
        lse,
        mean,
        first.shape[1],
        anchors.stride(0),
        keys.stride(0),
        1 / temperature,
        reference.SHORTEST_MIX,
        **sizes,
    )
    return lse, mean
