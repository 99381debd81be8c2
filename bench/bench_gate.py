"""What CI holds on to: ratios of one run with wide margins, and counts that no noise touches.

`make gate` runs these alone, with --margin 0.5: half of each bar.
"""

import cases
import measure
import pytest
import torch
from bench_contrast import compared
from bench_regions import pooling
from bench_selection import case_of, ours, peer
from bench_step import full, step
from peers import selection as peers
from runs import with_gradient

import pico_fast

SMALL = cases.DataSet("171 classes x 200", 171, 200, 0)
# at most so many; what is new and needs more says why in its commit
MOST_OPERATIONS = 640

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device != "cpu":
        pytest.skip("the gate is a CPU's; a GPU has the bars of every benchmark")


def test_all_keys(compare):
    case, runs = compared("cpu", SMALL, 512, 1.0, "clustered", ("eager", "two products"))
    compare(case, runs)


@pytest.mark.parametrize(
    ("sampling", "name", "function", "tolerance"),
    (
        ("hardest", "matmul + topk", peers.matmul_topk, 1e-3),
        ("semi_hard", "full matrix", peers.semi_hard, None),
    ),
)
def test_hardest_and_semi_hard(compare, sampling, name, function, tolerance):
    pairs = cases.pairs(SMALL, 512)
    runs = {**ours(pairs, sampling), name: peer(function, pairs, tolerance, 2.0)}
    compare(case_of(sampling, pairs, 1.0, "clustered", SMALL.name), runs)


@pytest.mark.parametrize("detail", ("forward", "forward + backward"))
def test_region_pooling(compare, detail):
    compare(*pooling("cpu", torch.float32, "planes", 19, detail, ("index_add",)))


@pytest.mark.parametrize("sampling", ("all", "random", "hardest", "semi_hard"))
def test_a_step_dispatches_no_more_than_before(benchmark, sampling, results):
    batch = cases.images(cases.CAMVID, 2, 16, 16)
    criterion = pico_fast.PiCoLoss(
        11, sampling=sampling, pixel_queue_size=50, region_queue_size=5, max_samples=64
    )
    run = step(full(criterion), batch)
    count = measure.operations(run)
    results.counts[f"operations of a step on a CPU, {sampling}"] = count
    benchmark.pedantic(run, rounds=1)
    assert count <= MOST_OPERATIONS


def test_memory_does_not_grow_with_the_keys(benchmark, results):
    peaks = []
    for slots in (100, 400):
        pairs = cases.pairs(cases.DataSet("", 171, slots, 0), 256)
        run = with_gradient(pico_fast.contrast, *pairs, 0.1)
        measure.allocated(run)  # the first time also counts what is kept for later
        peaks.append(measure.allocated(run))
        results.counts[f"bytes of loss + gradient, 256 x {171 * slots:,}"] = peaks[-1]
    benchmark.pedantic(run, rounds=1)
    assert peaks[1] <= 1.1 * peaks[0] + 2**20
    assert peaks[1] < 256 * 171 * 400
