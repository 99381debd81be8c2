"""Small runs of every GPU kernel, for compute-sanitizer, which is too slow for the tests themselves.

    compute-sanitizer --tool memcheck python tests/sanitize.py

`bench/gpu_variants.py` runs what launches Triton on a CPU, to know what has to be compiled.
"""

import itertools

import torch

import pico_fast
from pico_fast.contrast import ops
from pico_fast.selection import layout as layouts
from pico_fast.selection.layout import Cut
from pico_fast.selection.options import SAMPLINGS


def region_pooling() -> None:
    # planes of whole vectors, skewed ones, a stretch that ends within a tile, more than one range
    shapes = [(2, 40, 16, 16, 5), (1, 33, 9, 7, 3), (1, 8, 33, 32, 171), (1, 3, 5, 5, 20_000)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    orders = (torch.contiguous_format, torch.channels_last)
    for shape, dtype, order in itertools.product(shapes, dtypes, orders):
        *size, classes = shape
        features = torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=order)
        labels = torch.randint(-1, classes + 1, (size[0], *size[2:]), device="cuda")
        means, counts = torch.ops.pico_fast.region_pool(features, labels, classes)
        pixels = order == torch.channels_last
        torch.ops.pico_fast.region_pool_backward(means, labels, counts, dtype, pixels)


def contrast(device: str = "cuda") -> None:
    # sizes that end within tiles, in batch, keys in any order, a bank with an empty class, long rows
    for dtype, channels in itertools.product((torch.bfloat16, torch.float16), (48, 256)):
        anchors = torch.randn(70, channels, device=device)
        labels = torch.randint(-1, 5, (70,), device=device)
        keys = torch.randn(5 * 90, channels, device=device).to(dtype)
        key_labels = torch.randint(-1, 5, (450,), device=device)
        first = torch.arange(5, device=device) * 90
        parts = (first, first % 61, first + 60, first % 31)
        ranges = torch.stack(parts, 1).view(5, 2, 2)
        for work in (
            layouts.of_labels(anchors, labels, keys, key_labels),
            layouts.of_bank(anchors, labels, keys, ranges),
            layouts.of_labels(anchors.to(dtype), labels, None, None),
        ):
            lse, *_ = ops.negatives(work, Cut(), 0.1, True)
            ops.positives(work, Cut(), lse, 0.1, True)
            for own in (True, False):
                ops.keys_grad(work, Cut(), own, lse, lse, 0.1)


def selection(device: str = "cuda") -> None:
    # few keys, by digits; many, by a sample and its repair; what is picked, and mixes
    for n_keys, kind in ((300, "random"), (6000, "random"), (6000, "duplicates")):
        anchors = torch.randn(33, 64, device=device)
        labels = torch.randint(-1, 4, (33,), device=device)
        keys = torch.randn(n_keys, 64, device=device).bfloat16()
        if kind == "duplicates":
            keys = keys[torch.randint(0, 5, (n_keys,), device=device)]
        key_labels = torch.randint(-1, 4, (n_keys,), device=device)
        for sampling in SAMPLINGS:
            pico_fast.contrast(
                anchors.requires_grad_(),
                labels,
                keys,
                key_labels,
                sampling=sampling,
                num_positives=9,
                num_negatives=20,
                synthesis=pico_fast.Synthesis(5, 3, 12),
            ).backward()


if __name__ == "__main__":
    region_pooling()
    contrast()
    selection()
    torch.cuda.synchronize()
    print("every kernel ran")
