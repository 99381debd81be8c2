"""Loss and gradient with all keys, beside every other way to the same result."""

import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path

import cases
import ours
import pytest
import torch
from cases import CHANNELS, COCO_STUFF, TEMPERATURE
from peers import contrast as peers
from peers.products import bank_of
from results import Case, Row
from runs import Run, with_gradient

import pico_fast

# bars on a CPU and on a GPU; a peer without one is there to be seen
CPU_BARS = {"eager": 5.0, "two products": 1 / 1.35}
GPU_BARS = {"product of the same operations": 0.57, "attention, flash": 1.0}
SWEEP = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def parametrised(on_cpu: list, on_gpu: list):
    """Cases of each device; those of the other are not collected."""
    on_gpu = on_gpu if torch.cuda.is_available() else []
    return [
        pytest.param(device, *case, id="-".join(str(getattr(x, "name", x)) for x in (device, *case)))
        for device, these in (("cpu", on_cpu), ("cuda", on_gpu))
        for case in these
    ]


def losses(pairs: cases.Pairs, device: str) -> dict[str, Run]:
    """Every peer by name."""
    anchors, keys = pairs.anchors, pairs.keys
    bank = bank_of(keys, pairs.key_labels)
    args = (*pairs, TEMPERATURE)
    found = {}

    def add(name: str, function: str, call) -> None:
        needs = peers.bytes_needed(function, len(anchors), len(keys), CHANNELS, len(bank))
        found[name] = Run(call, 1e-4 if device == "cpu" else 2e-2, needs)

    add("eager", "eager", with_gradient(peers.eager, *args))
    add("eager, compiled", "eager_compiled", with_gradient(peers.eager_compiled, *args))
    checkpointed = with_gradient(peers.eager_checkpointed, *args)
    add("eager, checkpointed", "eager_checkpointed", checkpointed)
    add("eager, chunked", "eager_chunked", functools.partial(peers.eager_chunked, *args))
    if device == "cuda":
        for name, run in found.items():
            found[name] = dataclasses.replace(run, call=under_autocast(run.call))
    add("analytic", "analytic", functools.partial(peers.analytic, *args))
    attentions = {"flash": peers.flash_attention_on_cpu}
    if device == "cuda":
        attentions = {
            "flash": peers.flash_attention,
            "cudnn": peers.cudnn_attention,
            "flex": peers.flex_attention,
        }
    for name, attention in attentions.items():
        call = functools.partial(
            peers.attention_loss, anchors, pairs.anchor_labels, bank, TEMPERATURE, attention
        )
        add(f"attention, {name}", "attention", call)
    if device == "cuda":  # on a CPU it is plain PyTorch
        log_sum_exp = functools.partial(peers.cut_cross_entropy, anchors, keys, TEMPERATURE)
        needs = peers.bytes_needed("cut_cross_entropy", len(anchors), len(keys), CHANNELS)
        found["cut cross-entropy, no classes"] = Run(log_sum_exp, None, needs)
    return found


def compared(
    device: str, data_set: cases.DataSet, n_anchors: int, share: float, data: str, only=None
) -> tuple[Case, dict[str, Run]]:
    """The case and all its runs, or those of `only`, with ours among them."""
    half = torch.bfloat16
    pairs = cases.pairs(
        data_set, n_anchors, share, data, half if device == "cuda" else torch.float32, device
    )
    operations = 4.0 * n_anchors * len(pairs.keys) * CHANNELS
    case = Case(
        "contrast, all keys", data_set.name, len(pairs.keys), n_anchors, share, data,
        operations=operations,
    )  # fmt: skip
    tolerance = 1e-4 if device == "cpu" else 2e-2
    runs = {
        "pico_fast": Run(ours.against_a_bank(pairs)),
        "pico_fast, labelled keys": Run(ours.on_labelled_keys(pairs), tolerance),
    }
    if device == "cpu":
        narrow = pairs._replace(keys=pairs.keys.to(half))
        runs["pico_fast, bf16 bank"] = Run(ours.against_a_bank(narrow), 1e-2)
        runs["two products"] = Run(
            functools.partial(peers.two_products, pairs.anchors, pairs.keys),
            least_ratio=CPU_BARS["two products"],
        )
    else:
        product = Run(product_of(operations), least_ratio=GPU_BARS["product of the same operations"])
        runs["product of the same operations"] = product
    bars = CPU_BARS if device == "cpu" else GPU_BARS
    for name, run in losses(pairs, device).items():
        runs[name] = dataclasses.replace(run, least_ratio=bars.get(name))
    if only:
        runs = {name: run for name, run in runs.items() if name in ("pico_fast", *only)}
    return case, runs


