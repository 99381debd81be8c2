"""Contrast with all keys on an NVIDIA GPU: launching `pico_fast.kernels.contrast`.

Nothing is read back to the host: sizes that depend on the data (how many keys of a class, which classes
have anchors) stay on the device, in the order and the ranges that `class_order` makes.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pico_fast.class_order import class_order, spread_tiles
from pico_fast.kernels import configs, contrast, contrast_ends
from pico_fast.pass_gpu import Pass, make_pass, products, takes, tile_dtype

__all__ = [
    "contrast_all",
    "contrast_all_keys_grad",
    "contrast_negatives",
    "contrast_positives",
    "takes",
]


class _Negatives(NamedTuple):
    """What the negatives add up to, anchors in class order."""

    lse: Tensor  # [A] float32
    dissimilar: Tensor  # [A] float32, sum of the inner products
    centre: Tensor  # [A, D] float32, softmax mean; [0] where none is wanted


def _negatives(
    work: Pass,
    mix_lse: Tensor | None,  # [A]
    mix_mean: Tensor | None,  # [A, D]
    want_mean: bool,
) -> _Negatives:
    n_anchors, channels = work.queries.shape
    arranged = work.arranged
    fixed = work.keys.dtype != torch.float16  # which has too few exponents for a fixed shift
    new = functools.partial(torch.empty, device=work.queries.device)
    scale = math.log2(math.e) / work.temperature
    # inner products with unit keys are at most this; longer ones raise the flag
    bound = torch.linalg.vector_norm(work.queries, dim=1, dtype=torch.float32) * scale
    flag = torch.zeros(1, dtype=torch.int32, device=work.queries.device)
    found = _Negatives(
        new(n_anchors),
        new(n_anchors),
        new((n_anchors, channels) if want_mean else 0),
    )
    gather = arranged.key_order is not None
    # at first with a fixed shift; again with the running maximum, which does nothing unless flagged
    for running in (False, True) if fixed else (True,):
        launch = configs.negatives(work.generation, work.keys.dtype, channels, running, gather)
        splits = work.splits(launch, triton.cdiv(work.keys.shape[0], launch.BN))
        top, total, away = (new(splits, n_anchors) for _ in range(3))
        mean = new((splits, n_anchors, channels) if want_mean else 0)
        tiles, bounds, first_span = spread_tiles(arranged.spans, launch.BN, splits)
        modes = {
            "RUNNING": running,
            "RUNNING_IF_FLAGGED": running and fixed,
            "WANT_MEAN": want_mean,
        }
        contrast.negatives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
            bound=bound,
            tiles=tiles,
            bounds=bounds,
            first_span=first_span,
            top=top,
            total=total,
            away=away,
            mean=mean,
            flag=flag,
            scale=scale,
            **modes,
            **work.options(launch),
        )
        contrast_ends.merge_kernel[(triton.cdiv(n_anchors, configs.ENDS.BM),)](
            order=arranged.order,
            low=arranged.low,
            top=top,
            total=total,
            away=away,
            negatives=arranged.negatives,
            mean=mean,
            mix_lse=top if mix_lse is None else mix_lse,
            mix_mean=mean if mix_mean is None else mix_mean,
            lse=found.lse,
            dissimilar=found.dissimilar,
            centre=found.centre,
            flag=flag,
            n_anchors=n_anchors,
            splits=splits,
            BR=configs.ENDS.BM,
            MIXED=mix_lse is not None,
            num_warps=configs.ENDS.num_warps,
            **modes,
            **work.sizes,
        )
    return found


class _Rows(NamedTuple):
    """The op's outputs and the weight that the keys' gradient needs, anchors in their own order."""

    loss: Tensor  # [A] float32
    lse: Tensor  # [A] float32
    positive_count: Tensor  # [A] int64
    positive_similarity: Tensor  # [A] float32
    negative_similarity: Tensor  # [A] float32
    gradient: Tensor  # [A, D] float32, or [0]
    weight: Tensor  # [A] float32


def _positives(
    work: Pass,
    negatives: _Negatives,
    in_batch: bool,
    want_gradient: bool,
) -> _Rows:
    n_anchors, channels = work.queries.shape
    arranged = work.arranged
    launch = configs.positives(work.keys.dtype, channels)
    # a class is a small part of the keys: no more parts than can be busy
    splits = work.splits(launch, min(8, triton.cdiv(work.keys.shape[0], launch.BN)))
    new = functools.partial(torch.empty, device=work.queries.device)
    loss, weight, similar = (new(splits, n_anchors) for _ in range(3))
    pull = new((splits, n_anchors, channels) if want_gradient else 0)
    contrast.positives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
        low_span=arranged.low_span,
        high_span=arranged.high_span,
        lse=negatives.lse,
        loss=loss,
        weight=weight,
        similar=similar,
        pull=pull,
        splits=splits,
        scale=1 / work.temperature,
        IN_BATCH=in_batch,
        WANT_PULL=want_gradient,
        **work.options(launch),
    )
    out = _Rows(
        new(n_anchors),
        new(n_anchors),
        new(n_anchors, dtype=torch.int64),
        new(n_anchors),
        new(n_anchors),
        new((n_anchors, channels) if want_gradient else 0),
        new(n_anchors),
    )
    contrast_ends.finish_kernel[(triton.cdiv(n_anchors, configs.ENDS.BM),)](
        order=arranged.order,
        low=arranged.low,
        lse=negatives.lse,
        positives=arranged.positives,
        negatives=arranged.negatives,
        dissimilar=negatives.dissimilar,
        centre=negatives.centre,
        loss_parts=loss,
        weight_parts=weight,
        similar_parts=similar,
        pull_parts=pull,
        loss=out.loss,
        out_lse=out.lse,
        positive_count=out.positive_count,
        similar=out.positive_similarity,
        away=out.negative_similarity,
        weight=out.weight,
        gradient=out.gradient,
        n_anchors=n_anchors,
        splits=splits,
        scale=1 / work.temperature,
        BR=configs.ENDS.BM,
        WANT_GRADIENT=want_gradient,
        num_warps=configs.ENDS.num_warps,
        **work.sizes,
    )
    return out


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
    arranged = class_order(anchor_labels, key_labels, segments)
    work = make_pass(anchors, keys, arranged, temperature)
    negatives = _negatives(work, mix_lse, mix_mean, want_gradient)
    return tuple(_positives(work, negatives, keys is None, want_gradient))[:6]


def contrast_negatives(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    segments: Tensor,  # [C, G, 2] int64
    temperature: float,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_negatives`; see `pico_fast.contrast`."""
    work = make_pass(anchors, keys, class_order(anchor_labels, None, segments), temperature)
    found = _negatives(work, None, None, want_mean)
    order, empty = work.arranged.order, work.arranged.low < 0
    # rows of empty slots were never written
    rows = (
        found.lse.masked_fill(empty, -math.inf),
        found.centre.masked_fill(empty[:, None], 0.0) if want_mean else found.centre,
        found.dissimilar.masked_fill(empty, 0.0),
    )
    lse, mean, away = (torch.empty_like(x).index_copy_(0, order[: len(x)], x) for x in rows)
    return lse, mean, away


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
    arranged = class_order(anchor_labels, None, segments)
    # one positive and one negative a row: sums come out as sums, and for a centre of 0 the gradient is
    # the pull divided by the temperature
    one = torch.ones_like(arranged.positives)
    work = make_pass(anchors, keys, arranged._replace(positives=one, negatives=one), temperature)
    centre = torch.zeros(work.queries.shape if want_pull else 0, device=anchors.device)
    ordered = _Negatives(lse[arranged.order], torch.zeros_like(lse), centre)
    found = _positives(work, ordered, False, want_pull)
    unused = anchor_labels < 0
    loss, weight = (x.masked_fill(unused, 0.0) for x in (found.loss, found.weight))
    return loss, weight, found.positive_similarity, found.gradient * -temperature


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
    arranged = class_order(anchor_labels, key_labels, None)
    work = make_pass(anchors, keys, arranged, temperature)
    n_anchors, n_keys = work.queries.shape[0], work.keys.shape[0]
    # the weights again, from the own class alone
    nothing = lse.new_empty(0)
    ordered = _Negatives(lse[arranged.order], lse, nothing)
    weight = _positives(work, ordered, keys is None, False).weight
    usable = (positive_count > 0) & (lse > -math.inf)
    factor = torch.where(usable, grad_loss.float() / positive_count.clamp(min=1), 0.0)
    launch = configs.keys_grad(work.keys.dtype, anchors.shape[1])
    out = torch.zeros(work.keys.shape, device=anchors.device)
    contrast_ends.keys_grad_kernel[(triton.cdiv(n_keys, launch.BN),)](
        queries=work.queries,
        low=arranged.low,
        high=arranged.high,
        lse=ordered.lse,
        factor=factor[arranged.order],
        weight=weight[arranged.order],
        keys=work.keys,
        key_order=arranged.key_order,
        used_keys=arranged.spans[0, 1:],
        out=out,
        n_anchors=n_anchors,
        key_stride=work.keys.stride(0),
        scale=1 / temperature,
        BM=launch.BM,
        BN=launch.BN,
        IN_BATCH=keys is None,
        PRODUCT=products(work.keys.dtype)["PRODUCT"],
        # float16 has too few exponents for weights of any size; TF32 has its 10 bits and float32's
        WEIGHTS=tl.bfloat16 if tile_dtype(work.keys.dtype) == torch.bfloat16 else tl.float32,
        num_warps=launch.num_warps,
        **work.sizes,
    )
    return out
