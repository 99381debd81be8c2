"""`region_pool` on a GPU at full size: truth, repeatability, streams, graphs, no synchronisation."""

import pytest
import torch

import pico_fast
from pico_fast import info

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, D, H, W, C: sizes of training; one whose planes start at no multiple of 16 bytes; many classes
SIZES = [(8, 256, 128, 256, 19), (2, 256, 129, 257, 171), (4, 256, 128, 128, 1000)]


def scene(size, dtype, channels_last):
    """Features and blocky labels, a tenth of them left out."""
    images, channels, height, width, classes = size
    order = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(images, channels, height, width, device="cuda") + 0.5
    blocks = torch.randint(classes, (images, height // 8 + 1, width // 8 + 1), device="cuda")
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    labels[torch.rand(labels.shape, device="cuda") < 0.1] = -1
    return features.to(dtype).contiguous(memory_format=order), labels, classes


def truth_of(features, labels, classes):
    """Means [B, C, D] and counts [B, C] in float64."""
    images, channels = features.shape[:2]
    row = torch.where(labels < 0, classes, labels).flatten(1)
    row = row + torch.arange(images, device=row.device)[:, None] * (classes + 1)
    sums = torch.zeros(images * (classes + 1), channels, device=row.device, dtype=torch.float64)
    for image in range(images):  # one at a time: float64 features are large
        pixels = features[image].flatten(1).T.double()
        sums.index_add_(0, row[image], pixels)
    counts = torch.bincount(row.flatten(), minlength=images * (classes + 1))
    sums, counts = (x.unflatten(0, (images, -1))[:, :classes] for x in (sums, counts))
    return sums / counts.clamp(min=1)[..., None], counts


def test_the_compiled_kernels_are_there():
    assert info.implementation("pico_fast::region_pool", "CUDA") == "compiled"
    assert info.implementation("pico_fast::region_pool_backward", "CUDA") == "compiled"


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_full_size(size, dtype, channels_last):
    features, labels, classes = scene(size, dtype, channels_last)
    truth, expected_counts = truth_of(features, labels, classes)
    means, counts = torch.ops.pico_fast.region_pool(features, labels, classes)
    assert torch.equal(counts, expected_counts)
    # sums of up to 4096 values in float32, then float64
    assert ((means - truth).abs() <= 1e-5 * (1 + truth.abs())).all()
    share = torch.randn_like(means)
    grad = torch.ops.pico_fast.region_pool_backward(share, labels, counts, dtype, channels_last)
    image = torch.arange(len(labels), device="cuda")[:, None, None]
    expected = (share / counts.clamp(min=1)[..., None])[image, labels.clamp(min=0)]
    expected = torch.where(labels[..., None] < 0, 0, expected).to(dtype).permute(0, 3, 1, 2)
    torch.testing.assert_close(grad, expected)
    for _ in range(3):
        again, _ = torch.ops.pico_fast.region_pool(features, labels, classes)
        assert torch.equal(again, means)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_layouts_give_the_same_bits(dtype):
    features, labels, classes = scene(SIZES[1], dtype, False)
    other = features.contiguous(memory_format=torch.channels_last)
    means, _ = torch.ops.pico_fast.region_pool(features, labels, classes)
    assert torch.equal(means, torch.ops.pico_fast.region_pool(other, labels, classes)[0])
    on_cpu, _ = torch.ops.pico_fast.region_pool(features.cpu(), labels.cpu(), classes)
    torch.testing.assert_close(means.cpu(), on_cpu, rtol=1e-5, atol=1e-6)


def test_nothing_synchronises_and_a_graph_replays():
    features, labels, classes = scene(SIZES[1], torch.float32, False)
    features.requires_grad_()

    def step():
        means, _ = pico_fast.region_pool(features, labels, classes, ignore_index=2000)
        return means, torch.autograd.grad(means.square().sum(), features)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_counts_beyond_24_bits():
    labels = torch.zeros(1, 4097, 4099, device="cuda", dtype=torch.uint8)
    labels[0, 0, 0] = 1
    features = torch.ones(1, 1, 4097, 4099, device="cuda", dtype=torch.bfloat16)
    means, counts = torch.ops.pico_fast.region_pool(features, labels, 2)
    assert counts.tolist() == [[4097 * 4099 - 1, 1]] and (means == 1).all()


def test_labels_on_another_device_are_refused():
    with pytest.raises(ValueError, match="labels"):
        pico_fast.region_pool(torch.ones(1, 2, 3, 4, device="cuda"), torch.zeros(1, 3, 4).long(), 2)
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.pico_fast.region_pool(
            torch.ones(1, 2, 3, 4, device="cuda"), torch.zeros(1, 3, 4).long(), 2
        )
