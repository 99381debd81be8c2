"""`region_pool`: hand numbers, both implementations against float64, and the ops' contracts."""

import functools

import emulation
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pico_fast
from pico_fast import info, reference, regions

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}

needs_compiled = pytest.mark.skipif(
    regions.why_not_compiled is not None, reason=f"no compiled kernels: {regions.why_not_compiled}"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(op):
    """`op` on copies of its tensors on the GPU, every stride kept; its results back on the CPU."""

    def there(x):
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

    def run(*args):
        assert info.implementation(str(op).removesuffix(".default"), "CUDA") == "compiled"
        out = op(*map(there, args))
        return out.cpu() if isinstance(out, Tensor) else tuple(x.cpu() for x in out)

    return run


@functools.cache
def ops_of(implementation: str):
    """Forward and backward: compiled for the CPU or for the GPU, the latter emulated, in PyTorch."""
    if implementation == "torch":  # what devices run that no kernel is compiled for
        return regions.pool_torch, regions.pool_backward_torch
    if implementation == "emulated":
        return tuple(emulation.load().values())
    ops = torch.ops.pico_fast.region_pool.default, torch.ops.pico_fast.region_pool_backward.default
    return tuple(map(on_gpu, ops)) if implementation == "gpu" else ops


each = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("compiled", marks=needs_compiled),
        "torch",
        pytest.param("emulated", marks=needs_compiled),
        pytest.param("gpu", marks=needs_gpu),
    ],
)

# B, D, H, W, C: one of everything; odd sizes, a short last block of planes; several stretches of
# pixels; stretches of 16 * C pixels; more classes than pixels; planes of whole vectors, of one more
# group of channels, of an odd size; more classes than a block of the GPU has room for
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 19, 7, 13, 5),
    (2, 8, 61, 67, 19),
    (1, 21, 53, 59, 171),
    (3, 5, 11, 17, 1000),
    (2, 40, 50, 64, 3),
    (1, 70, 33, 33, 7),
    (1, 3, 9, 7, 65535),
]
MAPS = ["random", "striped", "one class", "all ignored", "some ignored"]
LAYOUTS = ["planes", "pixels", "strided"]


def label_map(kind: str, images: int, height: int, width: int, classes: int) -> Tensor:
    """Labels [B, H, W] int64, -1 for pixels left out."""
    labels = torch.randint(classes, (images, height, width))
    if kind == "striped":
        labels = (torch.arange(height)[:, None] + torch.zeros(images, 1, width).long()) % classes
    elif kind == "one class":
        labels.fill_(classes - 1)
    elif kind == "all ignored":
        labels.fill_(-1)
    elif kind == "some ignored":
        labels[torch.rand(labels.shape) < 0.3] = -1
    return labels


def in_layout(features: Tensor, layout: str) -> Tensor:
    """The same values, in another order in memory."""
    if layout == "pixels":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return features.repeat_interleave(2, 3)[..., ::2]
    return features.contiguous()


