"""The Triton kernels of `contrast` against the reference: interpreted without a GPU, for real with one."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import class_order, contrast_any, reference

contrast_gpu = pytest.importorskip("pico_fast.contrast_gpu", reason="needs Triton")
pass_gpu = pytest.importorskip("pico_fast.pass_gpu", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, on exp2 and log2 of inf
if DEVICE == "cuda" and contrast_gpu.contrast.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set beside a GPU", allow_module_level=True)

# relative error of one rounding of a product's operand
EPS = {torch.float32: 2**-11, torch.bfloat16: 2**-9, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    """float32 keys are taken where TF32 may be used; the interpreter computes it exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def scene(n_anchors, n_keys, dim, classes, clustered=False, unit=True, seed=0):
    """Anchors, labels, keys, labels; some slots of both are empty, and empty keys hold nan."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=g) * (2.0 if clustered else 0.0)
    anchor_labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    key_labels = torch.randint(-1, classes, (n_keys,), generator=g)
    anchors = torch.randn(n_anchors, dim, generator=g) + centres[anchor_labels.clamp(min=0)]
    keys = torch.randn(n_keys, dim, generator=g) + centres[key_labels.clamp(min=0)]
    if unit:
        anchors, keys = normalize(anchors, dim=1), normalize(keys, dim=1)
    keys[key_labels < 0] = float("nan")
    return anchors, anchor_labels, keys, key_labels


def truth(anchors, anchor_labels, keys, key_labels, temperature):
    """Loss [A], Z [A] and the gradients of the losses' sum, by the reference in float64."""
    leaves = [x if x is None else x.double().requires_grad_() for x in (anchors, keys)]
    choice = ("all", 1, 1, 0.1, None, torch.tensor(0))
    loss, _ = reference.contrast(
        leaves[0], anchor_labels, leaves[1], key_labels, temperature, *choice
    )
    loss.sum().backward()
    return loss.detach(), leaves[0].grad, None if keys is None else leaves[1].grad


def on_device(*tensors):
    return tuple(x if x is None else x.to(DEVICE) for x in tensors)


def check(found, expected, gradient, temperature, dtype, unit=True):
    """Loss and gradient within what rounding the operands once may cost."""
    exact = (
        DEVICE == "cpu" and dtype != torch.float16
    )  # interpreted: bfloat16 is computed in float32
    loss, grad = found[0].cpu().double(), found[5].cpu().double()
    assert loss.isfinite().all() and grad.isfinite().all()
    relative = 2e-5 if exact else 4 * EPS[dtype] * (1 + 1 / temperature)
    scale = 1.0 if unit else 1e2
    assert (loss - expected).abs().max() <= relative * scale * expected.abs().max().clamp(min=1)
    assert (grad - gradient).norm() <= 2 * relative * scale * gradient.norm().clamp(min=1e-6)


