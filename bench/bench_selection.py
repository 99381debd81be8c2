"""Loss and gradient on selected keys, beside what PyTorch and FAISS make of it."""

import cases
import pytest
import torch
from bench_contrast import peak_of
from cases import CHANNELS, COCO_STUFF, COUNTS, TEMPERATURE
from peers import selection as peers
from peers.products import bank_of
from results import Case, Row
from runs import Run, why_not_run, with_gradient

import pico_fast

DRAWS = ("semi_hard", "random")


def inputs(device: str, data: str, share: float, n_anchors: int) -> cases.Pairs:
    """Keys in bfloat16 on a GPU, as a bank keeps them; float32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return cases.pairs(COCO_STUFF, n_anchors, share, data, dtype, device)


def case_of(
    sampling: str, pairs: cases.Pairs, share: float, data: str, data_set: str = COCO_STUFF.name
) -> Case:
    """Of the samplings hardest alone needs a product with all keys."""
    n_anchors, n_keys = len(pairs.anchors), len(pairs.keys)
    product = 2.0 * n_anchors * n_keys * CHANNELS
    return Case(
        f"contrast, {sampling}",
        data_set,
        n_keys,
        n_anchors,
        share,
        data,
        operations=product if sampling == "hardest" else 0.0,
    )


def ours(pairs: cases.Pairs, sampling: str) -> dict[str, Run]:
    """Ours, without and with synthesised negatives."""
    options = {"temperature": TEMPERATURE, "sampling": sampling}
    mixes = {"synthesis": pico_fast.Synthesis()}
    return {
        "pico_fast": Run(with_gradient(pico_fast.contrast, *pairs, **options)),
        "pico_fast, synthesis": Run(with_gradient(pico_fast.contrast, *pairs, **options, **mixes)),
    }


def peer(function, pairs: cases.Pairs, tolerance: float | None, bar: float | None = None) -> Run:
    """A peer's loss and gradient."""
    sizes = (len(pairs.anchors), len(pairs.keys), CHANNELS, *COUNTS)
    needs = peers.bytes_needed(function.__name__, *sizes)
    return Run(with_gradient(function, *pairs, *COUNTS, TEMPERATURE), tolerance, needs, bar)


@pytest.mark.parametrize("data", ("clustered", "random"))
def test_hardest(compare, device, data):
    n_anchors, share = (512, 0.1) if device == "cpu" else (4096, 1.0)
    pairs = inputs(device, data, share, n_anchors)
    # keys that rounding swaps at the threshold change the gradient by more than rounding
    tolerance = 1e-3 if device == "cpu" else 2e-2
    runs = {
        **ours(pairs, "hardest"),
        "matmul + topk": peer(peers.matmul_topk, pairs, tolerance, 2.0),
        "chunked topk": peer(peers.chunked_topk, pairs, tolerance),
    }
    if device == "cpu":
        runs["FAISS"] = peer(peers.faiss_hardest, pairs, tolerance)
    compare(case_of("hardest", pairs, share, data), runs)


@pytest.mark.parametrize("sampling", DRAWS)
def test_draws(compare, device, sampling):
    """The peers draw by themselves: losses are compared as means over the anchors, not bit by bit."""
    n_anchors, share = (512, 0.1) if device == "cpu" else (4096, 1.0)
    pairs = inputs(device, "clustered", share, n_anchors)
    runs = ours(pairs, sampling)
    if sampling == "semi_hard":
        runs["full matrix"] = peer(peers.semi_hard, pairs, None, 2.0)
        runs["subset"] = peer(peers.semi_hard_subset, pairs, None)
        same_pool = ("full matrix", "subset")
    else:
        runs["gather"] = peer(peers.random_gather, pairs, None)
        # what a step costs that looks at all keys
        runs["full matrix"] = peer(peers.semi_hard, pairs, None, 10.0)
        same_pool = ("gather",)
    mine = runs["pico_fast"].call()[0]
    for name in same_pool:
        if why_not_run(runs[name], device) is None:
            theirs = runs[name].call()[0].to(mine.dtype)
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=0)
    compare(case_of(sampling, pairs, share, "clustered"), runs)


@pytest.mark.parametrize("sampling", DRAWS)
def test_draws_from_the_whole_bank(compare, device, sampling):
    """1.71 million keys."""
    n_anchors = 256 if device == "cpu" else 16384
    pairs = inputs(device, "clustered", 1.0, n_anchors)
    runs = ours(pairs, sampling)
    if sampling == "semi_hard":
        runs["subset"] = peer(peers.semi_hard_subset, pairs, None)
    compare(case_of(sampling, pairs, 1.0, "clustered"), runs)


def test_a_mostly_empty_bank_costs_what_it_holds(compare, device):
    """The first twentieth of every queue is filled: the keys in their bank, and the same keys alone."""
    share, times = 0.01, 20
    packed = inputs(device, "clustered", share, 256)
    bank = bank_of(packed.keys, packed.key_labels)
    classes, slots, _ = bank.shape
    spread = bank.new_zeros(classes, times * slots, CHANNELS)
    spread[:, :slots] = bank
    labels = packed.key_labels.new_full((classes, times * slots), -1)
    labels[:, :slots] = packed.key_labels.view(classes, slots)
    options = {"temperature": TEMPERATURE, "sampling": "hardest"}
    in_bank = packed._replace(keys=spread.flatten(0, 1), key_labels=labels.flatten())
    runs = {
        "pico_fast": Run(with_gradient(pico_fast.contrast, *in_bank, **options)),
        "packed": Run(with_gradient(pico_fast.contrast, *packed, **options), 1e-3, 0, 0.5),
    }
    case = Case(
        "mostly empty bank", COCO_STUFF.name, len(packed.keys), 256, share, detail="hardest"
    )
    compare(case, runs)


@pytest.mark.parametrize(
    ("sampling", "name"), (("hardest", "matmul + topk"), ("semi_hard", "full matrix"))
)
def test_memory(benchmark, device, results, sampling, name):
    """Growth of the resident set over loss + gradient, each in a process of its own."""
    if device == "cuda":
        pytest.skip("on a GPU every timed run's peak is recorded")
    case = Case("memory", COCO_STUFF.name, COCO_STUFF.keys(0.1), 1024, 0.1, detail=sampling)
    peaks = {}
    for run in ("pico_fast", name):
        function = {"matmul + topk": "matmul_topk", "full matrix": "semi_hard"}.get(run)
        sizes = (case.anchors, case.keys, CHANNELS, *COUNTS)
        needs = peers.bytes_needed(function, *sizes) if function else 0
        row = Row(case, run)
        row.peak_bytes, row.why_not = peak_of(run, sampling, case.anchors, case.share, needs)
        peaks[run] = row.peak_bytes
        results.rows.append(row)
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(lambda: None, rounds=1)
    assert peaks[name] is None or 4 * peaks["pico_fast"] <= peaks[name]
