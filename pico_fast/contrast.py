"""Contrast of anchors with keys: the ops, their gradient and the public function.

The formula stands in `pico_fast.reference`. Each op returns, for every anchor,

    loss                 0 without a positive or without a negative
    lse                  Z, log-sum over the negatives, -inf without any
    positive_count       int64
    positive_similarity  mean inner product with the positives, 0 without any
    negative_similarity  mean inner product with the negatives, 0 without any
    gradient             d loss_i / d a_i [A, D], or [0] where none is wanted

`contrast_negatives` and `contrast_positives` are the two halves of `contrast_all`, for keys that are a part
of all keys: what each part of the keys adds to

    lse, mean, away               log-sum over the negatives [A], their softmax mean [A, D], or [0], and
                                  the sum of inner products [A]
    loss, weight, similar, pull   for a given lse, sums over the positives: of softplus(lse - s), of w =
                                  sigmoid(lse - s), of inner products [A], and of w k [A, D], or [0]

Keys of a bank carry no gradient, so the backward is a scale of a saved matrix; where keys carry one
(in batch) a second pass makes theirs.
"""

import math

import torch
from torch import Tensor

from pico_fast import checks, contrast_any, contrast_cpu, contrast_selected, reference
from pico_fast.finite import finite_anchors
from pico_fast.selection import check_pairs, check_sampling, product_dtype
from pico_fast.synthesis import Synthesis, check_synthesis

REDUCTIONS = ("mean", "sum", "none")

_ROWS = (
    "(Tensor loss, Tensor lse, Tensor positive_count, Tensor positive_similarity,"
    " Tensor negative_similarity, Tensor gradient)"
)
torch.library.define(
    "pico_fast::contrast_all",
    "(Tensor anchors, Tensor anchor_labels, Tensor? keys, Tensor? key_labels, Tensor? mix_lse,"
    f" Tensor? mix_mean, float temperature, bool want_gradient, Tensor? segments=None) -> {_ROWS}",
)
torch.library.define(
    "pico_fast::contrast_all_keys_grad",
    "(Tensor grad_loss, Tensor anchors, Tensor anchor_labels, Tensor? keys, Tensor? key_labels,"
    " Tensor lse, Tensor positive_count, float temperature) -> Tensor",
)
torch.library.define(
    "pico_fast::contrast_negatives",
    "(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor segments, float temperature,"
    " bool want_mean) -> (Tensor lse, Tensor mean, Tensor away)",
)
torch.library.define(
    "pico_fast::contrast_positives",
    "(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor segments, Tensor lse,"
    " float temperature, bool want_pull)"
    " -> (Tensor loss, Tensor weight, Tensor similar, Tensor pull)",
)
torch.library.define(
    "pico_fast::contrast_selected",
    "(Tensor anchors, Tensor? keys, Tensor positive_index, Tensor negative_index,"
    " Tensor positive_similarity, Tensor negative_similarity, Tensor? mix_lse, Tensor? mix_mean,"
    f" float temperature, bool want_gradient) -> {_ROWS}",
)
torch.library.define(
    "pico_fast::contrast_selected_keys_grad",
    "(Tensor grad_loss, Tensor anchors, Tensor positive_index, Tensor negative_index,"
    " Tensor positive_similarity, Tensor negative_similarity, Tensor lse, float temperature,"
    " SymInt num_keys) -> Tensor",
)


def _register(op: str, key: str, function) -> None:
    def without_autocast(*args):
        # autocast would reach into the products of the implementation
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    torch.library.impl(f"pico_fast::{op}", key, without_autocast)


for _key, _page in (("CPU", contrast_cpu), ("CompositeExplicitAutograd", contrast_any)):
    _register("contrast_all", _key, _page.contrast_all)
    _register("contrast_all_keys_grad", _key, _page.contrast_all_keys_grad)
    _register("contrast_negatives", _key, _page.contrast_negatives)
    _register("contrast_positives", _key, _page.contrast_positives)
