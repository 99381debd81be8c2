"""Which keys of each share anchors are compared with, where the bank lies on several ranks.

A key is known by its row in the whole bank, so that ties and draws are decided as one process decides
them. hardest: each share's hardest are candidates; the ranks that own the anchors find where the hardest of
all shares end, and tell. random: every rank computes the picks of all anchors, which are a permutation of
ranks, and keeps those in its share.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import reference
from pico_fast.bank import Share
from pico_fast.class_order import rows_of_places
from pico_fast.contrast_any import merge_mixes
from pico_fast.picked import rank_keys
from pico_fast.selection import product_dtype

# negatives that a sample must hold for its quantile to be sharp, and how many more are taken
_SHARP, _MORE = 8192, 1.25
_LAST = torch.iinfo(torch.int64).max


class Anchors(NamedTuple):
    """Anchors of all ranks, in rank order."""

    rows: Tensor  # [N·A, D]
    labels: Tensor  # [N·A] int64
    own: slice  # those of this rank


class Picks(NamedTuple):
    """Keys of this share that anchors are compared with."""

    index: Tensor  # [n, k] int64 into the share's keys, -1 where there is none
    similarity: Tensor  # [n, k] inner products, 0 where there is none


def available(
    anchor_labels: Tensor,  # [A] int64
    share: Share,
) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each anchor among all keys in use: [A] int64 each."""
    lengths = share.all_segments.select(2, 1).sum(1)
    used = anchor_labels >= 0
    own = torch.where(used, lengths.gather(0, anchor_labels.clamp(min=0)), 0)
    return own, torch.where(used, lengths.sum() - own, 0)


def how_many(
    n: Tensor,  # [A] int64
    count: int,
    sampling: str,
    hard_fraction: float,
) -> Tensor:
    """Keys that anchors with n [A] on one side are compared with: [A] int64."""
    if sampling == "all":
        return n
    if sampling == "semi_hard":
        n = torch.minimum(_pool_size(n, hard_fraction), n)
    return n.clamp(max=count)


def _pool_size(n: Tensor, hard_fraction: float) -> Tensor:
    """Size of the hardest pool of n [A] keys: [A] int64, at least 1."""
    return (n.double() * hard_fraction).ceil().long().clamp(min=1)


