"""The sums of the contrast in PyTorch on any device: block by block with masks, nothing read back."""

import math

import torch
from torch import Tensor

from pico_fast.contrast.weights import Negatives, Positives, merge, pull_weights, push_weights
from pico_fast.selection.eager import positions, within
from pico_fast.selection.layout import Cut, Layout


def negatives(layout: Layout, cut: Cut, temperature: float, want_mean: bool) -> Negatives:
    """The op `negatives`."""
    work, empty = positions(layout), (layout.anchor_class < 0).unsqueeze(1)
    lse = torch.full_like(work.queries[:, 0], -math.inf)
    away = torch.zeros_like(lse)
    mean = torch.zeros_like(work.queries) if want_mean else lse.new_zeros(0)
    found = torch.zeros_like(layout.anchor_class)
    for rows, first, last in work.chunks(not cut.is_none):
        s = work.similarity(rows, first, last)
        mask, m = within(work.candidates(rows, first, last, False), s, cut.of(rows), False)
        part, p = push_weights(s, mask, temperature)
        part_mean = work.weighted(p, first, last) if want_mean else mean
        away[rows] += s.masked_fill_(~mask, 0.0).sum(1)
        found[rows] += m
        lse[rows], merged = merge(lse[rows], mean[rows], part, part_mean)
        if want_mean:
            mean[rows] = merged.masked_fill_(empty[rows], 0.0)  # 0 x a key of nan is nan
    return Negatives(lse, mean, away, found.narrow(0, 0, 0) if cut.ceiling is None else found)


def positives(
    layout: Layout,
    cut: Cut,
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> Positives:
    """The op `positives`."""
    work, empty = positions(layout), (layout.anchor_class < 0).unsqueeze(1)
    loss, weight, similar = (torch.zeros_like(work.queries[:, 0]) for _ in range(3))
    pull = torch.zeros_like(work.queries) if want_pull else loss.new_zeros(0)
    for rows, first, last in work.chunks(not cut.is_none):
        s = work.similarity(rows, first, last)
        mask, _ = within(work.candidates(rows, first, last, True), s, cut.of(rows), True)
        losses, w = pull_weights(s, mask, lse[rows], temperature)
        loss[rows] += losses.sum(1)
        weight[rows] += w.sum(1)
        similar[rows] += s.masked_fill_(~mask, 0.0).sum(1)
        if want_pull:
            pull[rows] += work.weighted(w, first, last).masked_fill_(empty[rows], 0.0)
    return Positives(loss, weight, similar, pull)


def keys_grad(
    layout: Layout,
    cut: Cut,
    own: bool,
    lse: Tensor,  # [A]
    factor: Tensor,  # [A] what an anchor's weights are multiplied by
    temperature: float,
) -> Tensor:
    """The op `keys_grad`: what the anchors add to the gradient of the keys on one side [K, D]."""
    work = positions(layout)
    out = work.queries.new_zeros(layout.keys.shape)
    for rows, first, last in work.chunks(not cut.is_none):
        s = work.similarity(rows, first, last)
        mask, _ = within(work.candidates(rows, first, last, own), s, cut.of(rows), own)
        if own:
            weight = -pull_weights(s, mask, lse[rows], temperature)[1]
        else:
            z = lse[rows, None]
            mask &= z > -math.inf
            # a weight is at most 1, however Z is rounded
            above = (s / temperature - z).clamp_(max=0.0)
            weight = torch.exp(above.masked_fill_(~mask, -math.inf))
        weight *= factor[rows, None]
        # a key that nobody meets is added to key 0, with nothing
        out.index_add_(0, work.key[first:last], weight.T @ work.queries[rows])
    return out
