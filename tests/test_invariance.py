"""What must not matter to `contrast`: the order of things, who holds which key, how the space is turned."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

import pico_fast
from pico_fast.selection import layout as layouts
from pico_fast.selection import options
from pico_fast.selection.layout import Cut

# every key takes part: there is no draw that the order or the names of things could move
SAMPLINGS = st.sampled_from(("all", "hardest"))
COUNTS = {"num_positives": 5, "num_negatives": 9}


@st.composite
def scenes(draw, dtype=torch.float64):
    """Anchors, labels, keys, labels and a temperature; some slots of both are empty."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, k = draw(st.integers(1, 9)), draw(st.integers(0, 40))
    dim, classes = draw(st.sampled_from((1, 3, 16, 33))), draw(st.integers(1, 5))
    spread = draw(st.sampled_from((1.0, 0.05)))  # clustered: all near one direction
    centre = torch.randn(dim, generator=g, dtype=dtype)
    rows = centre + spread * torch.randn(n + k, dim, generator=g, dtype=dtype)
    if draw(st.booleans()):
        rows = normalize(rows, dim=1)
    labels = torch.randint(-1, classes, (n + k,), generator=g)
    temperature = draw(st.sampled_from((0.05, 0.1, 1.0, 5.0)))
    return rows[:n], labels[:n], rows[n:], labels[n:], temperature


def each(anchors, anchor_labels, keys, key_labels, temperature, sampling):
    """Loss [A] and its gradient [A, D]."""
    anchors = anchors.clone().requires_grad_()
    pairs = (anchors, anchor_labels, keys, key_labels)
    loss = pico_fast.contrast(*pairs, temperature, sampling, reduction="none", **COUNTS)
    (grad,) = torch.autograd.grad(loss.sum(), anchors)
    return loss.detach(), grad


def same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@given(scenes(), SAMPLINGS)
def test_the_order_of_keys_and_anchors(figures, scene, sampling):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    loss, grad = each(*scene, sampling)
    by, of = torch.randperm(len(keys)), torch.randperm(len(anchors))
    moved = (anchors[of], anchor_labels[of], keys[by], key_labels[by], temperature)
    same(each(*moved, sampling), (loss[of], grad[of]))
    figures.add("invariance", "scenes")


@given(scenes(), SAMPLINGS)
def test_the_names_of_classes(figures, scene, sampling):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    names = torch.cat([torch.randperm(50)[:5], torch.tensor([-7])])  # -1 takes the last
    renamed = (anchors, names[anchor_labels], keys, names[key_labels], temperature)
    same(each(*renamed, sampling), each(*scene, sampling))
    figures.add("invariance", "scenes")


@given(scenes(), SAMPLINGS)
def test_rotating_everything_rotates_the_gradient(figures, scene, sampling):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    turn, _ = torch.linalg.qr(torch.randn(anchors.shape[1], anchors.shape[1]).double())
    loss, grad = each(*scene, sampling)
    turned = (anchors @ turn, anchor_labels, keys @ turn, key_labels, temperature)
    same(each(*turned, sampling), (loss, grad @ turn))
    figures.add("invariance", "scenes")


@given(scenes(), st.sampled_from(options.SAMPLINGS))
def test_empty_slots_may_hold_anything(figures, scene, sampling):
    """Wherever they stand: a draw counts the keys of a class."""
    anchors, anchor_labels, keys, key_labels, temperature = scene
    n = len(keys)
    places = torch.randperm(n + 17)[:n].sort()[0]
    filler = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(0, 3, (n + 17,))].double()
    more = filler[:, None].repeat(1, keys.shape[1]).index_copy_(0, places, keys)
    labels = torch.full((n + 17,), -1).index_copy_(0, places, key_labels)
    same(each(anchors, anchor_labels, more, labels, temperature, sampling), each(*scene, sampling))
    figures.add("invariance", "scenes")


