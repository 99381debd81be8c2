"""Loss and gradient on the sample that all anchors share, beside plain PyTorch on the same sample."""

import functools

import cases
import ours
import pytest
import torch
from bench_contrast import peak_of
from cases import CHANNELS, COCO_STUFF, COUNTS, TEMPERATURE
from ours import SAMPLED
from peers import sampled as peers
from results import Case, Row
from runs import Run

import pico_fast

# COCO-Stuff's bank of 10,000 pixels and 1,000 regions a class, and a small one; both give a sample of
# as many negatives
FULL = cases.DataSet("171 classes x 11,000", 171, 10_000, 1_000)
SMALL = cases.DataSet("171 classes x 1,000", 171, 1_000, 0)
# the peer takes at least 1.5 times as long; a bank eleven times as large at most 1.3 times as long
FASTER, FLAT = 1.5, 1 / 1.3
# these sample as many positives of either bank; "semi_hard" ten times as many where a class has them
FLAT_SAMPLINGS = [name for name in SAMPLED if name != "semi_hard"]


def inputs(data_set: cases.DataSet, device: str, n_anchors: int) -> cases.Pairs:
    """Keys in bfloat16, as a bank keeps them."""
    return cases.pairs(data_set, n_anchors, 1.0, "clustered", torch.bfloat16, device)


def operations(name: str, n_anchors: int, sizes: tuple[list[int], list[int]]) -> float:
    """Operations of the products that any way needs: similarities and a weighted sum of both sides.

    An anchor meets the sampled positives of its own class alone, counted as a class's mean number.
    """
    of_class, sampled = sum(sizes[0]) / len(sizes[0]), sum(sizes[1])
    # of negatives that a cut leaves the weighted sum needs few keys
    weighted = sampled if name == "random" else COUNTS[1]
    return 2.0 * n_anchors * CHANNELS * (sampled + weighted + 2 * of_class)


def plain(pairs: cases.Pairs, name: str, block: int) -> Run:
    """The peer on the sample that ours draws, in blocks of so many anchors."""
    selection_ = ours.selection_of(name)
    samples = tuple(peers.Sampled(*rows) for rows in ours.sampled_rows(pairs, name))
    strategies = (selection_.negatives, selection_.positives)
    call = functools.partial(
        peers.plain, *pairs[:3], *samples, *strategies, *COUNTS, TEMPERATURE, block=block
    )
    needs = peers.bytes_needed(len(pairs.anchors), CHANNELS, *samples, block)
    # keys that rounding swaps at a bound change the gradient by more than rounding
    tolerance = 1e-3 if pairs.anchors.device.type == "cpu" else 2e-2
    return Run(call, tolerance, needs, FASTER)


def sampled(data_set: cases.DataSet, pairs: cases.Pairs, name: str) -> tuple[Case, dict[str, Run]]:
    """The case, and ours beside the peer: block by block, and all anchors at once."""
    sizes = tuple(sizes for _, sizes in ours.sampled_rows(pairs, name))
    n_anchors = len(pairs.anchors)
    case = Case(
        f"sampled contrast, {name}",
        data_set.name,
        len(pairs.keys),
        n_anchors,
        operations=operations(name, n_anchors, sizes),
    )
    runs = {
        "pico_fast": Run(ours.against_a_bank(pairs, name)),
        "plain PyTorch": plain(pairs, name, n_anchors),
        "plain PyTorch, in blocks": plain(pairs, name, 256),
    }
    return case, runs


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("data_set", (SMALL, FULL), ids=lambda d: d.name)
def test_sampled(compare, device, data_set, name):
    n_anchors = 1024 if device == "cpu" else 4096
    pairs = inputs(data_set, device, n_anchors)
    case, runs = sampled(data_set, pairs, name)
    runs["pico_fast, labelled keys"] = Run(ours.on_labelled_keys(pairs, name), 1e-3)
    if name.startswith("semi_hard"):
        mixed = ours.against_a_bank(pairs, name, pico_fast.Synthesis())
        runs["pico_fast, synthesis"] = Run(mixed)
    compare(case, runs)


@pytest.mark.parametrize("name", FLAT_SAMPLINGS)
def test_time_does_not_grow_with_the_bank(compare, device, name):
    """Ours alone, against both banks in turn."""
    full, small = (inputs(data_set, device, 1024) for data_set in (FULL, SMALL))
    runs = {
        "pico_fast": Run(ours.against_a_bank(full, name)),
        "pico_fast, 171 x 1,000": Run(ours.against_a_bank(small, name), least_ratio=FLAT),
    }
    bench = "sampled contrast, by size of the bank"
    compare(Case(bench, FULL.name, len(full.keys), 1024, detail=name), runs)


@pytest.mark.parametrize("name", SAMPLED)
def test_memory(benchmark, device, results, name):
    """Growth of the resident set over loss + gradient, each in a process of its own."""
    if device == "cuda":
        pytest.skip("on a GPU every timed run's peak is recorded")
    n_anchors, share = 512, 0.1
    keys = COCO_STUFF.keys(share)
    case = Case("memory, sampled contrast", COCO_STUFF.name, keys, n_anchors, share, detail=name)
    peaks = {}
    for run in ("pico_fast", "plain PyTorch", "plain PyTorch, in blocks"):
        row = Row(case, run)
        row.peak_bytes, row.why_not = peak_of(run, name, n_anchors, share)
        peaks[run] = row.peak_bytes
        results.rows.append(row)
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(lambda: None, rounds=1)
    assert peaks["pico_fast"] <= min(peaks.values())