SIZES = [
    (37, 150, 19, 5),
    (70, 333, 32, 7),
    (1, 90, 16, 2),
    (130, 40, 48, 3),
    (9, 64, 16, 1),
    (65, 1, 24, 2),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("clustered", (False, True))
def test_keys_in_any_order(size, dtype, clustered):
    anchors, anchor_labels, keys, key_labels = scene(*size, clustered)
    keys = keys.to(dtype)
    expected, gradient, _ = truth(anchors, anchor_labels, keys, key_labels, 0.1)
    pairs = on_device(anchors, anchor_labels, keys, key_labels)
    found = contrast_gpu.contrast_all(*pairs, None, None, 0.1, True)
    check(found, expected, gradient, 0.1, dtype)
    plain = contrast_any.contrast_all(*pairs, None, None, 0.1, True)
    used = on_device(anchor_labels >= 0)[0]
    assert torch.equal(found[2], plain[2])  # positives
    for i in (1, 3, 4):  # Z and both similarities
        torch.testing.assert_close(found[i][used], plain[i][used], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("temperature", (0.01, 0.05, 1.0))
@pytest.mark.parametrize("unit", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_running_maximum_takes_over(temperature, unit, dtype):
    pairs = scene(40, 200, 32, 6, clustered=True, unit=unit)
    pairs = (*pairs[:2], pairs[2].to(dtype), pairs[3])
    if not unit:
        pairs = (pairs[0] * 3, *pairs[1:])
    expected, gradient, _ = truth(*pairs, temperature)
    found = contrast_gpu.contrast_all(*on_device(*pairs), None, None, temperature, True)
    check(found, expected, gradient, temperature, dtype, unit)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("temperature", (0.07, 0.5))
def test_in_batch_and_the_gradient_of_the_keys(dtype, temperature):
    anchors, anchor_labels, keys, key_labels = scene(45, 160, 24, 5)
    for with_keys in (False, True):
        given = (keys.to(dtype), key_labels) if with_keys else (None, None)
        mine = anchors if with_keys else anchors.to(dtype)
        expected, gradient, of_keys = truth(mine, anchor_labels, *given, temperature)
        pairs = on_device(mine, anchor_labels, *given)
        found = contrast_gpu.contrast_all(*pairs, None, None, temperature, True)
        ones = torch.ones(45, device=DEVICE)
        second = contrast_gpu.contrast_all_keys_grad(
            ones, *pairs, found[1], found[2], temperature
        ).cpu()
        if with_keys:
            check(found, expected, gradient, temperature, dtype)
            used = key_labels >= 0
            assert (second[~used] == 0).all()
            second, of_keys = second[used], of_keys[used]
        else:  # both sides are the anchors'
            second, of_keys = second + found[5].cpu(), gradient
        error = (second.double() - of_keys).norm() / of_keys.norm()
        assert error <= (
            1e-5
            if dtype == torch.float32 and DEVICE == "cpu"
            else 0.1 / temperature * EPS[dtype] * 10
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fill", ("empty", "some", "full", "one class"))
def test_straight_from_a_partly_filled_bank(fill, dtype):
    g = torch.Generator().manual_seed(1)
    bank = pico_fast.MemoryBank(6, 24, 31, 9, dtype=dtype)
    bank.storage.copy_(normalize(torch.randn(6, 40, 24, generator=g), dim=2))
    if fill in ("some", "full"):
        bank.pixel_count.copy_(torch.randint(0, 32, (6,), generator=g) if fill == "some" else 31)
        bank.region_count.copy_(torch.randint(0, 10, (6,), generator=g) if fill == "some" else 9)
    elif fill == "one class":
        bank.pixel_count[4] = 20
    keys, key_labels = bank.keys()
    segments = bank.segments()
    assert torch.equal(class_order.labels_of_segments(segments, len(keys)), key_labels)
    anchors, anchor_labels, _, _ = scene(70, 1, 24, 6)
    expected, gradient, _ = truth(anchors, anchor_labels, keys, key_labels, 0.1)
    pairs = on_device(anchors, anchor_labels, keys)
    found = contrast_gpu.contrast_all(*pairs, None, None, None, 0.1, True, segments.to(DEVICE))
    check(found, expected, gradient, 0.1, dtype)
    other = contrast_gpu.contrast_all(*pairs, key_labels.to(DEVICE), None, None, 0.1, True)
    torch.testing.assert_close(found[0], other[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], other[2])


def test_mixes_join_the_denominator():
    anchors, anchor_labels, keys, key_labels = scene(33, 140, 16, 4)
    g = torch.Generator().manual_seed(2)
    mixes = torch.randn(33, generator=g), torch.randn(33, 16, generator=g)
    mixes[0][3] = -math.inf
    pairs = on_device(anchors, anchor_labels, keys, key_labels)
    found = contrast_gpu.contrast_all(*pairs, *on_device(*mixes), 0.1, True)
    plain = contrast_any.contrast_all(*pairs, *on_device(*mixes), 0.1, True)
    used = on_device(anchor_labels >= 0)[0]
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine[used], theirs[used], rtol=1e-2, atol=1e-3)


def test_the_same_bits_and_no_gradient_where_none_is_wanted():
    pairs = on_device(*scene(70, 333, 32, 7))
    first = contrast_gpu.contrast_all(*pairs, None, None, 0.1, True)
    again = contrast_gpu.contrast_all(*pairs, None, None, 0.1, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    without = contrast_gpu.contrast_all(*pairs, None, None, 0.1, False)
    assert without[5].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(first[:5], without[:5], strict=True))


def test_the_number_of_splits_changes_rounding_alone(monkeypatch):
    pairs = on_device(*scene(40, 900, 16, 9))
    results = []
    for processors in (1, 3, 16):
        monkeypatch.setattr(pass_gpu, "_device", lambda _, p=processors: (90, p))
        results.append(contrast_gpu.contrast_all(*pairs, None, None, 0.1, True))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result[5], results[0][5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_the_halves_are_those_of_the_formula(dtype):
    """Keys of a share in segments: one empty, one of no anchor; an anchor without a class."""
    anchors = torch.nn.functional.normalize(torch.randn(37, 24), dim=1)
    labels = torch.randint(-1, 3, (37,))
    keys = torch.nn.functional.normalize(torch.randn(160, 24), dim=1).to(dtype)
    segments = torch.tensor([[[0, 25], [30, 9]], [[40, 0], [70, 0]], [[80, 33], [120, 2]]])
    half = on_device(anchors, labels, keys, segments)
    lse = torch.rand(37, device=DEVICE) * 3 + 4
    for want in (True, False):
        found = contrast_gpu.contrast_negatives(*half, 0.1, want)
        found += contrast_gpu.contrast_positives(*half, lse, 0.1, want)
        expected = contrast_any.contrast_negatives(*half, 0.1, want)
        expected += contrast_any.contrast_positives(*half, lse, 0.1, want)
        for mine, theirs in zip(found, expected, strict=True):
            if theirs.numel() == 37 and not want and not theirs.any():
                continue  # w is not summed where nobody wants the pull
            torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=5e-3)


def test_what_the_kernels_are_not_for():
    takes = contrast_gpu.takes
    bf16, fp32 = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(3, 16)
    assert takes(fp32, bf16) and takes(bf16, None) and takes(fp32, None)
    assert not takes(fp32, bf16.double()) and not takes(fp32.double(), bf16)
    assert not takes(torch.empty(3, 513), torch.empty(2, 513, dtype=torch.bfloat16))
    assert not takes(fp32, bf16[:0]) and not takes(fp32[:0], bf16)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not takes(fp32, fp32) and takes(fp32, bf16)


@pytest.mark.parametrize(
    ("blocks", "processors"), [(32, 132), (70, 132), (1, 132), (128, 132), (500, 132)]
)
def test_splits_fill_whole_waves(blocks, processors):
    splits = pass_gpu.choose_splits(blocks, processors, 12)
    waves = -(-blocks * splits // processors)
    one = -(-blocks // processors)
    assert 1 <= splits <= 12
    assert blocks * splits / waves >= blocks / one
