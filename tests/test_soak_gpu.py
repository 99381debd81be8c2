"""Thousands of steps on a GPU: memory and compiled kernels stay as they are; streams and threads agree."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import pico_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SMALL = {
    "num_classes": 7,
    "embedding_dim": 64,
    "num_positives": 64,
    "num_negatives": 128,
    "max_samples": 200,
    "pixel_queue_size": 100,
    "region_queue_size": 12,
    "synthesis": pico_fast.Synthesis(16, 16, 32),
}


def batch(loss: pico_fast.JointLoss, step: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, embeddings and labels: 0 to 3 images; all classes, two of them, one, or none."""
    bank, images = loss.criterion.bank, step % 4
    generator = torch.Generator("cuda").manual_seed(1000 * step + seed)
    new = {"generator": generator, "device": "cuda"}
    logits = torch.randn(images, bank.num_classes, 32, 32, **new)
    embeddings = normalize(torch.randn(images, bank.embedding_dim, 32, 32, **new), dim=1)
    labels = torch.randint(0, bank.num_classes, (images, 32, 32), **new)
    kind = step // 4 % 4
    labels = (labels, labels % 2, labels * 0 + step % 7, labels * 0 + bank.ignore_index)[kind]
    return logits, embeddings.requires_grad_(), labels


def train_step(loss: pico_fast.JointLoss, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    logits, embeddings, labels = batch(loss, step, seed)
    value = loss(logits, embeddings, labels)
    return value, torch.autograd.grad(value, embeddings)[0]


def compiled_kernels() -> int:
    """How many variants of the package's kernels Triton has compiled for this GPU."""
    import triton
    from pico_fast.kernels import candidates, contrast, cut, hardest, merge, sample, synthesis

    modules = (candidates, contrast, cut, hardest, merge, sample, synthesis)
    found = [x for module in modules for x in vars(module).values()]
    device = torch.cuda.current_device()
    caches = [x.device_caches for x in found if isinstance(x, triton.JITFunction)]
    return sum(len(cache[device][0]) for cache in caches if device in cache)


def measure() -> dict[str, int]:
    """What this process holds of the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    names = ("allocated_bytes.all.current", "allocation.all.current", "segment.all.current")
    return {name: stats[name] for name in names} | {"kernels": compiled_kernels()}


@pytest.mark.parametrize("sampling", ["semi_hard", "all"])
@pytest.mark.parametrize("preset", [None, "coco_stuff"])
def test_memory_and_kernels_stay_as_they_are(preset, sampling, full, figures):
    # so many that both measurements follow on the same kind of batch
    steps = 640 if preset is None else 160
    if full:
        steps = 10_240 if preset is None else 640
    if preset is None:
        criterion = pico_fast.PiCoLoss(sampling=sampling, **SMALL)
    else:
        criterion = pico_fast.PiCoLoss.from_preset(
            preset, sampling=sampling, synthesis=pico_fast.Synthesis()
        )
    loss = pico_fast.JointLoss(criterion, warmup_steps=10).cuda()
    held = []
    for step in range(steps):
        # nothing of the step before is held while the next one runs
        train_step(loss, step)
        if step + 1 in (steps // 4, steps):
            held.append(measure())
    assert held[0] == held[1]
    assert held[0]["kernels"] > 0
    bank = loss.criterion.bank
    assert int(bank.step) == steps
    if preset is None:
        assert (bank.pixel_count == bank.pixel_queue_size).all()
    figures.add("soak on a GPU", "steps", steps)
    figures.most("soak on a GPU", "compiled kernels", held[1]["kernels"])


def run(seed: int, steps: int) -> list[Tensor]:
    """The bank at the end of a training of its own, and every loss and gradient on the way."""
    loss = pico_fast.JointLoss(pico_fast.PiCoLoss(seed=seed, **SMALL), warmup_steps=3).cuda()
    found = [tensor for step in range(steps) for tensor in train_step(loss, step, seed)]
    return [loss.criterion.bank.storage, *loss.state_dict().values(), *found]


def same(mine: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)
    assert (expected[0] != 0).any()


def test_a_side_stream_computes_the_same():
    expected = run(0, 36)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mine = run(0, 36)
    side.synchronize()
    same(mine, expected)


def test_two_threads_with_streams_of_their_own_do_not_disturb_each_other(full, figures):
    steps = 500 if full else 100
    expected = [run(seed, steps) for seed in (1, 2)]
    torch.cuda.synchronize()
    start = threading.Barrier(2, timeout=60)

    def work(seed: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        start.wait()
        with torch.cuda.stream(stream):
            found = run(seed, steps)
        stream.synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, (1, 2)))
    for mine, theirs in zip(results, expected, strict=True):
        same(mine, theirs)
    assert not torch.equal(expected[0][0], expected[1][0])
    figures.add("soak on a GPU", "steps in two threads at once", 2 * steps)
