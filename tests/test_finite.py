"""A nan or an infinity shows where it is, and reaches nothing else."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast.contrast import cpu, eager
from pico_fast.regions import why_not_compiled
from pico_fast.selection import layout as layouts
from pico_fast.selection.layout import Cut
from pico_fast.selection.options import SAMPLINGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = (math.nan, math.inf, -math.inf)


def scene(in_batch, dtype=torch.float32):
    keys, key_labels = normalize(torch.randn(60, 16), dim=1).to(dtype), torch.arange(60) % 4
    anchors, labels = normalize(torch.randn(12, 16), dim=1).to(dtype), torch.arange(12) % 4
    labels[3] = -1
    pairs = (None, None) if in_batch else (keys, key_labels)
    return anchors, labels, *pairs


def each(anchors, *rest, **options):
    """Loss [A] and its gradient [A, D]."""
    anchors = anchors.clone().requires_grad_()
    counts = {"num_positives": 5, "num_negatives": 9}
    loss = pico_fast.contrast(anchors, *rest, reduction="none", **counts, **options)
    (grad,) = torch.autograd.grad(loss.sum(), anchors)
    return loss.detach(), grad


@pytest.mark.parametrize("impl", (None, "reference"))
@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("mixes", (None, pico_fast.Synthesis(3, 2, 4)))
def test_an_anchor_that_is_not_finite_is_nan_and_nothing_else(
    impl, in_batch, sampling, value, mixes, figures
):
    anchors, labels, *pairs = scene(in_batch)
    spoiled, gone = anchors.clone(), labels.clone()
    spoiled[5, 3] = value
    gone[5] = -1
    words = {"sampling": sampling, "impl": impl, "synthesis": mixes}
    loss, grad = each(spoiled, labels, *pairs, **words)
    # in batch it is no key of others: as if its slot were empty
    expected = each(anchors, gone, *pairs, **words)
    others = torch.arange(12) != 5
    for mine, theirs in zip((loss, grad), expected, strict=True):
        torch.testing.assert_close(mine[others], theirs[others])
        assert mine[others].isfinite().all()
    assert loss[5].isnan() and grad[5].isnan().all()
    figures.add("finite", "anchors of nan or infinity")


@pytest.mark.parametrize("value", VALUES)
def test_an_empty_slot_of_anchors_may_hold_anything(value):
    anchors, labels, *pairs = scene(False)
    spoiled = anchors.clone()
    spoiled[3] = value
    for mine, theirs in zip(each(spoiled, labels, *pairs), each(anchors, labels, *pairs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", (None, "reference"))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_such_an_anchor_selects_nothing_and_is_selected_by_none(impl, sampling):
    anchors, labels, *pairs = scene(True)
    anchors[5, 3] = math.nan
    counts = {"num_positives": 5, "num_negatives": 9}
    found = pico_fast.select_keys(anchors, labels, *pairs, sampling, **counts, impl=impl)
    assert (found.positive_index[5] == -1).all() and (found.negative_index[5] == -1).all()
    assert not (found.positive_index == 5).any() and not (found.negative_index == 5).any()
    assert found.positive_similarity.isfinite().all() and found.negative_similarity.isfinite().all()


@pytest.mark.parametrize("call", (pico_fast.contrast, pico_fast.select_keys))
@pytest.mark.parametrize("value", VALUES)
def test_keys_in_use_have_to_be_finite(call, value):
    anchors, labels, keys, key_labels = scene(False)
    keys[17, 2] = value
    with pytest.raises(ValueError, match=r"^keys: expected finite.* 1 of 60 rows, first in row 17"):
        call(anchors, labels, keys, key_labels)
    key_labels[17] = -1
    call(anchors, labels, keys, key_labels)


def kernels():
    return pytest.importorskip("pico_fast.contrast.gpu", reason="needs Triton")


PAGES = {"eager": lambda: eager, "Triton": kernels}
if why_not_compiled is None:
    PAGES["CPU"] = lambda: cpu


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("page", PAGES)
def test_elsewhere_a_key_of_nan_makes_nan_of_whom_it_meets(page):
    """Where no check can be made without reading back: never a number that is wrong."""
    anchors, labels, keys, key_labels = scene(False, torch.bfloat16)
    keys[16, 2] = math.nan  # of class 0
    work = layouts.of_labels(*(x.to(DEVICE) for x in (anchors, labels, keys, key_labels)))
    page, nobody, used = PAGES[page](), Cut(), work.anchor_class >= 0
    other = used & (work.names[work.anchor_class] != 0)
    lse, mean, away, _ = page.negatives(work, nobody, 0.1, True)
    assert lse[other].isnan().all() and mean[other].isnan().any(1).all()
    assert lse[used & ~other].isfinite().all()
    assert away[other].isnan().all() and (lse[~used] == -math.inf).all() and not mean[~used].any()
    loss = page.positives(work, nobody, lse.nan_to_num(1.0), 0.1, True)[0]
    assert loss[used & ~other].isnan().all() and loss[other].isfinite().all()
    assert not loss[~used].any()


@pytest.mark.parametrize("queues", ((40, 8), (0, 0)))
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_pixel_spoils_no_other_gradient_and_no_bank(queues, value, sampling, figures):
    words = {"pixel_queue_size": queues[0], "region_queue_size": queues[1], "max_samples": 64}
    criterion = pico_fast.PiCoLoss(3, 8, sampling=sampling, **words)
    labels = torch.randint(0, 3, (2, 6, 6))
    good = normalize(torch.randn(2, 8, 6, 6), dim=1)
    criterion(good, labels)
    spoiled = good.clone()
    spoiled[1, 2, 3, 4] = value
    spoiled.requires_grad_()
    loss = criterion(spoiled, labels)
    loss.backward()
    others = torch.ones(2, 6, 6, dtype=torch.bool)
    others[1, 3, 4] = False
    grad = spoiled.grad.movedim(1, 3)
    assert loss.isnan() and grad[1, 3, 4].isnan().all()
    assert grad[others].isfinite().all() and grad[others].any()
    assert criterion.bank.storage.isfinite().all()
    for name in ("positive_similarity", "negative_similarity", "anchors"):
        assert criterion.stats[name].isfinite()
    # and the next batch is as good as ever
    assert criterion(good, labels).isfinite()
    figures.add("finite", "spoiled pixels in a criterion")


def test_finite_rows_whose_sum_is_not_are_finite():
    anchors, labels, keys, key_labels = scene(False)
    large = keys * 2e38
    assert not large.abs().sum().isfinite() and large.isfinite().all()
    large = large.abs()
    loss = pico_fast.contrast(anchors * 1e-38, labels, large, key_labels)
    assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_keys_of_any_length_have_a_finite_gradient(sampling):
    """Similarities of 2e10: a weight is made of their difference, which is rounded by thousands."""
    labels = torch.tensor([0, 1, 1, 0] * 4)
    long = normalize(torch.randn(1, 3) + 0.05 * torch.randn(16, 3), dim=1) * 1e4
    words = {"sampling": sampling, "temperature": 0.005}
    _, grad = each(long, labels, None, None, **words)
    assert grad.isfinite().all()
    # no weight is above 1: rows of 1e4 by weights of 16 anchors, by 1 / temperature
    assert grad.norm(dim=1).max() < 4 * 16 * 1e4 / 0.005
