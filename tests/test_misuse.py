"""Unusual circumstances: each call gives the right result there, or says clearly why not.

Wrong arguments have a table of their own in tests/test_errors.py.
"""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn.functional import normalize

import pico_fast
from pico_fast.selection.options import SAMPLINGS

torch.manual_seed(0)
ROWS, LABELS = normalize(torch.randn(12, 16), dim=1), torch.arange(12) % 4
KEYS, KEY_LABELS = normalize(torch.randn(60, 16), dim=1), torch.arange(60) % 5 - 1
IMAGES = normalize(torch.randn(2, 16, 6, 6), dim=1)
MAP, SCORES = torch.randint(-1, 4, (2, 6, 6)), torch.randn(2, 4, 6, 6)
QUEUE = normalize(torch.randn(4, 5, 16), dim=2)
MIXES = pico_fast.Synthesis(4, 3, 8)


def criterion(sampling="semi_hard", **options):
    """With a bank that holds a batch."""
    small = {"pixel_queue_size": 20, "region_queue_size": 4, "max_samples": 40, "num_negatives": 30}
    made = pico_fast.PiCoLoss(4, 16, sampling=sampling, synthesis=MIXES, **(small | options))
    made(IMAGES, MAP, SCORES)
    return made


def dropin():
    return pico_fast.PixelContrastLoss(num_classes=4, max_views=2)


# everything public that is differentiated, as a function of embeddings and of one more tensor
CALLS = {
    **{
        f"contrast {sampling}": (
            lambda x, k=KEYS, s=sampling: pico_fast.contrast(x, LABELS, k, KEY_LABELS, sampling=s),
            ROWS,
        )
        for sampling in SAMPLINGS
    },
    **{
        f"contrast in batch {sampling}": (
            lambda x, s=sampling: pico_fast.contrast(x, LABELS, sampling=s, synthesis=MIXES),
            ROWS,
        )
        for sampling in SAMPLINGS
    },
    **{
        f"criterion {sampling}": (lambda x, s=sampling: criterion(s)(x, MAP, SCORES), IMAGES)
        for sampling in SAMPLINGS
    },
    "joint": (lambda x: pico_fast.JointLoss(criterion())(SCORES, x, MAP), IMAGES),
    "drop-in": (lambda x: dropin()(x, MAP, SCORES), IMAGES),
    "drop-in with a queue": (lambda x: dropin()(x, MAP, SCORES, QUEUE), IMAGES),
    "region_pool": (lambda x: pico_fast.region_pool(x, MAP, 4)[0].square().sum(), IMAGES),
}
CALL = pytest.mark.parametrize("call", CALLS)


def value_and_gradient(call, change=lambda x: x):
    function, x = CALLS[call]
    x = x.clone().requires_grad_()
    value = function(change(x))
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


def same(found, expected, **bounds):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **(bounds or {"rtol": 0, "atol": 0}))


