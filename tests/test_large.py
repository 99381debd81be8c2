"""Offsets beyond 2^31 and 2^32: rows far apart in memory that is mostly never touched."""

import math

import numpy
import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast.contrast import eager
from pico_fast.contrast import ops as contrast_ops
from pico_fast.selection import eager as choosing
from pico_fast.selection import layout as layouts
from pico_fast.selection import ops as choosing_ops
from pico_fast.selection.layout import Cut
from pico_fast.selection.options import SAMPLINGS, check_selection
from pico_fast.selection.sample import draw_sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
APART = 2**27  # bytes between rows: the last ones are 2^33 bytes from the first


def untouched(n, dtype):
    """Zeros that take no memory until they are written: torch.zeros would write them."""
    return torch.from_numpy(numpy.zeros(n * dtype.itemsize, dtype=numpy.uint8)).view(dtype)


def far_rows(rows):
    """The same rows, far from one another."""
    step = APART // rows.dtype.itemsize
    memory = untouched(len(rows) * step, rows.dtype)
    assert memory.numel() > 2**31
    return memory.as_strided(rows.shape, (step, 1)).copy_(rows)


def scene(dtype):
    keys, key_labels = normalize(torch.randn(66, 16), dim=1).to(dtype), torch.arange(66) % 5 - 1
    anchors, labels = normalize(torch.randn(12, 16), dim=1), torch.arange(12) % 4
    return anchors, labels, keys, key_labels


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_keys_far_apart(sampling, dtype, figures):
    anchors, labels, keys, key_labels = scene(dtype)
    words = {"sampling": sampling, "synthesis": pico_fast.Synthesis(3, 2, 6), "num_negatives": 9}
    found = []
    for rows in (keys, far_rows(keys)):
        x = anchors.clone().requires_grad_()
        loss = pico_fast.contrast(x, labels, rows, key_labels, **words)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
        counts = {"sampling": sampling, "num_positives": 5, "num_negatives": 9}
        found[-1] += tuple(pico_fast.select_keys(anchors, labels, rows, key_labels, **counts))
    for near, far in zip(*found, strict=True):
        torch.testing.assert_close(far, near)
    figures.add("large", "calls with offsets beyond 2^32")


def sums_and_picks(contrast, selection, work):
    """Sums of both sides and the hardest negatives, in the order of the layout's anchors."""
    nobody = Cut()
    found = [*contrast.negatives(work, nobody, 0.1, True)[:3]]
    found += contrast.positives(work, nobody, found[0], 0.1, True)
    return [*found, *selection.hardest(work, False, None, 9, False)[:2]]


def same_sums_and_picks(found, expected, keys, others, **bounds):
    """The same sums, and picks of the same rows."""
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.dtype == torch.int64:
            assert torch.equal(mine < 0, theirs < 0)
            mine, theirs = keys[mine.clamp(min=0)], others[theirs.clamp(min=0)]
            mine, theirs = (x.float().masked_fill(found[i][..., None] < 0, 0) for x in (mine, theirs))
        torch.testing.assert_close(mine, theirs, **bounds)


def gpu_kernels(work):
    """What the Triton kernels say, interpreted without a GPU: numpy's integers wrap around as well."""
    contrast = pytest.importorskip("pico_fast.contrast.gpu", reason="needs Triton")
    selection = pytest.importorskip("pico_fast.selection.gpu", reason="needs Triton")
    return sums_and_picks(contrast, selection, work)


