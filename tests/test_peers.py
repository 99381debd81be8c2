"""The peers of the benchmarks: what stands beside pico_fast computes the same, or draws the same way."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pico_fast import reference
from pico_fast.selection.options import EVERYTHING, Selection, check_selection

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import measure
from peers import bank, contrast, products, regions, sampled, selection

TEMPERATURE = 0.1
DATA = ("random", "clustered")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def optional(module: str):
    """A module that `make bench` installs; the test is skipped without it."""
    return pytest.importorskip(module, reason="comes with `make bench`")


def pairs(data: str, n_anchors=7, classes=5, slots=13, channels=16, device="cpu", dtype=None):
    """Anchors, labels, keys class by class, labels; no anchor of the last class."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, channels, generator=g) * (data == "clustered")
    labels = torch.randint(0, classes - 1, (n_anchors,), generator=g)
    key_labels = torch.arange(classes).repeat_interleave(slots)
    anchors = torch.randn(n_anchors, channels, generator=g) + centres[labels]
    keys = torch.randn(len(key_labels), channels, generator=g) + centres[key_labels]
    anchors, keys = normalize(anchors, dim=1), normalize(keys, dim=1).to(dtype)
    return tuple(x.to(device) for x in (anchors, labels, keys, key_labels))


def hardest(n_positives: int, n_negatives: int) -> Selection:
    """The selection of the hardest of all keys."""
    return check_selection("hardest", None, n_positives, n_negatives, 1.0)


