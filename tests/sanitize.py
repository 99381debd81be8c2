"""Small runs of every GPU kernel, for compute-sanitizer, which is too slow for the tests themselves.

compute-sanitizer --tool memcheck python tests/sanitize.py
"""

import itertools

import torch


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


if __name__ == "__main__":
    import pico_fast  # noqa: F401  (registers the ops)

    region_pooling()
    torch.cuda.synchronize()
    print("every kernel ran")
