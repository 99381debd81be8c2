"""The CPU bars: A = 1024 anchors (512 with selected keys), 171 x 1000 keys, 256 channels.

Every result is checked against its peer before anything is timed; margins of the gate are wide
enough for a shared machine, the table shows the figures themselves.
"""

import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
from conftest import ROWS
from torch.nn.functional import normalize

import pico_fast

CLASSES, SLOTS, CHANNELS = 171, 1000, 256
TEMPERATURE = 0.1
COUNTS = (1024, 2048)  # positives and negatives of an anchor


def bank(n_anchors: int, slots: int = SLOTS):
    """Anchors [A, D], labels [A], keys [171 * slots, D] clustered by class, labels, all unit rows."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, CHANNELS, generator=g) * 0.3
    anchor_labels = torch.randint(0, CLASSES, (n_anchors,), generator=g)
    key_labels = torch.arange(CLASSES).repeat_interleave(slots)
    rows = torch.randn(n_anchors, CHANNELS, generator=g) + centres[anchor_labels]
    keys = torch.randn(CLASSES * slots, CHANNELS, generator=g) + centres[key_labels]
    return normalize(rows, dim=1), anchor_labels, normalize(keys, dim=1), key_labels


def with_backward(loss, anchors, *args, **options):
    """A run of loss and gradient: returns both."""

    def run():
        leaf = anchors.detach().requires_grad_()
        value = loss(leaf, *args, **options)
        value.backward()
        return value.detach(), leaf.grad

    return run


def check_equal(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm()


def test_contrast_all(compare):
    pairs = bank(1024)
    keys = pairs[2]
    half = (*pairs[:2], keys.bfloat16(), pairs[3])
    runs = {
        "pico_fast": with_backward(pico_fast.contrast, *pairs, TEMPERATURE),
        "pico_fast, bf16 bank": with_backward(pico_fast.contrast, *half, TEMPERATURE),
        "two bare products": lambda: peers.two_products(pairs[0], keys),
        "eager formula": with_backward(peers.eager, *pairs, TEMPERATURE),
    }
    check_equal(runs["pico_fast"](), runs["eager formula"](), 1e-4)
    check_equal(runs["pico_fast, bf16 bank"](), runs["eager formula"](), 1e-2)
    medians = compare("loss + gradient, all keys", runs)
    assert medians["eager formula"] >= 5 * medians["pico_fast"]
    assert medians["pico_fast"] <= 1.35 * medians["two bare products"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert medians["pico_fast"] >= 2 * medians["pico_fast, bf16 bank"]


@pytest.mark.parametrize("sampling", ("hardest", "semi_hard", "random"))
def test_contrast_selected(compare, sampling):
    pairs = bank(512)
    options = {"temperature": TEMPERATURE, "sampling": sampling}
    mixes = {"synthesis": pico_fast.Synthesis()}
    name, peer = ("matmul + topk", peers.matmul_topk)
    if sampling != "hardest":
        name, peer = ("semi_hard, full matrix", peers.semi_hard)
    runs = {
        "pico_fast": with_backward(pico_fast.contrast, *pairs, **options),
        "pico_fast, synthesis": with_backward(pico_fast.contrast, *pairs, **options, **mixes),
        name: with_backward(peer, *pairs, *COUNTS, TEMPERATURE),
    }
    if sampling == "hardest":
        check_equal(runs["pico_fast"](), runs[name](), 1e-4)
    if sampling == "semi_hard":
        # two draws from the same pools: the means over all anchors are close
        torch.testing.assert_close(runs["pico_fast"]()[0], runs[name]()[0], rtol=1e-2, atol=0)
    medians = compare(f"loss + gradient, {sampling}", runs)
    assert medians[name] >= (8 if sampling == "random" else 2) * medians["pico_fast"]


def test_a_mostly_empty_bank_costs_what_it_holds(compare):
    """The first twentieth of every queue is filled: the keys in their bank, and the same keys alone."""
    filled = SLOTS // 10
    anchors, anchor_labels, keys, key_labels = bank(256, filled)
    spread = keys.new_zeros(CLASSES, 20 * filled, CHANNELS)
    labels = torch.full(spread.shape[:2], -1)
    spread[:, :filled] = keys.view(CLASSES, filled, CHANNELS)
    labels[:, :filled] = key_labels.view(CLASSES, filled)
    spread, labels = spread.flatten(0, 1), labels.flatten()
    options = {"temperature": TEMPERATURE, "sampling": "hardest"}
    packed = (anchors, anchor_labels, keys, key_labels)
    runs = {
        "pico_fast": with_backward(pico_fast.contrast, *packed[:2], spread, labels, **options),
        "packed": with_backward(pico_fast.contrast, *packed, **options),
    }
    check_equal(runs["pico_fast"](), runs["packed"](), 1e-5)
    medians = compare("loss + gradient, hardest, 5 % filled", runs)
    assert medians["pico_fast"] <= 2 * medians["packed"]


@pytest.mark.parametrize("direction", ("forward", "forward + backward"))
def test_region_pooling(compare, direction):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(8, 256, 128, 128, generator=g)
    labels = torch.randint(0, 19, (8, 16, 16), generator=g)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)

    def both(pool):
        leaf = features.requires_grad_(direction != "forward")
        means = pool(leaf, labels, 19)
        if direction != "forward":
            leaf.grad = None
            means.backward(torch.ones_like(means))
        return means.detach()

    runs = {
        "pico_fast": lambda: both(lambda *args: pico_fast.region_pool(*args)[0]),
        "index_add_": lambda: both(peers.index_add),
    }
    torch.testing.assert_close(runs["pico_fast"](), runs["index_add_"](), rtol=1e-4, atol=1e-5)
    medians = compare(f"region pooling, {direction}", runs)
    assert medians["index_add_"] >= 3 * medians["pico_fast"]


def test_parts_of_a_step(compare):
    """A whole criterion step of COCO-Stuff's classes on a CPU, and what each part of it takes."""
    from pico_fast import anchors

    g = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(4, CHANNELS, 64, 64, generator=g), dim=1)
    labels = torch.randint(0, CLASSES, (4, 8, 8), generator=g)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    seed = torch.tensor(0)
    criterion = pico_fast.PiCoLoss(
        CLASSES, sampling="all", pixel_queue_size=900, region_queue_size=100
    )
    for _ in range(3):
        criterion(embeddings, labels)
    leaf = embeddings.clone().requires_grad_()
    runs = {
        "pico_fast": lambda: criterion(leaf, labels).backward(),
        "anchor sampling": lambda: anchors.draw_anchors(labels, None, 1024, 100, 1, CLASSES, seed),
        "bank update": lambda: criterion.bank.write(embeddings, labels),
    }
    compare("criterion step, 4 x 64 x 64", runs)


