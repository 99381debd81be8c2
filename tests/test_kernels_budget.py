"""The Triton kernels within the budget of tests/test_budget.py: interpreted, or for real on a GPU.

Each tile is interpreted in milliseconds, so the scenes are fewer.
"""

import pytest
import torch
from hypothesis import given, settings
from kernel_scenes import in_triton
from test_budget import bounds, check_picks, scenes, shares, truth

import pico_fast

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a tile's products take both sides in the keys' dtype, float32 as TF32
ROUNDING = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
few = settings(max_examples=max(8, settings().max_examples // 50))


@pytest.fixture(autouse=True, scope="module")
def every_op_in_triton():
    with in_triton():
        yield


@few
@given(scenes(dtypes=DTYPES, with_keys=True))
def test_within_the_budget(figures, scene):
    picks = scene.call(pico_fast.select_keys)[:2]
    expected, gradient = truth(scene, picks)
    allowed = bounds(scene, expected, ROUNDING)
    # the interpreter reads subnormal bfloat16 as 0
    flushed = torch.finfo(torch.float32).tiny * scene.anchors.double().abs().sum(1)
    check_picks(scene, picks, allowed.inner + flushed)
    x = scene.anchors.detach().requires_grad_()
    words = {"temperature": scene.temperature, "reduction": "none"}
    loss = scene._replace(anchors=x).call(pico_fast.contrast, **words)
    (found,) = torch.autograd.grad(loss.sum(), x)
    # weights of a tile are rounded as well, and the gradient to the anchors' dtype
    info = torch.finfo(scene.anchors.dtype)
    rounded = (16 * ROUNDING[scene.keys.dtype] + info.eps) * gradient.norm(dim=1)
    held = (gradient.abs() < info.max / 2).all(1)
    rounded = allowed.gradient + rounded + info.tiny * len(gradient[0])
    of_gradient = shares(found[held], gradient[held], rounded[held])
    worst = max(shares(loss.detach(), expected, allowed.loss), of_gradient)
    assert worst <= 1, f"{worst} of its budget"
    figures.add("kernels", "interpreted scenes against float64")
    figures.most("kernels", "worst error, as a share of its budget", worst)
