"""`sample_anchors`: counts, shares, uniformity, and the reference index by index."""

import pytest
import torch

import pico_fast
from pico_fast.regions import why_not_compiled


def scene(images=3, height=19, width=23, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, classes, (images, 4, 5), generator=g)
    labels = torch.nn.functional.interpolate(coarse[:, None].float(), (height, width))[:, 0].long()
    noise = torch.rand(labels.shape, generator=g) < 0.3
    predictions = torch.where(noise, torch.randint(0, classes, labels.shape, generator=g), labels)
    return labels, predictions.clamp(min=0)


def per_pair(labels, pixel, label):
    """{(image, class): pixels} of the result, after checking that it is well formed."""
    used = pixel >= 0
    n = int(used.sum())
    assert used[:n].all() and (pixel[n:] == -1).all() and (label[n:] == -1).all()
    assert pixel.dtype == label.dtype == torch.int64
    assert torch.equal(labels.flatten()[pixel[:n]], label[:n])
    assert len(set(pixel[:n].tolist())) == n
    pairs = {}
    for p, c in zip(pixel[:n].tolist(), label[:n].tolist(), strict=True):
        pairs.setdefault((p // labels[0].numel(), c), []).append(p)
    return pairs


@pytest.mark.parametrize("max_samples", (1, 7, 60, 1024))
@pytest.mark.parametrize("max_views", (1, 4, 100))
@pytest.mark.parametrize("min_pixels", (1, 30))
@pytest.mark.parametrize("easy", ("correct", "random"))
@pytest.mark.parametrize("with_predictions", (True, False))
def test_counts_and_shares(max_samples, max_views, min_pixels, easy, with_predictions):
    labels, predictions = scene()
    given = predictions if with_predictions else None
    options = {"num_classes": 5, "seed": 4, "easy": easy}
    sizes = (max_samples, max_views, min_pixels)
    found = pico_fast.sample_anchors(labels, given, *sizes, **options)
    wanted = pico_fast.sample_anchors(labels, given, *sizes, **options, impl="reference")
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert found[0].shape == (max_samples,)

    pairs = per_pair(labels, *found)
    eligible = {
        (b, c): (labels[b] == c) for b in range(3) for c in range(5) if (labels[b] == c).sum() >= min_pixels
    }
    n_view = max(1, min(max_samples // len(eligible), max_views))
    assert set(pairs) <= set(eligible)
    assert len(pairs) == min(len(eligible), max_samples)
    for (b, c), pixels in pairs.items():
        mask = eligible[b, c]
        assert len(pixels) == min(n_view, int(mask.sum()))
        wrong = (predictions[b] != c)[mask]
        n_hard = sum(int(predictions.flatten()[p]) != c for p in pixels)
        available_hard, available_easy = int(wrong.sum()), int((~wrong).sum())
        if with_predictions and easy == "correct":
            expected = min(available_hard, max(n_view // 2, n_view - available_easy))
            assert n_hard == expected
        elif with_predictions:
            assert n_hard >= min(available_hard, n_view // 2)


def test_more_pairs_than_samples_chooses_pairs_by_seed():
    labels, predictions = scene()
    chosen = set()
    for seed in range(30):
        found = pico_fast.sample_anchors(labels, predictions, 4, num_classes=5, seed=seed)
        pairs = per_pair(labels, *found)
        assert len(pairs) == 4 and all(len(pixels) == 1 for pixels in pairs.values())
        chosen |= set(pairs)
    assert len(chosen) > 10


@pytest.mark.parametrize("easy", ("correct", "random"))
def test_pixels_of_a_kind_are_drawn_equally_often(easy):
    labels = torch.zeros(1, 6, 10, dtype=torch.int64)
    predictions = (torch.arange(60).view(1, 6, 10) < 20).long()
    hits = torch.zeros(60)
    runs = 2000
    for seed in range(runs):
        pixel, _ = pico_fast.sample_anchors(labels, predictions, 12, num_classes=2, seed=seed, easy=easy)
        hits[pixel] += 1
    assert hits.sum() == 12 * runs
    # 6 of 20 hard ones and 6 of 40 others; or 6 hard and 6 of the 54 that remain
    expected = torch.full((60,), 6 / 40 if easy == "correct" else 6 / 54)
    expected[:20] = 6 / 20 if easy == "correct" else 6 / 20 + 14 / 20 * 6 / 54
    deviation = (hits / runs - expected) / (expected * (1 - expected) / runs).sqrt()
    assert deviation.abs().max() < 4.5


def test_labels_of_any_integer_dtype_and_sentinel():
    labels, predictions = scene()
    want = pico_fast.sample_anchors(labels, predictions, 50, num_classes=5)
    for dtype in (torch.int8, torch.int16, torch.int32):
        got = pico_fast.sample_anchors(labels.to(dtype), predictions, 50, num_classes=5)
        assert torch.equal(got[0], want[0])
    as_255 = torch.where(labels < 0, 255, labels)
    for dtype in (torch.uint8, torch.int64, torch.uint16):
        got = pico_fast.sample_anchors(as_255.to(dtype), predictions, 50, num_classes=5)
        assert torch.equal(got[0], want[0])
    scores = torch.nn.functional.one_hot(predictions, 5).permute(0, 3, 1, 2).float()
    got = pico_fast.sample_anchors(labels, scores, 50, num_classes=5)
    assert torch.equal(got[0], want[0])


def test_nothing_to_sample_is_not_an_error():
    for labels in (torch.full((2, 4, 4), 255), torch.zeros(0, 4, 4, dtype=torch.int64)):
        for impl in (None, "reference"):
            pixel, label = pico_fast.sample_anchors(labels, None, 9, num_classes=3, impl=impl)
            assert (pixel == -1).all() and (label == -1).all() and len(pixel) == 9
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    pixel, _ = pico_fast.sample_anchors(labels, None, 9, num_classes=3)
    assert sorted(pixel.tolist()) == [-1] * 5 + [0, 1, 2, 3]


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gathered_rows_and_their_gradient(layout):
    from pico_fast.pixels import gather_pixels

    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 5, 7, generator=g).to(memory_format=layout).requires_grad_()
    pixel = torch.tensor([69, 0, 34, 35, -1, -1])
    rows = gather_pixels(features, pixel)
    plain = features.detach().permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(rows[:4], plain[pixel[:4]])
    weight = torch.randn(6, 6, generator=g)
    weight[4:] = 0
    (rows * weight).sum().backward()
    expected = torch.zeros_like(plain)
    expected[pixel[:4]] = weight[:4]
    assert torch.equal(features.grad.permute(0, 2, 3, 1).reshape(-1, 6), expected)
    assert features.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("layout", ("planes", "pixels", "strided"))
def test_the_gather_op_takes_any_layout(layout, dtype):
    from pico_fast.pixels import gather_torch

    features = torch.randn(3, 37, 11, 13).to(dtype)
    if layout == "pixels":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        features = features.repeat_interleave(2, 2)[:, :, ::2].transpose(2, 3)
    pixel = torch.randperm(3 * 11 * 13)[:300]
    expected = features.permute(0, 2, 3, 1).reshape(-1, 37)[pixel]
    assert torch.equal(torch.ops.pico_fast.gather_pixels(features, pixel), expected)
    assert torch.equal(gather_torch(features, pixel), expected)
    torch.library.opcheck(torch.ops.pico_fast.gather_pixels.default, (features, pixel[:9]))


@pytest.mark.skipif(why_not_compiled is not None, reason="no compiled kernels")
@pytest.mark.parametrize("pixel", (-1, 60, 2**40))
def test_the_gather_op_reads_nothing_outside(pixel):
    features = torch.randn(2, 3, 5, 6)
    with pytest.raises(RuntimeError, match="indices of pixels"):
        torch.ops.pico_fast.gather_pixels(features, torch.tensor([0, pixel]))