MEMORY = """
import bench_cpu, peers, pico_fast
from pathlib import Path

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

pairs = bench_cpu.bank(1024)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = kib("VmRSS")
bench_cpu.with_backward({loss}, *pairs, {options})()
print(kib("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("sampling", "peer", "options", "share"),
    (
        ("all", "eager", "0.1", 8),
        ("hardest", "matmul_topk", "*bench_cpu.COUNTS, 0.1", 4),
        ("semi_hard", "semi_hard", "*bench_cpu.COUNTS, 0.1", 4),
    ),
)
def test_memory(benchmark, sampling, peer, options, share):
    """Growth of the resident set over loss + gradient, each in a process of its own."""
    kib = {}
    ours = f"0.1, {sampling!r}"
    for loss, given in (("pico_fast.contrast", ours), (f"peers.{peer}", options)):
        command = [sys.executable, "-c", MEMORY.format(loss=loss, options=given)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        kib["pico_fast" if given is ours else peer] = int(done.stdout)
    pairs = bank(64)
    benchmark.extra_info.update(kib)
    benchmark.pedantic(with_backward(pico_fast.contrast, *pairs, TEMPERATURE, sampling), rounds=1)
    ROWS.append({"case": f"peak memory of loss + gradient, {sampling}", "kib": kib})
    assert share * kib["pico_fast"] <= kib[peer]
