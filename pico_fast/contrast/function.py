"""The contrast as a function: what the flow finds, with its gradient attached.

Keys of a bank carry no gradient, so the backward is a scale of a matrix that the forward has made. Where
keys carry one (in batch, or where the caller's require it) a second pass over both sides makes theirs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import checks, reference
from pico_fast.bank.share import Share
from pico_fast.contrast import flow, ops, picks
from pico_fast.contrast.picks import Picks
from pico_fast.finite import check_keys, finite_anchors
from pico_fast.selection.eager import class_of_positions
from pico_fast.selection.layout import Cut, Layout
from pico_fast.selection.options import Selection, check_selection
from pico_fast.selection.synthesis import Synthesis, check_synthesis

REDUCTIONS = ("mean", "sum", "none")


class Settings(NamedTuple):
    """What is asked for, checked."""

    selection: Selection
    temperature: float
    synthesis: Synthesis | None
    is_reference: bool


class ContrastRows(NamedTuple):
    """What the contrast says of each anchor."""

    loss: Tensor  # [A], on the graph
    counted: Tensor  # [A] bool, whether it has a positive
    similar: Tensor  # [A] mean inner product with the positives that it is compared with
    away: Tensor  # [A] mean inner product with the negatives


class _OfSide(NamedTuple):
    """What the gradient of keys takes from one side, beside the layout of all keys."""

    key_order: Tensor | None  # [W] int64, with `ranges` those of its sample; None: all keys take part
    ranges: Tensor | None  # [C, G, 2] int64
    ceiling: Tensor | None  # [A], of its cut
    index: Tensor | None  # [A, n] int64, picks
    similarity: Tensor | None  # [A, n]
    factor: Tensor  # [A] what its weights are multiplied by


class _Loss(torch.autograd.Function):
    """A loss [A] whose gradient is known: grad_i times row i of it, and what `saved` tells of the keys.

    `saved` is a layout up to its ranges, its order, Z and what each side has of its own; or nothing.
    `cuts` are count and fraction, of positives and negatives.
    """

    @staticmethod
    def forward(ctx, anchors, keys, loss, gradient, temperature, cuts, *saved):
        ctx.save_for_backward(gradient, *saved)
        ctx.temperature, ctx.cuts = temperature, cuts
        ctx.dtypes = (anchors.dtype, None if keys is None else keys.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        checks.first_order("contrast")
        gradient, *saved = ctx.saved_tensors
        (dtype, keys_dtype), grad_keys = ctx.dtypes, None
        grad_anchors = gradient * grad_loss.unsqueeze(1) if ctx.needs_input_grad[0] else None
        if saved:
            *arranged, order, lse = saved[:7]
            layout = Layout(*arranged, order if keys_dtype is None else None)
            how = (layout, lse, grad_loss.index_select(0, order), ctx.temperature)
            grad_keys = _keys_grad(True, _OfSide(*saved[7:13]), ctx.cuts[0], *how)
            grad_keys = grad_keys + _keys_grad(False, _OfSide(*saved[13:]), ctx.cuts[1], *how)
        if saved and keys_dtype is None:
            grad_anchors, grad_keys = grad_anchors + grad_keys, None
        if grad_anchors is not None:
            grad_anchors = grad_anchors.to(dtype)
        if grad_keys is not None:
            grad_keys = grad_keys.to(keys_dtype)
        return grad_anchors, grad_keys, *[None] * (4 + len(saved))


def _keys_grad(
    own: bool,
    side: _OfSide,
    cut: tuple[int, float],
    layout: Layout,  # of all keys
    lse: Tensor,  # [A]
    grad_loss: Tensor,  # [A]
    temperature: float,
) -> Tensor:
    """What one side adds to the gradient of the keys [K, D]."""
    weighted = (lse, side.factor * grad_loss.to(side.factor.dtype), temperature)
    if side.index is not None:
        chosen = Picks(side.index, side.similarity)
        return picks.keys_grad(chosen, layout.anchors, layout.keys.shape[0], own, *weighted)
    if side.ranges is not None:
        layout = layout._replace(key_order=side.key_order, ranges=side.ranges)
    return ops.keys_grad(layout, Cut(side.ceiling, *cut), own, *weighted)


def _by_reference(pairs: tuple, settings: Settings, mixes: tuple | None, seed: Tensor) -> ContrastRows:
    (anchors, anchor_labels, *of_keys), selection = pairs, settings.selection
    loss, counted = reference.contrast(*pairs, settings.temperature, selection, mixes, seed)
    used, _ = finite_anchors(anchors, anchor_labels)
    *chosen, similar, away = reference.select_keys(anchors, used, *of_keys, selection, seed)
    n_similar, n_away = ((index >= 0).sum(1).clamp(min=1) for index in chosen)
    return ContrastRows(loss, counted, similar.sum(1) / n_similar, away.sum(1) / n_away)


def contrast_rows(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: those of `share`, or else the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    share: Share | None,
    settings: Settings,
    seed: Tensor,  # [] int64, that of all ranks
    first_row: int = 0,  # number of this rank's first anchor among those of all ranks
) -> ContrastRows:
    """`contrast` behind its checks, anchor by anchor; with a bank in shares all ranks call it together."""
    selection, temperature, synthesis, is_reference = settings
    mixes = None
    if synthesis is not None and synthesis.per_anchor:
        mixes = (synthesis.negative_negative, synthesis.negative_anchor, synthesis.pool)
    if is_reference:
        if share is not None:
            keys, key_labels = share.keys, class_of_positions(share.ranges, share.keys.shape[0])
        return _by_reference((anchors, anchor_labels, keys, key_labels), settings, mixes, seed)

    records = torch.is_grad_enabled()
    wants_anchors = records and anchors.requires_grad
    in_batch = keys is None and share is None
    wants_keys = wants_anchors if in_batch else records and keys is not None and keys.requires_grad
    with torch.no_grad():
        rows = anchors.detach()
        used, spoiled = finite_anchors(rows, anchor_labels)
        layout = flow.lay_out(rows, used, None if keys is None else keys.detach(), key_labels, share)
        options = flow.Options(selection, temperature, mixes, seed, first_row, wants_anchors)
        found, pulled, pushed = flow.contrast(layout, share, options)
        loss, counted, similar, away = map(layout.restore, found[:4])
        loss = loss.masked_fill(spoiled, math.nan)
        gradient, saved = found.gradient, ()
        if wants_anchors:
            gradient = layout.restore(gradient).masked_fill(spoiled.unsqueeze(1), math.nan)
        if wants_keys:
            saved = (*layout[:5], layout.order, found.lse)
            for side, factor in ((pulled, found.pull), (pushed, found.push)):
                # no tensor twice: a compiler refuses that in the arguments of an autograd Function
                is_sampled = selection.needed(side.own) is not None
                sample = (side.layout.key_order, side.layout.ranges) if is_sampled else (None, None)
                saved += (*sample, side.cut.ceiling, *(side.picks or (None, None)), factor)
    loss = _Loss.apply(anchors, keys, loss, gradient, temperature, (pulled.cut[1:], pushed.cut[1:]), *saved)
    return ContrastRows(loss, counted, similar, away)


def check_pairs(
    anchors: Tensor, anchor_labels: Tensor, keys: Tensor | None, key_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Raise unless anchors, keys and labels belong together; the labels as int64."""
    checks.tensor("anchors", anchors, "[A, D]", "floating")
    checks.tensor("anchor_labels", anchor_labels, "[A]", "integer")
    checks.size("anchor_labels", anchor_labels, 0, anchors.shape[0], "that of anchors")
    checks.same_device("anchor_labels", anchor_labels, "anchors", anchors)
    if anchors.shape[1] == 0:
        raise ValueError(f"anchors: expected at least one channel, got {checks.describe(anchors)}")
    if (keys is None) != (key_labels is None):
        raise ValueError("key_labels: expected together with keys, or neither of the two")
    if keys is None:
        return anchor_labels.long(), None
    checks.tensor("keys", keys, "[K, D]", "floating")
    checks.size("keys", keys, 1, anchors.shape[1], "that of anchors")
    checks.same_device("keys", keys, "anchors", anchors)
    checks.tensor("key_labels", key_labels, "[K]", "integer")
    checks.size("key_labels", key_labels, 0, keys.shape[0], "that of keys")
    checks.same_device("key_labels", key_labels, "anchors", anchors)
    key_labels = key_labels.long()
    check_keys("keys", keys, key_labels)
    return anchor_labels.long(), key_labels


def contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] integer
    keys: Tensor | None = None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None = None,  # [K] integer
    temperature: float = 0.1,
    sampling: str = "all",
    positives: str | None = None,
    num_positives: int = 1024,
    num_negatives: int = 2048,
    hard_fraction: float = 0.1,
    synthesis: Synthesis | None = None,
    seed: int | Tensor = 0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Pixel contrast: pull anchors towards keys of their class, push them from all others.

    With s_ij = <a_i, k_j> / temperature and Z_i = log sum over the negatives of exp(s_in), the loss of
    anchor i is the mean over its positives of softplus(Z_i - s_ip).

    Args:
        anchors: [A, D] float32, bfloat16, float16 or float64, usually rows of unit length.
        anchor_labels: [A], any integer dtype; a negative label is an empty slot.
        keys: [K, D], may differ in dtype from anchors and may require a gradient; None contrasts the
            anchors with one another, a row never with itself, the gradient flowing through both sides.
        key_labels: [K], any integer dtype; a negative label is an empty slot.
        temperature: divides inner products, > 0.
        sampling, positives, num_positives, num_negatives, hard_fraction, seed: which keys an anchor is
            compared with; see `select_keys`.
        synthesis: extra negatives mixed from the hard ones, or None.
        reduction: "mean" over the anchors that have a positive, "sum", or "none".
        impl: None picks by device; "reference" is the specification in plain PyTorch.

    Returns:
        A scalar, or [A] for "none" with 0 where an anchor has no positive or no negative: float32, or
        float64 where an input is float64. Products are made in the keys' dtype where the hardware
        multiplies it, in float32 otherwise; sums always in float32 or better. Without any anchor the
        loss is 0, on the graph. An anchor that holds a nan or an infinity has a loss and a gradient of
        nan, and leaves those of the others as they are; in batch it is no key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or, on a CPU, keys in
            use that are not finite (elsewhere the anchors that are compared with them get nan).

    Source: Wang et al., ICCV 2021, equation 3; PiCo, TPAMI 2024.
    """
    anchor_labels, key_labels = check_pairs(anchors, anchor_labels, keys, key_labels)
    temperature = checks.number("temperature", temperature, above=0.0)
    selection = check_selection(sampling, positives, num_positives, num_negatives, hard_fraction)
    check_synthesis(synthesis)
    checks.choice("reduction", reduction, REDUCTIONS)
    settings = Settings(selection, temperature, synthesis, checks.implementation(impl))
    seed = checks.seed(seed, anchors.device)
    rows = contrast_rows(anchors, anchor_labels, keys, key_labels, None, settings, seed)
    if reduction == "none":
        return rows.loss
    if reduction == "sum":
        return rows.loss.sum()
    return rows.loss.sum() / rows.counted.sum().clamp(min=1)
