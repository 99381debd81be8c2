"""`contrast` against an independent float64 formula, in every form, and against the reference."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import reference
from pico_fast.bank.memory_bank import Share
from pico_fast.contrast import cpu, eager
from pico_fast.contrast.function import Settings, contrast_rows
from pico_fast.regions import why_not_compiled
from pico_fast.selection import layout as layouts
from pico_fast.selection.eager import class_of_positions
from pico_fast.selection.layout import Cut
from pico_fast.selection.options import EVERYTHING, POSITIVES, SAMPLINGS, check_selection

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def truth(anchors, anchor_labels, keys, key_labels, temperature):
    """Loss of each anchor by loops over pairs, float64: the definition, written a second time."""
    in_batch = keys is None
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    rows = []
    for i, label in enumerate(anchor_labels.tolist()):
        s = keys.double() @ anchors[i].double() / temperature
        other = torch.arange(len(keys)) != i if in_batch else torch.ones(len(keys)).bool()
        positive = (key_labels == label) & (label >= 0) & other
        negative = (key_labels != label) & (key_labels >= 0) & (label >= 0)
        if not positive.any() or not negative.any():
            rows.append(anchors[i].double().sum() * 0)
            continue
        z = torch.logsumexp(s[negative], 0)
        rows.append(torch.log1p(torch.exp(z - s[positive])).mean())
    return torch.stack(rows) if rows else anchors.double().sum(1)


def case(name, n_anchors=37, n_keys=333, dim=24, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(n_anchors, dim, generator=g)
    keys = torch.randn(n_keys, dim, generator=g)
    anchor_labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    key_labels = torch.randint(-1, classes, (n_keys,), generator=g)
    if name == "clustered":
        centres = torch.randn(classes + 1, dim, generator=g) * 3
        anchors, keys = anchors + centres[anchor_labels], keys + centres[key_labels]
    if name == "sorted bank":
        key_labels = torch.arange(classes).repeat_interleave(n_keys // classes + 1)[:n_keys]
        key_labels[n_keys // 2 : n_keys // 2 + 20] = -1
    if name == "one class":
        anchor_labels = anchor_labels.clamp(max=0)
        key_labels = key_labels.clamp(max=0)
    if name == "single anchor":
        anchors, anchor_labels = anchors[:1], torch.tensor([2])
    if name == "no anchor":
        anchors, anchor_labels = anchors[:0], anchor_labels[:0]
    if name == "no key":
        keys, key_labels = keys[:0], key_labels[:0]
    if name == "all ignored":
        anchor_labels = torch.full_like(anchor_labels, -1)
    if name == "no key used":
        key_labels = torch.full_like(key_labels, -7)
    if name == "no negative":
        anchor_labels, key_labels = (
            torch.full_like(anchor_labels, 3),
            torch.full_like(key_labels, 3),
        )
    if name == "no positive":
        anchor_labels = torch.full_like(anchor_labels, 99)
    return normalize(anchors, dim=1), anchor_labels, normalize(keys, dim=1), key_labels


CASES = (
    "random",
    "clustered",
    "sorted bank",
    "one class",
    "single anchor",
    "no anchor",
    "no key",
    "all ignored",
    "no key used",
    "no negative",
    "no positive",
)


def close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if actual.numel():
        assert (actual.double() - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize("impl", (None, "reference"))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize("temperature", (0.01, 0.1, 1.0))
def test_loss_and_gradient_are_those_of_the_formula(name, in_batch, temperature, impl):
    anchors, anchor_labels, keys, key_labels = case(name)
    if in_batch:
        keys = key_labels = None
    leaves = [t.clone().requires_grad_() for t in (anchors, keys) if t is not None]
    exact = [t.double().requires_grad_() for t in (anchors, keys) if t is not None]
    rest = (None, None) if in_batch else (leaves[1], key_labels)
    rest_exact = (None, None) if in_batch else (exact[1], key_labels)
    loss = pico_fast.contrast(leaves[0], anchor_labels, *rest, temperature, reduction="none", impl=impl)
    expected = truth(exact[0], anchor_labels, *rest_exact, temperature)
    assert loss.dtype == torch.float32
    close(loss, expected, 1e-5)
    g = torch.linspace(-1, 2, len(loss))
    (loss * g).sum().backward()
    (expected * g).sum().backward()
    for leaf, want in zip(leaves, exact, strict=True):
        close(leaf.grad, want.grad if want.grad is not None else torch.zeros_like(want), 1e-4)


PAGES = [eager] + [cpu] * (why_not_compiled is None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
@pytest.mark.parametrize("shape", ((70, 9001, 40, 7), (1, 1, 16, 2), (300, 40, 17, 50)))
def test_sums_of_tiles_agree_with_the_formula(page, shape):
    anchors, anchor_labels, keys, key_labels = (
        t.double() if t.is_floating_point() else t for t in case("clustered", *shape)
    )
    work = layouts.of_labels(anchors, anchor_labels, keys, key_labels)
    nobody, n = Cut(), work.available(True)
    lse, mean, away, _ = page.negatives(work, nobody, 0.1, True)
    loss, weight, similar, pull = page.positives(work, nobody, lse, 0.1, True)
    leaf, key_leaf = anchors.clone().requires_grad_(), keys.clone().requires_grad_()
    expected = truth(leaf, anchor_labels, key_leaf, key_labels, 0.1)
    share = 1 / n.clamp(min=1).double()
    close(work.restore(loss * share), expected.detach(), 1e-10)
    expected.sum().backward()
    gradient = (share * 10 * weight)[:, None] * mean - (share * 10)[:, None] * pull
    close(work.restore(gradient), leaf.grad, 1e-9)
    key_grad = page.keys_grad(work, nobody, True, lse, share * 10, 0.1)
    key_grad += page.keys_grad(work, nobody, False, lse, share * 10 * weight, 0.1)
    # no anchor has a positive where there is one key: nothing reaches the keys then
    close(key_grad, torch.zeros_like(keys) if key_leaf.grad is None else key_leaf.grad, 1e-9)
    similarity = anchors @ keys.T
    used = (anchor_labels[:, None] >= 0) & (key_labels >= 0)
    own = anchor_labels[:, None] == key_labels
    for output, mask in ((similar, used & own), (away, used & ~own)):
        close(work.restore(output), (similarity * mask).sum(1), 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys_dtype", DTYPES)
@pytest.mark.parametrize("name", ("random", "clustered", "sorted bank"))
def test_error_stays_in_the_budget_of_the_dtype(dtype, keys_dtype, name):
    """float64 truth from the rounded inputs; allowed is what the same formula makes in that dtype."""
    anchors, anchor_labels, keys, key_labels = case(name, 33, 1500, 64)
    anchors, keys = anchors.to(dtype).requires_grad_(), keys.to(keys_dtype)
    loss = pico_fast.contrast(anchors, anchor_labels, keys, key_labels, 0.1)
    is_double = torch.float64 in (dtype, keys_dtype)
    assert loss.dtype == (torch.float64 if is_double else torch.float32)
    (grad,) = torch.autograd.grad(loss, anchors)
    assert grad.dtype == dtype
    exact = anchors.detach().double().requires_grad_()
    rows = truth(exact, anchor_labels, keys, key_labels, 0.1)
    labels = set(key_labels.tolist())
    counted = sum(label >= 0 and label in labels for label in anchor_labels.tolist())
    expected = rows.sum() / counted
    (want,) = torch.autograd.grad(expected, exact)
    coarse = max(torch.finfo(dtype).eps, torch.finfo(keys_dtype).eps if not is_double else 0)
    assert abs(loss.item() - expected.item()) <= max(1e-5, coarse) * expected.item()
    error = (grad.double() - want).norm() / want.norm()
    assert error <= max(1e-5, 2 * coarse)
    assert torch.cosine_similarity(grad.double().flatten(), want.flatten(), dim=0) > 1 - 1e-4


@pytest.mark.parametrize("norm", (1e-4, 1.0, 1e2, 1e4))
@pytest.mark.parametrize("temperature", (0.005, 0.07, 5.0))
def test_rows_of_any_length_stay_finite_and_exact(norm, temperature):
    anchors, anchor_labels, keys, key_labels = case("random")
    anchors = (anchors * norm).requires_grad_()
    loss = pico_fast.contrast(anchors, anchor_labels, keys, key_labels, temperature, reduction="none")
    exact = (anchors.detach().double(), anchor_labels, keys.double(), key_labels)
    expected, _ = reference.contrast(*exact, temperature, EVERYTHING)
    close(loss, expected, 1e-5)
    loss.sum().backward()
    assert anchors.grad.isfinite().all()


def test_all_negatives_far_below_any_shift():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    # anchor 0: positive at 1, its only negative at -1, tau 0.005: softplus(-400) = 0
    loss = pico_fast.contrast(
        anchors, torch.tensor([0, 5]), keys, torch.tensor([0, 1, -1, -1]), 0.005, reduction="none"
    )
    assert loss.tolist() == [0.0, 0.0]
    # the other way round: softplus(400) = 400
    loss = pico_fast.contrast(
        anchors, torch.tensor([1, 5]), keys, torch.tensor([0, 1, -1, -1]), 0.005, reduction="none"
    )
    assert loss.tolist() == [400.0, 0.0]


def test_empty_slots_may_hold_nan():
    anchors, anchor_labels, keys, key_labels = case("sorted bank")
    anchors[anchor_labels < 0] = math.nan
    keys[key_labels < 0] = math.inf
    for in_batch in (False, True):
        rest = (None, None) if in_batch else (keys, key_labels)
        for sampling in SAMPLINGS:
            for impl in (None, "reference"):
                leaf = anchors.clone().requires_grad_()
                loss = pico_fast.contrast(
                    leaf, anchor_labels, *rest, sampling=sampling, num_negatives=9, impl=impl
                )
                loss.backward()
                assert loss.isfinite()
                assert leaf.grad[anchor_labels >= 0].isfinite().all()
                if impl is None:
                    assert (leaf.grad[anchor_labels < 0] == 0).all()


def test_reductions_count_anchors_with_a_positive():
    anchors, anchor_labels, keys, key_labels = case("random")
    anchor_labels[3] = 77
    pairs = (anchors, anchor_labels, keys, key_labels)
    rows = pico_fast.contrast(*pairs, reduction="none")
    counted = (anchor_labels >= 0) & (anchor_labels != 77)
    assert rows.shape == anchor_labels.shape
    assert (rows[~counted] == 0).all()
    torch.testing.assert_close(pico_fast.contrast(*pairs, reduction="sum"), rows.sum())
    torch.testing.assert_close(pico_fast.contrast(*pairs), rows.sum() / counted.sum())


LAYOUTS = ("labels", "bank", "in batch")


def rows_of(layout, pairs, settings, seed=3):
    """Loss [A] and which of them count [A], of keys with labels, of a bank, or in batch."""
    anchors, anchor_labels, keys, key_labels = pairs
    share = None
    if layout == "in batch":
        keys = key_labels = None
    if layout == "bank":
        # 5 classes x (40 + 26) slots, of which some are in use and the others hold anything
        first, used = torch.arange(5) * 66, torch.tensor([40, 0, 31, 7, 40])
        ranges = torch.stack([first, used, first + 40, used * 5 // 8], 1).view(5, 2, 2)
        empty = class_of_positions(ranges, 330) < 0
        share = Share(keys[:330].masked_fill(empty[:, None], math.nan), ranges, ranges, 66, 0, None)
        keys = key_labels = None
    labels = (anchor_labels, keys, key_labels)
    return contrast_rows(anchors, *labels, share, settings, torch.tensor(seed))[:2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positives", (None, *POSITIVES))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_everything_equals_the_reference(sampling, positives, layout):
    """Losses and gradients, of the keys too, for every choice of keys, with mixes and without."""
    selection = check_selection(sampling, positives, 6, 11, 0.3)
    case_ = [x.double() if x.is_floating_point() else x for x in case("clustered", 19)]
    for synthesis in (None, pico_fast.Synthesis(7, 5, 20)):
        found = []
        for is_reference in (False, True):
            leaf, key_leaf = (case_[i].clone().requires_grad_() for i in (0, 2))
            pairs = (leaf, case_[1], key_leaf, case_[3])
            of = Settings(selection, 0.1, synthesis, is_reference)
            loss, counted = rows_of(layout, pairs, of)
            weights = torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
            (loss * weights).sum().backward()
            found.append((loss.detach(), counted, leaf.grad, key_leaf.grad))
        (loss, counted, *grads), (expected, counts, *wanted) = found
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(counted, counts)
        if layout == "bank":  # which carries no gradient
            grads, wanted = grads[:1], wanted[:1]
        for got, want in zip(grads, wanted, strict=True):
            if want is None:
                assert got is None
            else:
                assert (got - want).norm() <= 1e-9 * want.norm()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize("key_dtype", (torch.float32, torch.bfloat16))
def test_reductions_and_dtypes_equal_the_reference(sampling, in_batch, key_dtype):
    anchors, anchor_labels, keys, key_labels = case("clustered")
    rest = (None, None) if in_batch else (keys.to(key_dtype), key_labels)
    tolerance = 1e-2 if key_dtype == torch.bfloat16 and not in_batch else 2e-6
    options = {"num_positives": 6, "num_negatives": 11, "hard_fraction": 0.3, "seed": 3}
    for reduction in ("mean", "sum", "none"):
        found = []
        for impl in (None, "reference"):
            leaf = anchors.clone().requires_grad_()
            loss = pico_fast.contrast(
                leaf,
                anchor_labels,
                *rest,
                sampling=sampling,
                **options,
                reduction=reduction,
                impl=impl,
            )
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            found.append((loss.detach(), grad))
        for got, want in zip(*found, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize(
    ("sampling", "positives"),
    [*((name, None) for name in SAMPLINGS), ("bounded", "semi_hard"), ("hardest", "random")],
)
def test_the_gradient_is_the_derivative_in_float64(sampling, positives, in_batch):
    anchors, anchor_labels, keys, key_labels = case("random", 7, 20, 3, 3)

    def loss(anchors, keys):
        return pico_fast.contrast(
            anchors,
            anchor_labels,
            *((None, None) if in_batch else (keys, key_labels)),
            temperature=0.3,
            sampling=sampling,
            positives=positives,
            num_positives=4,
            num_negatives=8,
            hard_fraction=0.5,
            reduction="sum",
        )

    leaves = (anchors.double().requires_grad_(), keys.double().requires_grad_(not in_batch))
    assert loss(*leaves) > 0
    assert torch.autograd.gradcheck(loss, leaves)


def test_the_same_call_gives_the_same_bits():
    anchors, anchor_labels, keys, key_labels = case("clustered", 100, 5000, 64)
    for sampling in SAMPLINGS:
        runs = []
        for _ in range(2):
            leaf = anchors.clone().requires_grad_()
            loss = pico_fast.contrast(
                leaf, anchor_labels, keys.bfloat16(), key_labels, sampling=sampling, seed=5
            )
            loss.backward()
            runs.append((loss.detach(), leaf.grad))
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])


def test_the_bank_may_be_written_before_the_backward():
    anchors, anchor_labels, keys, key_labels = case("random")
    for sampling in SAMPLINGS:
        grads = []
        for overwrite in (False, True):
            leaf, bank = anchors.clone().requires_grad_(), keys.clone()
            loss = pico_fast.contrast(leaf, anchor_labels, bank, key_labels, sampling=sampling)
            if overwrite:
                bank.fill_(math.nan)
            loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("impl", (None, "reference"))
@pytest.mark.parametrize("sampling", [s for s in SAMPLINGS if s != "bounded"])
def test_float64_is_exact_where_a_positive_is_far_below_the_negatives(impl, sampling):
    """softplus(x) is not x at x = 20 to 36: torch's default takes it for that, which is 2e-9 too little."""
    x = torch.tensor([21.0, 25.0, 30.0], dtype=torch.float64)
    # one channel: the positive at 0, the negative at x
    anchors = torch.ones(1, 1, dtype=torch.float64).requires_grad_()
    for value in x:
        keys = torch.stack([value * 0, value])[:, None]
        labels = torch.tensor([0, 1])
        loss = pico_fast.contrast(anchors, labels[:1], keys, labels, 1.0, sampling, impl=impl)
        (grad,) = torch.autograd.grad(loss, anchors)
        excess = torch.log1p(torch.exp(-value))
        torch.testing.assert_close(loss.detach() - value, excess, rtol=1e-4, atol=1e-14)
        expected = value * torch.sigmoid(value)
        torch.testing.assert_close(grad[0, 0], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_weights_of_selected_negatives_add_up_to_one(sampling):
    """At similarities of 1e8 float32 rounds Z by whole numbers; weights made of it would not."""
    anchors = torch.full((3, 257), 1e4 / 257**0.5, requires_grad=True)
    keys, labels = anchors.detach().repeat(20, 1), torch.arange(60) % 4
    loss = pico_fast.contrast(anchors, labels[:3], keys, labels, 1.0, sampling, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), anchors)
    assert (grad.norm(dim=1) <= 2.001e4).all()  # of q mean - pull, each as long as a key at most
