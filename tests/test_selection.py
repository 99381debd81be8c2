"""`select_keys`, samples and cuts: exact where they are exact, the same as the reference, uniform.

Products of sixteenths are exact on every processor, and so are their sums: whatever makes them,
hundreds are equal, and picks are compared index by index. Of any rows a pick may be off by rounding.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import reference
from pico_fast.selection import eager
from pico_fast.selection import layout as layouts
from pico_fast.selection import ops as choosing
from pico_fast.selection.layout import Cut
from pico_fast.selection.options import POSITIVES, SAMPLINGS, check_selection
from pico_fast.selection.sample import draw_sample


def clustered(n_anchors=23, n_keys=700, dim=16, classes=6, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes + 1, dim, generator=g)
    anchor_labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    key_labels = torch.randint(-1, classes, (n_keys,), generator=g)
    anchors = normalize(torch.randn(n_anchors, dim, generator=g) + centres[anchor_labels], dim=1)
    keys = normalize(torch.randn(n_keys, dim, generator=g) + centres[key_labels], dim=1)
    return anchors.to(dtype), anchor_labels, keys.to(dtype), key_labels


def sixteenths(rows):
    return (rows * 16).round() / 16


def candidates(pairs, i, positive):
    """Keys that anchor i may be compared with on one side: ascending indices."""
    _, anchor_labels, keys, key_labels = pairs
    label = anchor_labels[i]
    labels = anchor_labels if keys is None else key_labels
    same = labels == label
    mask = (labels >= 0) & (label >= 0) & (same if positive else ~same)
    if keys is None:
        mask[i] = False
    return mask.nonzero()[:, 0]


def sides(found):
    return (
        (True, found.positive_index, found.positive_similarity),
        (False, found.negative_index, found.negative_similarity),
    )


BANKS = (
    "clustered",
    "duplicated",
    "one similarity",
    "class periodic",
    "in batch",
    "float64",
    "nearly all of one class",
    "one class alone",
    "few keys",
    "none",
    "nan",
)


def bank(name):
    """Anchors, labels, keys, labels."""
    few = {"few keys": 5, "none": 0}.get(name, 700)
    pairs = clustered(n_keys=few, dtype=torch.float64 if name == "float64" else torch.float32)
    anchors, anchor_labels, keys, key_labels = pairs
    if name == "duplicated":
        keys = keys[torch.arange(len(keys)) % 7]
    if name == "one similarity":
        keys = torch.ones_like(keys) / math.sqrt(keys.shape[1])
    if name == "class periodic":
        key_labels = torch.arange(len(keys)) % 6
        keys = keys[key_labels]
    if name == "nearly all of one class":
        key_labels = torch.where(torch.arange(len(keys)) % 50 > 0, 2, key_labels)
    if name == "one class alone":
        anchor_labels, key_labels = anchor_labels.clamp(max=0), key_labels.clamp(0, 0)
    if name == "nan":
        anchors = anchors.index_fill(0, torch.tensor([4, 9]), math.nan)
    if name in ("in batch", "nan"):
        anchors, anchor_labels = (
            torch.cat([anchors, keys[:150]]),
            torch.cat([anchor_labels, key_labels[:150]]),
        )
        keys = key_labels = None
    return anchors, anchor_labels, keys, key_labels


def exact_bank(name):
    """The same, of exact products."""
    anchors, anchor_labels, keys, key_labels = bank(name)
    return (
        sixteenths(anchors),
        anchor_labels,
        keys if keys is None else sixteenths(keys),
        key_labels,
    )


@pytest.mark.parametrize("name", [name for name in BANKS if name != "nan"])
@pytest.mark.parametrize("counts", ((1, 1), (5, 40), (1000, 8192)))
def test_hardest_equals_brute_force(name, counts):
    pairs = bank(name)
    anchors, _, keys, _ = pairs
    keys = anchors if keys is None else keys
    num_positives, num_negatives = counts
    found = pico_fast.select_keys(*pairs, num_positives=num_positives, num_negatives=num_negatives)
    exact = anchors.double() @ keys.double().T
    for positive, index, similarity in sides(found):
        count = counts[0] if positive else counts[1]
        assert index.shape == similarity.shape == (len(anchors), count)
        assert index.dtype == torch.int64 and similarity.dtype == torch.float32
        for i in range(len(anchors)):
            allowed = candidates(pairs, i, positive)
            n = min(count, len(allowed))
            chosen = index[i, :n]
            assert (index[i, n:] == -1).all() and (similarity[i, n:] == 0).all()
            assert len(set(chosen.tolist())) == n and set(chosen.tolist()) <= set(allowed.tolist())
            torch.testing.assert_close(similarity[i, :n].double(), exact[i, chosen], rtol=0, atol=3e-7)
            sign = -1 if positive else 1
            hardness = sign * similarity[i, :n]
            assert (hardness[:-1] >= hardness[1:]).all()
            if keys.dtype == torch.float32:
                equal = hardness[:-1] == hardness[1:]
                assert (chosen[:-1][equal] < chosen[1:][equal]).all()
            # nothing left out is harder than the last one taken, but for rounding
            left = torch.tensor(sorted(set(allowed.tolist()) - set(chosen.tolist())))
            if n and len(left):
                assert (sign * exact[i, left]).max() <= hardness[-1].double() + 3e-7


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_picks_are_those_of_the_reference(name, sampling):
    """Index by index, equal similarities by place in the sample, where all products are exact."""
    pairs = exact_bank(name)
    for positives, fraction in zip((None, *POSITIVES), (0.3, 0.05, 0.5, 1.0, 0.2), strict=True):
        options = {"num_positives": 4, "num_negatives": 21, "hard_fraction": fraction}
        options |= {"sampling": sampling, "positives": positives, "seed": 11}
        found, wanted = (pico_fast.select_keys(*pairs, **options, impl=i) for i in (None, "reference"))
        for got, want in zip(found, wanted, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("own", (True, False))
@pytest.mark.parametrize("name", ("labels", "huge labels", "bank", "in batch", "one class", "none"))
def test_samples_are_those_of_the_reference(name, own):
    """Bit for bit in C++ and in PyTorch: which keys, in which places, whatever describes the layout."""
    anchors, anchor_labels, keys, key_labels = clustered(n_keys=0 if name == "none" else 700)
    slots = None
    if name == "huge labels":
        names = torch.tensor([2**62, 2**40, 3, 2**32 + 3, 2**31, 0, -1])
        anchor_labels, key_labels = names[anchor_labels], names[key_labels]
    if name == "one class":
        key_labels = torch.where(key_labels < 0, -1, 4)
    if name == "in batch":
        anchors, anchor_labels, keys, key_labels = keys, key_labels, None, None
    if name == "bank":
        slots = 100
        ranges = torch.tensor([[[0, 60], [70, 20]], [[100, 0], [170, 7]], [[200, 70], [270, 30]]])
        key_labels = eager.class_of_positions(ranges, 300)
        work = layouts.of_bank(anchors, anchor_labels.clamp(max=2), keys[:300], ranges)
    else:
        work = layouts.of_labels(anchors, anchor_labels, keys, key_labels)
    labels = anchor_labels if keys is None else key_labels
    for need in (1, 7, 50, 300, 10**6):
        selection = check_selection("random", None, need, need, 1.0)
        for seed in (0, 5, -(2**62)):
            expected = reference.sample_keys(labels, need, own, seed)
            found = draw_sample(work, selection, own, torch.tensor(seed), slots)
            n, width = len(expected), len(found.key_order)
            assert torch.equal(found.key_order[:n], expected)
            assert (found.key_order[n:] == -1).all() and found.sizes.sum() == n
            assert len(expected.unique()) == n
            of = eager.class_of_positions(found.ranges, width)[:n]
            assert torch.equal(work.names[of], labels[expected])
            asked = (min(need, 1000), own, torch.tensor(seed), width)
            asked = (work.ranges, work.names, work.key_order, *asked)
            both = [op(*asked) for op in (choosing.sample_keys, eager.sample_keys)]
            for mine, theirs in zip(*both, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("own", (True, False))
def test_an_anchor_is_offered_what_its_sample_holds(own):
    for pairs in (clustered(), (*clustered(200)[:2], None, None)):
        work = layouts.of_labels(*pairs)
        for need in (1, 20, 10**6):
            selection = check_selection("random", None, need, need, 1.0)
            sample = draw_sample(work, selection, own, torch.tensor(3), None)
            labels = pairs[1] if pairs[3] is None else pairs[3]
            drawn = reference.sample_keys(labels, need, own, 3)
            for found, i in zip(sample.available(own), work.order.tolist(), strict=True):
                allowed = set(candidates(pairs, i, own).tolist())
                assert found == len(allowed & set(drawn.tolist()))


def test_semi_hard_draws_uniformly_from_the_hardest_pool():
    """Up to the sample's own quantile: 0.9 % of 2048 picks lie beyond that of all keys."""
    classes, slots = 40, 4000
    keys = normalize(torch.randn(classes * slots, 8), dim=1)
    first = torch.arange(classes) * slots
    ranges = torch.stack([first, first * 0 + slots], 1).unsqueeze(1)
    anchors = normalize(torch.randn(2, 8), dim=1)
    work = layouts.of_bank(anchors, torch.tensor([0, 7]), keys, ranges)
    exact = anchors @ keys.T
    selection = check_selection("semi_hard", None, 1024, 2048, 0.1)
    beyond, distances = [], []
    for seed in range(6):
        sample = draw_sample(work, selection, False, torch.tensor(seed), slots)
        assert (Cut(None, 2048, 0.1).wanted(sample.available(False)) == 2048).all()
        index, *_ = choosing.hardest(sample, False, None, 2048, True)
        for i, c in enumerate((0, 7)):
            assert len(index[i].unique()) == 2048
            others = exact[i][eager.class_of_positions(ranges, len(keys)) != c].sort(descending=True)[0]
            pool = math.ceil(0.1 * len(others))
            rank = torch.searchsorted(-others, -exact[i, index[i]]).sort()[0]
            beyond.append(float((rank >= pool).double().mean()))
            within = rank[rank < pool]
            steps = (torch.arange(len(within)) + 1) / len(within)
            distances.append(float((steps - (within + 1) / pool).abs().max()))
    assert sum(beyond) / len(beyond) < 0.016 and max(beyond) < 0.06
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) once in a hundred, and the quantile moves by some percents
    assert sum(distances) / len(distances) < 0.03 and max(distances) < 0.075


