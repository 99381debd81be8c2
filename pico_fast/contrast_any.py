"""Contrast with all keys on any device: tile by tile with masks, nothing read back to the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pico_fast.class_order import labels_of_segments
from pico_fast.selection import product_dtype

_TILE = 2**13


def _masks(
    anchor_labels: Tensor,  # [A]
    key_labels: Tensor,  # [K]
    in_batch: bool,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs of the tile that begins at key `first`: [A, tile] each."""
    labels = key_labels[first : first + _TILE]
    used = (anchor_labels[:, None] >= 0) & (labels >= 0)
    same = anchor_labels[:, None] == labels
    positive = used & same
    if in_batch:
        row = torch.arange(anchor_labels.numel(), device=labels.device)
        positive &= row[:, None] != row[first : first + _TILE]
    return positive, used & ~same


class _Scene(NamedTuple):
    """Anchors and keys as both passes take them."""

    queries: Tensor  # [A, D] anchors / temperature, 0 in empty slots
    anchor_labels: Tensor  # [A] int64
    keys: Tensor  # [K, D]
    key_labels: Tensor  # [K] int64
    in_batch: bool


def _scene(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    segments: Tensor | None,  # [C, G, 2] int64, instead of key_labels
    temperature: float,
) -> _Scene:
    if segments is not None:
        key_labels = labels_of_segments(segments, keys.shape[0])
    in_batch = keys is None
    if in_batch:
        keys, key_labels = anchors, anchor_labels
    dtype = product_dtype(anchors, keys)
    queries = anchors.to(dtype).masked_fill(anchor_labels[:, None] < 0, 0.0) / temperature
    return _Scene(queries, anchor_labels, keys, key_labels, in_batch)


class _Negatives(NamedTuple):
    lse: Tensor  # [A]
    mean: Tensor  # [A, D] softmax mean
    away: Tensor  # [A] sum of s
    count: Tensor  # [A] int64


def _negatives(scene: _Scene, want_mean: bool) -> _Negatives:
    queries, anchor_labels, keys, key_labels, in_batch = scene
    dtype = queries.dtype
    n, n_keys = queries.shape[0], keys.shape[0]
    top = queries.new_full((n,), -math.inf)
    total, away = queries.new_zeros(n), queries.new_zeros(n)
    n_negative = torch.zeros_like(anchor_labels)
    mean = torch.zeros_like(queries)
    for first in range(0, n_keys, _TILE):
        _, negative = _masks(anchor_labels, key_labels, in_batch, first)
        tile, s = _tile(queries, keys, key_labels, first)
        away += s.masked_fill(~negative, 0.0).sum(1)
        n_negative += negative.sum(1)
        s = s.masked_fill_(~negative, -math.inf)
        new_top = torch.maximum(top, s.amax(1))
        # a row without a negative yet stays at -inf, and -inf - -inf would be nan
        shift = new_top.clamp(min=torch.finfo(dtype).min)
        fade = torch.exp(top - shift)
        p = s.sub_(shift[:, None]).exp_()
        total = total * fade + p.sum(1)
        if want_mean:
            mean = torch.addmm(mean * fade[:, None], p, tile)
        top = new_top
    lse = torch.where(total == 0, -math.inf, total.log() + top)  # a key of nan makes it nan
    mean = mean / total.clamp(min=torch.finfo(dtype).tiny)[:, None]
    return _Negatives(lse, mean, away, n_negative)


class _Positives(NamedTuple):
    loss: Tensor  # [A] sum of softplus(lse - s)
    weight: Tensor  # [A] sum of w = sigmoid(lse - s)
    similar: Tensor  # [A] sum of s
    pull: Tensor  # [A, D] sum of w k
    count: Tensor  # [A] int64


def _positives(
    scene: _Scene,
    lse: Tensor,  # [A]
    want_pull: bool,
) -> _Positives:
    queries, anchor_labels, keys, key_labels, in_batch = scene
    n = queries.shape[0]
    loss, weight = queries.new_zeros(n), queries.new_zeros(n)
    similar = queries.new_zeros(n)
    n_positive = torch.zeros_like(anchor_labels)
    pull = torch.zeros_like(queries)
    for first in range(0, keys.shape[0], _TILE):
        positive, _ = _masks(anchor_labels, key_labels, in_batch, first)
        tile, s = _tile(queries, keys, key_labels, first)
        above = (lse[:, None] - s).masked_fill_(~positive, -math.inf)
        loss += softplus(above, threshold=40.0).sum(1)
        similar += s.masked_fill(~positive, 0.0).sum(1)
        n_positive += positive.sum(1)
        if want_pull:
            w = above.sigmoid_()
            weight += w.sum(1)
            pull = torch.addmm(pull, w, tile)
    return _Positives(loss, weight, similar, pull, n_positive)


