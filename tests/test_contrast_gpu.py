"""The contrast with all keys on a GPU at full size: truth, same bits, memory, graphs, no recompilation."""

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import info
from pico_fast.contrast import eager, ops
from pico_fast.selection.layout import Cut, of_bank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CLASSES, SLOTS, CHANNELS = 171, 10_000, 256
ALL = Cut()


def bank_of(slots, clustered, dtype=torch.bfloat16, channels=CHANNELS):
    """Keys [171 * slots, D] class by class, their ranges, and the classes' centres."""
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, 1, channels, device="cuda") * (0.5 if clustered else 0.0)
    keys = torch.randn(CLASSES, slots, channels, device="cuda", dtype=torch.bfloat16) + centres
    keys = normalize(keys, dim=2).to(dtype)
    first = torch.arange(CLASSES, device="cuda") * slots
    ranges = torch.stack([first, torch.full_like(first, slots)], 1).unsqueeze(1)
    return keys.flatten(0, 1), ranges, centres[:, 0]


def anchors_of(n, centres):
    labels = torch.randint(-1, CLASSES, (n,), device="cuda")
    rows = torch.randn(n, centres.shape[1], device="cuda") + centres[labels.clamp(min=0)]
    return normalize(rows, dim=1), labels


def sums(page, of):
    """What both ops of a page say: lse, mean and away, then loss, weight, similar and pull."""
    found = page.negatives(of, ALL, 0.1, True)[:3]
    return *found, *page.positives(of, ALL, found[0], 0.1, True)


def check(found, expected, relative):
    """Every sum within a share of its length."""
    for mine, theirs in zip(found, expected, strict=True):
        finite = theirs.isfinite()
        assert torch.equal(mine[~finite].double(), theirs[~finite])
        error = (mine.double() - theirs)[finite].norm()
        assert error <= relative * theirs[finite].norm().clamp(min=1e-9)


def test_the_ops_are_triton():
    for op in ("negatives", "positives", "keys_grad"):
        assert info.implementation(f"pico_fast::{op}", "CUDA") == "Triton"


@pytest.mark.parametrize("clustered", (False, True))
@pytest.mark.parametrize("n_anchors", (1, 100, 1024, 4096, 16384))
@pytest.mark.parametrize("slots", (1000, SLOTS))
def test_error_at_full_size(n_anchors, slots, clustered):
    keys, ranges, centres = bank_of(slots, clustered)
    of = of_bank(*anchors_of(n_anchors, centres), keys, ranges)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = sums(ops, of)
    assert torch.cuda.max_memory_allocated() - before <= 500e6
    again = sums(ops, of)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    some = slice(None, None, -(-n_anchors // 256))  # the truth of a few anchors is the truth of all
    # what bfloat16 anchors cost is not the kernel's error
    rounded = of.anchors[some].bfloat16().double()
    few = of._replace(anchors=rounded, anchor_class=of.anchor_class[some])
    # the weights of the keys are rounded to bfloat16 once
    check([x[some] for x in found], sums(eager, few), 5e-3)


@pytest.mark.parametrize("channels", (16, 48, 64, 96, 128, 320, 512))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_every_width_and_dtype(dtype, channels):
    keys, ranges, centres = bank_of(257, True, dtype, channels)
    of = of_bank(*anchors_of(333, centres), keys, ranges)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = sums(ops, of)
        factor = torch.randn(333, device="cuda")
        grads = [ops.keys_grad(of, ALL, own, found[0], factor, 0.1) for own in (False, True)]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    wide = of._replace(anchors=of.anchors.double())
    check(found, sums(eager, wide), 3e-2)
    rest = (found[0].double(), factor.double(), 0.1)
    expected = [eager.keys_grad(wide, ALL, own, *rest) for own in (False, True)]
    check(grads, expected, 5e-2)


def test_no_recompilation_from_step_to_step():
    from pico_fast.kernels import contrast as kernels

    keys, ranges, centres = bank_of(100, False)
    for n in (100, 101, 102):
        sums(ops, of_bank(*anchors_of(n, centres), keys, ranges))
    caches = kernels.negatives_kernel.device_caches[torch.cuda.current_device()]
    compiled = len(caches[0])
    for n in (103, 105, 107):
        anchors, labels = anchors_of(n, centres)
        labels = labels.clamp(max=CLASSES - 3)
        sums(ops, of_bank(anchors, labels, keys[: 171 * 100 - n], ranges[:-2]))
    assert len(caches[0]) == compiled


def test_a_whole_criterion_step_is_one_graph():
    def make():
        return pico_fast.PiCoLoss(19, 64, sampling="all", pixel_queue_size=50, region_queue_size=10).cuda()

    torch.manual_seed(0)
    batches = [
        (
            normalize(torch.randn(4, 64, 32, 32, device="cuda"), dim=1),
            torch.randint(0, 19, (4, 32, 32), device="cuda"),
            torch.randint(0, 19, (4, 32, 32), device="cuda"),
        )
        for _ in range(5)
    ]
    held = [x.clone() for x in batches[0]]
    leaf = held[0].requires_grad_()
    criterion, eager = make(), make()

    def step(criterion, embeddings, labels, predictions):
        loss = criterion(embeddings, labels, predictions)
        return loss, torch.autograd.grad(loss, embeddings)[0]

    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(criterion, leaf, *held[1:])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(criterion, leaf, *held[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(criterion, leaf, *held[1:])
    criterion.load_state_dict(state)
    for batch in batches:
        with torch.no_grad():
            for mine, given in zip(held, batch, strict=True):
                mine.copy_(given)
        graph.replay()
        expected = step(eager, batch[0].requires_grad_(), *batch[1:])
        for mine, theirs in zip(captured, expected, strict=True):
            assert torch.equal(mine, theirs)
    for name, value in eager.state_dict().items():
        assert torch.equal(criterion.state_dict()[name], value), name