def by_index_add(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Means [B, C, D] and counts [B, C] in the features' own dtype, by index_add_."""
    images, channels = features.shape[:2]
    rows = torch.where(labels < 0, classes, labels)
    rows = (rows + torch.arange(images)[:, None, None] * (classes + 1)).flatten()
    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
    sums = features.new_zeros(images * (classes + 1), channels).index_add_(0, rows, pixels)
    sums = sums.view(images, classes + 1, channels)[:, :classes]
    counts = torch.bincount(rows, minlength=images * (classes + 1))
    counts = counts.view(images, classes + 1)[:, :classes]
    return sums / counts.clamp(min=1)[..., None], counts


def within_budget(got: Tensor, truth: Tensor, plain: Tensor, eps: float) -> bool:
    """No further from the truth than plain PyTorch in that dtype, but for a rounding of the result."""
    allowed = (plain.double() - truth).abs().max() + eps * truth.abs().max()
    return bool(((got.double() - truth).abs() <= allowed).all())


def test_by_hand():
    features = torch.tensor([[[1.0, 2.0, 3.0, 40.0]], [[5.0, 7.0, 9.0, 11.0]]]).view(2, 1, 2, 2)
    labels = torch.tensor([[[0, 0], [2, 255]], [[-3, 1], [1, 1]]])
    means, counts = pico_fast.region_pool(features, labels, 3)
    assert means.tolist() == [[[1.5], [0.0], [3.0]], [[0.0], [9.0], [0.0]]]
    assert counts.tolist() == [[2, 0, 1], [0, 3, 0]]


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_means_against_float64(implementation, dtype, kind, shape):
    images, channels, height, width, classes = shape
    features = (torch.randn(images, channels, height, width) + 0.5).to(dtype)
    labels = label_map(kind, images, height, width, classes)
    truth, expected_counts = by_index_add(features.double(), labels, classes)
    plain, _ = by_index_add(features, labels, classes)
    pool, _ = ops_of(implementation)
    first = None
    for layout in LAYOUTS:
        means, counts = pool(in_layout(features, layout), labels, classes)
        assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(counts, expected_counts)
        assert within_budget(means, truth, plain, EPS[means.dtype]), layout
        first = means if first is None else first
        assert torch.equal(means, first), f"{layout} differs from {LAYOUTS[0]}"


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_against_float64(implementation, dtype, kind, shape):
    images, channels, height, width, classes = shape
    labels = label_map(kind, images, height, width, classes)
    features = torch.zeros(images, channels, height, width, dtype=torch.float64, requires_grad=True)
    means, counts = by_index_add(features, labels, classes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_means = torch.randn(images, classes, channels, dtype=wide)
    (truth,) = torch.autograd.grad(means, features, grad_means.double())
    _, pool_backward = ops_of(implementation)
    for channels_last in (False, True):
        grad = pool_backward(grad_means, labels, counts, dtype, channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        assert grad.dtype == dtype
        assert grad.is_contiguous(memory_format=order)
        # one division and one rounding to dtype; float16 has a smallest step as well
        allowed = (EPS[wide] + EPS[dtype]) * truth.abs() + torch.finfo(dtype).smallest_normal
        assert ((grad.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autograd_of_the_public_function(dtype, layout):
    features = in_layout(torch.randn(2, 6, 9, 5, dtype=dtype), layout).requires_grad_()
    labels = label_map("some ignored", 2, 9, 5, 4)
    means, counts = pico_fast.region_pool(features, labels, 4)
    expected, expected_counts = pico_fast.region_pool(features, labels, 4, impl="reference")
    assert means.dtype == expected.dtype == dtype
    assert torch.equal(counts, expected_counts) and not counts.requires_grad
    torch.testing.assert_close(means, expected)
    weight = torch.randn_like(means)
    (grad,) = torch.autograd.grad((means * weight).sum(), features)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), features)
    torch.testing.assert_close(grad, expected_grad)


def test_reference_against_index_add():
    features = torch.randn(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = label_map("some ignored", 3, 6, 5, 7)
    means, counts = reference.region_pool(features, labels, 7)
    expected, expected_counts = by_index_add(features, labels, 7)
    torch.testing.assert_close(means, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(counts, expected_counts)
    assert torch.autograd.gradcheck(lambda x: reference.region_pool(x, labels, 7)[0], features)


def test_gradcheck():
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = label_map("some ignored", 2, 4, 5, 3)
    assert torch.autograd.gradcheck(lambda x: pico_fast.region_pool(x, labels, 3)[0], features)


@each
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_dtypes_and_values_outside(implementation, label_dtype):
    pool, pool_backward = ops_of(implementation)
    labels = torch.randint(0, 256, (2, 9, 8)).to(label_dtype)
    if label_dtype != torch.uint8:
        limits = torch.iinfo(label_dtype)
        labels[0, 0, :4] = torch.tensor([limits.min, limits.max, -1, 7])
    features = torch.randn(2, 4, 9, 8)
    cleaned = torch.where((labels >= 0) & (labels < 7), labels.long(), -1)
    expected, expected_counts = by_index_add(features.double(), cleaned, 7)
    means, counts = pool(features, labels, 7)
    torch.testing.assert_close(means.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, expected_counts)
    grad = pool_backward(torch.ones_like(means), labels, counts, torch.float32, False)
    assert torch.equal(grad[:, 0] != 0, cleaned >= 0)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_public_function_takes_any_integer_labels(label_dtype):
    features = torch.randn(1, 2, 3, 4)
    labels = torch.randint(5, (1, 3, 4))
    means, counts = pico_fast.region_pool(features, labels.to(label_dtype), 5)
    expected, expected_counts = pico_fast.region_pool(features, labels, 5)
    assert torch.equal(means, expected) and torch.equal(counts, expected_counts)


@each
def test_a_pixel_that_is_not_finite_stays_in_its_region(implementation):
    features, labels = torch.ones(1, 3, 4, 4), torch.arange(16).view(1, 4, 4) % 4
    features[0, 1, 0, 2], features[0, 2, 0, 3] = float("nan"), float("inf")
    means, _ = ops_of(implementation)[0](features, labels, 4)
    expected = torch.ones(4, 3)
    expected[2, 1], expected[3, 2] = float("nan"), float("inf")
    torch.testing.assert_close(means[0], expected, equal_nan=True)


@each
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_the_same_bits_for_any_number_of_threads(implementation, layout):
    pool, pool_backward = ops_of(implementation)
    features = in_layout(torch.randn(3, 20, 64, 64), layout)
    labels = label_map("some ignored", 3, 64, 64, 19)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads, threads):
            torch.set_num_threads(count)
            means, counts = pool(features, labels, 19)
            grad = pool_backward(means, labels, counts, torch.float32, layout == "pixels")
            results.append((means, counts, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_compiled
def test_long_sums_stay_accurate():
    # a running float32 sum of 0.1 is off by 5e-4 after a million pixels
    features = torch.full((1, 1, 1024, 1024), 0.1)
    means, counts = torch.ops.pico_fast.region_pool(features, torch.zeros(1, 1024, 1024).long(), 1)
    assert counts.item() == 2**20
    assert abs(means.item() - features[0, 0, 0, 0].item()) < 1e-6


@needs_compiled
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_is_written(layout):
    features, labels = in_layout(torch.randn(2, 9, 8, 8), layout), torch.randint(-1, 7, (2, 8, 8))
    expected = torch.ops.pico_fast.region_pool(features, labels, 9)
    backward = torch.ops.pico_fast.region_pool_backward
    expected_grad = backward(expected[0], labels, expected[1], torch.float32, layout == "pixels")
    # in this mode torch fills whatever C++ allocates with NaN
    torch.use_deterministic_algorithms(True)
    try:
        means, counts = torch.ops.pico_fast.region_pool(features, labels, 9)
        grad = backward(means, labels, counts, torch.float32, layout == "pixels")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(means, expected[0]) and torch.equal(counts, expected[1])
    assert torch.equal(grad, expected_grad)


@each
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_inputs(implementation, shape):
    pool, pool_backward = ops_of(implementation)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    means, counts = pool(torch.ones(shape), labels, 2)
    assert means.shape == (shape[0], 2, shape[1]) and counts.shape == (shape[0], 2)
    assert (counts == torch.tensor([shape[2] * shape[3], 0])).all()
    assert (means == (counts > 0)[..., None]).all()
    assert pool_backward(means, labels, counts, torch.float32, False).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_opcheck(dtype, layout):
    features = in_layout(torch.randn(2, 5, 6, 7).to(dtype), layout).requires_grad_()
    labels = label_map("some ignored", 2, 6, 7, 4)
    torch.library.opcheck(torch.ops.pico_fast.region_pool.default, (features, labels, 4))
    means, counts = torch.ops.pico_fast.region_pool(features.detach(), labels, 4)
    args = (means, labels, counts, dtype, layout == "pixels")
    torch.library.opcheck(torch.ops.pico_fast.region_pool_backward.default, args)


def test_fullgraph_compile():
    def energy(features, labels):
        return pico_fast.region_pool(features, labels, 4)[0].square().sum()

    features = torch.randn(2, 5, 6, 7, requires_grad=True)
    labels = label_map("some ignored", 2, 6, 7, 4)
    (expected,) = torch.autograd.grad(energy(features, labels), features)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(features, labels), features)
    torch.testing.assert_close(grad, expected)


def test_autocast_changes_nothing():
    features, labels = torch.randn(2, 5, 6, 7), label_map("random", 2, 6, 7, 4)
    expected, _ = pico_fast.region_pool(features, labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        means, _ = pico_fast.region_pool(features, labels, 4)
    assert means.dtype == torch.float32 and torch.equal(means, expected)


def test_fake_gpu_tensors():
    with FakeTensorMode():
        features = torch.empty(2, 5, 6, 7, device="cuda")
        labels = torch.zeros(2, 6, 7, device="cuda", dtype=torch.int64)
        means, counts = pico_fast.region_pool(features, labels, 4)
        # the op by itself: torch's engine aborts on fake GPU tensors where there is no CUDA
        grad = torch.ops.pico_fast.region_pool_backward(means, labels, counts, torch.half, True)
    assert means.device.type == counts.device.type == grad.device.type == "cuda"
    assert means.shape == (2, 4, 5) and counts.shape == (2, 4)
    assert grad.shape == features.shape and grad.dtype == torch.half
    assert grad.is_contiguous(memory_format=torch.channels_last)


FEATURES, LABELS = torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
BAD = {
    "features is no tensor": (TypeError, "features", [[1.0]], LABELS, {}),
    "features of integers": (TypeError, "features", FEATURES.long(), LABELS, {}),
    "features without batch": (ValueError, "features", FEATURES[0], LABELS, {}),
    "sparse features": (TypeError, "features", FEATURES.to_sparse(), LABELS, {}),
    "labels of floats": (TypeError, "labels", FEATURES, LABELS.float(), {}),
    "labels of booleans": (TypeError, "labels", FEATURES, LABELS.bool(), {}),
    "labels without batch": (ValueError, "labels", FEATURES, LABELS[0], {}),
    "another batch": (ValueError, "labels", FEATURES, LABELS[:1], {}),
    "another height": (ValueError, "labels", FEATURES, LABELS[:, :3], {}),
    "another width": (ValueError, "labels", FEATURES, LABELS[:, :, :4], {}),
    "another device": (ValueError, "labels", FEATURES, LABELS.to("meta"), {}),
    "no class": (ValueError, "num_classes", FEATURES, LABELS, {"num_classes": 0}),
    "half a class": (TypeError, "num_classes", FEATURES, LABELS, {"num_classes": 2.5}),
    "a label too high": (ValueError, "labels", FEATURES, LABELS + 4, {}),
    "ignoring a class": (ValueError, "ignore_index", FEATURES, LABELS, {"ignore_index": 1}),
    "impl misspelt": (ValueError, "impl", FEATURES, LABELS, {"impl": "refrence"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, name, features, labels, options = BAD[case]
    with pytest.raises(error, match=rf"^{name}: expected .*got "):
        pico_fast.region_pool(features, labels, **{"num_classes": 4, **options})
