"""The Triton kernels of the contrast pair by pair: interpreted without a GPU, for real with one."""

import math

import kernel_scenes as scenes
import pytest
import torch
from kernel_scenes import DEVICE, KINDS

from pico_fast.selection.layout import Cut, Layout

gpu = pytest.importorskip("pico_fast.contrast.gpu", reason="needs Triton")
launch = pytest.importorskip("pico_fast.selection.launch", reason="needs Triton")
# numpy's, on exp2 and log2 of inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
if DEVICE == "cuda" and launch.rows.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set beside a GPU", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error of one rounding of a product's operand
EPS = {torch.float32: 2**-11, torch.bfloat16: 2**-9, torch.float16: 2**-11}
ALL = Cut()


@pytest.fixture(autouse=True)
def tf32():
    with scenes.tf32():
        yield


def rounding(dtype, temperature):
    """Relative error that rounding the operands once may cost; interpreted, bfloat16 is float32."""
    exact = DEVICE == "cpu" and dtype != torch.float16
    return 2e-5 if exact else 4 * EPS[dtype] * (1 + 1 / temperature)


def near(found, expected, relative):
    """Within a share of the largest value, and infinite in the same places."""
    found = found.cpu().double()
    assert found.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite])
    if finite.any():
        scale = max(1.0, float(expected[finite].abs().max()))
        assert (found - expected)[finite].abs().max() <= relative * scale


def check(of, dtype, temperature):
    """All three ops on both sides."""
    of, relative = scenes.with_keys(of, dtype), rounding(dtype, temperature)
    truth = scenes.pairs(of, dtype if DEVICE == "cuda" or dtype == torch.float16 else None)
    found = gpu.negatives(of, ALL, temperature, True)[:3]
    for mine, expected in zip(found, scenes.negatives(truth, temperature), strict=True):
        near(mine, expected, relative)
    lse, z = found[0], found[0].cpu().double()
    found = gpu.positives(of, ALL, lse, temperature, True)
    for mine, expected in zip(found, scenes.positives(truth, z, temperature), strict=True):
        near(mine, expected, relative)
    factor = torch.randn(len(lse))
    for own in (False, True):
        found = gpu.keys_grad(of, ALL, own, lse, factor.to(DEVICE), temperature)
        expected = scenes.keys_grad(truth, own, z, factor.double(), temperature)
        near(found, expected, 4 * relative)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(kind, dtype):
    # more than a block of anchors, and spans of more than a tile
    check(scenes.layout(kind, 70, 24, 4, 90), dtype, 0.1)


@pytest.mark.parametrize("dim", (16, 19, 40))
@pytest.mark.parametrize(("n_anchors", "classes", "per_class"), [(1, 2, 30), (9, 1, 64), (65, 9, 1)])
def test_odd_sizes(n_anchors, classes, per_class, dim):
    for kind in ("labels", "bank"):
        check(scenes.layout(kind, n_anchors, dim, classes, per_class), torch.float32, 0.1)


@pytest.mark.parametrize(("temperature", "length"), [(0.01, 1.0), (0.05, 3.0), (1.0, 30.0)])
def test_the_running_maximum_takes_over(temperature, length):
    of = scenes.layout("bank", 40, 32, 3, 40)
    check(of._replace(anchors=of.anchors * length), torch.float32, temperature)


def test_a_maximum_that_rounds_by_hundreds():
    """Similarities of float16 keys up to 4e8 to base 2: a weight is at most 1 there as well."""
    of = scenes.with_keys(scenes.layout("bank", 40, 16, 3, 40), torch.float16)
    of = of._replace(anchors=of.anchors * 3000, keys=of.keys * 500)
    truth = scenes.negatives(scenes.pairs(of, torch.float16), 0.005)
    lse, mean, _, _ = gpu.negatives(of, ALL, 0.005, True)
    near(lse, truth[0], 1e-5)
    # the greatest has nearly all of the weight
    near(mean, truth[1], 1e-3)


def test_nothing_to_compare_with():
    of = scenes.layout("bank", 20, 16, 3, 40)
    for empty in (
        of._replace(ranges=of.ranges * torch.tensor([1, 0], device=DEVICE)),
        of._replace(anchor_class=torch.full_like(of.anchor_class, -1)),
    ):
        check(empty, torch.float32, 0.1)


def test_a_key_that_is_not_finite_shows():
    of = scenes.layout("full bank", 40, 16, 3, 40)
    c = of.anchor_class[0]
    of.keys[of.ranges[c, 0, 0]] = math.nan
    lse, mean, away, _ = gpu.negatives(of, ALL, 0.1, True)
    loss, *_ = gpu.positives(of, ALL, torch.ones_like(lse), 0.1, True)
    used = of.anchor_class >= 0
    assert torch.equal(lse.isnan(), used & (of.anchor_class != c))
    assert torch.equal(away.isnan(), lse.isnan()) and mean[lse.isnan()].isnan().all()
    assert torch.equal(loss.isnan(), of.anchor_class == c)


