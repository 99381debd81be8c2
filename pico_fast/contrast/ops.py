"""The ops of the contrast: schemas, implementations on a CPU and in PyTorch, fakes.

Each takes the six tensors of a layout (`selection.layout.Layout`), then the bounds within which a key
counts (`selection.layout.Bounds`; None: every one). With the inner product s of a pair they return:

    negatives   log-sum of exp(s / temperature), softmax mean of the keys [A, D] or [0], sum of s
    positives   for a given lse, sums of softplus(lse - s / temperature), of the weight
                w = sigmoid(lse - s / temperature), of s, and of w k [A, D] or [0]
    keys_grad   for each key [K, D] the sum over anchors of factor p a (negatives), -factor w a (positives)
"""

import torch

from pico_fast.contrast import cpu, eager
from pico_fast.regions import why_not_compiled
from pico_fast.selection.layout import product_dtype
from pico_fast.selection.ops import LAYOUT, register

_BOUNDS = "Tensor? ceiling, Tensor? threshold, Tensor? ties"
_SCHEMAS = {
    "negatives": f"({LAYOUT}, {_BOUNDS}, float temperature, bool want_mean)"
    " -> (Tensor lse, Tensor mean, Tensor away)",
    "positives": f"({LAYOUT}, {_BOUNDS}, Tensor lse, float temperature, bool want_pull)"
    " -> (Tensor loss, Tensor weight, Tensor similar, Tensor pull)",
    "keys_grad": f"({LAYOUT}, bool own, {_BOUNDS}, Tensor lse, Tensor factor, float temperature)"
    " -> Tensor",
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"pico_fast::{_name}", _schema)
    register(_name, "CompositeExplicitAutograd", getattr(eager, _name))
    if why_not_compiled is None:
        register(_name, "CPU", getattr(cpu, _name))

negatives = torch.ops.pico_fast.negatives.default
positives = torch.ops.pico_fast.positives.default
keys_grad = torch.ops.pico_fast.keys_grad.default


def _rows(anchors, keys, n: int, want_matrix: bool) -> list:
    """n rows [A] and a matrix [A, D], or [0]."""
    dtype = product_dtype(anchors, keys)
    rows = [anchors.new_empty(anchors.shape[0], dtype=dtype) for _ in range(n)]
    return [*rows, anchors.new_empty(anchors.shape if want_matrix else (0,), dtype=dtype)]


@torch.library.register_fake("pico_fast::negatives")
def _(anchors, anchor_class, keys, *rest):
    lse, away, mean = _rows(anchors, keys, 2, rest[-1])
    return lse, mean, away


@torch.library.register_fake("pico_fast::positives")
def _(anchors, anchor_class, keys, *rest):
    return tuple(_rows(anchors, keys, 3, rest[-1]))


@torch.library.register_fake("pico_fast::keys_grad")
def _(anchors, anchor_class, keys, *_):
    return keys.new_empty(keys.shape, dtype=product_dtype(anchors, keys))
