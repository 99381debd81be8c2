"""The formula in PyTorch, for any list or block of similarities: what negatives and positives add up to."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Negatives(NamedTuple):
    """What an anchor's negatives add up to."""

    lse: Tensor  # [A] log-sum of exp(s / temperature), -inf without any
    mean: Tensor  # [A, D] their softmax mean; [0] where none is wanted
    away: Tensor  # [A] sum of their similarities s
    below: Tensor  # [A] int64, how many lie below a ceiling; [0] where there is none


class Positives(NamedTuple):
    """What an anchor's positives add up to, for a given Z."""

    loss: Tensor  # [A] sum of softplus(Z - s / temperature)
    weight: Tensor  # [A] sum of w = sigmoid(Z - s / temperature)
    similar: Tensor  # [A] sum of their similarities s
    pull: Tensor  # [A, D] sum of w k; [0] where none is wanted


def push_weights(
    similarity: Tensor,  # [A, n]
    mask: Tensor,  # [A, n] bool, which pairs are negatives
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-sum [A] of the negatives and their softmax [A, n], 0 for all other pairs."""
    unused = mask.logical_not()
    logits = (similarity / temperature).masked_fill_(unused, -math.inf)
    # not exp(s - Z): where Z is rounded, such weights would not add up to 1
    return logits.logsumexp(1), logits.softmax(1).masked_fill_(unused, 0.0)


def pull_weights(
    similarity: Tensor,  # [A, n]
    mask: Tensor,  # [A, n] bool, which pairs are positives
    lse: Tensor,  # [A] Z
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Losses [A, n] of the positives and their weights w [A, n], 0 for all other pairs."""
    above = lse.unsqueeze(1) - similarity / temperature
    above = above.masked_fill_(mask.logical_not(), -math.inf)
    return softplus(above, threshold=40.0), above.sigmoid()


def merge(
    lse: Tensor,  # [A]
    mean: Tensor,  # [A, D], or [0]
    other_lse: Tensor,  # [A]
    other_mean: Tensor,  # [A, D], or [0]
) -> tuple[Tensor, Tensor]:
    """Log-sum [A] and softmax mean [A, D] of two groups of negatives together."""
    top = torch.maximum(lse, other_lse)
    safe = top.clamp(min=torch.finfo(top.dtype).min)  # -inf - -inf would be nan
    one, two = torch.exp(lse - safe), torch.exp(other_lse - safe)
    both = one + two
    if mean.dim() == 2:
        one, two = one.unsqueeze(1), two.unsqueeze(1)
        mean = (mean * one + other_mean * two) / both.clamp(min=1.0).unsqueeze(1)
    return torch.where(both > 0, both.log() + safe, top), mean