def truth(anchors, labels, keys, key_labels, choice=EVERYTHING):
    """Loss and gradient by the reference in float64."""
    leaf = anchors.double().requires_grad_()
    rows, counted = reference.contrast(leaf, labels, keys.double(), key_labels, TEMPERATURE, choice, seed=0)
    loss = rows.sum() / counted.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def differentiated(loss, anchors, *args, **options):
    """Loss and gradient by autograd."""
    leaf = anchors.clone().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(found, expected, tolerance=1e-5):
    """Loss and gradient, each relative in its norm."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "loss",
    (
        contrast.eager,
        contrast.eager_compiled,
        functools.partial(contrast.eager_checkpointed, block=3),
        contrast.metric_learning,
    ),
    ids=("eager", "eager_compiled", "eager_checkpointed", "metric_learning"),
)
def test_losses_with_all_keys(loss, data):
    if loss is contrast.metric_learning:
        optional("pytorch_metric_learning")
    inputs = pairs(data)
    assert_same(differentiated(loss, *inputs, TEMPERATURE), truth(*inputs))


# chunks within a class, of a class, of some classes with fewer at the end, of all
@pytest.mark.parametrize("chunk", (5, 13, 30, None))
@pytest.mark.parametrize("data", DATA)
def test_analytic(data, chunk):
    inputs = pairs(data)
    assert_same(contrast.analytic(*inputs, TEMPERATURE, chunk), truth(*inputs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_analytic_with_a_compiled_epilogue(dtype):
    inputs = pairs("clustered", dtype=dtype)
    found = contrast.analytic(*inputs, TEMPERATURE, chunk=30, compiled=True)
    assert_same(found, truth(*inputs))


@pytest.mark.parametrize("data", DATA)
def test_eager_chunked(data):
    inputs = pairs(data)
    assert_same(contrast.eager_chunked(*inputs, TEMPERATURE, block=3), truth(*inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("attention", (contrast.flash_attention_on_cpu, contrast.flex_attention))
def test_attention_loss(attention, data):
    anchors, labels, keys, key_labels = pairs(data)
    found = contrast.attention_loss(anchors, labels, keys.view(5, 13, 16), TEMPERATURE, attention)
    assert_same(found, truth(anchors, labels, keys, key_labels))


@needs_gpu
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ("flash_attention", "cudnn_attention", "flex_attention", "analytic"))
def test_in_bfloat16_on_a_gpu(name, data):
    sizes = {"n_anchors": 70, "classes": 5, "slots": 130, "channels": 64}
    inputs = pairs(data, **sizes, device="cuda", dtype=torch.bfloat16)
    if name == "analytic":
        found = contrast.analytic(*inputs, TEMPERATURE, chunk=100)
    else:
        given = (*inputs[:2], inputs[2].view(5, 130, 64), TEMPERATURE)
        found = contrast.attention_loss(*given, getattr(contrast, name))
    assert_same(found, truth(*inputs), 2e-2)


def test_two_products():
    anchors, _, keys, _ = pairs("random", slots=300)
    expected = anchors @ keys.T @ keys
    torch.testing.assert_close(contrast.two_products(anchors, keys), expected)


def assert_log_sum_exp_of_all_keys(anchors, keys, tolerance):
    leaf = anchors.double().requires_grad_()
    expected = (leaf @ keys.double().T / TEMPERATURE).logsumexp(1)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found = contrast.cut_cross_entropy(anchors, keys, TEMPERATURE)
    assert_same(found, (expected.detach(), gradient), tolerance)


def test_cut_cross_entropy_leaves_the_plain_log_sum_exp():
    optional("cut_cross_entropy")
    anchors, _, keys, _ = pairs("random", channels=32)
    assert_log_sum_exp_of_all_keys(anchors, keys, 1e-5)


@needs_gpu
def test_cut_cross_entropy_on_a_gpu():
    optional("cut_cross_entropy")
    inputs = pairs("random", 70, 5, 130, 64, "cuda", torch.bfloat16)
    assert_log_sum_exp_of_all_keys(inputs[0], inputs[2], 3e-2)


def test_own_class_products():
    anchors, labels, keys, key_labels = pairs("random")
    rows = products.bank_of(keys, key_labels)
    assert rows.shape == (5, 13, 16)
    found = products.own_class_product(anchors, labels, rows)
    torch.testing.assert_close(found, torch.einsum("ad,atd->at", anchors, rows[labels]))
    back = products.own_class_sum(found, labels, rows)
    torch.testing.assert_close(back, torch.einsum("at,atd->ad", found, rows[labels]))


def test_picked_carries_the_gradient_of_the_products():
    anchors, _, keys, _ = pairs("random")
    index = torch.randint(0, len(keys), (7, 4))
    weights = torch.randn(7, 4)
    similarity = torch.einsum("ad,and->an", anchors, keys[index])

    def loss(leaf):
        return (products.picked(leaf, keys, index, similarity) * weights).sum()

    _, gradient = differentiated(loss, anchors)
    torch.testing.assert_close(gradient, torch.einsum("an,and->ad", weights, keys[index]))


@pytest.mark.parametrize("counts", ((4, 9), (13, 52)))
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "loss",
    (
        selection.matmul_topk,
        functools.partial(selection.chunked_topk, chunk=10),
        selection.chunked_topk,
        selection.faiss_hardest,
    ),
    ids=("matmul_topk", "chunked_topk of 10", "chunked_topk", "faiss_hardest"),
)
def test_hardest(loss, data, counts):
    if loss is selection.faiss_hardest:
        optional("faiss")
    inputs = pairs(data)
    found = differentiated(loss, *inputs, *counts, TEMPERATURE)
    assert_same(found, truth(*inputs, hardest(*counts)))


@pytest.mark.parametrize("name", ("matmul_topk", "chunked_topk"))
def test_hardest_of_keys_in_bfloat16(name):
    inputs = pairs("clustered", dtype=torch.bfloat16)
    found = differentiated(getattr(selection, name), *inputs, 4, 9, TEMPERATURE)
    assert_same(found, truth(*inputs, hardest(4, 9)), 3e-2)


def sampled_of(inputs, choice):
    """Arguments of the peer that compares with the sample which the reference draws."""
    anchors, labels, keys, key_labels = inputs
    sides = []
    for own in (True, False):
        rows = reference.sample_keys(key_labels, choice.needed(own), own, 0)
        sides.append(sampled.Sampled(rows, torch.bincount(key_labels[rows]).tolist()))
    return (anchors, labels, keys, *sides, choice.negatives, choice.positives)


# few of many, all there are, and fewer than some anchors have below their ceilings
@pytest.mark.parametrize("counts", ((4, 9), (30, 200), (2, 40)))
@pytest.mark.parametrize("block", (3, 256))
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("sampling", "positives"),
    (("random", None), ("semi_hard", None), ("semi_hard", "random"), ("bounded", None)),
)
def test_plain_contrast_of_a_sample(sampling, positives, data, block, counts):
    inputs = pairs(data, 12, 5, 60)
    choice = check_selection(sampling, positives, *counts, 0.25)
    given = sampled_of(inputs, choice)
    found = sampled.plain(*given, *counts, TEMPERATURE, 0.25, block)
    assert_same(found, truth(*inputs, choice))


@pytest.mark.parametrize("blocks", (1, 4), ids=("scattered", "in blocks"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("index_add", "scatter_reduce", "one_hot", "sorted_segments", "loop"))
def test_region_means(name, dtype, blocks):
    features = torch.randn(3, 6, 8, 12).to(dtype)
    labels = torch.randint(0, 4, (3, 8 // blocks, 12 // blocks))
    labels = labels.repeat_interleave(blocks, 1).repeat_interleave(blocks, 2)
    labels[1] = 2  # an image of one class
    exact = features.double().requires_grad_()
    expected, _ = reference.region_pool(exact, labels, 5)
    weights = torch.randn(expected.shape)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    leaf = features.clone().requires_grad_()
    means = getattr(regions, name)(leaf, labels, 5)
    (found,) = torch.autograd.grad((means * weights).sum(), leaf)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_same((means.detach(), found), (expected.detach(), gradient), tolerance)


def reference_bank(storage, pixels: int):
    """Arguments of `reference.update_bank`, in front of the batch."""
    rings = [torch.zeros(len(storage), dtype=torch.int64) for _ in range(4)]
    return [storage, *rings, pixels]


@pytest.mark.parametrize("pixel_queue", (0, 5, 200))
def test_the_loop_fills_the_bank_of_the_reference(pixel_queue):
    """Same regions, pointers and counts; pixels of the class, all of them where the queue holds them."""
    ours, theirs = (reference_bank(torch.zeros(4, pixel_queue + 3, 6), pixel_queue) for _ in range(2))
    per_class = [[] for _ in range(4)]
    for _ in range(3):
        embeddings = normalize(torch.randn(2, 6, 5, 7), dim=1)
        labels = torch.randint(-1, 3, (2, 5, 7))  # the last class stays empty
        reference.update_bank(*ours, embeddings, labels, 40, 0)
        bank.loop_enqueue(*theirs, embeddings, labels, 40)
        for c, rows in enumerate(per_class):
            rows.append(embeddings.permute(0, 2, 3, 1)[labels == c])
    for mine, other in zip(ours[1:5], theirs[1:5], strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(ours[0][:, pixel_queue:], theirs[0][:, pixel_queue:])
    for c, rows in enumerate(map(torch.cat, per_class)):
        stored = theirs[0][c, :pixel_queue][: theirs[1][c]]
        same = (stored[:, None] == rows).all(2)
        assert same.any(1).all()
        assert same.sum() == len(stored) == min(len(rows), pixel_queue)


def test_a_bank_of_its_own():
    filled = bank.Bank(4, 6, 8, 3, dtype=torch.float32)
    filled.enqueue(normalize(torch.randn(2, 6, 5, 7), dim=1), torch.randint(0, 3, (2, 5, 7)))
    assert [ring.tolist() for ring in filled.rings[::2]] == [[8, 8, 8, 0], [2, 2, 2, 0]]
    assert filled.storage[:3, :10].norm(dim=2).sub(1).abs().max() < 1e-5
    assert not filled.storage[3].any() and not filled.storage[:, 10:].any()


@pytest.mark.parametrize("min_pixels", (None, 1))
@pytest.mark.parametrize("max_samples", (40, 90))
def test_the_loop_draws_anchors_like_the_reference(max_samples, min_pixels):
    """As many of each class and image, as many of them hard, none twice."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 4, (3, 6, 10), generator=g)
    labels[0, :, 3:] = 2
    right = torch.rand(labels.shape, generator=g) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    predictions = torch.where(right, labels, 4)
    args = (labels, predictions, max_samples, 9)
    least = 10 if min_pixels is None else min_pixels
    pixel, classes = reference.sample_anchors(*args, least, 5, 0)
    found, found_classes = bank.loop_anchors(*args, 5, min_pixels)
    assert len(found.unique()) == len(found) == len(found_classes) == (pixel >= 0).sum()
    assert torch.equal(labels.flatten()[found], found_classes)

    def kinds(pixel, classes):
        hard = predictions.flatten()[pixel] != classes
        return sorted(zip((pixel // 60).tolist(), classes.tolist(), hard.tolist(), strict=True))

    assert kinds(found, found_classes) == kinds(pixel[pixel >= 0], classes[pixel >= 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sizes", ((40, 20, 30), (64, 4, 500)))
def test_no_peer_allocates_more_than_it_says(sizes):
    n_anchors, classes, slots = sizes
    inputs = pairs("random", n_anchors, classes, slots, 32)
    given = (*inputs, TEMPERATURE)
    rows = products.bank_of(*inputs[2:])
    attention = functools.partial(contrast.attention_loss, *inputs[:2], rows, TEMPERATURE)
    calls = {
        name: functools.partial(differentiated, getattr(contrast, name), *given)
        for name in ("eager", "eager_compiled", "eager_checkpointed")
    }
    calls |= {
        "eager_chunked": functools.partial(contrast.eager_chunked, *given),
        "analytic": functools.partial(contrast.analytic, *given),
        "two_products": functools.partial(contrast.two_products, inputs[0], inputs[2]),
        "attention": functools.partial(attention, contrast.flash_attention_on_cpu),
        "flex_attention": functools.partial(attention, contrast.flex_attention),
    }
    for name, call in calls.items():
        call()
        needed = contrast.bytes_needed(name, n_anchors, len(inputs[2]), 32, classes)
        assert measure.allocated(call) <= needed, name
    for name in ("matmul_topk", "chunked_topk"):
        call = functools.partial(differentiated, getattr(selection, name), *inputs, 5, 50, TEMPERATURE)
        needed = selection.bytes_needed(name, n_anchors, len(inputs[2]), 32, 5, 50, classes)
        assert measure.allocated(call) <= needed, name
    choice = check_selection("bounded", None, 5, 50, 0.1)
    given = sampled_of(inputs, choice)
    needed = sampled.bytes_needed(n_anchors, 32, *given[3:5])
    assert measure.allocated(functools.partial(sampled.plain, *given, 5, 50, TEMPERATURE)) <= needed