def contrast_all(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    mix_lse: Tensor | None,  # [A] log-sum of the synthesised negatives
    mix_mean: Tensor | None,  # [A, D] their softmax mean
    temperature: float,
    want_gradient: bool,
    segments: Tensor | None = None,  # [C, G, 2] int64, instead of key_labels
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_all`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, key_labels, segments, temperature)
    lse, mean, away, n_negative = _negatives(scene, want_gradient)
    if mix_lse is not None:
        lse, mean = merge_mixes(lse, mean, mix_lse, mix_mean)
    loss, weight, similar, pull, n_positive = _positives(scene, lse, want_gradient)
    counted = (n_positive > 0) & (n_negative > 0)
    share = torch.where(counted, 1 / n_positive.clamp(min=1).to(loss.dtype), 0.0)
    similar = similar * temperature / n_positive.clamp(min=1)
    away = away * temperature / n_negative.clamp(min=1)
    loss = torch.where(counted, loss * share, 0.0)
    gradient = loss.new_zeros(0)
    if want_gradient:
        gradient = (weight[:, None] * mean - pull) * (share[:, None] / temperature)
    return loss, lse, n_positive, similar, away, gradient


def contrast_negatives(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    segments: Tensor,  # [C, G, 2] int64
    temperature: float,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_negatives`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, None, segments, temperature)
    found = _negatives(scene, want_mean)
    mean = found.mean if want_mean else found.lse.new_zeros(0)
    return found.lse, mean, found.away * temperature


def contrast_positives(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    segments: Tensor,  # [C, G, 2] int64
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_positives`; see `pico_fast.contrast`."""
    scene = _scene(anchors, anchor_labels, keys, None, segments, temperature)
    found = _positives(scene, lse, want_pull)
    pull = found.pull if want_pull else found.loss.new_zeros(0)
    return found.loss, found.weight, found.similar * temperature, pull


def merge_mixes(
    lse: Tensor,  # [A] log-sum over selected negatives
    mean: Tensor,  # [A, D] their softmax mean
    mix_lse: Tensor,  # [A] log-sum over synthesised negatives
    mix_mean: Tensor,  # [A, D] their softmax mean
) -> tuple[Tensor, Tensor]:
    """Log-sum [A] and softmax mean [A, D] over both."""
    both = torch.logaddexp(lse, mix_lse)
    safe = both.clamp(min=torch.finfo(both.dtype).min)
    mean = mean * torch.exp(lse - safe)[:, None]
    return both, mean + mix_mean * torch.exp(mix_lse - safe)[:, None]


def _tile(
    queries: Tensor,  # [A, D] anchors / temperature
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K]
    first: int,
) -> tuple[Tensor, Tensor]:
    """Keys of one tile [tile, D], zero where empty, and their s [A, tile]."""
    unused = key_labels[first : first + _TILE, None] < 0
    # an empty slot may hold anything; 0 x nan would still be nan in the products
    tile = keys[first : first + _TILE].to(queries.dtype).masked_fill(unused, 0.0)
    return tile, queries @ tile.T


def contrast_all_keys_grad(
    grad_loss: Tensor,  # [A]
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]
    key_labels: Tensor | None,  # [K] int64
    lse: Tensor,  # [A] of the forward
    positive_count: Tensor,  # [A] int64 of the forward
    temperature: float,
) -> Tensor:
    """Gradient of the keys [K, D] (of the anchors in their part as keys, where keys is None)."""
    in_batch = keys is None
    if in_batch:
        keys, key_labels = anchors, anchor_labels
    dtype = product_dtype(anchors, keys)
    queries = anchors.to(dtype).masked_fill(anchor_labels[:, None] < 0, 0.0) / temperature
    usable = (positive_count > 0) & (lse > -math.inf)
    lse = torch.where(usable, lse, 0.0)[:, None]
    share = torch.where(usable, grad_loss.to(dtype) / positive_count.clamp(min=1), 0.0)[:, None]
    weight = torch.zeros_like(share)
    out = queries.new_zeros(keys.shape)
    for first in range(0, keys.shape[0], _TILE):
        positive, _ = _masks(anchor_labels, key_labels, in_batch, first)
        _, s = _tile(queries, keys, key_labels, first)
        w = (lse - s).masked_fill_(~positive, -math.inf).sigmoid_() * share
        weight += w.sum(1, keepdim=True)
        out[first : first + _TILE] -= w.T @ queries
    for first in range(0, keys.shape[0], _TILE):
        _, negative = _masks(anchor_labels, key_labels, in_batch, first)
        _, s = _tile(queries, keys, key_labels, first)
        p = (s - lse).masked_fill_(~(negative & usable[:, None]), -math.inf).exp_() * weight
        out[first : first + _TILE] += p.T @ queries
    return out
