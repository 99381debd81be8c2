"""Selection in PyTorch on any device: sample, cut, lists, mixes. Nothing is read back to the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import draws, reference
from pico_fast.selection.layout import Cut, Layout, product_dtype

# similarities of a block of anchors, or mixed values, held at a time; keys of a product
_BLOCK, _TILE = 2**24, 2**13


def sample_keys(
    ranges: Tensor,  # [C, G, 2] int64
    names: Tensor,  # [C] int64
    key_order: Tensor | None,  # [W] int64
    need: int,
    own: bool,
    seed: Tensor,  # [] int64
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The op `sample_keys`: keys drawn of each class [capacity], -1 behind the last; ranges [C, 1, 2]."""
    sizes = ranges.select(2, 1).sum(1)
    wanted = sizes.clamp(max=need)
    if not own:
        others = (sizes.sum() - sizes.max()).clamp(min=1)
        wanted = torch.minimum((sizes * need + others - 1) // others, sizes)
    until, stream = wanted.cumsum(0), draws.POSITIVE if own else draws.NEGATIVE
    slot = torch.arange(capacity, device=sizes.device)
    of = torch.searchsorted(until, slot, right=True).clamp(max=wanted.shape[0] - 1)
    there = slot < until[-1:]
    n = sizes.gather(0, of).clamp(min=1)
    k = wanted.gather(0, of).clamp(min=1)
    t = torch.where(there, slot - (until - wanted).gather(0, of), 0)
    state = draws.hash32(seed, stream, names.gather(0, of))
    begin, end = t * n // k, (t + 1) * n // k
    place = begin + draws.below(draws.fold(state, t), end - begin) + draws.below(state, n)
    place = place % n
    position = torch.zeros_like(place)
    for part in ranges.unbind(1):
        first, length = part.index_select(0, of).unbind(1)
        position = torch.where((place >= 0) & (place < length), first + place, position)
        place = place - length
    if key_order is not None and key_order.shape[0]:
        position = key_order.gather(0, position)
    drawn = torch.where(there, position, -1)
    return drawn, torch.stack([until - wanted, wanted], 1).unsqueeze(1)


class Positions(NamedTuple):
    """The keys of a layout, position by position, and the anchors that meet them."""

    queries: Tensor  # [A, D] in the product's dtype
    anchor_class: Tensor  # [A] int64
    keys: Tensor  # [K, D]
    key: Tensor  # [W] int64, the key at each position
    key_class: Tensor  # [W] int64, -1 at a position that is not in use
    own_key: Tensor | None  # [A] int64

    def load(self, first: int, last: int) -> Tensor:
        """Keys [n, D] at positions first to last, zero where none is in use."""
        # a position that is not in use may hold anything; 0 x nan would still be nan in a product
        unused = self.key_class[first:last, None] < 0
        rows = self.keys.index_select(0, self.key[first:last])
        return rows.to(self.queries.dtype).masked_fill_(unused, 0.0)

    def chunks(self, whole: bool) -> list[tuple[slice, int, int]]:
        """Blocks of anchors and stretches of positions: `whole` rows of similarities, or all anchors."""
        n_anchors, n = self.queries.shape[0], self.key.shape[0]
        block, tile = (max(1, _BLOCK // max(1, n)), n) if whole else (n_anchors, _TILE)
        return [
            (slice(start, start + block), first, min(first + tile, n))
            for start in range(0, n_anchors, max(1, block))
            for first in range(0, n, max(1, tile))
        ]

    def similarity(self, rows: slice, first: int, last: int) -> Tensor:
        """Inner products [n, last - first] of a block of anchors."""
        out = self.queries.new_empty(self.queries[rows].shape[0], last - first)
        for start in range(first, last, _TILE):
            stop = min(start + _TILE, last)
            out[:, start - first : stop - first] = self.queries[rows] @ self.load(start, stop).T
        return out

    def weighted(self, weight: Tensor, first: int, last: int) -> Tensor:
        """The keys at positions first to last by weight [n, last - first]: [n, D]."""
        out = self.queries.new_zeros(weight.shape[0], self.queries.shape[1])
        for start in range(first, last, _TILE):
            stop = min(start + _TILE, last)
            out.addmm_(weight[:, start - first : stop - first], self.load(start, stop))
        return out

    def candidates(self, rows: slice, first: int, last: int, own: bool) -> Tensor:
        """Which pairs are positives (`own`) or negatives: [n, last - first] bool."""
        mine, of_key = self.anchor_class[rows, None], self.key_class[first:last]
        mask = (mine >= 0) & (of_key >= 0) & ((mine == of_key) == own)
        if own and self.own_key is not None:
            mask &= self.own_key[rows, None] != self.key[first:last]
        return mask


def class_of_positions(
    ranges: Tensor,  # [C, G, 2] int64
    n: int,
) -> Tensor:
    """The class of each of n positions [n] int64, -1 where none is in use."""
    position = torch.arange(n, device=ranges.device)
    first, length = ranges.flatten(0, 1).unbind(1)
    # of parts that begin at one position the last is the one that is not empty
    part = torch.searchsorted(first.contiguous(), position, right=True).sub_(1).clamp_(min=0)
    offset = position - first.gather(0, part)
    inside = (offset >= 0) & (offset < length.gather(0, part))
    return torch.where(inside, part // ranges.shape[1], -1)


def positions(layout: Layout) -> Positions:
    """The positions of a layout."""
    keys, key_order = layout.keys, layout.key_order
    n = keys.shape[0] if key_order is None else key_order.shape[0]
    key = torch.arange(n, device=keys.device) if key_order is None else key_order.clamp(min=0)
    key_class, queries = class_of_positions(layout.ranges, n), layout.anchors.to(layout.dtype)
    return Positions(queries, layout.anchor_class, keys, key, key_class, layout.own_key)


def below(
    mask: Tensor,  # [n, W] bool
    similarity: Tensor,  # [n, W]
    ceiling: Tensor | None,  # [n]
) -> Tensor:
    """The candidates [n, W] that lie below the ceiling; a similarity of nan does, so that it shows."""
    return mask if ceiling is None else mask & ~(similarity >= ceiling.unsqueeze(1))


def within(
    mask: Tensor,  # [n, W] bool, candidates of one side
    similarity: Tensor,  # [n, W]
    cut: Cut,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """The candidates that count [n, W], those at the bound by place; and how many a cut chose from [n]."""
    mask = below(mask, similarity, cut.ceiling)
    m = mask.sum(1)
    if cut.is_none or mask.shape[1] == 0:
        return mask, m
    n, hardness = cut.wanted(m).unsqueeze(1), -similarity if own else similarity
    ranked = hardness.masked_fill(~mask, -math.inf).topk(min(cut.count, mask.shape[1]), dim=1)[0]
    bound = ranked.gather(1, (n - 1).clamp(min=0))
    harder, equal = mask & ~(hardness <= bound), mask & (hardness == bound)
    equal &= equal.cumsum(1) <= n - harder.sum(1, keepdim=True)
    return (harder | equal) & (n > 0), m


def hardest(
    layout: Layout,
    own: bool,
    ceiling: Tensor | None,  # [A]
    count: int,
    by_place: bool,
    in_order: bool = True,  # these always are
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hardest`: keys of one side [A, count] and similarities, hardest first; how many lie below."""
    work = positions(layout)
    if layout.key_order is not None and not by_place:
        order = layout.key_order.argsort(stable=True)  # columns by key: equal ones then go by lower key
        work = work._replace(key=work.key[order], key_class=work.key_class[order])
    index = layout.anchor_class.new_full((layout.anchors.shape[0], count), -1)
    similarity = torch.zeros_like(index, dtype=work.queries.dtype)
    found = torch.zeros_like(layout.anchor_class)
    for rows, first, last in work.chunks(True):
        s = work.similarity(rows, first, last)
        mask = work.candidates(rows, first, last, own)
        mask = below(mask, s, None if ceiling is None else ceiling[rows])
        hardness = (-s if own else s).masked_fill(~mask, -math.inf)
        # equal ones by lower column
        column = hardness.argsort(dim=1, descending=True, stable=True)[:, :count]
        found[rows] += mask.sum(1)
        width = column.shape[1]
        there = torch.arange(width, device=s.device) < mask.sum(1, keepdim=True)
        index[rows, :width] = torch.where(there, work.key[column], -1)
        similarity[rows, :width] = s.gather(1, column).masked_fill_(~there, 0.0)
    return index, similarity, found.narrow(0, 0, 0) if ceiling is None else found


def weighted_rows(
    keys: Tensor,  # [K, D]
    index: Tensor,  # [A, n] int64, all different in a row, -1 where there is none
    weight: Tensor,  # [A, n], 0 where there is none
) -> Tensor:
    """The op `weighted_rows`: the indexed keys by weight, summed in its dtype: [A, D]."""
    out = weight.new_zeros(index.shape[0], keys.shape[1])
    if 0 in index.shape or 0 in keys.shape:
        return out
    # behind the last stands a row's own largest pick: weight 0 on any other row would spread its nan
    none = (index < 0).all(1, keepdim=True)
    index = torch.where(index < 0, index.amax(1, keepdim=True).clamp(min=0), index)
    block = max(1, _BLOCK // (index.shape[1] * keys.shape[1]))
    for first in range(0, index.shape[0], block):
        here = slice(first, first + block)
        rows = keys[index[here]].to(weight.dtype)
        out[here] = torch.bmm(weight[here, None], rows)[:, 0]
    return out.masked_fill(none, 0.0)


def mix_negatives(
    anchors: Tensor,  # [A, D]
    keys: Tensor,  # [K, D]
    pool_index: Tensor,  # [A, pool] int64 into keys, -1 behind the last
    row: Tensor,  # [A] int64, number of each anchor in its draws
    negative_negative: int,
    negative_anchor: int,
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """The op `mix_negatives`: log-sum of exp(<a, h> / temperature) over mixes [A], their mean [A, D]."""
    dtype = product_dtype(anchors, keys)
    lse = anchors.new_full((anchors.shape[0],), -math.inf, dtype=dtype)
    mean = anchors.new_zeros(anchors.shape, dtype=dtype)
    if keys.shape[0] == 0 or pool_index.shape[1] == 0:
        return lse, mean
    how = (negative_negative, negative_anchor, seed)
    block = max(1, _BLOCK // ((negative_negative + negative_anchor) * anchors.shape[1]))
    for first in range(0, anchors.shape[0], block):
        here = slice(first, first + block)
        mixed, exists = reference.synthesise(anchors[here], keys, pool_index[here], row[here], *how)
        s = torch.bmm(mixed, anchors[here, :, None].to(dtype))[..., 0] / temperature
        s = s.masked_fill_(~exists, -math.inf)
        lse[here] = s.logsumexp(1)
        weight = s.softmax(1).nan_to_num_(0.0)
        mean[here] = torch.bmm(weight[:, None], mixed)[:, 0]
    return lse, mean