def test_kernels_gather_keys_far_apart(figures):
    anchors, labels, keys, key_labels = (x.to(DEVICE) for x in scene(torch.float16))
    anchors = anchors.half()  # as products take them
    if DEVICE == "cuda":  # whose memory has to be there: 9 GB
        memory = torch.empty(len(keys) * APART // 2, dtype=torch.float16, device=DEVICE)
        far = memory.as_strided(keys.shape, (APART // 2, 1)).copy_(keys)
    else:
        far = far_rows(keys)
    near, away = (layouts.of_labels(anchors, labels, x, key_labels) for x in (keys, far))
    # weights of the kernels are rounded to float16
    expected = sums_and_picks(eager, choosing, near)
    same_sums_and_picks(gpu_kernels(away), expected, keys, keys, rtol=2e-3, atol=2e-3)
    figures.add("large", "calls with offsets beyond 2^32", 3)


@pytest.mark.parametrize("dim", (17, 16), ids=("by pointers", "by descriptors"))
def test_kernels_read_the_end_of_a_large_bank(dim, figures):
    n = 2**31 // dim // 3 + 100
    if DEVICE == "cuda":
        bank = torch.zeros(3, n, dim, dtype=torch.float16, device=DEVICE)
    else:
        bank = untouched(3 * n * dim, torch.float16).view(3, n, dim)
    rows = normalize(torch.randn(3, 25, dim), dim=2).half().to(DEVICE)
    bank[:, :10], bank[:, -15:] = rows[:, :10], rows[:, 10:]
    anchors = normalize(torch.randn(7, dim), dim=1).half().to(DEVICE)
    labels = torch.arange(7, device=DEVICE) % 3
    works = [
        layouts.of_bank(anchors, labels, keys.flatten(0, 1), ends(3, keys.shape[1], 10, 15))
        for keys in (bank, rows)
    ]
    found, expected = gpu_kernels(works[0]), sums_and_picks(eager, choosing, works[1])
    same_sums_and_picks(found, expected, works[0].keys, works[1].keys, rtol=2e-3, atol=2e-3)
    figures.add("large", "calls with offsets beyond 2^31", 2)


def ends(classes, slots, n_first, n_last):
    """Ranges of a bank of which each class has its first and its last slots in use."""
    first = torch.arange(classes, device=DEVICE) * slots
    parts = [first, first * 0 + n_first, first + slots - n_last, first * 0 + n_last]
    return torch.stack(parts, 1).view(classes, 2, 2)


def test_images_far_apart(figures):
    """Images, channels and rows of pixels beyond 2^31 elements from the first."""
    x = normalize(torch.randn(3, 8, 4, 5), dim=1)
    memory = untouched(3 * 2**30, torch.float32)
    far = memory.as_strided(x.shape, (2**30, 2**26, 2**10, 1))
    far.copy_(x)
    labels = torch.randint(-1, 4, (3, 4, 5))
    for near, mine in zip(
        pico_fast.region_pool(x, labels, 4), pico_fast.region_pool(far, labels, 4), strict=True
    ):
        torch.testing.assert_close(mine, near)
    made = [pico_fast.PiCoLoss(4, 8, pixel_queue_size=20, region_queue_size=3) for _ in range(2)]
    for _ in range(2):
        losses = [criterion(e, labels) for criterion, e in zip(made, (x, far), strict=True)]
        torch.testing.assert_close(*losses)
    assert torch.equal(made[0].bank.storage[:, :20], made[1].bank.storage[:, :20])
    figures.add("large", "calls with offsets beyond 2^32", 3)


def test_a_bank_of_more_than_2_to_the_31_values(figures):
    """Only its first and its last slots of each class are in use, so that it takes no memory."""
    classes, slots, dim = 9, 2**20, 256
    storage = untouched(classes * slots * dim, torch.bfloat16).view(classes, slots, dim)
    assert storage.numel() > 2**31
    rows = normalize(torch.randn(classes, 40, dim), dim=2).bfloat16()
    storage[:, :10], storage[:, -30:] = rows[:, :10], rows[:, 10:]
    anchors, labels = normalize(torch.randn(14, dim), dim=1), torch.arange(14) % classes
    works = [
        layouts.of_bank(anchors, labels, keys.flatten(0, 1), ends(classes, keys.shape[1], 10, 30))
        for keys in (storage, rows)
    ]
    found, expected = (sums_and_picks(contrast_ops, choosing_ops, work) for work in works)
    same_sums_and_picks(found, expected, works[0].keys, works[1].keys, rtol=2e-3, atol=2e-3)
    assert found[-2].max() > 2**31 // dim
    selection = check_selection("semi_hard", None, 6, 20, 0.5)
    samples = [
        draw_sample(work, selection, False, torch.tensor(3), of)
        for work, of in zip(works, (slots, 40), strict=True)
    ]
    drawn, near = (work.keys[sample.key_order] for work, sample in zip(works, samples, strict=True))
    n = int(samples[0].sizes.sum())
    assert torch.equal(drawn[:n], near[:n]) and samples[0].key_order.max() > 2**31 // dim
    figures.add("large", "calls with offsets beyond 2^32", 2)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sizes_beyond_2_to_the_31_on_a_device_without_memory(sampling):
    """Shapes alone: what a step would return, and that nothing counts in 32 bits on the way."""
    anchors = torch.empty(1024, 256, device="meta", requires_grad=True)
    labels = torch.empty(1024, dtype=torch.int64, device="meta")
    keys = torch.empty(2**27, 256, dtype=torch.bfloat16, device="meta")
    key_labels = torch.empty(2**27, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    pairs = (anchors, labels, keys, key_labels)
    loss = pico_fast.contrast(*pairs, sampling=sampling, seed=seed)
    loss.backward()
    assert anchors.grad.shape == (1024, 256) and loss.shape == ()
    assert math.prod(keys.shape) > 2**32
