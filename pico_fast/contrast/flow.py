"""The flow from anchors and keys to losses: one page for every device, placement and sampling.

    layout      whose key is whose: anchors class by class, keys as ranges of positions
    sample      some keys of each class, one draw for all anchors         (random, semi_hard, bounded)
    cut         which share of these counts, and below which ceiling      (semi_hard, bounded)
    picks       or lists of the hardest of all keys                       (hardest)
    negatives   log-sum, softmax mean; merged with mixes, and over the shares of a bank
    positives   loss, weight and pull for that log-sum; summed over the shares
    finish      loss and gradient

A side is the positives or the negatives. Its keys are here, or a sample of them came here. On a bank that
lies on several ranks they may also stay where they are: then all ranks' anchors meet each share (`shares`).
Nothing here carries a gradient: `function` attaches what this page finds.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast.bank.share import Share
from pico_fast.contrast import ops, shares
from pico_fast.contrast import picks as picks_
from pico_fast.contrast.picks import Picks
from pico_fast.contrast.weights import Negatives, Positives, merge
from pico_fast.selection import layout as layouts
from pico_fast.selection import ops as choosing
from pico_fast.selection.layout import Cut, Layout
from pico_fast.selection.options import Selection
from pico_fast.selection.sample import draw_sample


class Options(NamedTuple):
    """What is asked for, the same for all anchors."""

    selection: Selection
    temperature: float
    mixes: tuple[int, int, int] | None  # negative-negative, negative-anchor, pool
    seed: Tensor  # [] int64, that of all ranks
    first_row: int  # number of this rank's first anchor among those of all ranks
    want_gradient: bool


class Side(NamedTuple):
    """Positives (`own`) or negatives: the keys that anchors are compared with."""

    own: bool
    layout: Layout  # of this rank's anchors, or where the keys stay in shares of all ranks'
    cut: Cut
    picks: Picks | None  # where the keys stay in shares in rank order, else in class order
    offered: Tensor | None  # [A] int64, keys for each of this rank's anchors; None: those below a ceiling
    share: Share | None  # set where the keys stay in shares

    def count(self, below: Tensor | None = None) -> Tensor:
        """How many keys count for each of this rank's anchors [A] int64, of so many `below` a ceiling."""
        if self.picks is not None:
            return self.offered.clamp(max=self.picks.index.shape[1])
        return self.cut.wanted(below if self.offered is None else self.offered)


class Rows(NamedTuple):
    """What the contrast says of each of this rank's anchors, class by class."""

    loss: Tensor  # [A]
    counted: Tensor  # [A] bool, whether it has a positive
    similar: Tensor  # [A] mean similarity with its positives
    away: Tensor  # [A] mean similarity with its negatives
    gradient: Tensor  # [A, D], or [0]
    lse: Tensor  # [A] Z
    pull: Tensor  # [A] what the weights of its positives are multiplied by in a gradient
    push: Tensor  # [A] and those of its negatives


def lay_out(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: those of `share`, or the anchors
    key_labels: Tensor | None,  # [K] int64
    share: Share | None,
) -> Layout:
    """The layout of all keys; where a bank is in shares they are not all here, but `ranges` know them."""
    if share is None:
        return layouts.of_labels(anchors, anchor_labels, keys, key_labels)
    return layouts.of_bank(anchors, anchor_labels, share.keys, share.all_ranges)


def choose(
    layout: Layout,  # of all keys
    share: Share | None,
    selection: Selection,
    own: bool,
    seed: Tensor,  # [] int64
    pulled: Side | None = None,  # the positives, which may bound the negatives
    in_order: bool = False,  # whether lists have to be hardest first
) -> Side:
    """One side: all keys or a sample of them, and which of these count."""
    is_sampled, stays = selection.needed(own) is not None, None
    if is_sampled:
        layout = draw_sample(layout, selection, own, seed, share and share.slots)
    count, is_bounded = selection.count(own), selection.strategy(own) == "bounded"
    offered = None if is_bounded else layout.available(own)
    if share is not None and share.ranks is not None:
        stays = None if is_sampled else share
        if is_sampled:
            layout = shares.bring(layout, share)
        elif pulled is not None and pulled.share is not None:
            layout = pulled.layout  # all ranks' anchors are here already
        else:
            layout = shares.everyone(layout, share)
    cut = Cut()
    if selection.is_cut(own):
        cut = Cut(mean_similarity(pulled) if is_bounded else None, count, selection.hard_fraction)
    picks = None
    if selection.strategy(own) == "hardest":
        picks = Picks(*choosing.hardest(layout, own, None, count, False, in_order)[:2])
        if stays is not None:
            picks = shares.cut(Picks(*map(layout.restore, picks)), stays, own, offered.clamp(max=count))
    return Side(own, layout, cut, picks, offered, stays)


