"""Layouts for the tests of kernels, and what the ops say of them, pair by pair in float64."""

import contextlib
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from pico_fast import on_gpu
from pico_fast.selection.layout import Layout, of_bank, of_labels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("labels", "in batch", "bank", "full bank", "sample")


def vectors(n, dim, g, kind="random"):
    """Unit rows [n, D]; or "exact" ones, of which every product and sum is exact in every dtype."""
    if kind == "exact":
        return torch.randint(-2, 3, (n, dim), generator=g) / 4
    rows = torch.randn(n, dim, generator=g)
    if kind == "duplicates":
        rows = rows[torch.randint(0, 7, (n,), generator=g)]
    return normalize(rows, dim=1)


def layout(kind, n_anchors, dim, classes, per_class, vectors_kind="random", seed=0) -> Layout:
    """A layout on DEVICE with empty slots; rows of keys that are in no range hold nan."""
    g = torch.Generator().manual_seed(seed)
    anchors = vectors(n_anchors, dim, g, vectors_kind)
    labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    if kind == "in batch":
        return on_device(of_labels(anchors, labels, None, None))
    keys = vectors(classes * per_class, dim, g, vectors_kind)
    if kind == "labels":  # of which one class has no anchor, and one anchor no key
        key_labels = torch.randint(-1, classes, (len(keys),), generator=g) * 3
        labels = torch.where(labels == 0, 1, labels * 3)
        keys[key_labels < 0] = math.nan
        return on_device(of_labels(anchors, labels, keys, key_labels))
    most = torch.tensor([per_class * 3 // 4, per_class - per_class * 3 // 4])
    first = torch.arange(classes)[:, None] * per_class + torch.tensor([0, most[0]])
    length = most.expand(classes, 2)
    if kind != "full bank":
        length = (torch.rand(classes, 2, generator=g) * (most + 1)).long()
    ranges = torch.stack([first, length], 2)
    used = key_classes(None, ranges, len(keys))
    keys[used < 0] = math.nan
    found = of_bank(anchors, labels, keys, ranges)
    if kind == "sample":
        order, ranges = [], []
        for c in range(classes):
            rows = (used == c).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=g)[: len(rows) * 2 // 3]].tolist()
            ranges.append([[len(order), len(rows)]])
            order += rows
        key_order = torch.tensor(order + [-1] * 29)
        found = found._replace(key_order=key_order, ranges=torch.tensor(ranges))
    return on_device(found)


def on_device(of: Layout) -> Layout:
    return Layout(*(x if x is None else x.to(DEVICE) for x in of))


def with_keys(of: Layout, dtype: torch.dtype) -> Layout:
    """The layout with keys of a dtype; the anchors as well where they are the same."""
    if of.own_key is None:
        return of._replace(keys=of.keys.to(dtype))
    return of._replace(keys=of.keys.to(dtype), anchors=of.anchors.to(dtype))


def key_classes(key_order, ranges, n_keys) -> Tensor:
    """The class of each row of keys [K], -1 where it has none."""
    found = torch.full((n_keys,), -1)
    for c, parts in enumerate(ranges.tolist()):
        for first, length in parts:
            position = torch.arange(first, first + length)
            found[position if key_order is None else key_order[position]] = c
    return found


class Pairs(NamedTuple):
    """All pairs of a layout on the CPU in float64."""

    anchors: Tensor  # [A, D]
    keys: Tensor  # [K, D], 0 where in no range
    s: Tensor  # [A, K]
    negative: Tensor  # [A, K] bool
    positive: Tensor  # [A, K] bool

    def side(self, own: bool) -> Tensor:
        return self.positive if own else self.negative


def pairs(of: Layout, narrow: torch.dtype | None = None) -> Pairs:
    """The pairs of a layout; anchors are rounded to the dtype `narrow`."""
    cpu = [x if x is None else x.cpu() for x in of.tensors]
    anchors, anchor_class, keys, key_order, ranges, own_key = cpu
    anchors = anchors.to(narrow or anchors.dtype).double()
    of_key = key_classes(key_order, ranges, len(keys))
    keys = keys.double().masked_fill(of_key[:, None] < 0, 0.0)
    mine = anchor_class[:, None]
    usable = (mine >= 0) & (of_key >= 0)
    positive = usable & (mine == of_key)
    if own_key is not None:
        positive &= own_key[:, None] != torch.arange(len(keys))
    return Pairs(anchors, keys, anchors @ keys.T, usable & (mine != of_key), positive)


def negatives(of: Pairs, temperature: float):
    """What the op `negatives` says: lse, mean, away."""
    logits = (of.s / temperature).masked_fill(~of.negative, -math.inf)
    lse = logits.logsumexp(1)
    p = torch.exp(logits - lse[:, None]).nan_to_num(0.0)
    return lse, p @ of.keys, of.s.masked_fill(~of.negative, 0.0).sum(1)


def positives(of: Pairs, lse: Tensor, temperature: float):
    """What the op `positives` says: loss, weight, similar, pull."""
    above = (lse[:, None] - of.s / temperature).masked_fill(~of.positive, -math.inf)
    w = torch.sigmoid(above)
    similar = of.s.masked_fill(~of.positive, 0.0).sum(1)
    return softplus(above, threshold=40.0).sum(1), w.sum(1), similar, w @ of.keys


def keys_grad(of: Pairs, own: bool, lse: Tensor, factor: Tensor, temperature: float) -> Tensor:
    """What the op `keys_grad` says [K, D]."""
    above = lse[:, None] - of.s / temperature
    weight = -torch.sigmoid(above) if own else torch.exp(-above)
    counts = of.side(own) & (lse > -math.inf)[:, None]
    return (weight * factor[:, None]).masked_fill(~counts, 0.0).T @ of.anchors


@contextlib.contextmanager
def tf32():
    """float32 keys are taken where TF32 may be used; the interpreter computes it exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def in_triton():
    """Ops choose as they do on a GPU where there is none, their kernels interpreted."""
    with pytest.MonkeyPatch.context() as patch, tf32():
        if DEVICE == "cpu":
            patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
            patch.setattr(on_gpu, "_is_new", lambda _: True)
            for page, name, takes in on_gpu._OPS:
                patch.setattr(page, name, on_gpu._in_triton(page, name, takes))
        yield