def product_of(operations: float):
    """A call that multiplies matrices of a shape that suits tensor cores, so many operations in all."""
    size, widest = 8192, 2**16
    columns = operations / (2 * size * size)
    times = math.ceil(columns / widest)
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    # a multiple of 64: no tile of any kernel hangs over by much
    width = max(64, round(columns / times / 64) * 64)
    right = torch.randn(size, width, device="cuda", dtype=torch.bfloat16)

    def run():
        for _ in range(times):
            torch.mm(left, right)

    return run


def under_autocast(call):
    """The call as people train: matrix products in bfloat16."""

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            return call()

    return run


EVERY_PEER = parametrised(
    [(COCO_STUFF, 1024, 0.1, "clustered")],
    [(COCO_STUFF, a, 1.0, "clustered") for a in (1024, 4096, 16384)],
)
FEW_PEERS = parametrised(
    [
        (COCO_STUFF, 1024, 0.1, "random"),
        *((d, 1024, 1.0 if d is cases.CAMVID else 0.1, "clustered") for d in cases.DATA_SETS[:4]),
    ],
    [
        (COCO_STUFF, 4096, 1.0, "random"),
        *((d, 4096, 1.0, "clustered") for d in cases.DATA_SETS[:4]),
    ],
)


@pytest.mark.parametrize(("on", "data_set", "n_anchors", "share", "data"), EVERY_PEER)
def test_every_peer(compare, device, on, data_set, n_anchors, share, data):
    if on != device:
        pytest.skip(f"for {on}")
    case, runs = compared(device, data_set, n_anchors, share, data)
    medians = compare(case, runs)
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert medians["pico_fast"] >= 1.5 * medians["pico_fast, bf16 bank"]


@pytest.mark.parametrize(("on", "data_set", "n_anchors", "share", "data"), FEW_PEERS)
def test_data_sets(compare, device, on, data_set, n_anchors, share, data):
    if on != device:
        pytest.skip(f"for {on}")
    only = ("pico_fast, bf16 bank", "two products", "product of the same operations")
    case, runs = compared(device, data_set, n_anchors, share, data, (*only, "eager", "analytic"))
    compare(case, without_bars(runs))


def without_bars(runs: dict[str, Run]) -> dict[str, Run]:
    """The same runs, to be seen only."""
    return {name: dataclasses.replace(run, least_ratio=None) for name, run in runs.items()}


def test_of_a_size_that_metric_learning_takes(compare, device):
    """pytorch-metric-learning makes all positive by all negative pairs: 64 anchors and 220 keys."""
    data_set = cases.DataSet("11 classes x 20", 11, 20, 0)
    pairs = cases.pairs(data_set, 64, device=device)
    runs = {
        "pico_fast": Run(with_gradient(pico_fast.contrast, *pairs, TEMPERATURE)),
        "eager": Run(with_gradient(peers.eager, *pairs, TEMPERATURE), 1e-4),
        "metric learning": Run(with_gradient(peers.metric_learning, *pairs, TEMPERATURE), 1e-4),
    }
    compare(Case("contrast, tiny", data_set.name, len(pairs.keys), 64), runs)


@pytest.mark.parametrize("share", SWEEP)
def test_by_number_of_keys(compare, device, share):
    only = ("pico_fast, bf16 bank", "analytic", "eager")
    if device == "cpu" and share == 1.0:
        only = only[:2]  # half a minute for each call of the eager formula
    n_anchors = 256 if device == "cpu" else 4096
    case, runs = compared(device, COCO_STUFF, n_anchors, share, "clustered", only)
    case = dataclasses.replace(case, bench="contrast, by number of keys")
    compare(case, without_bars(runs))


@pytest.mark.parametrize("share", SWEEP[1:5])
def test_memory_by_number_of_keys(benchmark, device, results, share):
    """Growth of the resident set over loss + gradient, each in a process of its own."""
    if device == "cuda":
        pytest.skip("on a GPU every timed run's peak is recorded")
    keys = COCO_STUFF.keys(share)
    case = Case("memory, by number of keys", COCO_STUFF.name, keys, 1024, share)
    peaks = {}
    for name in ("pico_fast", "analytic", "eager"):
        needs = 0 if name == "pico_fast" else peers.bytes_needed(name, 1024, keys, CHANNELS)
        row = Row(case, name)
        row.peak_bytes, row.why_not = peak_of(name, "all", 1024, share, needs)
        peaks[name] = row.peak_bytes
        results.rows.append(row)
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(lambda: None, rounds=1)
    if keys > 100_000 and peaks["eager"]:
        assert 8 * peaks["pico_fast"] <= peaks["eager"]


def peak_of(
    name: str, sampling: str, n_anchors: int, share: float, needs: int = 0
) -> tuple[int | None, str | None]:
    """Peak bytes of a run in a process of its own, or why it was not tried."""
    import runs

    why_not = runs.why_not_run(Run(print, needs=needs), "cpu")
    if why_not:
        return None, why_not
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, script, name, sampling, str(n_anchors), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout), None
