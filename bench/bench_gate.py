"""What CI holds on to: ratios of one run with wide margins, and counts that no noise touches.

`make gate` runs these alone, with --margin 0.5: half of each bar.
"""

import cases
import measure
import ours
import pytest
import torch
from bench_contrast import compared
from bench_regions import pooling
from bench_sampled import inputs, sampled
from bench_selection import case_of, mine, peer
from bench_step import full, step
from peers import selection as peers

import pico_fast
from pico_fast.selection.options import SAMPLINGS

SMALL = cases.DataSet("171 classes x 200", 171, 200, 0)
# at most so many; what is new and needs more says why in its commit
MOST_OPERATIONS = 760

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device != "cpu":
        pytest.skip("the gate is a CPU's; a GPU has the bars of every benchmark")


def test_all_keys(compare):
    case, runs = compared("cpu", SMALL, 512, 1.0, "clustered", ("eager", "two products"))
    compare(case, runs)


def test_hardest(compare):
    pairs = cases.pairs(SMALL, 512)
    runs = {**mine(pairs), "matmul + topk": peer(peers.matmul_topk, pairs, 1e-3, 2.0)}
    compare(case_of(pairs, 1.0, "clustered", SMALL.name), runs)


def test_sampled(compare):
    pairs = inputs(SMALL, "cpu", 512)
    compare(*sampled(SMALL, pairs, "semi_hard, random positives"))


@pytest.mark.parametrize("detail", ("forward", "forward + backward"))
def test_region_pooling(compare, detail):
    compare(*pooling("cpu", torch.float32, "planes", 19, detail, ("index_add",)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
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
        run = ours.against_a_bank(pairs)
        measure.allocated(run)  # the first time also counts what is kept for later
        peaks.append(measure.allocated(run))
        results.counts[f"bytes of loss + gradient, 256 x {171 * slots:,}"] = peaks[-1]
    benchmark.pedantic(run, rounds=1)
    assert peaks[1] <= 1.1 * peaks[0] + 2**20
    assert peaks[1] < 256 * 171 * 400