@given(scenes())
def test_keys_twice_are_the_same_positives_and_twice_the_negatives(figures, scene):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    twice = (anchors, anchor_labels, keys.repeat(2, 1), key_labels.repeat(2), temperature)
    found, _ = each(*twice, "all")
    similarity = anchors @ keys.T / temperature
    used = (anchor_labels[:, None] >= 0) & (key_labels >= 0)
    own = anchor_labels[:, None] == key_labels
    for i in range(len(anchors)):
        negatives, positives = similarity[i, used[i] & ~own[i]], similarity[i, used[i] & own[i]]
        expected = torch.zeros((), dtype=torch.float64)
        if len(negatives) and len(positives):
            z = negatives.logsumexp(0) + math.log(2)
            expected = torch.nn.functional.softplus(z - positives, threshold=40.0).mean()
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)
    figures.add("invariance", "scenes")


@given(scenes(), st.integers(1, 4))
def test_parts_of_the_keys_add_up(figures, scene, n_parts):
    """Sums over parts of a bank, of any cut, and the formula over all of it."""
    anchors, anchor_labels, keys, key_labels, temperature = scene
    ops, nobody, parts = torch.ops.pico_fast, Cut(), []
    for index in torch.arange(len(keys)).chunk(n_parts) if len(keys) else ():
        label, order = key_labels[index].sort(stable=True)
        length = torch.stack([(label == c).sum() for c in range(5)])
        first = (label < 0).sum() + length.cumsum(0) - length
        ranges = torch.stack([first, length], 1)[:, None]
        parts.append(layouts.of_bank(anchors, anchor_labels, keys[index][order], ranges))
    lse = [anchors.new_full((len(anchors),), -math.inf)]
    lse += [ops.negatives(*p.tensors, *nobody, temperature, False)[0] for p in parts]
    z = torch.stack(lse).logsumexp(0)
    total = torch.zeros_like(z)
    for part in parts:
        total += ops.positives(*part.tensors, *nobody, z, temperature, False)[0]
    n = ((anchor_labels[:, None] == key_labels) & (key_labels >= 0)).sum(1)
    expected, _ = each(*scene, "all")
    found = torch.where(z > -math.inf, total, 0.0)
    found = parts[0].restore(found) / n.clamp(min=1) if parts else found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    figures.add("invariance", "scenes")


@given(scenes(), SAMPLINGS)
def test_another_negative_never_lowers_the_loss(figures, scene, sampling):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    loss, _ = each(*scene, sampling)
    more = (torch.cat([keys, keys[:1]]), torch.cat([key_labels, torch.tensor([77])]))
    if len(keys):
        after, _ = each(anchors, anchor_labels, *more, temperature, sampling)
        assert (after >= loss - 1e-12 * loss.abs()).all()
    figures.add("invariance", "scenes")


@given(scenes(), SAMPLINGS)
def test_finite_differences(figures, scene, sampling):
    anchors, anchor_labels, keys, key_labels, temperature = scene
    _, grad = each(*scene, sampling)
    step = torch.randn_like(anchors)
    step = 1e-6 * step / step.norm()
    ahead, behind = (
        each(anchors + sign * step, anchor_labels, keys, key_labels, temperature, sampling)[0].sum()
        for sign in (1, -1)
    )
    expected = (grad * step).sum()
    bound = 1e-5 * grad.norm() * step.norm() + 1e-12 * (1 + ahead.abs())
    assert ((ahead - behind) / 2 - expected).abs() <= bound
    figures.add("invariance", "scenes")


@pytest.mark.parametrize("sampling", options.SAMPLINGS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_an_anchor_that_is_not_finite_leaves_the_others_alone(sampling, value):
    torch.manual_seed(0)
    keys, key_labels = normalize(torch.randn(60, 16), dim=1), torch.arange(60) % 4
    anchors, labels = normalize(torch.randn(12, 16), dim=1), torch.arange(12) % 4
    spoiled = anchors.clone()
    spoiled[5, 3] = value
    found, expected = (each(x, labels, keys, key_labels, 0.1, sampling) for x in (spoiled, anchors))
    others = torch.arange(12) != 5
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[others], theirs[others], rtol=1e-5, atol=1e-6)
