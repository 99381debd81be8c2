"""Contrast with selected keys: the similarities are known, so only the chosen rows are read."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pico_fast.contrast_any import merge_mixes
from pico_fast.picked import dense_weights, weighted_rows
from pico_fast.selection import product_dtype

# dense weights held at a time
_BLOCK = 2**24


def _weights(
    lse: Tensor,  # [A]
    positive_index: Tensor,  # [A, P]
    negative_index: Tensor,  # [A, N]
    positive_similarity: Tensor,  # [A, P]
    negative_similarity: Tensor,  # [A, N]
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """temperature x d loss / d inner product: of positives [A, P], negatives [A, N]; and q [A]."""
    chosen = positive_index >= 0
    n_positive = chosen.sum(1)
    usable = (n_positive > 0) & (lse > -math.inf)
    lse = torch.where(usable, lse, 0.0)[:, None]
    chosen &= usable[:, None]
    w = torch.sigmoid(lse - positive_similarity / temperature).masked_fill(~chosen, 0.0)
    w = w / n_positive.clamp(min=1)[:, None]
    q = w.sum(1)
    s = (negative_similarity / temperature).masked_fill(negative_index < 0, -math.inf)
    # not exp(s - lse): float32 rounds s = 1e8 by whole numbers, and then those would not add up to 1.
    # Without mixes lse is this same log-sum, and the share 1 to the bit
    share = torch.exp(s.logsumexp(1, keepdim=True) - lse)
    p = (s.softmax(1) * share).masked_fill((negative_index < 0) | ~usable[:, None], 0.0)
    return -w, p * q[:, None], q


def contrast_selected(
    anchors: Tensor,  # [A, D]
    keys: Tensor | None,  # [K, D]; None: the anchors
    positive_index: Tensor,  # [A, P] int64, -1 behind the last
    negative_index: Tensor,  # [A, N] int64, -1 behind the last
    positive_similarity: Tensor,  # [A, P]
    negative_similarity: Tensor,  # [A, N]
    mix_lse: Tensor | None,  # [A] log-sum of the synthesised negatives
    mix_mean: Tensor | None,  # [A, D] their softmax mean
    temperature: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_selected`; see `pico_fast.contrast`."""
    keys = anchors if keys is None else keys
    dtype = product_dtype(anchors, keys)
    chosen, against = positive_index >= 0, negative_index >= 0
    n_positive, n_negative = chosen.sum(1), against.sum(1)
    s = (negative_similarity / temperature).masked_fill(~against, -math.inf)
    selected = lse = s.logsumexp(1)
    if mix_lse is not None:
        lse = torch.logaddexp(selected, mix_lse)
    counted = (n_positive > 0) & (n_negative > 0)
    above = (lse[:, None] - positive_similarity / temperature).masked_fill(~chosen, -math.inf)
    loss = softplus(above, threshold=40.0).sum(1) / n_positive.clamp(min=1)
    loss = torch.where(counted, loss, 0.0)
    similar = positive_similarity.sum(1) / n_positive.clamp(min=1)
    away = negative_similarity.sum(1) / n_negative.clamp(min=1)
    gradient = anchors.new_zeros(0, dtype=dtype)
    if want_gradient and keys.shape[0] > 0:
        chosen_by = (positive_index, negative_index, positive_similarity, negative_similarity)
        pull, push, q = _weights(lse, *chosen_by, temperature)
        index = torch.cat([negative_index, positive_index], 1)
        weight = torch.cat([push, pull], 1)
        gradient = weighted_rows(keys, index, weight) / temperature
        if mix_lse is not None:
            nothing = torch.zeros_like(gradient)
            _, mixed = merge_mixes(selected, nothing, mix_lse, mix_mean)
            gradient += q[:, None] * mixed / temperature
    elif want_gradient:
        gradient = torch.zeros_like(anchors, dtype=dtype)
    return loss, lse, n_positive, similar, away, gradient


def contrast_selected_keys_grad(
    grad_loss: Tensor,  # [A]
    anchors: Tensor,  # [A, D]
    positive_index: Tensor,  # [A, P] int64, -1 behind the last
    negative_index: Tensor,  # [A, N] int64, -1 behind the last
    positive_similarity: Tensor,  # [A, P]
    negative_similarity: Tensor,  # [A, N]
    lse: Tensor,  # [A] of the forward
    temperature: float,
    num_keys: int,
) -> Tensor:
    """Gradient of the keys [K, D], by dense weights of a block of anchors at a time."""
    chosen_by = (positive_index, negative_index, positive_similarity, negative_similarity)
    pull, push, _ = _weights(lse, *chosen_by, temperature)
    index = torch.cat([positive_index, negative_index], 1)
    weight = torch.cat([pull, push], 1) * grad_loss.to(push.dtype)[:, None] / temperature
    out = weight.new_zeros(num_keys, anchors.shape[1])
    # an anchor without any pick may hold anything; 0 x nan would still be nan in the product
    rows = anchors.to(weight.dtype).masked_fill((index < 0).all(1, keepdim=True), 0.0)
    block = max(1, _BLOCK // (num_keys + 1))
    for first in range(0, rows.shape[0], block):
        here = slice(first, first + block)
        out.addmm_(dense_weights(index[here], weight[here], num_keys).T, rows[here])
    return out
