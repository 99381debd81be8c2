"""The package's ops: each keeps the rules of torch.library, compiles, and reads nothing back inside."""

import contextlib

import pytest
import torch
import torch._dynamo  # before a fixture wraps torch's functions: it has to know them
from torch.nn.functional import normalize

import pico_fast
from pico_fast import pixels
from pico_fast.contrast import eager as sums
from pico_fast.finite import _labels_of_finite
from pico_fast.grid import _on_grid
from pico_fast.regions import why_not_compiled
from pico_fast.selection import eager
from pico_fast.selection import layout as layouts
from pico_fast.selection.layout import Cut, Layout
from pico_fast.selection.options import SAMPLINGS

ops = torch.ops.pico_fast


def rows(dtype=torch.float32):
    anchors, keys = torch.randn(7, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    anchor_labels = torch.tensor([0, 0, 1, 1, 2, -1, 3])
    return anchors, anchor_labels, keys, torch.arange(11) % 4 - (torch.arange(11) == 5).long() * 9


def layout(kind):
    anchors, anchor_labels, keys, key_labels = rows()
    if kind == "in batch":
        return layouts.of_labels(anchors, anchor_labels, None, None)
    if kind == "labels":
        return layouts.of_labels(anchors, anchor_labels, keys, key_labels)
    # a bank of 3 classes x (3 + 1) slots, not all in use
    first = torch.arange(0, 12, 4)
    ranges = torch.stack([first, first * 0 + 2, first + 3, first * 0 + 1], 1).view(3, 2, 2)
    return layouts.of_bank(anchors, anchor_labels.clamp(max=2), torch.randn(12, 8), ranges)


def of_layout(name, kind):
    """Arguments of an op that takes a layout first, once for all keys and once with a cut."""
    work, seed = layout(kind), torch.tensor(3)
    tensors, n = work.tensors, len(work.anchors)
    ceiling = torch.full((n,), 0.5)
    if name == "sample_keys":
        return [(work.ranges, work.names, work.key_order, 2, own, seed, 20) for own in (True, False)]
    if name == "hardest":
        return [(*tensors, True, None, 3, True), (*tensors, False, ceiling, 4, False)]
    none, lse, factor = tuple(Cut()), torch.randn(n), torch.rand(n)
    cuts = {True: (none, (None, 3, 0.5)), False: (none, (ceiling, 3, 0.5))}
    if name == "negatives":
        return [(*tensors, *cut, 0.1, cut == none) for cut in cuts[False]]
    if name == "positives":
        return [(*tensors, *cut, lse, 0.1, cut == none) for cut in cuts[True]]
    if name == "keys_grad":
        return [(*tensors, *cut, own, lse, factor, 0.1) for own in cuts for cut in cuts[own]]
    pool, *_ = ops.hardest(*tensors, False, None, 4, True)
    if name == "weighted_rows":
        return [(work.keys, pool, torch.rand(n, 4))]
    if name == "mix_negatives":
        return [(work.anchors, work.keys, pool, work.order + 5, 3, 2, 0.1, seed)]
    raise KeyError(f"{name}: an op that this table does not know")


def row_kernels(name):
    """Arguments of the C++ ops that others are made of: what they write they are given."""
    keys, similarity, which = torch.randn(9, 8), torch.randn(3, 5), torch.tensor([8, 0, 3, 3, 1])
    number, sums = torch.ones(3, dtype=torch.int64), [torch.zeros(3) for _ in range(3)]
    kept, tally = (torch.zeros(3, n, dtype=torch.int64) for n in (100, 3))
    calls = {
        "multiply_few": (torch.randn(3, 8), keys, which, similarity),
        "cut_rows": (similarity, torch.ones(3), 2, 0.5, False, number),
        "add_negatives": (similarity, keys, which, 0.1, *sums, torch.zeros(3, 8)),
        "add_positives": (similarity, keys, which, torch.ones(3), 0.1, *sums, None),
        "keep_hardest": (similarity, which, 0, torch.ones(3), False, 4, kept, tally),
        "list_kept": (kept, tally, False, kept[:, :4].clone(), torch.zeros(3, 4)),
    }
    return [calls[name]]


def calls(name, kind):
    """Arguments of one op, drawn from a run of those before it."""
    anchors, anchor_labels, _, _ = rows()
    if name == "labels_on_grid":
        return [(torch.randint(0, 4, (2, 6, 8)), 3, 5, 4, 255)]
    if name == "gather_pixels":
        return [(torch.randn(2, 5, 4, 3), torch.randperm(24)[:7])]
    if name == "labels_of_finite":
        return [("anchors", anchors, anchor_labels, refuse) for refuse in (True, False)]
    return row_kernels(name) if name in KERNELS else of_layout(name, kind)


# what runs inside the ops on a device without compiled kernels
INSIDE = {
    "labels_on_grid": _on_grid,
    "labels_of_finite": _labels_of_finite,
    "gather_pixels": pixels.gather_torch,
    "sample_keys": eager.sample_keys,
    "hardest": eager.hardest,
    "weighted_rows": eager.weighted_rows,
    "mix_negatives": eager.mix_negatives,
    "negatives": sums.negatives,
    "positives": sums.positives,
    "keys_grad": sums.keys_grad,
}


def inside(name, *args):
    """One of these, called as the op is."""
    if name in ("negatives", "positives", "keys_grad"):
        args = (Layout(*args[:6]), Cut(*args[6:9]), *args[9:])
    elif name == "hardest":
        args = (Layout(*args[:6]), *args[6:])
    return INSIDE[name](*args)


OPS = sorted(
    name.removeprefix("pico_fast::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("pico_fast::") and "region_pool" not in name  # those have their own page
)
# parts of a CPU's ops, which no other device has
KERNELS = set(OPS) - set(INSIDE)
KINDS = ("labels", "bank", "in batch")
CASES = [
    (name, kind)
    for name in OPS
    for kind in KINDS
    if kind == "labels" or name not in KERNELS | {"labels_on_grid", "gather_pixels"}
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_op_keeps_the_rules(name, kind):
    if name in KERNELS and why_not_compiled is not None:
        pytest.skip("no compiled kernels")
    for args in calls(name, kind):
        torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] in INSIDE])
