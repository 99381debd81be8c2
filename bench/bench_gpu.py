"""The GPU bars: region pooling against a copy, contrast against the matrix product and attention."""

import peers
import pytest
import torch
from torch.nn.functional import normalize

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


CLASSES, CHANNELS, TEMPERATURE = 171, 256, 0.1


@pytest.mark.parametrize("n_anchors", (1024, 4096, 16384))
@pytest.mark.parametrize("slots", (3304, 10_000))
def test_contrast_all(compare, n_anchors, slots):
    """Loss and gradient with all keys; the product has the floor's 4 A K D operations."""
    bank = torch.randn(CLASSES, slots, CHANNELS, device="cuda", dtype=torch.bfloat16)
    bank = normalize(bank, dim=2)
    keys = bank.flatten(0, 1)
    first = torch.arange(CLASSES, device="cuda") * slots
    segments = torch.stack([first, torch.full_like(first, slots)], 1).unsqueeze(1)
    anchors = normalize(torch.randn(n_anchors, CHANNELS, device="cuda"), dim=1)
    labels = torch.randint(0, CLASSES, (n_anchors,), device="cuda")
    args = (anchors, labels, keys, None, None, None, TEMPERATURE, True, segments)
    queries = anchors.bfloat16()
    found = torch.ops.pico_fast.contrast_all(*args)
    # a product with the same number of operations, in a shape that suits it
    size = 8192
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    operations = 4 * n_anchors * len(keys) * CHANNELS
    share = operations / (2 * size**3)
    runs = {
        "pico_fast": lambda: torch.ops.pico_fast.contrast_all(*args),
        "product 8192": lambda: left @ left,
    }
    for attention in (peers.flash_attention, peers.cudnn_attention):
        peer = (queries, labels, bank, TEMPERATURE, attention)
        try:
            lse, _ = peers.class_attention(*peer)
        except RuntimeError as error:
            print(f"{attention.__name__} does not run here: {str(error).splitlines()[0]}")
            continue
        torch.testing.assert_close(lse.float(), found[1], rtol=2e-2, atol=2e-2)
        runs[attention.__name__] = lambda peer=peer: peers.class_attention(*peer)
    medians = compare(f"loss + gradient, {n_anchors} x {len(keys)}", runs, "cuda")
    assert share * medians["product 8192"] >= 0.57 * medians["pico_fast"], (
        "below 57 % of the product"
    )
    assert medians["pico_fast"] < medians.get("flash_attention", float("inf"))


@pytest.mark.parametrize("n_anchors", (1024, 4096))
@pytest.mark.parametrize("sampling", ("hardest", "semi_hard", "random"))
def test_contrast_selected(compare, sampling, n_anchors):
    """Loss and gradient on 1024 and 2048 selected keys of 1.71 M, beside full-matrix PyTorch."""
    slots = 10_000
    labels = torch.arange(CLASSES, device="cuda").repeat_interleave(slots)
    keys = torch.randn(len(labels), CHANNELS, device="cuda", dtype=torch.bfloat16)
    keys = normalize(keys, dim=1)
    anchors = normalize(torch.randn(n_anchors, CHANNELS, device="cuda"), dim=1).requires_grad_()
    anchor_labels = torch.randint(0, CLASSES, (n_anchors,), device="cuda")
    size = 8192
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    block = 128  # rows whose similarities to all keys fit beside everything else

    def ours():
        loss = pico_fast.contrast(anchors, anchor_labels, keys, labels, 0.1, sampling)
        return torch.autograd.grad(loss, anchors)

    def matmul_topk():
        for first in range(0, n_anchors, block):
            here = slice(first, first + block)
            rows = anchors[here].detach().requires_grad_()
            loss = peers.matmul_topk(
                rows.bfloat16(), anchor_labels[here], keys, labels, 1024, 2048, 0.1
            )
            torch.autograd.grad(loss, rows)

    runs = {"pico_fast": ours, "product 8192": lambda: left @ left}
    if sampling == "hardest":
        runs["matmul + topk"] = matmul_topk
    medians = compare(f"loss + gradient, {sampling}, {n_anchors} x {len(keys)}", runs, "cuda")
    floor = 2 * n_anchors * len(keys) * CHANNELS / (2 * size**3) * medians["product 8192"]
    print(f"{sampling}, {n_anchors} anchors: {medians['pico_fast'] / floor:.2f} x one product")
    if sampling == "hardest":
        assert medians["matmul + topk"] >= 3 * medians["pico_fast"]
