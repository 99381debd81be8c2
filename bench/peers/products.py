"""Products that several peers need: with any keys, with those of the own class, with picked ones."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def product(
    left: Tensor,  # [n, D] or [C, n, D]
    right: Tensor,  # [D, m] or [C, D, m]
    out: Tensor | None = None,  # [n, m] or [C, n, m], float32; a place to write to if the product is
) -> Tensor:
    """A matrix product in float32; of 16-bit factors, summed in float32, where `right` is so on a GPU."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if right.is_cuda and right.element_size() == 2:
        return multiply(left.to(right.dtype), right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return multiply(left.to(dtype), right.to(dtype), out=out)


def bank_of(
    keys: Tensor,  # [K, D], sorted by class, classes of one size
    key_labels: Tensor,  # [K] int64
) -> Tensor:
    """The keys class by class, a view [C, T, D]; the number of classes is read back."""
    return keys.unflatten(0, (int(key_labels[-1]) + 1, -1))


def _rows_by_class(labels: Tensor, classes: int) -> tuple[Tensor, int]:
    """Row [A] of each anchor in a table of `classes` times so many rows; that number is read back."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=classes)
    ascending = torch.arange(len(labels), device=labels.device)
    place = torch.empty_like(order)
    place[order] = ascending - (counts.cumsum(0) - counts)[labels[order]]
    most = int(counts.max())
    return labels * most + place, most


def own_class_product(
    anchors: Tensor,  # [A, D] float32
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
) -> Tensor:
    """Inner products of each anchor with the keys of its class: [A, T].

    One batched product. Every class has room for as many anchors as the one with the most of them.
    """
    classes = len(bank)
    row, most = _rows_by_class(labels, classes)
    table = anchors.new_zeros(classes * most, anchors.shape[1])
    table[row] = anchors
    return product(table.view(classes, most, -1), bank.mT).flatten(0, 1)[row]


def own_class_sum(
    weights: Tensor,  # [A, T] float32
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
) -> Tensor:
    """Weighted sum of the keys of each anchor's class [A, D], as one batched product."""
    classes = len(bank)
    row, most = _rows_by_class(labels, classes)
    table = weights.new_zeros(classes * most, weights.shape[1])
    table[row] = weights
    return product(table.view(classes, most, -1), bank).flatten(0, 1)[row]


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, keys, index, similarity):
        ctx.save_for_backward(keys, index)
        ctx.dtype = anchors.dtype
        return similarity.view_as(similarity)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        keys, index = ctx.saved_tensors
        weights = gradient.to(keys.dtype)
        rows = embedding_bag(index, keys, per_sample_weights=weights, mode="sum")
        return rows.to(ctx.dtype), None, None, None


def picked(
    anchors: Tensor,  # [A, D], may require grad
    keys: Tensor,  # [K, D]
    index: Tensor,  # [A, N] int64
    similarity: Tensor,  # [A, N] inner products of the anchors with keys[index]
) -> Tensor:
    """Similarities that are already known [A, N], with their gradient on the anchors.

    The gradient is an embedding bag: it reads the picked rows where they lie and copies none.
    """
    return _Picked.apply(anchors, keys, index, similarity)
