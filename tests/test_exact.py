"""What is decided by integers is the same to the bit as the specification: anchors, bank, region counts."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

import pico_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# rounding of a sum's terms; the sums are float32, or float64
EPS = {torch.float64: 2.0**-52}
INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
)


@st.composite
def maps(draw):
    """Labels [B, H, W] of any dtype and layout in memory, and how many classes they may have."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    classes = draw(st.sampled_from((1, 2, 5, 40)))
    labels = torch.randint(0, classes, size, generator=g)
    kind = draw(st.sampled_from(("uniform", "one class", "left out", "long tail")))
    if kind == "one class":
        labels.zero_()
    if kind == "left out":
        labels = torch.where(torch.rand(size, generator=g) < 0.7, 255, labels)
    if kind == "long tail":
        labels = torch.where(torch.rand(size, generator=g) < 0.9, 0, labels)
    dtype = draw(st.sampled_from(INTEGERS))
    if dtype == torch.int8:
        labels = torch.where(labels == 255, -1, labels)
    labels = labels.to(dtype)
    if draw(st.booleans()):
        labels = labels.mT.contiguous().mT
    return labels, classes, g


@st.composite
def batches(draw):
    """Embeddings of any dtype and layout, some of them not finite; labels and classes."""
    labels, classes, g = draw(maps())
    dim = draw(st.sampled_from((1, 3, 16, 33)))
    x = normalize(torch.randn(labels.shape[0], dim, *labels.shape[1:], generator=g), dim=1)
    x = x * draw(st.sampled_from((1.0, 1e-4, 1e4, 1e-40))) if draw(st.booleans()) else x
    x = x.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and x.numel():
        spoiled = torch.randint(0, x.numel(), (2,), generator=g)
        x.view(-1)[spoiled] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    layout = draw(st.sampled_from(("planes", "pixels", "strided")))
    if layout == "pixels":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = x.repeat_interleave(2, 3)[..., ::2]
    return x, labels, classes


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9))
SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(maps(), SIZES, st.sampled_from(("correct", "random")), SEEDS, st.booleans())
def test_anchors(figures, drawn, sizes, easy, seed, predicted):
    labels, classes, g = drawn
    predictions = None
    if predicted:
        predictions = torch.randint(0, classes, labels.shape, generator=g)
    words = {"num_classes": classes, "seed": seed, "easy": easy}
    found, expected = (
        pico_fast.sample_anchors(labels, predictions, *sizes, **words, impl=impl)
        for impl in (None, "reference")
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    pixel, label = found
    used = pixel >= 0
    assert len(pixel[used].unique()) == used.sum()
    assert torch.equal(label[used], labels.flatten().long()[pixel[used]])
    figures.add("exact", "anchor draws equal to the bit")


@given(
    st.lists(batches(), min_size=1, max_size=5),
    st.integers(0, 12),
    st.integers(0, 4),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
)
def test_banks(figures, drawn, pixels, regions, per_image, dtype):
    """Any batches after one another; a batch of another kind is a batch of another bank."""
    first = drawn[0]
    sequence = [b for b in drawn if b[0].shape[1] == first[0].shape[1] and b[2] == first[2]]
    made = [
        pico_fast.MemoryBank(
            first[2], first[0].shape[1], pixels, regions, per_image, dtype, seed=3, impl=impl
        )
        for impl in (None, "reference")
    ]
    for embeddings, labels, _ in sequence:
        for bank in made:
            bank.enqueue(embeddings, labels)
    fast, slow = made
    counts = ("pixel_count", "pixel_next", "region_count", "region_next", "step", "refused")
    # a region's mean is a sum in another order: on the edge of what the dtype holds, one may be refused
    edge = dtype == torch.float16 and any(b[0].abs().max() > 1e3 for b in sequence if b[0].numel())
    if not edge:
        for name in counts:
            assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert torch.equal(fast.storage[:, :pixels], slow.storage[:, :pixels])
    assert fast.storage.isfinite().all()
    for bank in made:
        assert (bank.pixel_count <= pixels).all() and (bank.region_count <= regions).all()
    figures.add("exact", "banks equal to the bit", len(sequence))
    if not edge:
        figures.add("refused", "vectors refused where the specification does", int(fast.refused))


@given(batches())
def test_region_counts_and_means(figures, drawn):
    x, labels, classes = drawn
    means, counts = pico_fast.region_pool(x, labels, classes)
    wide = labels.long()
    member = (wide[:, None] == torch.arange(classes)[:, None, None]).flatten(2)
    assert torch.equal(counts, member.sum(2))
    for b in range(len(x)):
        for c in range(classes):
            rows = x[b].flatten(1)[:, member[b, c]].double()
            if rows.shape[1] == 0:
                assert not means[b, c].any()
                continue
            expected = rows.mean(1)
            eps = EPS.get(x.dtype, 2.0**-23)
            allowed = 4 * rows.shape[1] ** 0.5 * eps * rows.abs().mean(1) + 1e-44
            own = torch.finfo(x.dtype)
            allowed = allowed + own.eps * expected.abs() + own.smallest_normal * own.eps
            error = (means[b, c].double() - expected).abs()
            finite = expected.isfinite() & (expected.abs() < own.max / 2)
            assert (error <= allowed)[finite].all()
            # a pixel that is not finite spoils its own class and channel alone
            assert torch.equal(expected.isfinite()[finite], means[b, c].isfinite()[finite])
            assert not means[b, c][~expected.isfinite()].isfinite().any()
    figures.add("exact", "region poolings against float64")
