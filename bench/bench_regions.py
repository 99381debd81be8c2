"""Region pooling, bank update and anchor sampling, beside stock operations and the usual loops."""

import dataclasses
import functools

import cases
import pytest
import torch
from cases import CHANNELS, COCO_STUFF
from peers import bank as loops
from peers import regions as peers
from results import Case
from runs import Run

import pico_fast
from pico_fast import anchors

STOCK = ("index_add", "scatter_reduce", "one_hot", "sorted_segments", "loop")
SHAPES = {"cpu": (8, CHANNELS, 128, 128), "cuda": (8, CHANNELS, 128, 256)}


def features(device: str, dtype: torch.dtype, layout: str, classes: int):
    """Features [B, D, H, W] in planes or channels_last, and labels in regions of 16 x 16 pixels."""
    shape = SHAPES[device]
    order = torch.channels_last if layout == "pixels" else torch.contiguous_format
    g = torch.Generator(device).manual_seed(0)
    values = torch.empty(shape, dtype=dtype, device=device, memory_format=order)
    values.normal_(generator=g)
    images, _, height, width = shape
    size = (images, height // 16, width // 16)
    labels = torch.randint(0, classes, size, generator=g, device=device)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return values, labels.contiguous()


def pooled(pool, values: torch.Tensor, backward: bool):
    """A call that pools, and with `backward` also spreads a gradient of ones."""

    def run():
        if not backward:
            return pool(values)
        leaf = values.detach().requires_grad_()
        means = pool(leaf)
        return means.detach(), torch.autograd.grad(means, leaf, torch.ones_like(means))[0]

    return run


def pooling(
    device: str, dtype: torch.dtype, layout: str, classes: int, detail: str, stock: tuple[str, ...]
) -> tuple[Case, dict[str, Run]]:
    """The case, and ours beside stock operations; a pass reads or writes the features once."""
    values, labels = features(device, dtype, layout, classes)
    passes = 1 if detail == "forward" else 2
    case = Case(
        "region pooling",
        f"{classes} classes",
        detail=f"{detail}, {str(dtype)[6:]}, {layout}",
        bytes=float(passes * values.numel() * values.element_size()),
    )
    mine = pooled(lambda x: pico_fast.region_pool(x, labels, classes)[0], values, passes == 2)
    runs = {"pico_fast": Run(mine)}
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name in stock:
        pool = functools.partial(getattr(peers, name), labels=labels, num_classes=classes)
        runs[name] = Run(pooled(pool, values, passes == 2), tolerance)
    # backward, a CPU spends most of the time on fresh memory for the gradient, whoever writes it
    bar = 3.0 if passes == 1 else 2.0
    runs["index_add"] = dataclasses.replace(runs["index_add"], least_ratio=bar)
    if device == "cuda":
        target = torch.empty_like(values)
        # a copy reads and writes: 65 % of its bandwidth is 1.3 of its time for one pass, 0.65 for two
        runs["copy"] = Run(lambda: target.copy_(values), least_ratio=1.3 / passes)
    return case, runs


@pytest.mark.parametrize("detail", ("forward", "forward + backward"))
@pytest.mark.parametrize("classes", (19, 171))
@pytest.mark.parametrize("layout", ("planes", "pixels"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_region_pooling(compare, device, dtype, layout, classes, detail):
    if device == "cpu" and (dtype, layout) != (torch.float32, "planes"):
        pytest.skip("a CPU's case is float32 in planes")
    stock = STOCK if classes == 19 else STOCK[:1]
    compare(*pooling(device, dtype, layout, classes, detail, stock))


def test_bank_update(compare, device):
    """A batch of COCO-Stuff's classes goes into a bank of the paper's size."""
    batch = cases.images(COCO_STUFF, 4, 64, 64, device)
    bank = pico_fast.MemoryBank(COCO_STUFF.classes, CHANNELS, 10_000, 1_000).to(device)
    theirs = loops.Bank(COCO_STUFF.classes, CHANNELS, 10_000, 1_000, device)
    runs = {
        "pico_fast": Run(lambda: bank.write(batch.embeddings, batch.labels)),
        "loop": Run(lambda: theirs.enqueue(batch.embeddings, batch.labels)),
    }
    compare(Case("bank update", COCO_STUFF.name, detail="4 x 64 x 64"), runs)


def test_anchor_sampling(compare, device):
    """1024 anchors of four images, half of them hard where there are so many."""
    batch = cases.images(COCO_STUFF, 4, 64, 64, device)
    seed = torch.tensor(0, device=device)
    args = (batch.labels, batch.predictions, 1024, 100)
    runs = {
        "pico_fast": Run(lambda: anchors.draw_anchors(*args, 1, COCO_STUFF.classes, seed)),
        "loop": Run(lambda: loops.loop_anchors(*args, COCO_STUFF.classes, min_pixels=1)),
    }
    compare(Case("anchor sampling", COCO_STUFF.name, anchors=1024, detail="4 x 64 x 64"), runs)
