"""The Triton kernels of `hardest` and of synthesis: interpreted without a GPU, for real with one."""

import math

import kernel_scenes as scenes
import pytest
import torch
from kernel_scenes import DEVICE, KINDS

from pico_fast import reference
from pico_fast.selection import eager
from pico_fast.selection.layout import Layout

gpu = pytest.importorskip("pico_fast.selection.gpu", reason="needs Triton")
SEED = torch.tensor(5)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def tf32():
    with scenes.tf32():
        yield


def check(of, own, count, narrow=None, exact=False):
    """Similarities to rounding, index sets equal outside a rounding band; `exact`: the very indices.

    Nobody asked for an order: lists are in that of positions.
    """
    found = gpu.hardest(of, own, None, count, False, False)
    row = of.key_order if of.key_order is not None else torch.arange(len(of.keys), device=of.keys.device)
    row = row[row >= 0]
    place = torch.zeros(len(of.keys), dtype=torch.int64, device=row.device)
    place[row] = torch.arange(len(row), device=row.device)
    place = place.take(found[0].clamp(min=0))
    assert ((place.diff(dim=1) > 0) | (found[0][:, 1:] < 0)).all()
    found = gpu._ordered(*found[:2], own)
    index, similarity = found[0].cpu(), found[1].cpu().double()
    truth = scenes.pairs(of, narrow)
    candidate, sign = truth.side(own), -1 if own else 1
    n = candidate.sum(1).clamp(max=count)
    there = torch.arange(count) < n[:, None]
    assert torch.equal(index >= 0, there) and (similarity[~there] == 0).all()
    rows, columns = torch.arange(len(index))[:, None], index.clamp(min=0)
    assert candidate[rows, columns][there].all()
    in_order = index.sort(1).values
    assert not ((in_order.diff(dim=1) == 0) & (in_order[:, 1:] >= 0)).any()
    band = 0.0 if exact else 1e-6 if DEVICE == "cpu" else 1e-3
    s = truth.s[rows, columns]
    assert ((similarity - s).abs() <= band)[there].all()
    hardness = (sign * truth.s).masked_fill(~candidate, -math.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    if exact:  # ties go by lower row
        width = min(count, order.shape[1])
        expected = order[:, :width].masked_fill(~there[:, :width], -1)
        assert torch.equal(index[:, :width], expected)
    least = hardness.gather(1, order.gather(1, (n - 1).clamp(min=0)[:, None]))
    assert (sign * s >= least - 2 * band)[there].all()
    sure = (candidate & (hardness > least + 2 * band)).sum(1)
    assert torch.equal(((sign * s > least + 2 * band) & there).sum(1), sure)
    assert ((sign * similarity).diff(dim=1) <= 0)[there[:, 1:]].all()


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_by_digits(kind, own):
    check(scenes.layout(kind, 12, 16, 3, 40), own, 5)


def test_in_order_is_hardest_first():
    of = scenes.layout("sample", 12, 16, 3, 40, "exact")
    *unordered, _ = gpu.hardest(of, True, None, 7, False, False)
    *found, _ = gpu.hardest(of, True, None, 7, False)
    assert all(map(torch.equal, found, gpu._ordered(*unordered, True)))


@pytest.mark.parametrize("own", (False, True))
def test_more_than_a_block_of_anchors(own):
    check(scenes.layout("in batch", 70 if own else 270, 16, 3, 0), own, 2)


@pytest.mark.parametrize("own", (False, True))
def test_more_than_there_are_and_one(own):
    of = scenes.layout("bank", 8, 16, 3, 20)
    check(of, own, 60)
    check(of, own, 1)
    check(scenes.layout("bank", 5, 16, 1, 20), own, 4)  # without a negative


@pytest.mark.parametrize("own", (False, True))
def test_equal_similarities_go_by_lower_row(own):
    """Of vectors whose products are exact, so that both products say the same."""
    for kind in ("bank", "sample", "in batch"):
        check(scenes.layout(kind, 12, 16, 3, 40, "exact"), own, 7, exact=True)


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("kind", ("random", "duplicates", "exact"))
def test_from_a_sample_and_its_repair(kind, own, monkeypatch):
    monkeypatch.setattr(gpu, "_FEW", 2)
    of = scenes.layout("full bank", 12, 16, 4, 800 if own else 200, kind)
    repaired = []
    original = gpu._Side.exact_threshold

    def watched(side, active):
        repaired.append(int(active.sum()))
        return original(side, active)

    monkeypatch.setattr(gpu._Side, "exact_threshold", watched)
    check(of, own, 16, exact=kind == "exact")
    # many equal similarities overflow the candidates; elsewhere the sample serves most anchors
    used = int((of.anchor_class >= 0).sum())
    if kind == "duplicates":
        assert repaired == [used]
    elif kind == "random" or not own:
        assert repaired[0] < used


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("kind", ("full bank", "bank", "labels"))
def test_an_estimate_lets_a_little_more_through(kind, own):
    """The similarity at a rank of a part of the keys, or down to the next; all keys where these are few."""
    of = scenes.layout(kind, 12, 16, 4, 400)
    side = gpu._Side(gpu.launches.dense(of), own, 16)
    number = gpu._sampled_threshold(side).cpu() >> 32
    found = torch.where(number < 0, number ^ 0x7FFFFFFF, number).int().view(torch.float32)
    classes = eager.class_of_positions(of.ranges, gpu.launches.n_positions(of))
    step, rank = (4, 4 + 11) if own else (16, 1 + 6)  # so many are one of `step` of 16, and six roots more
    position = (classes >= 0).nonzero()[::step, 0]
    keys = of.keys[position if of.key_order is None else of.key_order[position]]
    s = of.anchors.float() @ keys.float().T
    s = (-s if own else s).masked_fill((of.anchor_class[:, None] == classes[position]) != own, -math.inf)
    *_, exact, behind = s.topk(rank + 1, dim=1).values.cpu().unbind(1)
    used, is_few = (of.anchor_class >= 0).cpu(), ((s > -math.inf).sum(1) <= rank).cpu()
    assert torch.equal((found == -math.inf)[used], is_few[used])
    used &= ~is_few
    assert used.any()
    assert (found <= exact)[used].all() and (found >= behind - behind.abs() * 2.0**-9)[used].all()


def test_a_similarity_of_nan_is_the_hardest():
    of = scenes.layout("full bank", 8, 16, 3, 30)
    row = int(of.ranges[1, 0, 0]) + 2
    of.keys[row] = math.nan
    for own in (False, True):
        index, similarity, _ = gpu.hardest(of, own, None, 5, False)
        meets = (of.anchor_class == 1) == own
        meets &= of.anchor_class >= 0
        assert (index[meets, 0] == row).all() and similarity[meets, 0].isnan().all()
        assert not similarity[~meets].isnan().any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_keys(dtype):
    of = scenes.with_keys(scenes.layout("bank", 8, 24, 3, 40), dtype)
    check(of, False, 5, dtype if DEVICE == "cuda" or dtype == torch.float16 else None)


def test_what_the_kernels_are_not_for():
    def takes(anchors, keys, count=5, ceiling=None, by_place=False):
        ranges = torch.zeros(3, 1, 2, dtype=torch.int64)
        layout = Layout(anchors, None, keys, None, ranges, None)
        return gpu.takes_hardest(layout, True, ceiling, count, by_place)

    bf16, fp32 = torch.empty(3, 512, dtype=torch.bfloat16), torch.empty(3, 16)
    assert takes(bf16, bf16) and takes(fp32, fp32) and takes(fp32, fp32, gpu.MAX_COUNT)
    assert not takes(bf16, bf16.float()) and not takes(fp32, fp32.double())
    assert not takes(fp32, fp32, 0) and not takes(fp32, fp32, gpu.MAX_COUNT + 1)
    assert not takes(fp32, fp32, ceiling=fp32[:, 0]) and not takes(fp32, fp32, by_place=True)


def lists(n_anchors, n_keys, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n_keys, generator=g)[:n] for _ in range(n_anchors)])
    kept = torch.randint(0, n + 1, (n_anchors, 1), generator=g)
    return torch.where(torch.arange(n) < kept, index, -1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dim", (16, 40, 256))
def test_weighted_rows(dim, dtype):
    keys = scenes.vectors(50, dim, torch.Generator().manual_seed(0)).to(dtype)
    index = lists(7, 50, 21)
    weight = torch.randn(index.shape).masked_fill(index < 0, 0.0)
    found = gpu.weighted_rows(*(x.to(DEVICE) for x in (keys, index, weight))).cpu()
    expected = torch.einsum("an,and->ad", weight, keys[index.clamp(min=0)].float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", (True, False))
@pytest.mark.parametrize("dim", (16, 40))
@pytest.mark.parametrize("temperature", (0.01, 0.1))
def test_mixes_are_those_of_the_reference(dim, unit, temperature):
    g = torch.Generator().manual_seed(0)
    anchors, keys = scenes.vectors(8, dim, g), scenes.vectors(60, dim, g)
    if not unit:
        anchors, keys = 3 * anchors, keys * torch.rand(60, 1)
    keys[5] = -keys[4]  # two that have no mean
    index = lists(8, 60, 12)
    index[0] = torch.tensor([4, 5] + [-1] * 10)
    row = torch.randperm(40, generator=g)[:8]
    tensors, rest = (anchors, keys, index, row), (11, 7, temperature)
    found = gpu.mix_negatives(*(x.to(DEVICE) for x in tensors), *rest, SEED.to(DEVICE))
    doubles = (anchors.double(), keys.double(), index, row)
    mixed, exists = reference.synthesise(*doubles, 11, 7, SEED)
    s = torch.einsum("amd,ad->am", mixed, anchors.double()) / temperature
    lse = s.masked_fill(~exists, -math.inf).logsumexp(1)
    weight = torch.exp(s - lse[:, None]).masked_fill(~exists, 0.0).nan_to_num(0.0)
    mean = torch.einsum("am,amd->ad", weight, mixed)
    torch.testing.assert_close(found[0].cpu().double(), lse, rtol=1e-5, atol=1e-3 * (not unit) + 1e-4)
    torch.testing.assert_close(found[1].cpu().double(), mean, rtol=1e-3, atol=1e-4)
    plain = eager.mix_negatives(*tensors, *rest, SEED)
    torch.testing.assert_close(found[1].cpu(), plain[1], rtol=1e-3, atol=1e-4)