def test_no_op_reads_anything_back_inside(name, kind, monkeypatch):
    # autocast knows no device without values
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for args in calls(name, kind):
        expected = getattr(ops, name)(*args)
        found = inside(name, *(a.to("meta") if torch.is_tensor(a) else a for a in args))
        one = torch.is_tensor(found)
        for mine, real in [(found, expected)] if one else zip(found, expected, strict=True):
            assert mine.is_meta and mine.dtype == real.dtype and mine.shape == real.shape


def sixteenths(x):
    return (x * 16).round() / 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("hardest", "negatives", "positives", "keys_grad"))
def test_eager_ops_say_what_the_compiled_ones_say(name, kind, monkeypatch):
    """Of exact products: the same lists to the bit, also block by block; the same sums."""
    for first in (True, False):
        torch.manual_seed(3)
        for args in of_layout(name, kind):
            args = (sixteenths(args[0]), args[1], sixteenths(args[2]), *args[3:])
            expected = getattr(ops, name)(*args)
            if not first:
                monkeypatch.setattr(eager, "_BLOCK", 30)
                monkeypatch.setattr(eager, "_TILE", 3)
            found = inside(name, *args)
            one = torch.is_tensor(found)
            for mine, theirs in [(found, expected)] if one else zip(found, expected, strict=True):
                if name == "hardest":
                    assert torch.equal(mine, theirs)
                else:
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def pairs(in_batch):
    torch.manual_seed(1)
    keys, labels = normalize(torch.randn(80, 16), dim=1), torch.arange(80) % 5 - 1
    return keys[:12].clone(), labels[:12], *((None, None) if in_batch else (keys, labels))


OPTIONS = {"num_positives": 4, "num_negatives": 9, "hard_fraction": 0.3, "seed": 3}


def loss_and_gradients(function, anchors, labels, keys, key_labels, **options):
    leaves = [x.clone().requires_grad_() for x in (anchors, keys) if x is not None]
    rest = (None, None) if keys is None else (leaves[1], key_labels)
    loss = function(leaves[0], labels, *rest, **OPTIONS, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


COMPILED = [(sampling, None, False) for sampling in SAMPLINGS]
COMPILED += [("semi_hard", "semi_hard", True), ("bounded", "all", True)]


@pytest.mark.parametrize(("sampling", "positives", "in_batch"), COMPILED)
def test_a_whole_contrast_compiles(sampling, positives, in_batch):
    torch._dynamo.reset()
    compiled = torch.compile(pico_fast.contrast, fullgraph=True, backend="aot_eager")
    options = {"sampling": sampling, "positives": positives}
    options["synthesis"] = pico_fast.Synthesis(3, 2, 6)
    found = loss_and_gradients(compiled, *pairs(in_batch), **options)
    expected = loss_and_gradients(pico_fast.contrast, *pairs(in_batch), **options)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_autocast_changes_nothing(sampling, in_batch):
    options = {"sampling": sampling, "synthesis": pico_fast.Synthesis(3, 2, 6)}
    expected = loss_and_gradients(pico_fast.contrast, *pairs(in_batch), **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(pico_fast.contrast, *pairs(in_batch), **options)
        picks = pico_fast.select_keys(*pairs(False), sampling, **OPTIONS)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(picks, pico_fast.select_keys(*pairs(False), sampling, **OPTIONS), strict=True):
        assert torch.equal(mine, theirs)
