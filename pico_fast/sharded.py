"""Contrast with a bank on several ranks: each compares all ranks' anchors with its share of the keys.

Sums over keys are sums over shares. Two rounds, each of a size that all ranks know:

    1. the negatives: each share's log-sum and softmax mean; the log-sums of all shares make Z, which every
       rank needs, the means go to the ranks whose anchors they are of
    2. the positives, with that Z: sums of loss, weight and pull go to the anchors' ranks, which finish

Which keys of its share a rank sums over is the affair of `shard_picks`. Nothing here carries a gradient:
the keys have none, and that of an anchor is a saved row, scaled in the backward.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pico_fast import checks, shard_picks
from pico_fast.bank import Share
from pico_fast.contrast_any import merge_mixes
from pico_fast.finite import finite_anchors
from pico_fast.picked import weighted_rows
from pico_fast.selection import product_dtype
from pico_fast.shard_picks import Anchors, Picks
from pico_fast.synthesis import Synthesis


class _Negatives(NamedTuple):
    """What negatives add up to, of a share or of all."""

    lse: Tensor  # [n] log-sum of exp(s)
    mean: Tensor  # [n, D] their softmax mean; [0] where no gradient is wanted
    away: Tensor  # [n] sum of inner products


def _of_picks(picks: Picks, keys: Tensor, temperature: float, want_mean: bool) -> _Negatives:
    """The sums over picked negatives."""
    s = (picks.similarity / temperature).masked_fill(picks.index < 0, -math.inf)
    lse = s.logsumexp(1)
    mean = lse.new_zeros(0)
    if want_mean:
        p = s.softmax(1).masked_fill(picks.index < 0, 0.0)
        mean = weighted_rows(keys, picks.index, p)
    return _Negatives(lse, mean, picks.similarity.sum(1))


def _with_mixes(
    found: _Negatives,
    mix_lse: Tensor,  # [n]
    mix_mean: Tensor,  # [n, D]
) -> _Negatives:
    """The same with the synthesised negatives, which count in the denominator alone."""
    if found.mean.numel() == 0:
        return found._replace(lse=torch.logaddexp(found.lse, mix_lse))
    lse, mean = merge_mixes(found.lse, found.mean, mix_lse, mix_mean)
    return _Negatives(lse, mean, found.away)


def _columns(*values: Tensor) -> Tensor:
    """Values [n] and [n, D] side by side; what is not wanted is left out."""
    return torch.cat([v if v.dim() == 2 else v[:, None] for v in values if v.numel()], 1)


class _Work(NamedTuple):
    anchors: Anchors
    share: Share
    temperature: float
    want_gradient: bool


def _negatives_of_share(
    work: _Work, picks: Picks | None, mixes: tuple[int, int, int] | None, seed: Tensor
) -> _Negatives:
    """What this share's negatives add up to, for the anchors of all ranks [N·A]."""
    (everyone, labels, _), share, temperature, want = work
    if picks is None:
        found = _Negatives(
            *torch.ops.pico_fast.contrast_negatives(
                everyone, labels, share.keys, share.segments, temperature, want
            )
        )
    else:
        found = _of_picks(picks, share.keys, temperature, want)
    if mixes is None:
        return found
    return _with_mixes(
        found, *shard_picks.mix_share(work.anchors, share, picks, mixes, temperature, seed)
    )


class _Pending(NamedTuple):
    """Sums of the own anchors' negatives that are still on their way."""

    arrive: Callable[[], Tensor]  # columns [A, 1 + D] or [A, 1]

    def wait(self) -> tuple[Tensor, Tensor]:
        """away [A] and mean [A, D], or [A, 0]."""
        columns = self.arrive()
        return columns[:, 0], columns[:, 1:]


def _merge(work: _Work, part: _Negatives) -> tuple[Tensor, _Pending]:
    """Z of all anchors [N·A], and what the own anchors' negatives add up to, on its way."""
    ranks = work.share.ranks
    top = ranks.maximum(part.lse)
    safe = top.clamp(min=torch.finfo(top.dtype).min)
    total = ranks.sum(torch.exp(part.lse - safe))
    lse = torch.where(total > 0, total.log() + safe, -math.inf)
    fraction = torch.exp(part.lse - lse.clamp(min=torch.finfo(lse.dtype).min))
    sent = _columns(part.away, part.mean * fraction[:, None] if work.want_gradient else part.mean)
    return lse, _Pending(ranks.start_sum_own(sent))


