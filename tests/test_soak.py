"""Thousands of steps: memory stays as it is, the bank goes round and round, nothing compiles anew.

    python tests/test_soak.py STEPS

trains, and then leaks for some steps more; prints what it measured.
"""

import array
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import normalize

import pico_fast
from pico_fast.selection.options import SAMPLINGS

# the compiler lists torch's functions once; it must see the true ones, before a fixture wraps any
torch._dynamo.trace_rules.get_torch_obj_rule_map()

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
LIBC = ctypes.CDLL(None)
CLASSES, CHANNELS = 5, 16
# growth of a step, in the mean: far less than what a small tensor, or any object, left behind would make
MOST_BYTES, MOST_OBJECTS = 16, 0.1
# resident memory is also what is free in pieces; 100 bytes left behind by each of 7,680 steps are more
MOST_RESIDENT = 2**19


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a step: 0 to 3 images; all classes, two of them, one, or none."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(step % 4, 3, 12, 12, generator=generator)
    labels = torch.randint(0, CLASSES, (step % 4, 12, 12), generator=generator)
    kind = step // 4 % 4
    labels = (labels, labels % 2, torch.full_like(labels, step % CLASSES), labels * 0 + 255)[kind]
    return images, labels


def make(**options: object) -> nn.Module:
    """The whole method with a bank so small that a few batches fill it."""
    small = {
        "num_positives": 16,
        "num_negatives": 32,
        "max_samples": 48,
        "pixel_queue_size": 40,
        "region_queue_size": 6,
        "synthesis": pico_fast.Synthesis(4, 4, 8),
    }
    criterion = pico_fast.PiCoLoss(CLASSES, CHANNELS, **(small | options))
    return pico_fast.JointLoss(criterion, warmup_steps=10)


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def measure() -> dict[str, int]:
    """What the process holds now."""
    gc.collect()
    LIBC.malloc_trim(0)
    LIBC.mallinfo2.restype = MallocInfo
    info = LIBC.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    objects = gc.get_objects()
    return {
        "allocated": info.uordblks + info.hblkhd,  # to the byte
        "resident": pages * os.sysconf("SC_PAGESIZE"),
        "objects": len(objects),
        "tensors": sum(issubclass(type(x), Tensor) for x in objects),
    }


def soak(steps: int) -> dict[str, object]:
    """Train for so many steps; what was held after a quarter, at the end, and after leaks of 100 bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    body, head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, CHANNELS, 1)
    classifier, joint = nn.Conv2d(16, CLASSES, 1), make()
    bank = joint.criterion.bank
    weights = [*body.parameters(), *head.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(weights, 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.9)
    leaked, rounds = steps // 4, torch.zeros(2, CLASSES, dtype=torch.int64)
    # what this function keeps has its size from the start
    held, took = [], array.array("d", [0.0]) * (steps + leaked)
    for step in range(steps + leaked):
        begin = time.perf_counter()
        place = torch.stack([bank.pixel_next, bank.region_next])
        images, labels = batch(step)
        features = body(images).relu()
        loss = joint(classifier(features), normalize(head(features), dim=1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        rounds += torch.stack([bank.pixel_next, bank.region_next]) < place
        if step >= steps:
            LIBC.malloc(100)
        took[step] = time.perf_counter() - begin
        # the first time measures what measuring allocates
        if step + 1 in (steps // 8, steps // 4, steps, steps + leaked):
            held.append(measure())
    times = took[steps // 4 : steps]
    return {
        "held": held[1:],
        "rounds": int(rounds.min()),
        "slowest": max(times) / statistics.median(times),
    }


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs glibc 2.33")
def test_memory_stays_as_it_is(full, figures):
    # so many that all measurements follow on the same kind of batch
    steps = 10_240 if full else 640
    run = subprocess.run(
        [sys.executable, __file__, str(steps)],
        # freed pieces that a thread keeps for itself would count as allocated
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    (early, late, leaky), counted = found["held"], steps - steps // 4
    growth = {name: late[name] - early[name] for name in early}
    figures.add("soak", "steps", steps)
    figures.most("soak", "bytes allocated, growth of a step", growth["allocated"] / counted)
    figures.most("soak", "bytes resident, growth of a step", growth["resident"] / counted)
    figures.most("soak", "tensors, growth", growth["tensors"])
    figures.most("soak", "slowest step / median step", found["slowest"])
    assert found["rounds"] >= steps / 40
    assert growth["tensors"] == 0 and late["tensors"] > 0
    assert growth["allocated"] <= MOST_BYTES * counted
    assert growth["objects"] <= MOST_OBJECTS * counted
    assert growth["resident"] <= MOST_RESIDENT
    # a small leak would have been seen
    assert leaky["allocated"] - late["allocated"] > MOST_BYTES * (steps // 4)


def compile_once(sampling: str, steps: int) -> int:
    """Compare a compiled criterion with an eager one for so many steps; how many graphs there were."""
    torch._dynamo.reset()
    counters.clear()
    # the bank fills slowly, its rings go round in the full run
    joint = make(sampling=sampling, pixel_queue_size=120, region_queue_size=50, pixels_per_image=1)
    eager = copy.deepcopy(joint)
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    network = nn.Conv2d(3, CHANNELS, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(steps):
        # batches of three images, some without labels
        images, labels = batch(4 * step + 3)
        x = normalize(network(images), dim=1)
        logits, leaf = x[:, :CLASSES].detach() * 10, x.detach().requires_grad_()
        is_training = step % 5 != 1
        for loss in (compiled, eager):
            loss.train(is_training)
        with torch.set_grad_enabled(is_training):
            mine, expected = (loss(logits, leaf, labels) for loss in (compiled, eager))
        assert torch.equal(mine, expected)
        if is_training:
            grads = [torch.autograd.grad(value, leaf)[0] for value in (mine, expected)]
            assert torch.equal(*grads)
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            x.backward(grads[0])
            optimizer.step()
        if step == 2:
            graphs = counters["stats"]["unique_graphs"]
    state = eager.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in joint.state_dict().items())
    assert int(joint.step) > joint.warmup_steps
    # one for training, one for evaluation
    assert graphs == counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    return graphs


def test_nothing_compiles_anew(full, figures):
    steps = 500 if full else 50
    for sampling in SAMPLINGS if full else ("semi_hard",):
        graphs = compile_once(sampling, steps)
        figures.add("no recompilation", "compiled steps", steps)
        figures.most("no recompilation", "graphs", graphs)


if __name__ == "__main__":
    print(json.dumps(soak(int(sys.argv[1]))))