for _name in ("contrast_selected", "contrast_selected_keys_grad"):
    _register(_name, "CompositeExplicitAutograd", getattr(contrast_selected, _name))


def _fake_rows(anchors: Tensor, keys: Tensor | None, want_gradient: bool) -> tuple[Tensor, ...]:
    dtype = product_dtype(anchors, anchors if keys is None else keys)
    rows = [anchors.new_empty(anchors.shape[0], dtype=dtype) for _ in range(4)]
    count = anchors.new_empty(anchors.shape[0], dtype=torch.int64)
    gradient = anchors.new_empty(anchors.shape if want_gradient else (0,), dtype=dtype)
    return rows[0], rows[1], count, rows[2], rows[3], gradient


@torch.library.register_fake("pico_fast::contrast_all")
def _(
    anchors, anchor_labels, keys, key_labels, mix_lse, mix_mean, temperature, want, segments=None
):
    return _fake_rows(anchors, keys, want)


@torch.library.register_fake("pico_fast::contrast_all_keys_grad")
def _(grad_loss, anchors, anchor_labels, keys, key_labels, lse, positive_count, temperature):
    keys = anchors if keys is None else keys
    return keys.new_empty(keys.shape, dtype=product_dtype(anchors, keys))


@torch.library.register_fake("pico_fast::contrast_negatives")
def _(anchors, anchor_labels, keys, segments, temperature, want_mean):
    _, lse, _, _, away, mean = _fake_rows(anchors, keys, want_mean)
    return lse, mean, away


@torch.library.register_fake("pico_fast::contrast_positives")
def _(anchors, anchor_labels, keys, segments, lse, temperature, want_pull):
    loss, weight, _, similar, _, pull = _fake_rows(anchors, keys, want_pull)
    return loss, weight, similar, pull


@torch.library.register_fake("pico_fast::contrast_selected")
def _(anchors, keys, *rest):
    return _fake_rows(anchors, keys, rest[-1])


@torch.library.register_fake("pico_fast::contrast_selected_keys_grad")
def _(grad_loss, anchors, *rest):
    return rest[4].new_empty(rest[-1], anchors.shape[1])


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        anchors,
        anchor_labels,
        keys,
        key_labels,
        seed,
        temperature,
        sampling,
        num_positives,
        num_negatives,
        hard_fraction,
        mixes,
        segments,
    ):
        ops = torch.ops.pico_fast
        wants_anchors, wants_keys = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        anchor_labels, spoiled = finite_anchors(anchors, anchor_labels)
        pairs = (anchors, anchor_labels, keys, key_labels)
        chosen = None
        if sampling != "all":
            counts = (num_positives, num_negatives)
            chosen = ops.select_keys(*pairs, sampling, *counts, hard_fraction, seed, segments)
        mixed = (None, None)
        if mixes is not None:
            negative_negative, negative_anchor, pool = mixes
            if chosen is None:
                choice = ("hardest", 1, pool, hard_fraction, seed, segments)
                hardest = ops.select_keys(*pairs, *choice)[1]
            else:
                hardest = chosen[1].narrow(1, 0, min(pool, chosen[1].shape[1]))
            mixed = ops.mix_negatives(
                anchors, keys, hardest, negative_negative, negative_anchor, temperature, seed
            )
        if chosen is None:
            found = ops.contrast_all(*pairs, *mixed, temperature, wants_anchors, segments)
        else:
            found = ops.contrast_selected(
                anchors, keys, *chosen, *mixed, temperature, wants_anchors
            )
        loss, lse, positive_count, similar, away, gradient = found
        loss = loss.masked_fill(spoiled, math.nan)
        if wants_anchors:
            gradient = gradient.masked_fill(spoiled.unsqueeze(1), math.nan)

        ctx.in_batch = keys is None and wants_anchors
        ctx.temperature = temperature
        ctx.dtype = anchors.dtype
        ctx.sampled = chosen is not None
        # keys without a gradient are not kept: a bank may be written before the backward
        second_pass = ()
        if ctx.in_batch or wants_keys:
            ctx.num_keys = (anchors if keys is None else keys).shape[0]
            ctx.keys_dtype = (anchors if keys is None else keys).dtype
            of_all = (*pairs, lse, positive_count)
            second_pass = of_all if chosen is None else (anchors, *chosen, lse)
        ctx.save_for_backward(gradient if wants_anchors else None, *second_pass)
        counted = positive_count > 0
        ctx.mark_non_differentiable(counted, similar, away)
        return loss, counted, similar, away

    @staticmethod
    def backward(ctx, grad_loss, *_):
        checks.first_order("contrast")
        gradient, *second_pass = ctx.saved_tensors
        grad_anchors = grad_keys = None
        if ctx.needs_input_grad[0]:
            grad_anchors = gradient * grad_loss.unsqueeze(1)
        if second_pass:
            ops = torch.ops.pico_fast
            if ctx.sampled:
                grad_keys = ops.contrast_selected_keys_grad(
                    grad_loss, *second_pass, ctx.temperature, ctx.num_keys
                )
            else:
                grad_keys = ops.contrast_all_keys_grad(grad_loss, *second_pass, ctx.temperature)
        if ctx.in_batch:
            grad_anchors, grad_keys = grad_anchors + grad_keys, None
        if grad_anchors is not None:
            grad_anchors = grad_anchors.to(ctx.dtype)
        if grad_keys is not None:
            grad_keys = grad_keys.to(ctx.keys_dtype)
        return grad_anchors, None, grad_keys, *[None] * 9


