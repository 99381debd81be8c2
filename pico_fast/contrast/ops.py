"""The ops of the contrast: schemas, implementations on a CPU and in PyTorch, fakes.

Each takes the six tensors of a layout (`selection.layout.Layout`), then the cut that says which of its keys
count (`selection.layout.Cut`). With the inner product s of a pair they return:

    negatives   log-sum of exp(s / temperature), softmax mean of the keys [A, D] or [0], sum of s;
                with a ceiling how many keys lie below it [A] int64, else [0]
    positives   for a given lse, sums of softplus(lse - s / temperature), of the weight
                w = sigmoid(lse - s / temperature), of s, and of w k [A, D] or [0]
    keys_grad   for each key [K, D] the sum over anchors of factor p a (negatives), -factor w a (positives)
"""

import torch

from pico_fast.contrast import cpu, eager
from pico_fast.contrast.weights import Negatives, Positives
from pico_fast.regions import why_not_compiled
from pico_fast.selection.layout import Cut, Layout, product_dtype
from pico_fast.selection.ops import LAYOUT, register

_CUT = "Tensor? ceiling, int count, float fraction"
_SCHEMAS = {
    "negatives": f"({LAYOUT}, {_CUT}, float temperature, bool want_mean)"
    " -> (Tensor lse, Tensor mean, Tensor away, Tensor below)",
    "positives": f"({LAYOUT}, {_CUT}, Tensor lse, float temperature, bool want_pull)"
    " -> (Tensor loss, Tensor weight, Tensor similar, Tensor pull)",
    "keys_grad": f"({LAYOUT}, {_CUT}, bool own, Tensor lse, Tensor factor, float temperature) -> Tensor",
}


def implement(op: str, key: str, function) -> None:
    """Make `function` the implementation of an op; it takes the layout and the cut in one piece each."""
    register(op, key, function, lambda *args: (Layout(*args[:6]), Cut(*args[6:9]), *args[9:]))


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"pico_fast::{_name}", _schema)
    implement(_name, "CompositeExplicitAutograd", getattr(eager, _name))
    if why_not_compiled is None:
        implement(_name, "CPU", getattr(cpu, _name))


def negatives(layout: Layout, cut: Cut, *rest) -> Negatives:
    """The op `negatives` for a layout and a cut."""
    return Negatives(*torch.ops.pico_fast.negatives(*layout.tensors, *cut, *rest))


def positives(layout: Layout, cut: Cut, *rest) -> Positives:
    """The op `positives` for a layout and a cut."""
    return Positives(*torch.ops.pico_fast.positives(*layout.tensors, *cut, *rest))


def keys_grad(layout: Layout, cut: Cut, *rest) -> torch.Tensor:
    """The op `keys_grad` for a layout and a cut."""
    return torch.ops.pico_fast.keys_grad(*layout.tensors, *cut, *rest)


def _rows(anchors, keys, n: int, want_matrix: bool) -> list:
    """n rows [A] and a matrix [A, D], or [0]."""
    dtype = product_dtype(anchors, keys)
    rows = [anchors.new_empty(anchors.shape[0], dtype=dtype) for _ in range(n)]
    return [*rows, anchors.new_empty(anchors.shape if want_matrix else (0,), dtype=dtype)]


@torch.library.register_fake("pico_fast::negatives")
def _(anchors, anchor_class, keys, key_order, ranges, own_key, ceiling, *rest):
    lse, away, mean = _rows(anchors, keys, 2, rest[-1])
    return lse, mean, away, anchor_class.new_empty(0 if ceiling is None else anchors.shape[0])


@torch.library.register_fake("pico_fast::positives")
def _(anchors, anchor_class, keys, *rest):
    return tuple(_rows(anchors, keys, 3, rest[-1]))


@torch.library.register_fake("pico_fast::keys_grad")
def _(anchors, anchor_class, keys, *_):
    return keys.new_empty(keys.shape, dtype=product_dtype(anchors, keys))
