"""The ops of selection: schemas, implementations on a CPU and in PyTorch, fakes.

Those of a layout take its six tensors first (see `layout.Layout`). Similarities are inner products, not
divided by the temperature, in float64 where anchors or keys are float64, else in float32.

    sample_keys    some keys of each class: a smaller layout's key_order and ranges
    hardest        lists of the hardest keys of each anchor, hardest first unless nobody asks for an order;
                   with a ceiling how many lie below it, else [0]
    weighted_rows  sums of listed keys by weight
    mix_negatives  log-sum and softmax mean of synthesised negatives
"""

import torch

from pico_fast.regions import why_not_compiled
from pico_fast.selection import cpu, eager
from pico_fast.selection.layout import Layout, product_dtype

LAYOUT = (
    "Tensor anchors, Tensor anchor_class, Tensor keys, Tensor? key_order, Tensor ranges, Tensor? own_key"
)
_SCHEMAS = {
    "sample_keys": "(Tensor ranges, Tensor names, Tensor? key_order, SymInt need, bool own,"
    " Tensor seed, SymInt capacity) -> (Tensor key_order, Tensor ranges)",
    "hardest": f"({LAYOUT}, bool own, Tensor? ceiling, SymInt count, bool by_place, bool in_order=True)"
    " -> (Tensor index, Tensor similarity, Tensor below)",
    "weighted_rows": "(Tensor keys, Tensor index, Tensor weight) -> Tensor",
    "mix_negatives": "(Tensor anchors, Tensor keys, Tensor pool_index, Tensor row,"
    " int negative_negative, int negative_anchor, float temperature, Tensor seed)"
    " -> (Tensor mix_lse, Tensor mix_mean)",
}


def register(op: str, key: str, function, pack) -> None:
    """Make `function` the implementation of an op for a dispatch key, called with what `pack` returns."""

    def without_autocast(*args):
        # autocast would reach into the products of the implementation
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*pack(*args))

    torch.library.impl(f"pico_fast::{op}", key, without_autocast)


def implement(op: str, key: str, function) -> None:
    """Make `function` the implementation of an op of this page; a layout it takes in one piece."""
    register(op, key, function, lambda *args: (Layout(*args[:6]), *args[6:]) if op == "hardest" else args)


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"pico_fast::{_name}", _schema)
    implement(_name, "CompositeExplicitAutograd", getattr(eager, _name))
# the others have one in csrc/
if why_not_compiled is None:
    implement("hardest", "CPU", cpu.hardest)

sample_keys = torch.ops.pico_fast.sample_keys.default
weighted_rows = torch.ops.pico_fast.weighted_rows.default
mix_negatives = torch.ops.pico_fast.mix_negatives.default


def hardest(layout: Layout, *rest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `hardest` for a layout."""
    return torch.ops.pico_fast.hardest(*layout.tensors, *rest)


@torch.library.register_fake("pico_fast::sample_keys")
def _(ranges, names, key_order, need, own, seed, capacity):
    return ranges.new_empty(capacity), ranges.new_empty(ranges.shape[0], 1, 2)


@torch.library.register_fake("pico_fast::hardest")
def _(anchors, anchor_class, keys, key_order, ranges, own_key, own, ceiling, count, *_):
    index = anchor_class.new_empty(anchors.shape[0], count)
    below = anchor_class.new_empty(0 if ceiling is None else anchors.shape[0])
    return index, anchors.new_empty(index.shape, dtype=product_dtype(anchors, keys)), below


@torch.library.register_fake("pico_fast::weighted_rows")
def _(keys, index, weight):
    return weight.new_empty(weight.shape[0], keys.shape[1])


@torch.library.register_fake("pico_fast::mix_negatives")
def _(anchors, keys, *_):
    dtype = product_dtype(anchors, keys)
    return anchors.new_empty(anchors.shape[0], dtype=dtype), anchors.new_empty(anchors.shape, dtype=dtype)