def test_semi_hard_is_the_hard_pool_where_the_sample_is_everything():
    pairs = exact_bank("clustered")
    options = {"num_positives": 200, "num_negatives": 600, "hard_fraction": 0.3}
    found = pico_fast.select_keys(*pairs, "semi_hard", **options, seed=3)
    whole = pico_fast.select_keys(*pairs, "hardest", **options)
    for (positive, index, similarity), (_, _, hardest) in zip(sides(found), sides(whole), strict=True):
        for i in range(len(index)):
            n = math.ceil(0.3 * len(candidates(pairs, i, positive)))
            assert (index[i] >= 0).sum() == n
            assert torch.equal(similarity[i, :n], hardest[i, :n])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_another_seed_is_another_draw_and_the_same_seed_the_same(sampling):
    options = {"num_positives": 3, "num_negatives": 8, "hard_fraction": 0.5, "sampling": sampling}
    first, again, other = (
        pico_fast.select_keys(*clustered(), **options, seed=s) for s in (1, torch.tensor(1), 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = sampling not in ("all", "hardest")
    assert torch.equal(first.negative_index, other.negative_index) != drawn


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", ("clustered", "duplicated", "one similarity", "in batch"))
def test_contrast_uses_what_select_keys_selects(sampling, name):
    """Hundreds of equal similarities among them: which of these count shows in the gradient."""
    anchors, anchor_labels, keys, key_labels = exact_bank(name)
    for positives in (None, "semi_hard"):
        options = {"sampling": sampling, "positives": positives, "seed": 9}
        options |= {"num_positives": 4, "num_negatives": 30, "hard_fraction": 0.2}
        found = pico_fast.select_keys(anchors, anchor_labels, keys, key_labels, **options)
        leaf = anchors.clone().requires_grad_()
        rows = pico_fast.contrast(leaf, anchor_labels, keys, key_labels, 0.1, **options, reduction="none")
        exact = anchors.double().requires_grad_()
        columns = exact if keys is None else keys.double()
        expected = []
        for i in range(len(anchors)):
            p, n = (
                columns[index[i][index[i] >= 0]] @ exact[i] / 0.1
                for index in (found.positive_index, found.negative_index)
            )
            nothing = not len(p) or not len(n)
            expected.append(
                exact[i].sum() * 0 if nothing else torch.log1p(torch.exp(n.logsumexp(0) - p)).mean()
            )
        expected = torch.stack(expected)
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-7)
        rows.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", (2, 20))
@pytest.mark.parametrize("name", ("clustered", "duplicated", "one similarity", "float64"))
def test_empty_slots_between_the_keys_change_nothing(name, step):
    anchors, anchor_labels, keys, key_labels = exact_bank(name)
    key_labels = key_labels.clamp(min=0)
    sparse = keys.new_full((len(keys) * step, keys.shape[1]), math.nan)
    labels = torch.full((len(sparse),), -3)
    sparse[step - 1 :: step], labels[step - 1 :: step] = keys, key_labels
    options = {"num_positives": 4, "num_negatives": 50, "hard_fraction": 0.3, "seed": 5}
    for sampling in SAMPLINGS:
        found, dense = (
            pico_fast.select_keys(anchors, anchor_labels, *rest, sampling, **options)
            for rest in ((sparse, labels), (keys, key_labels))
        )
        for (_, index, similarity), (_, wanted, products) in zip(sides(found), sides(dense), strict=True):
            width = wanted.shape[1]  # "all" has a column for each key
            expected = torch.where(wanted < 0, -1, wanted * step + step - 1)
            assert torch.equal(index[:, :width], expected) and (index[:, width:] == -1).all()
            assert torch.equal(similarity[:, :width], products)
    labels[:] = -1
    for sampling in SAMPLINGS:
        found = pico_fast.select_keys(anchors, anchor_labels, sparse, labels, sampling, **options)
        assert all((index == -1).all() for index in found[:2])
        assert all((similarity == 0).all() for similarity in found[2:])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_labels_up_to_2_to_the_62(sampling):
    anchors, anchor_labels, keys, key_labels = exact_bank("clustered")
    # in the order of the small ones, and of the same lower 32 bits: their draws are the same
    names = torch.tensor([0, 2**32 + 1, 2**33 + 2, 2**61 + 3, 2**61 + 2**40 + 4, 2**62 + 5, -(2**62)])
    options = {"num_positives": 4, "num_negatives": 21, "hard_fraction": 0.3, "seed": 4}
    for synthesis in (None, pico_fast.Synthesis(3, 2, 6)):
        found = pico_fast.contrast(
            anchors, names[anchor_labels], keys, names[key_labels], sampling=sampling,
            synthesis=synthesis, **options,
        )  # fmt: skip
        expected = pico_fast.contrast(
            anchors,
            anchor_labels,
            keys,
            key_labels,
            sampling=sampling,
            synthesis=synthesis,
            **options,
        )
        assert torch.equal(found, expected)
