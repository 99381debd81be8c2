"""Shares of a bank that lies on several ranks: the sample travels, or else the anchors of all ranks do.

A sample comes to all ranks in one collective, and what follows needs no other rank. Where all keys take
part ("all", "hardest") they stay where they are: each rank sums over its share for the anchors of all
ranks, and the sums of shares are merged. "Rank order" is that of these anchors: rank by rank, each rank's
class by class. A key is known by its row in the whole bank, so that ties are decided as one process
decides them. All sizes follow from the options, so a rank without an anchor takes part like any other.
"""

import math

import torch
from torch import Tensor

from pico_fast.bank.share import Share
from pico_fast.collectives import Ranks
from pico_fast.contrast.picks import Picks
from pico_fast.contrast.weights import Negatives, merge
from pico_fast.selection import layout as layouts
from pico_fast.selection.layout import Layout
from pico_fast.selection.ops import mix_negatives

_LAST = torch.iinfo(torch.int64).max


def _local(share: Share, row: Tensor) -> Tensor:
    """The row [...] in the share of each row of the whole bank, -1 where it lies elsewhere."""
    width = share.keys.shape[0] // share.ranges.shape[0]
    slot = row % share.slots - share.first
    here = (row < _LAST) & (slot >= 0) & (slot < width)
    return torch.where(here, row // share.slots * width + slot, -1)


def _names(share: Share, index: Tensor) -> Tensor:
    """The row [...] in the whole bank of each row of the share; behind all of them where there is none."""
    width = max(1, share.keys.shape[0] // share.ranges.shape[0])
    name = index // width * share.slots + share.first + index % width
    return torch.where(index < 0, _LAST, name)


def bring(layout: Layout, share: Share) -> Layout:
    """The layout of a sample of the whole bank with its keys brought here, in the order of their rows."""
    row, place = torch.where(layout.key_order < 0, _LAST, layout.key_order).sort()
    if share.keys.shape[0] == 0:
        keys = share.keys.new_zeros(row.shape[0], share.keys.shape[1])
    else:
        local = _local(share, row)
        # each key lies in one share: the others add 0
        keys = share.keys.index_select(0, local.clamp(min=0))
        keys = keys.masked_fill_((local < 0).unsqueeze(1), 0.0)
    return layout._replace(keys=share.ranks.sum(keys), key_order=place.argsort())


def everyone(layout: Layout, share: Share) -> Layout:
    """The layout of all ranks' anchors and the keys of this share; its own order is rank order."""
    anchors, anchor_class = (share.ranks.gather(x) for x in layout[:2])
    return layouts.of_bank(anchors, anchor_class, share.keys, share.ranges)


def own_rows(ranks: Ranks, rows: Tensor) -> Tensor:
    """Of rows [N·A, ...] in rank order those of this rank's anchors [A, ...]."""
    return rows.unflatten(0, (ranks.size, -1)).select(0, ranks.rank)


def add(ranks: Ranks, *parts: Tensor) -> list[Tensor]:
    """The sums over shares of [N·A] and [N·A, D] in rank order, of this rank's anchors: [A] and [A, D].

    A part that nobody wants is [0], and stays so.
    """
    n = parts[0].shape[0]
    columns = [x.reshape(n, x.numel() // n) for x in parts]
    found = ranks.start_sum_own(torch.cat(columns, 1))().split([x.shape[1] for x in columns], 1)
    return [x.flatten() if part.dim() == 1 else x for x, part in zip(found, parts, strict=True)]


def merge_negatives(ranks: Ranks, found: Negatives) -> Negatives:
    """What the negatives in all shares add up to, of this rank's anchors; `found` in rank order."""
    top = ranks.maximum(found.lse)
    safe = top.clamp(min=torch.finfo(top.dtype).min)
    fade = torch.exp(found.lse - safe)
    mean = found.mean * fade.unsqueeze(1) if found.mean.dim() == 2 else found.mean
    total, away, mean = add(ranks, fade, found.away, mean)
    # not "total > 0": a key of nan must show
    lse = torch.where(total == 0, -math.inf, total.log() + own_rows(ranks, safe))
    if mean.dim() == 2:
        mean = mean / total.clamp(min=1.0).unsqueeze(1)
    return Negatives(lse, mean, away, found.below)


def cut(picks: Picks, share: Share, own: bool, size: Tensor) -> Picks:
    """Of each share's hardest picks [N·A, n], in rank order, those among the hardest of all shares.

    `size` [A] says how many these are, for each of this rank's anchors.
    """
    ranks, name = share.ranks, _names(share, picks.index)
    hardness = -picks.similarity if own else picks.similarity
    hardness = hardness.masked_fill(picks.index < 0, -math.inf)

    def of_own(x: Tensor) -> Tensor:
        """What all ranks have found for this rank's anchors: [A, N·n]."""
        return ranks.exchange(x).unflatten(0, (ranks.size, -1)).transpose(0, 1).flatten(1)

    # by name first: of equal hardness the lower name then stays in front
    names, order = of_own(name).sort(1)
    hard, order = of_own(hardness).gather(1, order).sort(dim=1, descending=True, stable=True)
    at = (size - 1).clamp(0, hard.shape[1] - 1).unsqueeze(1)
    # the last one that is meant is told to all
    least = ranks.gather(hard.gather(1, at))
    last = ranks.gather(names.gather(1, order).gather(1, at))
    # not "hardness > least": a similarity of nan counts as hardest
    kept = ~(hardness <= least) | ((hardness == least) & (name <= last))
    kept &= picks.index >= 0
    return Picks(picks.index.masked_fill(~kept, -1), picks.similarity.masked_fill(~kept, 0.0))


def mix(
    layout: Layout,
    share: Share,
    pool: Picks,  # [N·A, size] in rank order, the most similar negatives of this share
    row: Tensor,  # [A] int64, numbers of this rank's anchors in their draws
    mixes: tuple[int, int, int],
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """This share's part of the synthesis, in rank order: log-sum [N·A] and softmax mean [N·A, D].

    Two negatives of different shares cannot be mixed. So of n members of an anchor's pool, m of them here,
    this share's mixes weigh m / n of all, and those of two negatives m (m - 1) of the sum of this over
    shares.
    """
    ranks, (*wanted, size) = share.ranks, mixes
    in_use = own_rows(ranks, ranks.sum((pool.index >= 0).sum(1)))
    members = cut(pool, share, False, in_use.clamp(max=size)).index
    anchors, row = layout.restore(layout.anchors), ranks.gather(row)
    m = (members >= 0).sum(1)
    found = None
    for kind, (count, weight) in enumerate(zip(wanted, (m * (m - 1), m), strict=True)):
        if count == 0:
            continue
        made = -(-count // ranks.size)
        drawn = (members, row, *((made, 0) if kind == 0 else (0, made)), temperature, seed)
        lse, mean = mix_negatives(anchors, share.keys, *drawn)
        part = weight.to(lse.dtype) / ranks.sum(weight).clamp(min=1)
        # -inf, which is no mix, where the share has none
        lse = lse + torch.log(part * (count / made))
        found = (lse, mean) if found is None else merge(*found, lse, mean)
    return found
