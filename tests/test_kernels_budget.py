"""The Triton kernels within the budget of tests/test_budget.py: interpreted, or for real on a GPU.

Each tile is interpreted in milliseconds, so the scenes are fewer.
"""

import pytest
import torch
from hypothesis import given, settings
from test_budget import bounds, check_picks, scenes, shares, truth

from pico_fast import contrast_any, contrast_selected, selection

contrast_gpu = pytest.importorskip("pico_fast.contrast_gpu", reason="needs Triton")
selection_gpu = pytest.importorskip("pico_fast.selection_gpu", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SAMPLINGS = ("all", "hardest", "semi_hard")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a tile's products take both sides in the keys' dtype, float32 as TF32
ROUNDING = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
few = settings(max_examples=max(8, settings().max_examples // 12))


@pytest.fixture(autouse=True, scope="module")
def tf32():
    """float32 keys are taken where TF32 may be used; the interpreter computes it exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@few
@given(scenes(SAMPLINGS, DTYPES, with_keys=True))
def test_within_the_budget(figures, scene):
    pairs = scene[:4]
    anchors, keys = scene.anchors, scene.keys
    picks, selected = None, ()
    if scene.sampling != "all":
        choice = (scene.sampling, scene.num_positives, scene.num_negatives)
        seed = torch.tensor(scene.seed, device=anchors.device)
        page = selection_gpu if selection_gpu.takes(anchors, keys, *choice) else selection
        select = page.select_keys if page is selection_gpu else selection.select_any
        selected = select(*pairs, *choice, scene.hard_fraction, seed, None)
        picks = selected[:2]
    expected, gradient = truth(scene, picks)
    allowed = bounds(scene, expected, ROUNDING)
    if picks is None:
        page = contrast_gpu if contrast_gpu.takes(anchors, keys) else contrast_any
        loss, *_, found = page.contrast_all(*pairs, None, None, scene.temperature, True)
    else:
        check_picks(scene, picks, allowed.inner)
        ends = (None, None, scene.temperature, True)
        loss, *_, found = contrast_selected.contrast_selected(anchors, keys, *selected, *ends)
    # weights of a tile are rounded as well
    narrow = ROUNDING[keys.dtype]
    held = allowed.gradient + 16 * narrow * gradient.norm(dim=1)
    worst = max(shares(loss, expected, allowed.loss), shares(found, gradient, held))
    assert worst <= 1, f"{worst} of its budget"
    figures.add("kernels", "interpreted scenes against float64")
    figures.most("kernels", "worst error, as a share of its budget", worst)