def contrast_rows(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]
    key_labels: Tensor | None,  # [K] int64
    seed: Tensor,  # [] int64
    temperature: float,
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    synthesis: Synthesis | None,
    is_reference: bool,
    segments: Tensor
    | None = None,  # [C, G, 2] int64, first row and length of each part of each class
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`contrast` behind its checks, anchor by anchor; the ops take segments in the place of key_labels.

    Returns loss [A], whether the anchor has a positive [A] bool, and the mean inner product with the
    positives and with the negatives that it is compared with [A].
    """
    mixes = None
    if synthesis is not None and synthesis.per_anchor:
        mixes = (synthesis.negative_negative, synthesis.negative_anchor, synthesis.pool)
    choice = (sampling, num_positives, num_negatives, hard_fraction)
    if not is_reference:
        pairs = (anchors, anchor_labels, keys, key_labels)
        return _Contrast.apply(*pairs, seed, temperature, *choice, mixes, segments)
    pairs = (anchors, anchor_labels, keys, key_labels)
    loss, counted = reference.contrast(*pairs, temperature, *choice, mixes, seed)
    pairs = (anchors, finite_anchors(anchors, anchor_labels)[0], keys, key_labels)
    chosen = reference.select_keys(*pairs, *choice, seed)
    similar, away = (
        products.sum(1) / (index >= 0).sum(1).clamp(min=1)
        for index, products in zip(chosen[:2], chosen[2:], strict=True)
    )
    return loss, counted, similar, away


def contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] integer
    keys: Tensor | None = None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None = None,  # [K] integer
    temperature: float = 0.1,
    sampling: str = "all",
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
        sampling, num_positives, num_negatives, hard_fraction, seed: which keys an anchor is compared
            with; see `select_keys`.
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
    check_sampling(sampling, num_positives, num_negatives, hard_fraction)
    check_synthesis(synthesis)
    checks.choice("reduction", reduction, REDUCTIONS)
    choice = (sampling, num_positives, num_negatives, hard_fraction)
    loss, counted, _, _ = contrast_rows(
        anchors,
        anchor_labels,
        keys,
        key_labels,
        checks.seed(seed, anchors.device),
        temperature,
        *choice,
        synthesis,
        checks.implementation(impl),
    )
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / counted.sum().clamp(min=1)