@pytest.mark.parametrize("kind", ("bank", "in batch"))
def test_the_same_bits_and_no_matrix_where_none_is_wanted(kind):
    of = scenes.layout(kind, 70, 32, 5, 40)
    lse = torch.rand(70, device=DEVICE)
    for op, rest, matrix in ((gpu.negatives, (), 1), (gpu.positives, (lse,), 3)):
        first, again = (op(of, ALL, *rest, 0.1, True) for _ in range(2))
        without = op(of, ALL, *rest, 0.1, False)
        assert without[matrix].shape == (0,)
        for i, (a, b, c) in enumerate(zip(first, again, without, strict=True)):
            assert torch.equal(a, b) and (i == matrix or torch.equal(a, c))


def test_the_number_of_splits_changes_rounding_alone(monkeypatch):
    of = scenes.layout("bank", 40, 16, 9, 90)
    results = []
    for processors in (1, 3, 16):
        monkeypatch.setattr(launch, "gpu", lambda _, p=processors: (90, p))
        found = gpu.negatives(of, ALL, 0.1, True)[:3]
        results.append([*found, *gpu.positives(of, ALL, found[0], 0.1, True)])
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-4, atol=1e-5)


def test_without_a_copy_engine(monkeypatch):
    monkeypatch.setattr(launch, "gpu", lambda _: (80, 4))
    check(scenes.layout("bank", 40, 24, 4, 90), torch.float32, 0.1)


def test_hopper_gets_what_its_kernel_asks_for(monkeypatch):
    """Gluon cannot be interpreted: here only that the switch leads there, with its own arguments."""
    asked, names = [], gpu.all_keys.all_keys_kernel.arg_names

    class Kernel:
        def __getitem__(self, grid):
            return lambda **found: asked.append((grid, found))

    monkeypatch.setattr(gpu.all_keys, "all_keys_kernel", Kernel())
    of = scenes.layout("full bank", 200, 256, 3, 90)
    of = of._replace(keys=of.keys.bfloat16())
    monkeypatch.setattr(launch, "tile_dtype", lambda dtype: dtype)
    for switch in (False, True):
        monkeypatch.setattr(gpu.configs, "USE_ALL_KEYS", switch)
        walks = gpu._walks(launch.dense(of), None, True, False)
        assert len(walks) == 2 and (walks[1].launch is gpu.configs.ALL_KEYS) == switch
    parts = dict.fromkeys(("top", "total", "away", "mean"), torch.empty(0))
    gpu._sum_all_keys(launch.dense(of), walks[1], torch.empty(200), 1.0, parts)
    ((blocks,), found), *_ = asked
    assert blocks == 2 * walks[1].splits and set(found) == {*names, "num_warps"}
    assert found["query_blocks"].block_shape == [64, 256] and found["STAGES"] == 4


def test_what_the_kernels_are_not_for():
    def takes(anchors, keys, cut=ALL, key_order=None):
        ranges = torch.zeros(3, 1, 2, dtype=torch.int64)
        of = Layout(anchors, None, keys, key_order, ranges, None)
        found = {gpu.takes_negatives(of, cut), gpu.takes_positives(of, cut), gpu.takes_keys_grad(of, cut)}
        assert len(found) == 1
        return found.pop()

    bf16, fp32 = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(3, 16)
    assert takes(fp32, bf16) and takes(bf16, bf16) and takes(fp32, fp32)
    assert not takes(fp32, bf16.double()) and not takes(fp32.double(), bf16)
    assert not takes(torch.empty(3, 513), torch.empty(2, 513, dtype=torch.bfloat16))
    assert not takes(fp32, bf16[:0]) and not takes(fp32[:0], bf16)
    assert not takes(fp32, bf16, key_order=torch.empty(0, dtype=torch.int64))
    assert not takes(fp32, bf16, Cut(fp32[:, 0])) and not takes(fp32, bf16, Cut(None, 3, 0.1))
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not takes(fp32, fp32) and takes(fp32, bf16)


@pytest.mark.parametrize(("blocks", "processors"), [(32, 132), (70, 132), (1, 132), (128, 132), (500, 132)])
def test_splits_fill_whole_waves(blocks, processors):
    splits = launch.choose_splits(blocks, processors, 12)
    waves = -(-blocks * splits // processors)
    one = -(-blocks // processors)
    assert 1 <= splits <= 12
    assert blocks * splits / waves >= blocks / one