def _names(
    share: Share,
    index: Tensor,  # [n, k] int64
) -> Tensor:
    """The row [n, k] in the whole bank of each row of the share; the last of all where there is none."""
    width = max(1, share.keys.shape[0] // share.segments.shape[0])
    name = index // width * share.slots + share.first + index % width
    return torch.where(index < 0, _LAST, name)


def _local(
    share: Share,
    row: Tensor,  # [...] int64
) -> Tensor:
    """The row [...] in the share of each row of the whole bank, -1 where it lies elsewhere."""
    width = share.keys.shape[0] // share.segments.shape[0]
    slot = row % share.slots - share.first
    return torch.where((slot >= 0) & (slot < width), row // share.slots * width + slot, -1)


def _hardest_of_share(
    anchors: Anchors, share: Share, positives: int, negatives: int
) -> list[Picks]:
    """The hardest positives and negatives of this share: [N·A, count] each; 0 leaves a side out."""
    seed = torch.zeros((), dtype=torch.int64, device=share.keys.device)
    found = torch.ops.pico_fast.select_keys(
        anchors.rows,
        anchors.labels,
        share.keys,
        None,
        "hardest",
        positives,
        negatives,
        1.0,
        seed,
        share.segments,
    )
    return [Picks(found[0], found[2]), Picks(found[1], found[3])]


def _cut(
    anchors: Anchors,
    share: Share,
    picks: Picks,  # [N·A, k], the hardest of this share
    sign: int,  # 1: negatives, -1: positives
    size: Tensor,  # [A] int64, how many of all shares' hardest are meant for each own anchor
    draw: tuple[int, Tensor] | None = None,  # so many of them, by the lots of this seed
) -> Picks:
    """Of the picks those that are among the hardest of all shares, or among the ones drawn from these."""
    ranks = share.ranks
    name = _names(share, picks.index)
    hardness = (sign * picks.similarity).masked_fill(picks.index < 0, -math.inf)

    def of_own(x: Tensor) -> Tensor:
        """What all ranks have of the own anchors: [A, N·k]."""
        x = ranks.exchange(x).unflatten(0, (ranks.size, -1))
        return x.transpose(0, 1).flatten(1)

    # by name first: of equal hardness the lower name then stays in front
    names, order = of_own(name).sort(1)
    hard, by = of_own(hardness).gather(1, order).sort(dim=1, descending=True, stable=True)
    names = names.gather(1, by)
    at = (size - 1).clamp(0, max(0, names.shape[1] - 1))[:, None]
    # the last one that is meant, and the highest lot of those drawn
    least, least_name = hard.gather(1, at), names.gather(1, at)
    last = torch.stack([least_name, torch.full_like(least_name, reference.WORD)], 2)
    row = torch.arange(anchors.rows.shape[0], device=name.device)[:, None]
    if draw is not None:
        count, seed = draw
        lot = reference.hash32(seed, reference.POSITIVE, row[anchors.own], names)
        place = torch.arange(names.shape[1], device=name.device)
        lot = lot.masked_fill((place >= size[:, None]) | (names == _LAST), reference.WORD + 1)
        if count < lot.shape[1]:
            last[:, :, 1] = lot.topk(count, dim=1, largest=False)[0].amax(1, keepdim=True)
    least, last = ranks.gather(least), ranks.gather(last)
    kept = (hardness > least) | ((hardness == least) & (name <= last[:, :, 0]))
    if draw is not None:
        kept &= reference.hash32(draw[1], reference.POSITIVE, row, name) <= last[:, :, 1]
    kept &= picks.index >= 0
    return Picks(torch.where(kept, picks.index, -1), picks.similarity.masked_fill(~kept, 0.0))


def _random(anchors: Anchors, share: Share, counts: tuple[int, int], seed: Tensor) -> list[Picks]:
    """This share's part of uniform picks from all keys, those of `reference.select_keys`."""
    labels = anchors.labels
    lengths = share.all_segments.select(2, 1).sum(1)
    own = labels.clamp(min=0)
    first = (lengths.cumsum(0) - lengths).gather(0, own)[:, None]
    row = torch.arange(labels.numel(), device=labels.device)[:, None]
    queries = anchors.rows.to(product_dtype(anchors.rows, share.keys))
    n_keys = share.slots * share.segments.shape[0]
    found = []
    for n, count, stream in zip(
        available(labels, share), counts, (reference.POSITIVE, reference.NEGATIVE), strict=True
    ):
        n = n[:, None]
        rank = torch.arange(min(count, n_keys), device=labels.device)
        inside = rank < n
        shuffled = torch.ops.pico_fast.permute_ranks(
            torch.where(inside, rank, 0), n.clamp(min=1), seed, stream, row
        )
        place = torch.where(n > count, shuffled, rank)
        if stream == reference.POSITIVE:
            place = first + place
        else:
            place = torch.where(place >= first, place + lengths.gather(0, own)[:, None], place)
        local = _local(share, rows_of_places(share.all_segments, torch.where(inside, place, 0)))
        # those that are here in front
        local = torch.where(inside & (local >= 0), local, _LAST).sort(1)[0]
        local = torch.where(local == _LAST, -1, local)
        if share.keys.shape[0] == 0:
            found.append(Picks(local, queries.new_zeros(local.shape)))
        else:
            picked = rank_keys(queries, share.keys, local, stream == reference.POSITIVE)
            found.append(Picks(*picked))
    return found


def pick(
    anchors: Anchors,
    share: Share,
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    seed: Tensor,  # [] int64, common to all ranks
) -> tuple[Picks | None, Picks | None]:
    """Positives and negatives of this share; None is all of them, and the negatives of semi_hard."""
    counts = (num_positives, num_negatives)
    if sampling == "all":
        return None, None
    if sampling == "random":
        return tuple(_random(anchors, share, counts, seed))
    own, others = available(anchors.labels[anchors.own], share)
    if sampling == "hardest":
        positives, negatives = _hardest_of_share(anchors, share, *counts)
        return (
            _cut(anchors, share, positives, -1, own.clamp(max=num_positives)),
            _cut(anchors, share, negatives, 1, others.clamp(max=num_negatives)),
        )
    # no pool is larger than that of a class with all slots in use
    widest = max(1, math.ceil(hard_fraction * share.slots))
    positives, _ = _hardest_of_share(anchors, share, widest, 0)
    pool = torch.minimum(_pool_size(own, hard_fraction), own)
    return _cut(anchors, share, positives, -1, pool, (num_positives, seed)), None


def semi_hard_negatives(
    anchors: Tensor,  # [A, D], of this rank
    anchor_labels: Tensor,  # [A] int64
    share: Share,
    num_negatives: int,
    hard_fraction: float,
    seeds: tuple[Tensor, Tensor],  # [] int64: common to all ranks, and this rank's own
) -> tuple[Tensor, Picks]:
    """A sample of all shares' keys [W, D], the same on every rank, and the negatives drawn from it.

    As a class has no more keys than slots, so many more than have to be negatives of any anchor make
    sure of that.
    """
    segments = share.all_segments
    n_valid = segments.select(2, 1).sum()
    sharp = math.ceil(_MORE * max(num_negatives / hard_fraction, _SHARP))
    size = min(sharp + share.slots, share.slots * segments.shape[0])
    place = torch.arange(size, device=n_valid.device)
    n = n_valid.clamp(min=1)
    inside = place < n_valid
    drawn = torch.ops.pico_fast.permute_ranks(
        torch.where(place < n, place, 0).unsqueeze(0),
        n.view(1, 1),
        seeds[0],
        reference.SAMPLE,
        torch.zeros_like(n).view(1, 1),
    )
    place = torch.where(n_valid > size, drawn.squeeze(0), place)
    row = rows_of_places(segments, torch.where(inside, place, 0))
    local = torch.where(inside, _local(share, row), -1)
    # each key lies in one share: the others add 0
    keys = share.keys.new_zeros(size, share.keys.shape[1])
    if share.keys.shape[0]:
        keys = share.keys.index_select(0, local.clamp(min=0))
        keys = torch.where((local >= 0)[:, None], keys, 0.0)
    keys = share.ranks.sum(keys)
    key_labels = torch.where(inside, row // share.slots, -1)
    _, index, _, similarity = torch.ops.pico_fast.select_keys(
        anchors,
        anchor_labels,
        keys,
        key_labels,
        "semi_hard",
        0,
        num_negatives,
        hard_fraction,
        seeds[1],
    )
    return keys, Picks(index, similarity)


def mix_share(
    anchors: Anchors,
    share: Share,
    picks: Picks | None,  # [N·A, k] negatives of this share, hardest first; None: all
    mixes: tuple[int, int, int],
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """This share's part of the synthesis: log-sum [N·A] and softmax mean [N·A, D] of its mixes.

    Of n members of an anchor's pool a share holds m: its mixes, an N-th of all, weigh m / n of all, and
    those of two negatives m (m - 1) of the sum of this over shares.
    """
    ranks = share.ranks
    *wanted, pool = mixes
    if picks is None:
        _, picks = _hardest_of_share(anchors, share, 0, pool)
    picks = Picks(*(x.narrow(1, 0, min(pool, x.shape[1])) for x in picks))
    in_use = ranks.sum((picks.index >= 0).sum(1))[anchors.own]
    members = _cut(anchors, share, picks, 1, in_use.clamp(max=pool)).index
    m = (members >= 0).sum(1)
    parts = []
    for kind, (count, weight) in enumerate(zip(wanted, (m * (m - 1), m), strict=True)):
        made = -(-count // ranks.size)
        kinds = (made, 0) if kind == 0 else (0, made)
        lse, mean = torch.ops.pico_fast.mix_negatives(
            anchors.rows, share.keys, members, *kinds, temperature, seed
        )
        part = weight.to(lse.dtype) / ranks.sum(weight).clamp(min=1)
        # -inf, which is no mix, where the share has none
        parts.append((lse + torch.log(part * (count / max(1, made))), mean))
    return merge_mixes(*parts[0], *parts[1])
