"""Picks: keys that an anchor is compared with as a list of its own, as "hardest" finds them; their sums."""

from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast.contrast.weights import Negatives, Positives, pull_weights, push_weights
from pico_fast.selection.ops import weighted_rows

# dense weights held at a time
_BLOCK = 2**24


class Picks(NamedTuple):
    """Keys of one side; hardest first where the order matters."""

    index: Tensor  # [A, n] int64 into keys, -1 where there is none
    similarity: Tensor  # [A, n] inner products, 0 where there is none


def negatives(picks: Picks, keys: Tensor, temperature: float, want_mean: bool) -> Negatives:
    """What picked negatives add up to."""
    lse, p = push_weights(picks.similarity, picks.index >= 0, temperature)
    mean = weighted_rows(keys, picks.index, p) if want_mean else lse.new_zeros(0)
    return Negatives(lse, mean, picks.similarity.sum(1), picks.index.new_empty(0))


def positives(
    picks: Picks,
    keys: Tensor,  # [K, D]
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> Positives:
    """What picked positives add up to, for a given Z."""
    losses, w = pull_weights(picks.similarity, picks.index >= 0, lse, temperature)
    pull = weighted_rows(keys, picks.index, w) if want_pull else lse.new_zeros(0)
    return Positives(losses.sum(1), w.sum(1), picks.similarity.sum(1), pull)


def keys_grad(
    picks: Picks,
    anchors: Tensor,  # [A, D]
    num_keys: int,
    own: bool,
    lse: Tensor,  # [A]
    factor: Tensor,  # [A] what an anchor's weights are multiplied by
    temperature: float,
) -> Tensor:
    """The op `keys_grad` for picks [K, D], by dense weights of a block of anchors at a time."""
    mask = picks.index >= 0
    if own:
        weight = -pull_weights(picks.similarity, mask, lse, temperature)[1]
    else:
        # of all negatives, mixes too: the softmax of the picks, times their part of the sum
        picked, weight = push_weights(picks.similarity, mask, temperature)
        part = torch.exp((picked - lse).clamp(max=0.0)).masked_fill(lse == -torch.inf, 0.0)
        weight = weight * part.unsqueeze(1)
    weight = weight * factor.unsqueeze(1)
    out = weight.new_zeros(num_keys, anchors.shape[1])
    rows, column = anchors.to(weight.dtype), torch.where(mask, picks.index, num_keys)
    block = max(1, _BLOCK // (num_keys + 1))
    for first in range(0, rows.shape[0], block):
        here = slice(first, first + block)
        dense = weight.new_zeros(rows[here].shape[0], num_keys + 1)
        # only the column that is cut off takes several
        dense = dense.scatter_(1, column[here], weight[here])[:, :-1]
        out.addmm_(dense.T, rows[here])
    return out
