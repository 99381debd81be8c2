"""The GPU bars: region pooling against a copy of the same bytes and against index_add_."""

import peers
import pytest
import torch

import pico_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = {"8 x 256 x 128 x 256": (8, 256, 128, 256), "8 x 256 x 512 x 512": (8, 256, 512, 512)}


@pytest.mark.parametrize("classes", (19, 171))
@pytest.mark.parametrize("layout", ("planes", "pixels"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("size", SIZES)
def test_region_pooling(compare, size, dtype, layout, classes):
    """Both directions. The floor of each is half a copy: one read, or one write, of the features."""
    images, _, height, width = SIZES[size]
    order = torch.channels_last if layout == "pixels" else torch.contiguous_format
    features = torch.empty(SIZES[size], dtype=dtype, device="cuda", memory_format=order).normal_()
    # regions of 16 x 16 pixels
    labels = torch.randint(0, classes, (images, height // 16, width // 16), device="cuda")
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2).contiguous()
    pool = torch.ops.pico_fast.region_pool.default
    spread = torch.ops.pico_fast.region_pool_backward.default
    means, counts = pool(features, labels, classes)
    torch.testing.assert_close(means, peers.index_add(features.float(), labels, classes))
    image = torch.arange(images, device="cuda")[:, None]
    region = (image * classes + labels.flatten(1)).flatten()
    share = (means / counts[..., None].clamp(min=1)).flatten(0, 1).to(dtype)

    def gather():
        rows = share.index_select(0, region).unflatten(0, (images, height, width))
        return rows.permute(0, 3, 1, 2).contiguous(memory_format=order)

    args = (means, labels, counts, dtype, layout == "pixels")
    torch.testing.assert_close(spread(*args), gather())
    copy = torch.empty_like(features)
    case = f"region pooling, {size}, {str(dtype)[6:]}, {layout}, {classes} classes"
    forward = {
        "pico_fast": lambda: pool(features, labels, classes),
        "copy": lambda: copy.copy_(features),
        "index_add_": lambda: peers.index_add(features, labels, classes),
    }
    backward = {
        "pico_fast": lambda: spread(*args),
        "copy": lambda: copy.copy_(features),
        "index_select": gather,
    }
    for direction, runs in (("forward", forward), ("backward", backward)):
        medians = compare(f"{case}, {direction}", runs, "cuda")
        assert medians["copy"] / 2 >= 0.65 * medians["pico_fast"], "below 65 % of the bandwidth"
    assert pico_fast.region_pool(features, labels, classes)[0].dtype == dtype