def _sampled_negatives(
    work: _Work, choice: tuple, mixes: tuple[int, int, int] | None, seeds: tuple[Tensor, Tensor]
) -> tuple[Tensor, _Pending]:
    """The same for semi_hard, whose negatives the own anchors draw from a sample of all shares' keys."""
    (everyone, labels, own), share, temperature, want = work
    anchors = (everyone[own], labels[own])
    keys, picks = shard_picks.semi_hard_negatives(*anchors, share, *choice, seeds)
    found = _of_picks(picks, keys, temperature, want)
    if mixes is not None:
        pool = picks.index.narrow(1, 0, min(mixes[2], picks.index.shape[1]))
        mixed = torch.ops.pico_fast.mix_negatives(
            anchors[0], keys, pool, *mixes[:2], temperature, seeds[1]
        )
        found = _with_mixes(found, *mixed)
    columns = _columns(found.away, found.mean)
    return share.ranks.gather(found.lse), _Pending(lambda: columns)


def _positives(
    work: _Work,
    picks: Picks | None,
    lse: Tensor,  # [N·A]
) -> Tensor:
    """Sums over the own anchors' positives: columns of loss, weight, inner product and pull [A, 3 + D]."""
    (everyone, labels, _), share, temperature, want = work
    if picks is None:
        args = (everyone, labels, share.keys, share.segments, lse, temperature, want)
        sums = torch.ops.pico_fast.contrast_positives(*args)
    else:
        above = lse[:, None] - picks.similarity / temperature
        above = above.masked_fill(picks.index < 0, -math.inf)
        w = torch.sigmoid(above)
        pull = weighted_rows(share.keys, picks.index, w) if want else lse.new_zeros(0)
        sums = (softplus(above, threshold=40.0).sum(1), w.sum(1), picks.similarity.sum(1), pull)
    return share.ranks.start_sum_own(_columns(*sums))()


class _Saved(torch.autograd.Function):
    """A loss [A] whose gradient is known: grad_i times row i of it."""

    @staticmethod
    def forward(ctx, anchors, loss, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = anchors.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        checks.first_order("contrast")
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(ctx.dtype), None, None


@torch.no_grad()
def _contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    share: Share,
    seeds: tuple[Tensor, Tensor],  # [] int64 each
    temperature: float,
    choice: tuple[str, int, int, float],
    mixes: tuple[int, int, int] | None,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ranks, dtype = share.ranks, product_dtype(anchors, share.keys)
    n = anchors.shape[0]
    anchor_labels, spoiled = finite_anchors(anchors, anchor_labels)
    # an empty slot may hold anything
    anchors = anchors.masked_fill(anchor_labels[:, None] < 0, 0.0)
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    all_anchors = Anchors(ranks.gather(anchors), ranks.gather(anchor_labels), own)
    work = _Work(all_anchors, share, temperature, want_gradient)
    sampling, *counts, hard_fraction = choice
    positives, negatives = shard_picks.pick(all_anchors, share, *choice, seeds[0])
    if sampling == "semi_hard":
        lse, pending = _sampled_negatives(work, (counts[1], hard_fraction), mixes, seeds)
    else:
        lse, pending = _merge(work, _negatives_of_share(work, negatives, mixes, seeds[0]))
    columns = _positives(work, positives, lse)
    away, mean = pending.wait()

    n_positive, n_negative = (
        shard_picks.how_many(available, count, sampling, hard_fraction)
        for available, count in zip(
            shard_picks.available(anchor_labels, share), counts, strict=True
        )
    )
    counted = n_positive > 0
    part = torch.where(counted & (n_negative > 0), 1 / n_positive.clamp(min=1).to(dtype), 0.0)
    loss, weight, similar = columns[:, :3].unbind(1)
    gradient = loss.new_zeros(0)
    if want_gradient:
        gradient = (weight[:, None] * mean - columns[:, 3:]) * (part[:, None] / temperature)
        gradient = gradient.masked_fill(spoiled[:, None], math.nan)
    similar = similar / n_positive.clamp(min=1)
    loss = (loss * part).masked_fill(spoiled, math.nan)
    return loss, counted, similar, away / n_negative.clamp(min=1), gradient


def contrast_sharded(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    share: Share,
    seeds: tuple[Tensor, Tensor],  # [] int64: the ranks' common one, and this rank's own
    temperature: float,
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    synthesis: Synthesis | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `contrast_rows` returns, with the keys of all shares; all ranks call it together.

    "all", "hardest" and "random" give what one process gives that has all ranks' anchors, in rank order,
    and the whole bank. "semi_hard" draws negatives from a sample of the keys that is as large as
    docs/sampling.md asks for, or all of them; its positives are exact. Mixes of the synthesis are, but
    for "semi_hard", made of negatives of one share, as many of each share as the anchor's pool has there.
    """
    mixes = None
    if synthesis is not None and synthesis.per_anchor:
        mixes = (synthesis.negative_negative, synthesis.negative_anchor, synthesis.pool)
    choice = (sampling, num_positives, num_negatives, hard_fraction)
    want = anchors.requires_grad and torch.is_grad_enabled()
    with torch.autocast(anchors.device.type, enabled=False):
        loss, counted, similar, away, gradient = _contrast(
            anchors.detach(), anchor_labels, share, seeds, temperature, choice, mixes, want
        )
    return _Saved.apply(anchors, loss, gradient), counted, similar, away