# the same numbers in other clothes
def strided(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def shifted(x):
    """Not aligned to more than its own size."""
    flat = torch.cat([x.new_zeros(1), x.flatten()])
    return flat[1:].view(x.shape)


def negated(x):
    """A view that a flag says is to be negated: its memory holds the opposite."""
    view = torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag
    assert view.is_neg()
    return view


def windows(x):
    return torch.cat([x, x])[len(x) :]


CLOTHES = {f.__name__: f for f in (strided, transposed, shifted, negated, windows)}


@CALL
@pytest.mark.parametrize("clothes", CLOTHES)
def test_any_layout_in_memory(call, clothes, figures):
    bounds = {"rtol": 1e-5, "atol": 1e-6}  # region pooling adds in the order of the memory
    same(value_and_gradient(call, CLOTHES[clothes]), value_and_gradient(call), **bounds)
    figures.add("misuse", "circumstances")


@CALL
def test_one_row_for_all(call):
    """Strides of 0: all embeddings are one."""
    function, x = CALLS[call]
    one = x[:1].expand_as(x)
    bounds = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(function(one), function(one.clone()), **bounds)


@CALL
def test_backward_twice_needs_the_graph_and_then_adds_up(call, figures):
    function, x = CALLS[call]
    _, grad = value_and_gradient(call)
    x = x.clone().requires_grad_()
    value = function(x)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(x.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()
    figures.add("misuse", "circumstances")


@CALL
def test_a_second_derivative_is_right_or_an_error(call, figures):
    function, x = CALLS[call]
    x = x.clone().requires_grad_()
    if call == "region_pool":
        (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        own = pico_fast.region_pool(x, MAP, 4, impl="reference")[0].square().sum()
        (grad,) = torch.autograd.grad(own, x, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(grad.square().sum(), x)[0])
    else:
        with pytest.raises(RuntimeError, match="contrast: expected a backward without create_graph"):
            torch.autograd.grad(function(x), x, create_graph=True)
    figures.add("misuse", "circumstances")


def test_the_reference_has_second_derivatives():
    x = ROWS.double().requires_grad_()
    torch.autograd.gradgradcheck(
        lambda x: pico_fast.contrast(x, LABELS, KEYS.double(), KEY_LABELS, impl="reference"), x
    )


@CALL
@pytest.mark.parametrize("transform", ("grad", "vmap", "jvp", "dual"))
def test_transforms_are_right_or_an_error(call, transform, figures):
    function, x = CALLS[call]
    if transform == "dual":
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            function(forward_ad.make_dual(x, x.clone()))
        return
    transformed = {
        "grad": lambda: func.grad(function)(x),
        "vmap": lambda: func.vmap(function)(torch.stack([x, x.flip(0)])),
        "jvp": lambda: func.jvp(function, (x,), (x,)),
    }[transform]
    try:
        found = transformed()
    except (RuntimeError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("functorch", "vmap:", "forward-mode"))
    else:
        if transform == "vmap":
            expected = torch.stack([function(x), function(x.flip(0))])
        else:
            expected = value_and_gradient(call)[1]
        torch.testing.assert_close(found, expected)
    figures.add("misuse", "circumstances")


@CALL
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_the_value_is_the_same(call, mode, figures):
    function, x = CALLS[call]
    with mode():
        found = function(x.clone().requires_grad_())
        made_inside = function(x * 1)
    assert not found.requires_grad
    expected = value_and_gradient(call)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(made_inside, expected)
    figures.add("misuse", "circumstances")


def test_steps_in_inference_mode_and_training_mix():
    mixed, plain = criterion(), criterion()
    with torch.inference_mode():
        mixed(IMAGES, MAP, SCORES)
        mixed.eval()
        mixed(IMAGES * 1, MAP, SCORES)  # changes nothing
        mixed.train()
    plain(IMAGES, MAP, SCORES)
    x = IMAGES.clone().requires_grad_()
    found, expected = mixed(x, MAP, SCORES), plain(x, MAP, SCORES)
    assert torch.equal(found, expected) and found.requires_grad
    same(mixed.state_dict().values(), plain.state_dict().values())


def test_a_module_made_in_inference_mode_says_that_it_cannot_train():
    with torch.inference_mode():
        made = pico_fast.PiCoLoss(4, 16, pixel_queue_size=20)
    with pytest.raises(RuntimeError, match="inference tensor"):
        made(IMAGES.clone().requires_grad_(), MAP, SCORES)


@CALL
def test_deterministic_mode_changes_nothing(call, figures):
    expected = value_and_gradient(call)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        same(value_and_gradient(call), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    figures.add("misuse", "circumstances")


@CALL
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_another_default_dtype_changes_nothing(call, dtype, figures):
    expected = value_and_gradient(call)
    torch.set_default_dtype(dtype)
    try:
        same(value_and_gradient(call), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    figures.add("misuse", "circumstances")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_another_default_device_changes_nothing(sampling, figures):
    here, there = criterion(sampling), criterion(sampling)
    expected = here(IMAGES, MAP, SCORES)
    with torch.device("meta"):
        found = there(IMAGES, MAP, SCORES)
        rows = pico_fast.contrast(ROWS, LABELS, KEYS, KEY_LABELS, sampling=sampling)
        means, _ = pico_fast.region_pool(IMAGES, MAP, 4)
        pixel, _ = pico_fast.sample_anchors(MAP, SCORES, num_classes=4)
    assert torch.equal(found, expected)
    plain = pico_fast.contrast(ROWS, LABELS, KEYS, KEY_LABELS, sampling=sampling)
    assert torch.equal(rows, plain)
    assert torch.equal(means, pico_fast.region_pool(IMAGES, MAP, 4)[0])
    assert torch.equal(pixel, pico_fast.sample_anchors(MAP, SCORES, num_classes=4)[0])
    figures.add("misuse", "circumstances")
