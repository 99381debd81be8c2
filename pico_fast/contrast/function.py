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
from pico_fast.contrast.flow import Side
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


class _Common(NamedTuple):
    """What the gradient of keys is made of, and both sides have in common."""

    anchors: Tensor  # [A, D] in class order
    anchor_class: Tensor  # [A] int64
    keys: Tensor  # [K, D]
    key_order: Tensor | None  # [W] int64, of all keys
    ranges: Tensor  # [C, G, 2] int64
    order: Tensor  # [A] int64
    lse: Tensor  # [A]


class _OfSide(NamedTuple):
    """And what each side has of its own."""

    key_order: Tensor | None  # [W] int64, with `ranges` those of its sample; None: all keys take part
    ranges: Tensor | None  # [C, G, 2] int64
    ceiling: Tensor | None  # [A], of its cut
    index: Tensor | None  # [A, n] int64, picks
    similarity: Tensor | None  # [A, n]
    factor: Tensor  # [A] what its weights are multiplied by


def _of_side(side: Side, selection: Selection, factor: Tensor) -> _OfSide:
    # no tensor twice: a compiler refuses that in the arguments of an autograd Function
    is_sampled = selection.needed(side.own) is not None
    sample = (side.layout.key_order, side.layout.ranges) if is_sampled else (None, None)
    return _OfSide(*sample, side.cut.ceiling, *(side.picks or (None, None)), factor)


def _keys_grad(
    own: bool,
    common: _Common,
    side: _OfSide,
    grad_loss: Tensor,  # [A]
    temperature: float,
    cuts: tuple[tuple[int, float], ...],  # count and fraction, of positives and negatives
    in_batch: bool,
) -> Tensor:
    """What one side adds to the gradient of the keys [K, D]."""
    factor = side.factor * grad_loss.index_select(0, common.order).to(side.factor.dtype)
    weighted = (common.lse, factor, temperature)
    if side.index is not None:
        chosen = Picks(side.index, side.similarity)
        return picks.keys_grad(chosen, common.anchors, common.keys.shape[0], own, *weighted)
    where = (common.key_order, common.ranges) if side.ranges is None else side[:2]
    layout = Layout(*common[:3], *where, common.order if in_batch else None)
    cut = Cut(side.ceiling, *cuts[0 if own else 1])
    return ops.keys_grad(layout, cut, own, *weighted)


class _Loss(torch.autograd.Function):
    """A loss [A] whose gradient is known: grad_i times row i of it, and what `saved` tells of the keys."""

    @staticmethod
    def forward(ctx, anchors, keys, loss, gradient, temperature, cuts, in_batch, *saved):
        ctx.save_for_backward(gradient, *saved)
        ctx.temperature, ctx.cuts, ctx.in_batch = temperature, cuts, in_batch
        ctx.dtypes = (anchors.dtype, None if keys is None else keys.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        checks.first_order("contrast")
        gradient, *saved = ctx.saved_tensors
        grad_anchors = grad_keys = None
        if ctx.needs_input_grad[0]:
            grad_anchors = gradient * grad_loss.unsqueeze(1)
        if saved:
            common, sides = _Common(*saved[:7]), (_OfSide(*saved[7:13]), _OfSide(*saved[13:]))
            how = (grad_loss, ctx.temperature, ctx.cuts, ctx.in_batch)
            grad_keys = _keys_grad(True, common, sides[0], *how)
            grad_keys = grad_keys + _keys_grad(False, common, sides[1], *how)
        if ctx.in_batch and saved:
            grad_anchors, grad_keys = grad_anchors + grad_keys, None
        if grad_anchors is not None:
            grad_anchors = grad_anchors.to(ctx.dtypes[0])
        if grad_keys is not None:
            grad_keys = grad_keys.to(ctx.dtypes[1])
        return grad_anchors, grad_keys, *[None] * (5 + len(saved))


def _by_reference(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    settings: Settings,
    mixes: tuple[int, int, int] | None,
    seed: Tensor,
) -> ContrastRows:
    pairs, selection = (anchors, anchor_labels, keys, key_labels), settings.selection
    loss, counted = reference.contrast(*pairs, settings.temperature, selection, mixes, seed)
    pairs = (anchors, finite_anchors(anchors, anchor_labels)[0], keys, key_labels)
    chosen = reference.select_keys(*pairs, selection, seed)
    means = (
        products.sum(1) / (index >= 0).sum(1).clamp(min=1)
        for index, products in zip(chosen[:2], chosen[2:], strict=True)
    )
    return ContrastRows(loss, counted, *means)


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
        return _by_reference(anchors, anchor_labels, keys, key_labels, settings, mixes, seed)

    records = torch.is_grad_enabled()
    wants_anchors = records and anchors.requires_grad
    in_batch = keys is None and share is None
    wants_keys = wants_anchors if in_batch else records and keys is not None and keys.requires_grad
    with torch.no_grad():
        rows = anchors.detach()
        used, spoiled = finite_anchors(rows, anchor_labels)
        layout = flow.lay_out(rows, used, None if keys is None else keys.detach(), key_labels, share)
        options = (selection, temperature, mixes, seed, first_row, wants_anchors)
        found, pulled, pushed = flow.contrast(layout, share, flow.Options(*options))
        loss, counted, similar, away = map(layout.restore, found[:4])
        loss = loss.masked_fill(spoiled, math.nan)
        gradient, saved = found.gradient, ()
        if wants_anchors:
            gradient = layout.restore(gradient).masked_fill(spoiled.unsqueeze(1), math.nan)
        if wants_keys:
            common = _Common(*layout[:5], layout.order, found.lse)
            sides = ((pulled, found.pull), (pushed, found.push))
            saved = (*common, *(x for s in sides for x in _of_side(s[0], selection, s[1])))
    cuts = tuple((side.cut.count, side.cut.fraction) for side in (pulled, pushed))
    loss = _Loss.apply(anchors, keys, loss, gradient, temperature, cuts, in_batch, *saved)
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
    rows = contrast_rows(
        anchors,
        anchor_labels,
        keys,
        key_labels,
        None,
        Settings(selection, temperature, synthesis, checks.implementation(impl)),
        checks.seed(seed, anchors.device),
    )
    if reduction == "none":
        return rows.loss
    if reduction == "sum":
        return rows.loss.sum()
    return rows.loss.sum() / rows.counted.sum().clamp(min=1)
