"""The Triton kernels of the sample and its cut: interpreted without a GPU, for real with one."""

import itertools
import math

import kernel_scenes as scenes
import pytest
import torch
from kernel_scenes import DEVICE
from torch.nn.functional import pad

from pico_fast.contrast import eager as sums
from pico_fast.selection import eager
from pico_fast.selection.layout import Cut

gpu = pytest.importorskip("pico_fast.contrast.gpu", reason="needs Triton")
bounds = pytest.importorskip("pico_fast.selection.bounds", reason="needs Triton")
selection = pytest.importorskip("pico_fast.selection.gpu", reason="needs Triton")
kernels = pytest.importorskip("pico_fast.kernels.cut", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def tf32():
    with scenes.tf32():
        yield


def cut_rows(rows, fraction, most, own=False):
    """What cut_kernel makes of rows [A, width] float16, and of a class or a sample as long as they.

    A pair is none where it is -inf here and nan there.
    """
    n, width = rows.shape
    out = bounds.Bounds(
        *(torch.full((n,), 77).to(DEVICE, t) for t in (rows.dtype, torch.int32, torch.float, torch.long))
    )
    hardest = rows.float().amax(1).unsqueeze(0).contiguous()
    kernels.cut_kernel[(n,)](
        halves=pad(rows.masked_fill(rows == -math.inf, math.nan), (0, -width % 128), value=math.nan),
        anchor_class=torch.zeros(n, dtype=torch.int64, device=DEVICE),
        ranges=torch.tensor([[[0, width]]], device=DEVICE),
        ends=torch.tensor(width, device=DEVICE),
        hardest=hardest,
        fraction=fraction,
        most=most,
        n_anchors=n,
        half_stride=width + -width % 128,
        splits=1,
        scale=2.0,
        CHUNKS=width // kernels.LANES.value + 1,
        SPLITS=64,
        OWN=own,
        num_warps=4,
        **out._asdict(),
    )
    return out


def rows_of(kind, n, width, g):
    rows = torch.randn(n, width, generator=g).half()
    if kind == "ties":
        rows = (rows * 2).round() / 2
    if kind == "equal":
        rows = rows[:, :1].expand(n, width).clone()
    if kind == "few":
        rows[torch.rand(n, width, generator=g) < 0.97] = -math.inf
    if kind == "long":
        rows = (rows.float() * 40000).clamp(-65504, 65504).half()
    return rows.to(DEVICE)


@pytest.mark.parametrize(("fraction", "most"), [(0.1, 10**6), (0.1, 3), (1.0, 2**62), (0.013, 9)])
@pytest.mark.parametrize("kind", ("random", "ties", "equal", "few", "long"))
def test_the_cut_is_that_of_a_sort(kind, fraction, most):
    g = torch.Generator().manual_seed(len(kind) + most % 7)
    for width in (1, 37, 2048, 4500, 34_000):
        rows = rows_of(kind, 3, width, g)
        least, last, shift, pairs = cut_rows(rows, fraction, most, own=width == 37)
        there = rows > -math.inf
        assert torch.equal(pairs, there.sum(1))
        wanted = (pairs.double() * fraction).ceil().long().clamp(max=most)
        place = torch.arange(width, device=DEVICE)
        found = (rows > least[:, None]) | ((rows == least[:, None]) & (place <= last[:, None]))
        order = rows.float().argsort(dim=1, descending=True, stable=True)
        expected = torch.zeros_like(there).scatter_(1, order, place < wanted[:, None])
        assert torch.equal(found, expected)
        top = rows.float().amax(1) * 2
        assert torch.equal(shift, torch.where(top > -math.inf, top, 0.0))


def test_keys_of_nan_come_first():
    rows = torch.randn(3, 50).half().to(DEVICE)
    rows[:2, 7], rows[1] = math.inf, math.inf
    least, last, _, pairs = cut_rows(rows, 0.1, 9)
    assert pairs.tolist() == [50] * 3
    assert (least[1], last[1]) == (math.inf, 4)  # of equal ones the first five
    assert least[0] < math.inf  # so the one of nan counts


def cuts(n, longest):
    """Cuts of both sides; a class of the positives' sample has at most ⌈count / fraction⌉ keys."""
    g = torch.Generator().manual_seed(1)
    ceiling = (torch.rand(n, generator=g) * 0.6 - 0.1).to(DEVICE)
    ceiling[0] = math.inf
    return (
        Cut(None, 37, 0.3),
        Cut(None, -(-longest // 2), 0.5),
        Cut(ceiling, 20, 0.3),
        Cut(ceiling, 2**62, 1.0),
    )


def near(found, expected, used, tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        if mine.shape != used.shape and mine.numel():
            theirs = theirs.masked_fill(~used[:, None], 0.0)
            mine = mine.masked_fill(~used[:, None], 0.0)
        elif mine.numel():
            mine, theirs = mine[used], theirs[used]
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=tolerance, atol=tolerance)


def check(of, dtype, longest, tolerance):
    """Both ops against PyTorch in float64."""
    of = scenes.with_keys(of, dtype)
    exact = DEVICE == "cpu" and dtype != torch.float16
    anchors = of.anchors if exact else of.anchors.to(dtype)
    wide = of._replace(anchors=anchors.double(), keys=of.keys.double())
    used = of.anchor_class >= 0
    for cut in cuts(len(used), longest):
        assert gpu.takes_negatives(of, cut)
        found = gpu.negatives(of, cut, 0.2, True)
        near(found, sums.negatives(wide, cut, 0.2, True), used, tolerance)
        if cut.ceiling is None and cut.count / cut.fraction >= longest:
            assert gpu.takes_positives(of, cut)
            found, z = gpu.positives(of, cut, found.lse, 0.2, True), found.lse.double()
            near(found, sums.positives(wide, cut, z, 0.2, True), used, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("exact", "duplicates"))
def test_every_dtype(kind, dtype):
    """Similarities that a half holds exactly, many of them equal; or seven different keys."""
    check(scenes.layout("sample", 36, 24, 4, 60, kind), dtype, 60, 2e-3)


@pytest.mark.parametrize(
    ("n_anchors", "classes", "per_class", "dim"), [(1, 2, 30, 16), (9, 1, 64, 19), (65, 9, 1, 40)]
)
def test_odd_sizes(n_anchors, classes, per_class, dim):
    check(
        scenes.layout("sample", n_anchors, dim, classes, per_class, "exact"), torch.float32, per_class, 1e-5
    )


@pytest.mark.parametrize("dim", (128, 512))
def test_more_channels(dim):
    check(scenes.layout("sample", 10, dim, 3, 50, "duplicates"), torch.bfloat16, 50, 5e-2)


def test_random_data_within_the_grid_of_halves():
    """Which keys count is up to 2^-11: sums of them hardly change."""
    check(scenes.layout("sample", 36, 32, 5, 60), torch.float32, 60, 2e-2)


def test_in_batch_an_anchor_is_none_of_its_positives():
    of = scenes.layout("in batch", 40, 16, 3, 0, "exact")
    assert gpu.takes_positives(of, Cut(None, 20, 0.5))
    check(of, torch.float32, 40, 1e-5)


def test_blocks_of_anchors_and_the_same_bits(monkeypatch):
    of, cut = scenes.layout("sample", 70, 24, 4, 60, "duplicates"), cuts(70, 60)[2]
    found = [gpu.negatives(of, cut, 0.1, True) for _ in range(2)]
    monkeypatch.setattr(bounds, "_BLOCK", 64 * len(of.key_order))
    found.append(gpu.negatives(of, cut, 0.1, True))
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            assert torch.equal(mine[of.anchor_class >= 0], first[of.anchor_class >= 0])


def test_what_the_kernels_are_not_for():
    of = scenes.layout("sample", 9, 16, 3, 20)
    ceiling = torch.rand(9, device=DEVICE)
    for own, layout, cut in (
        (True, of, Cut(ceiling, 9, 0.5)),
        (False, of._replace(key_order=None), Cut(None, 9, 0.5)),
        (False, of._replace(ranges=of.ranges.expand(3, 2, 2)), Cut(None, 9, 0.5)),
        (False, of._replace(key_order=of.key_order.expand(2**11, -1).flatten()), Cut(None, 9, 0.5)),
    ):
        assert not bounds.takes(layout, cut, own)
    wide = of._replace(key_order=of.key_order.expand(2**11, -1).flatten())
    assert bounds.takes(wide, Cut(None, 9, 0.5), True)


@pytest.mark.parametrize(
    ("classes", "parts", "most"), [(1, 1, 5), (4, 2, 30), (171, 2, 12), (33, 3, 7), (2500, 1, 3)]
)
@pytest.mark.parametrize("seed", (0, -7, 2**62 + 12345))
def test_draws_are_those_of_pytorch(classes, parts, most, seed):
    g = torch.Generator().manual_seed(seed % 1000)
    length = torch.randint(0, most + 1, (classes, parts), generator=g)
    first = torch.arange(classes * parts).view(classes, parts) * most
    ranges, total = torch.stack([first, length], 2).to(DEVICE), int(length.sum())
    names = torch.randint(0, 2**62, (classes,), generator=g).to(DEVICE)
    order = torch.randperm(classes * parts * most, generator=g).to(DEVICE)
    for own, need, key_order in itertools.product((True, False), (1, total // 5, 10**6), (None, order)):
        args = (ranges, names, key_order, need, own, torch.tensor(seed).to(DEVICE), total + 17)
        assert selection.takes_sample(*args)
        found, expected = (page.sample_keys(*args) for page in (selection, eager))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
