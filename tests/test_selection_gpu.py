"""Selection and synthesis on a GPU at full size: brute force, same bits, graphs, memory."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import info

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CLASSES, CHANNELS = 171, 256


def scene(n_anchors, slots, kind):
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, CHANNELS, device="cuda") * (0.5 if kind == "clustered" else 0.0)
    key_labels = torch.arange(CLASSES, device="cuda").repeat_interleave(slots)
    keys = torch.randn(len(key_labels), CHANNELS, device="cuda", dtype=torch.bfloat16)
    keys = normalize(keys + centres[key_labels], dim=1).bfloat16()
    if kind == "duplicates":
        keys = keys[torch.randint(0, 50, (len(keys),), device="cuda")]
    elif kind == "periodic":
        keys[::16] = normalize(keys[::16] + 3 * keys[:1], dim=1)
    labels = torch.randint(-1, CLASSES, (n_anchors,), device="cuda")
    rows = torch.randn(n_anchors, CHANNELS, device="cuda") + centres[labels.clamp(min=0)]
    return normalize(rows, dim=1), labels, keys, key_labels


def test_the_ops_are_triton():
    for op in ("hardest", "weighted_rows", "mix_negatives"):
        assert info.implementation(f"pico_fast::{op}", "CUDA") == "Triton"


@pytest.mark.parametrize("kind", ("random", "clustered", "duplicates", "periodic"))
@pytest.mark.parametrize(("n_anchors", "slots"), [(100, 1000), (1024, 10_000)])
@pytest.mark.parametrize("count", (1, 1024, 4096))
def test_hardest_against_brute_force(n_anchors, slots, kind, count):
    of = scene(n_anchors, slots, kind)
    counts = {"num_positives": count, "num_negatives": count}
    found = pico_fast.select_keys(*of, "hardest", **counts)
    anchors, labels, keys, key_labels = of
    some = torch.arange(0, n_anchors, max(1, n_anchors // 64), device="cuda")
    exact = anchors[some].bfloat16().double() @ keys.double().T
    own = labels[some, None] == key_labels
    for sign, index, similarity in (
        (-1, found.positive_index, found.positive_similarity),
        (1, found.negative_index, found.negative_similarity),
    ):
        candidate = (own if sign < 0 else ~own) & (labels[some, None] >= 0)
        n = candidate.sum(1).clamp(max=count)
        mine, s = index[some], similarity[some].double()
        assert torch.equal((mine >= 0).sum(1), n)
        picked = exact.gather(1, mine.clamp(min=0)).masked_fill(mine < 0, 0.0)
        torch.testing.assert_close(s, picked, rtol=0, atol=1e-5)
        hardness = (sign * exact).masked_fill(~candidate, -math.inf)
        best = hardness.topk(min(count, hardness.shape[1]), dim=1).values
        shown = (sign * picked).masked_fill(mine < 0, -math.inf)[:, : best.shape[1]]
        torch.testing.assert_close(shown.sort(1, descending=True).values, best, rtol=0, atol=1e-5)
        order = mine.masked_fill(mine < 0, -1).sort(1).values
        assert not ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any()
    again = pico_fast.select_keys(*of, "hardest", **counts)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("sampling", ("hardest", "semi_hard", "bounded", "random"))
@pytest.mark.parametrize("synthesis", (None, pico_fast.Synthesis()))
def test_loss_and_gradient(sampling, synthesis):
    of = scene(512, 1000, "clustered")
    anchors = of[0].bfloat16().float().requires_grad_()
    options = {"temperature": 0.1, "sampling": sampling, "synthesis": synthesis, "seed": 3}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = pico_fast.contrast(anchors, *of[1:], **options)
    (grad,) = torch.autograd.grad(loss, anchors)
    assert torch.cuda.max_memory_allocated() - before <= 500e6
    again = pico_fast.contrast(anchors, *of[1:], **options)
    assert torch.equal(loss, again) and grad.isfinite().all()
    cpu = [x.cpu() for x in of]
    leaf = anchors.detach().cpu().requires_grad_()
    expected = pico_fast.contrast(leaf, cpu[1], cpu[2].float(), cpu[3], **options)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    # of keys that are almost as hard as the last one that counts, either may count
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert (grad.cpu() - expected_grad).norm() <= 2e-2 * expected_grad.norm()


@pytest.mark.parametrize("sampling", ("hardest", "semi_hard", "bounded", "random"))
def test_a_whole_criterion_step_is_one_graph(sampling):
    criterion = pico_fast.PiCoLoss(
        19,
        64,
        sampling=sampling,
        pixel_queue_size=500,
        region_queue_size=50,
        synthesis=pico_fast.Synthesis(32, 32, 64),
    ).cuda()
    torch.manual_seed(0)
    embeddings = normalize(torch.randn(4, 64, 32, 32, device="cuda"), dim=1).requires_grad_()
    labels = torch.randint(0, 19, (4, 32, 32), device="cuda")

    def step():
        loss = criterion(embeddings, labels, labels.flip(0))
        return loss, torch.autograd.grad(loss, embeddings)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    expected = [[x.detach().clone() for x in step()] for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    criterion.load_state_dict(state)
    for loss, grad in expected:
        graph.replay()
        assert torch.equal(captured[0], loss) and torch.equal(captured[1], grad)