def mean_similarity(pulled: Side) -> Tensor:
    """Mean similarity [A] of each anchor with the positives that it is offered; infinite without any."""
    layout = pulled.layout
    nothing = torch.full_like(layout.anchor_class, -math.inf, dtype=layout.dtype)
    similar = ops.positives(layout, Cut(), nothing, 1.0, False).similar
    if pulled.share is not None:
        (similar,) = shares.add(pulled.share.ranks, layout.restore(similar))
    return torch.where(pulled.offered > 0, similar / pulled.offered, math.inf)


def pool_of(side: Side, selection: Selection, size: int) -> Picks:
    """The `size` hardest keys that count, hardest first: [A, size], or as many columns as were picked."""
    if side.picks is not None:
        return Picks(*(x.narrow(1, 0, min(size, x.shape[1])) for x in side.picks))
    asked = (side.own, side.cut.ceiling, size, selection.needed(side.own) is not None, True)
    index, similarity, below = choosing.hardest(side.layout, *asked)
    if side.share is not None:
        return Picks(side.layout.restore(index), side.layout.restore(similarity))
    behind = torch.arange(size, device=index.device) >= side.count(below).unsqueeze(1)
    return Picks(index.masked_fill(behind, -1), similarity.masked_fill(behind, 0.0))


def mix(
    side: Side,
    row: Tensor,  # [A] int64, number of each of this rank's anchors among those of all ranks
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Log-sum [A] of mixed negatives and their softmax mean [A, D]; in shares this share's part of them."""
    *counts, size = options.mixes
    pool, how = pool_of(side, options.selection, size), (options.temperature, options.seed)
    if side.share is not None:
        return shares.mix(side.layout, side.share, pool, row, options.mixes, *how)
    return choosing.mix_negatives(side.layout.anchors, side.layout.keys, pool.index, row, *counts, *how)


def sum_negatives(
    side: Side,
    row: Tensor,  # [A] int64, number of each of this rank's anchors
    options: Options,
) -> Negatives:
    """What the negatives of this rank's anchors add up to, mixes included."""
    layout, how = side.layout, (options.temperature, options.want_gradient)
    if side.picks is not None:
        found = picks_.negatives(side.picks, layout.keys, *how)
    else:
        found = ops.negatives(layout, side.cut, *how)
        if side.share is not None:
            found = Negatives(*(layout.restore(x) if x.numel() else x for x in found))
    if options.mixes is not None:
        lse, mean = merge(found.lse, found.mean, *mix(side, row + options.first_row, options))
        found = found._replace(lse=lse, mean=mean)
    return found if side.share is None else shares.merge_negatives(side.share.ranks, found)


def sum_positives(
    side: Side,
    lse: Tensor,  # [A] Z
    options: Options,
) -> Positives:
    """What the positives of this rank's anchors add up to, for their Z."""
    layout, how = side.layout, (options.temperature, options.want_gradient)
    if side.share is not None:
        lse = side.share.ranks.gather(lse)
    if side.picks is not None:
        found = picks_.positives(side.picks, layout.keys, lse, *how)
    elif side.share is None:
        found = ops.positives(layout, side.cut, lse, *how)
    else:
        found = ops.positives(layout, side.cut, lse.index_select(0, layout.order), *how)
        found = [layout.restore(x) if x.numel() else x for x in found]
    return Positives(*(found if side.share is None else shares.add(side.share.ranks, *found)))


def finish(
    pulled: Side, pushed: Side, positives: Positives, negatives: Negatives, options: Options
) -> Rows:
    """Losses and gradients, from what both sides add up to."""
    n = pulled.count()
    share = n.clamp(min=1).to(positives.loss.dtype).reciprocal()
    pull = share / options.temperature
    push = pull * positives.weight
    away = negatives.away / pushed.count(negatives.below).clamp(min=1)
    gradient = positives.pull
    if options.want_gradient:
        gradient = push.unsqueeze(1) * negatives.mean - pull.unsqueeze(1) * positives.pull
    loss, similar = positives.loss * share, positives.similar * share
    return Rows(loss, n > 0, similar, away, gradient, negatives.lse, pull, push)


def contrast(layout: Layout, share: Share | None, options: Options) -> tuple[Rows, Side, Side]:
    """Rows of this rank's anchors in class order, and the two sides that they come from."""
    pulled = choose(layout, share, options.selection, True, options.seed)
    in_order = options.mixes is not None  # a pool is the first of a list
    pushed = choose(layout, share, options.selection, False, options.seed, pulled, in_order)
    negatives = sum_negatives(pushed, layout.order, options)
    positives = sum_positives(pulled, negatives.lse, options)
    return finish(pulled, pushed, positives, negatives, options), pulled, pushed
