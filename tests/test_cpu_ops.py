"""The CPU's ops of layouts against one anchor at a time in float64.

Values are sixteenths, so that a product is exact in every dtype, hundreds of similarities are equal, and
which keys count is the same in float64.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import softplus

import pico_fast  # noqa: F401  (the ops)
from pico_fast import draws
from pico_fast.regions import why_not_compiled

pytestmark = pytest.mark.skipif(why_not_compiled is not None, reason="no compiled kernels")

TAU = 0.5
ops = torch.ops.pico_fast


class Layout(NamedTuple):
    anchors: torch.Tensor
    anchor_class: torch.Tensor
    keys: torch.Tensor
    key_order: torch.Tensor | None
    ranges: torch.Tensor
    own_key: torch.Tensor | None

    @property
    def dtype(self):
        precise = torch.float64 in (self.keys.dtype, self.anchors.dtype)
        return torch.float64 if precise else torch.float32


class Truth(NamedTuple):
    """All pairs of anchors and positions in float64."""

    key: torch.Tensor  # [W] row of the key
    rows: torch.Tensor  # [W, D], 0 where no key is in use
    s: torch.Tensor  # [A, W]
    order: torch.Tensor  # [A, W] positions, hardest first, what is no candidate last
    n: torch.Tensor  # [A] how many of them count
    mask: torch.Tensor  # [A, W] which count


def truth(work, own, ceiling=None, count=10**9, fraction=1.0, by_row=False):
    n_positions = len(work.keys if work.key_order is None else work.key_order)
    key = torch.arange(n_positions) if work.key_order is None else work.key_order
    of = torch.full((n_positions,), -1)
    for c, parts in enumerate(work.ranges.tolist()):
        for first, length in parts:
            of[first : first + length] = c
    if by_row:
        of, key = of[key.argsort()], key.sort()[0]
    mine = work.anchor_class[:, None]
    candidate = (of >= 0) & (mine >= 0) & ((of == mine) == own)
    if own and work.own_key is not None:
        candidate &= key != work.own_key[:, None]
    rows = work.keys[key].double().masked_fill(of[:, None] < 0, 0.0)
    s = work.anchors.double() @ rows.T
    if ceiling is not None:
        candidate &= s < ceiling[:, None]
    hardness = (-s if own else s).masked_fill(~candidate, -math.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    n = (candidate.sum(1) * fraction).ceil().long().clamp(max=count)
    return Truth(key, rows, s, order, n, order.argsort(dim=1) < n[:, None])


def sixteenths(*size):
    return torch.randint(-8, 9, size) / 16.0


def layout(sizes, n_anchors, dtype=torch.float32, ordered=False, in_batch=False, anchor_dtype=None):
    """Classes of these sizes in two parts each, every fourth of them without anchors; or in batch."""
    gap = 0 if in_batch else 3
    sizes = [-(-n // 4) for n in sizes] if in_batch else sizes
    parts, at = [], gap
    for size in sizes:
        short = size // 3
        parts.append([[at, size - short], [at + size - short + gap, short]])
        at += size + 2 * gap
    ranges = torch.tensor(parts)
    keys = torch.full((at, 12), math.nan)
    used = torch.cat([torch.arange(f, f + n) for f, n in ranges.flatten(0, 1).tolist()])
    keys[used] = sixteenths(len(used), 12)
    key_order = None
    own_key = None
    if ordered:
        shuffled = torch.randperm(at)
        keys, key_order = keys[shuffled.argsort()], torch.cat([shuffled, torch.full((5,), -1)])
    if in_batch:
        of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        key_order = torch.randperm(at)
        own_key, anchor_class = key_order, of
        keys = keys[key_order.argsort()]
        anchors = keys[own_key]
    else:
        some = [c for c in range(len(sizes)) if c % 4 != 3] or [0]
        anchor_class = torch.tensor(some)[torch.randint(0, len(some), (n_anchors,))].sort()[0]
        anchors = sixteenths(n_anchors, 12)
    anchor_class = torch.cat([anchor_class, torch.full((2,), -1)])
    anchors = torch.cat([anchors, torch.zeros(2, 12)]).to(anchor_dtype or dtype)
    if in_batch:
        own_key = torch.cat([own_key, torch.zeros(2, dtype=torch.int64)])
    return Layout(anchors, anchor_class, keys.to(dtype), key_order, ranges, own_key)


LAYOUTS = {
    "few keys": ([3, 0, 5, 1], 9),
    "some classes": ([70, 41, 0, 90, 200, 33, 1, 57], 40),
    "more keys than a tile": ([900, 1100, 40, 500, 2500], 30),
    "one class with nearly all": ([4, 2000, 3], 50),
    "one class alone": ([300], 20),
    "many anchors of a class": ([500, 3, 20], 90),
    "no anchors": ([30, 40], 0),
    "no keys": ([0, 0], 5),
}
KINDS = {"as they lie": {}, "ordered": {"ordered": True}, "in batch": {"in_batch": True}}
CASES = [
    pytest.param(*case, kind, id=f"{name}, {how}")
    for name, case in LAYOUTS.items()
    for how, kind in KINDS.items()
    if sum(case[0]) or how != "in batch"
]
CASES += [
    pytest.param(*LAYOUTS[name], {"dtype": dtype} | kind, id=f"{name}, {how}, {dtype}")
    for name, how in (("some classes", "as they lie"), ("many anchors of a class", "ordered"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
    for kind in [KINDS[how]]
]
CASES.append(pytest.param([50, 60, 70], 40, {"anchor_dtype": torch.float64}, id="mixed"))
layouts = pytest.mark.parametrize(("sizes", "n_anchors", "more"), CASES)
sides = pytest.mark.parametrize("own", [False, True])


def ceiling_of(work, own, wanted):
    return None if own or not wanted else sixteenths(len(work.anchors)).to(work.dtype) * 0.5


@pytest.mark.parametrize(("count", "fraction"), [(20, 1.0), (2048, 0.1), (7, 0.3), (10**6, 1.0)])
@sides
@layouts
def test_cuts_are_exact(sizes, n_anchors, more, own, count, fraction):
    work = layout(sizes, n_anchors, **more)
    pairs = truth(work, own)
    s = pairs.s.to(work.dtype).masked_fill(~pairs.mask, math.inf if own else -math.inf)
    for with_ceiling in (False, True):
        ceiling = ceiling_of(work, own, with_ceiling)
        rows = torch.nn.functional.pad(s, (0, 7))[:, : s.shape[1]]  # with a gap between rows
        below = torch.empty(len(rows), dtype=torch.int64)
        ops.cut_rows(rows, ceiling, count, fraction, own, below)
        assert torch.equal(below, truth(work, own, ceiling).n)
        mask = truth(work, own, ceiling, count, fraction).mask
        assert torch.equal(rows.isinf(), ~mask) and torch.equal(rows[mask], s[mask])


@pytest.mark.parametrize("count", [1, 20, 3000])
@sides
@layouts
def test_the_hardest_are_exact(sizes, n_anchors, more, own, count):
    work = layout(sizes, n_anchors, **more)
    ceiling = ceiling_of(work, own, count == 20)
    for by_place in (True, False):
        index, similarity, below = ops.hardest(*work, own, ceiling, count, by_place)
        assert torch.equal(below, below[:0] if ceiling is None else truth(work, own, ceiling).n)
        true = truth(work, own, ceiling, count, by_row=not by_place)
        there = torch.arange(count) < true.n[:, None]
        order = torch.nn.functional.pad(true.order, (0, count))[:, :count]
        assert torch.equal(index, torch.where(there, true.key[order], -1))
        expected = torch.where(there, true.s.gather(1, order), 0.0)
        assert torch.equal(similarity, expected.to(work.dtype))


NONE = (None, 2**63 - 1, 1.0)


def cut_of(work, own, is_cut):
    """A cut as the ops take it, and the truth of what it leaves."""
    cut = (ceiling_of(work, own, True), 30, 0.4) if is_cut else NONE
    return cut, truth(work, own, *cut)


def close(found, expected):
    rtol = 1e-9 if found.dtype == torch.float64 else 3e-5
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("tau", [TAU, 0.005])
@layouts
def test_negatives_add_up(sizes, n_anchors, more, is_cut, tau):
    work = layout(sizes, n_anchors, **more)
    cut, true = cut_of(work, False, is_cut)
    lse, mean, away, below = ops.negatives(*work, *cut, tau, True)
    assert torch.equal(below, below[:0] if cut[0] is None else truth(work, False, cut[0]).n)
    logits = (true.s / tau).masked_fill(~true.mask, -math.inf)
    close(lse, logits.logsumexp(1))
    close(mean, logits.softmax(1).masked_fill(~true.mask, 0.0) @ true.rows)
    close(away, (true.s * true.mask).sum(1))
    without = ops.negatives(*work, *cut, tau, False)
    assert torch.equal(without[0], lse) and without[1].shape == (0,)


@pytest.mark.parametrize("is_cut", [False, True])
@layouts
def test_positives_add_up(sizes, n_anchors, more, is_cut):
    work = layout(sizes, n_anchors, **more)
    cut, true = cut_of(work, True, is_cut)
    lse = ops.negatives(*work, *NONE, TAU, False)[0]
    loss, weight, similar, pull = ops.positives(*work, *cut, lse, TAU, True)
    above = (lse[:, None].double() - true.s / TAU).masked_fill(~true.mask, -math.inf)
    close(loss, softplus(above).sum(1))
    close(weight, above.sigmoid().sum(1))
    close(similar, (true.s * true.mask).sum(1))
    close(pull, above.sigmoid() @ true.rows)
    without = ops.positives(*work, *cut, lse, TAU, False)
    assert torch.equal(without[0], loss) and without[3].shape == (0,)


@pytest.mark.parametrize("is_cut", [False, True])
@sides
@layouts
def test_the_gradient_of_keys_adds_up(sizes, n_anchors, more, is_cut, own):
    work = layout(sizes, n_anchors, **more)
    cut, true = cut_of(work, own, is_cut)
    lse = ops.negatives(*work, *(NONE if own else cut), TAU, False)[0]
    factor = torch.rand_like(lse)
    above = true.s / TAU - lse[:, None].double()
    w = -(-above).sigmoid() if own else above.exp()
    w = w.masked_fill(~true.mask | (lse == -math.inf)[:, None], 0.0) * factor[:, None]
    expected = torch.zeros(work.keys.shape, dtype=torch.float64)
    there = true.key >= 0
    expected[true.key[there]] = (w.T @ work.anchors.double())[there]
    close(ops.keys_grad(*work, *cut, own, lse, factor, TAU), expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_sample_is_the_hash(ordered, own):
    work = layout([70, 41, 0, 90, 20_000, 33, 1, 57], 3, ordered=ordered)
    sizes = work.ranges[:, :, 1].sum(1).tolist()
    others = sum(sizes) - max(sizes)
    wanted = [min(n, 41) if own else -(-n * 41 // others) for n in sizes]
    names = torch.arange(8) * 3 + 2**33
    seed, stream = torch.tensor(-12345), draws.POSITIVE if own else draws.NEGATIVE
    order, ranges = ops.sample_keys(work.ranges, names, work.key_order, 41, own, seed, sum(wanted) + 4)
    expected, first = [], 0
    for c, (k, n) in enumerate(zip(wanted, sizes, strict=True)):
        positions = torch.cat([torch.arange(f, f + m) for f, m in work.ranges[c].tolist()])
        rows = positions if work.key_order is None else work.key_order[positions]
        assert ranges[c].tolist() == [[first, k]]
        first += k
        if k == 0:
            continue
        state = draws.hash32(seed, stream, int(names[c]))
        t = torch.arange(k)
        begin, end = t * n // k, (t + 1) * n // k
        place = begin + draws.below(draws.fold(state, t), end - begin) + draws.below(state, n)
        expected.append(rows[place % n])
        assert len(expected[-1].unique()) == k
    assert torch.equal(order, torch.cat([*expected, torch.full((4,), -1)]))


def test_threads_change_nothing():
    work = layout([500, 300, 20, 800], 60, ordered=True)
    found = []
    count = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([*ops.hardest(*work, False, None, 100, True)])
        found[-1] += ops.positives(*work, None, 30, 0.4, torch.ones(62), TAU, True)
    torch.set_num_threads(count)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@sides
def test_as_many_count_as_were_wanted_where_similarities_are_rounded(own):
    for n_anchors, size in ((7, 400), (300, 3000)):
        work = layout([size, size // 2, size // 3], n_anchors, ordered=True)
        # few different rows: most similarities of an anchor occur many times
        rows = torch.randn(40, 12)[torch.randint(0, 40, (len(work.keys),))]
        work = work._replace(anchors=torch.randn_like(work.anchors), keys=rows)
        counts = (truth(work, own).n * 0.2).ceil().clamp(max=150).long()
        if own:
            # sigmoid(inf) is 1: weights count
            lse = torch.full_like(work.anchors[:, 0], 1e4)
            weight = ops.positives(*work, None, 150, 0.2, lse, 1.0, False)[1]
            assert torch.equal(weight.long(), counts)
        else:
            lse = ops.negatives(*work, None, 150, 0.2, 1e9, False)[0]
            assert torch.equal(lse.exp().round().long(), counts)
