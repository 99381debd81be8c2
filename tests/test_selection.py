"""`select_keys`: exact where it is exact, uniform where it draws, the same as the reference."""

import math

import numpy
import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import picked, reference, selection


def clustered(n_anchors=23, n_keys=700, dim=16, classes=6, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes + 1, dim, generator=g)
    anchor_labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    key_labels = torch.randint(-1, classes, (n_keys,), generator=g)
    anchors = normalize(torch.randn(n_anchors, dim, generator=g) + centres[anchor_labels], dim=1)
    keys = normalize(torch.randn(n_keys, dim, generator=g) + centres[key_labels], dim=1)
    return anchors.to(dtype), anchor_labels, keys.to(dtype), key_labels


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


BANKS = ("clustered", "duplicated", "one similarity", "class periodic", "in batch", "float64")


def bank(name):
    pairs = clustered(dtype=torch.float64 if name == "float64" else torch.float32)
    anchors, anchor_labels, keys, key_labels = pairs
    if name == "duplicated":
        keys = keys[torch.arange(len(keys)) % 7]
    if name == "one similarity":
        keys = torch.ones_like(keys) / math.sqrt(keys.shape[1])
    if name == "class periodic":
        key_labels = torch.arange(len(keys)) % 6
        keys = keys[key_labels]
    if name == "in batch":
        anchors, anchor_labels = keys[:300], key_labels[:300]
        keys = key_labels = None
    return anchors, anchor_labels, keys, key_labels


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("counts", ((1, 1), (5, 40), (1000, 8192)))
def test_hardest_equals_brute_force(name, counts):
    pairs = bank(name)
    anchors, _, keys, _ = pairs
    keys = anchors if keys is None else keys
    found = pico_fast.select_keys(*pairs, "hardest", *counts)
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
            torch.testing.assert_close(
                similarity[i, :n].double(), exact[i, chosen], rtol=0, atol=3e-7
            )
            sign = -1 if positive else 1
            hardness = sign * similarity[i, :n]
            assert (hardness[:-1] >= hardness[1:]).all()
            equal = hardness[:-1] == hardness[1:]
            assert (chosen[:-1][equal] < chosen[1:][equal]).all()
            # nothing left out is harder than the last one taken, but for rounding
            left = torch.tensor(sorted(set(allowed.tolist()) - set(chosen.tolist())))
            if n and len(left):
                assert (sign * exact[i, left]).max() <= hardness[-1].double() + 3e-7


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("sampling", pico_fast.selection.SAMPLINGS)
@pytest.mark.parametrize("fraction", (0.05, 0.5, 1.0))
def test_picks_are_those_of_the_reference(name, sampling, fraction):
    pairs = bank(name)
    options = {"num_positives": 4, "num_negatives": 21, "hard_fraction": fraction, "seed": 11}
    found = pico_fast.select_keys(*pairs, sampling, **options)
    wanted = pico_fast.select_keys(*pairs, sampling, **options, impl="reference")
    for got, want in zip(found[:2], wanted[:2], strict=True):
        assert got.shape == want.shape
        # similarities are made by products of other shapes: neighbours within rounding may swap
        same = (got.sort(1)[0] == want.sort(1)[0]).double().mean()
        assert same == 1 or (name in ("clustered", "class periodic", "in batch") and same > 0.99)
    for got, want in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_semi_hard_draws_uniformly_from_the_hardest_pool():
    anchors, _, keys, key_labels = clustered(1, 3000, 8, 4, seed=3)
    key_labels = key_labels.clamp(min=0)
    pairs = (anchors, torch.tensor([0]), keys, key_labels)
    n = int((key_labels != 0).sum())
    pool = math.ceil(0.1 * n)
    allowed = candidates(pairs, 0, False)
    order = allowed[(keys[allowed] @ anchors[0]).argsort(descending=True)]
    rank_of = {int(key): rank for rank, key in enumerate(order)}
    ranks, runs, count = [], 400, 20
    for seed in range(runs):
        found = pico_fast.select_keys(*pairs, "semi_hard", 5, count, 0.1, seed=seed)
        picks = found.negative_index[0].tolist()
        assert len(set(picks)) == count
        ranks += [rank_of[key] for key in picks]
    ranks = numpy.array(ranks)
    assert ranks.max() < pool
    # Kolmogorov-Smirnov distance to the uniform distribution; 1.63/sqrt(n) is its 1 percent bound
    steps = (numpy.arange(len(ranks)) + 1) / len(ranks)
    distance = numpy.abs(steps - (numpy.sort(ranks) + 1) / pool).max()
    assert distance < 1.63 / math.sqrt(len(ranks))
    # each key of the pool equally often: chi-squared within 5 standard deviations
    hits = numpy.bincount(ranks, minlength=pool)
    expected = runs * count / pool
    statistic = ((hits - expected) ** 2 / expected).sum()
    assert abs(statistic - pool) < 5 * math.sqrt(2 * pool)


@pytest.mark.parametrize("in_batch", (False, True))
def test_random_draws_every_candidate_equally_often(in_batch):
    g = torch.Generator().manual_seed(1)
    keys = normalize(torch.randn(61, 8, generator=g), dim=1)
    key_labels = torch.randint(-1, 3, (61,), generator=g)
    pairs = (keys, key_labels, None, None)
    if not in_batch:
        pairs = (keys[:1], torch.tensor([1]), keys, key_labels)
    row = int((key_labels == 1).nonzero()[0]) if in_batch else 0
    hits = {True: torch.zeros(61), False: torch.zeros(61)}
    runs = 1500
    for seed in range(runs):
        found = pico_fast.select_keys(*pairs, "random", 3, 5, seed=seed)
        for positive, index, _ in sides(found):
            assert len(set(index[row].tolist())) == index.shape[1]
            hits[positive][index[row]] += 1
    for positive, count in ((True, 3), (False, 5)):
        allowed = candidates(pairs, row, positive)
        assert hits[positive].sum() == hits[positive][allowed].sum() == runs * count
        expected = runs * count / len(allowed)
        # draws without replacement vary less than a multinomial: this bound is wide
        statistic = ((hits[positive][allowed] - expected) ** 2 / expected).sum()
        assert statistic < len(allowed) + 5 * math.sqrt(2 * len(allowed))


def test_the_walk_of_fixed_length_is_the_permutation(monkeypatch):
    """Where the device cannot be read the walk has a fixed length; it must end in the same place."""
    n = torch.tensor([1, 2, 3, 5, 17, 101, 170, 290, 331, 1000, 65537, 1_881_000])[:, None]
    rank = torch.arange(64).expand(len(n), -1)
    rank = torch.minimum(rank, n - 1)
    row = torch.arange(len(n))[:, None]
    expected = reference.permute(rank, n, 7, reference.NEGATIVE, row)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    whole = (rank, n, torch.tensor(7), reference.NEGATIVE, row)
    assert torch.equal(torch.ops.pico_fast.permute_ranks(*whole), expected)
    found = selection.permute_torch(
        rank, n.as_subclass(Elsewhere), torch.tensor(7), reference.NEGATIVE, row
    )
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert (expected < n).all()


def test_another_seed_is_another_draw_and_the_same_seed_the_same():
    pairs = clustered()
    for sampling in ("random", "semi_hard"):
        options = {"num_positives": 3, "num_negatives": 8, "hard_fraction": 0.5}
        first = pico_fast.select_keys(*pairs, sampling, **options, seed=1)
        again = pico_fast.select_keys(*pairs, sampling, **options, seed=torch.tensor(1))
        other = pico_fast.select_keys(*pairs, sampling, **options, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first.negative_index, other.negative_index)


def test_contrast_uses_what_select_keys_selects():
    anchors, anchor_labels, keys, key_labels = clustered()
    for sampling in ("random", "hardest", "semi_hard"):
        options = {"num_positives": 4, "num_negatives": 30, "hard_fraction": 0.2, "seed": 9}
        found = pico_fast.select_keys(anchors, anchor_labels, keys, key_labels, sampling, **options)
        rows = pico_fast.contrast(
            anchors, anchor_labels, keys, key_labels, 0.1, sampling, **options, reduction="none"
        )
        for i in range(len(anchors)):
            p = found.positive_similarity[i, found.positive_index[i] >= 0].double() / 0.1
            n = found.negative_similarity[i, found.negative_index[i] >= 0].double() / 0.1
            expected = torch.log1p(torch.exp(n.logsumexp(0) - p)).mean() if len(p) else p.sum()
            torch.testing.assert_close(rows[i].double(), expected, rtol=1e-5, atol=1e-7)


def test_no_matrix_of_anchors_and_keys_is_made(monkeypatch):
    """A block of similarities at a time: shrinking the block changes nothing but the block."""
    pairs = clustered(40, 3000)
    whole = {s: pico_fast.select_keys(*pairs, s, 7, 33) for s in selection.SAMPLINGS}
    largest = []
    original = selection._similarity
    monkeypatch.setattr(selection, "_BLOCK_ON_CPU", 3000 * 3)
    monkeypatch.setattr(
        selection,
        "_similarity",
        lambda rows, *keys: largest.append(len(rows) * len(keys[0])) or original(rows, *keys),
    )
    for sampling, want in whole.items():
        got = pico_fast.select_keys(*pairs, sampling, 7, 33)
        for a, b in zip(got[2:], want[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(largest) == 3000 * 3


@pytest.mark.parametrize("name", ("clustered", "duplicated", "one similarity", "float64"))
@pytest.mark.parametrize("step", (2, 20))
def test_empty_slots_between_the_keys_change_nothing(name, step, monkeypatch):
    """A CPU takes the used keys out of a bank with many empty slots: ties and draws stay as they are."""
    anchors, anchor_labels, keys, key_labels = bank(name)
    key_labels = key_labels.clamp(min=0)
    # so few bits that products are exact: whatever makes them, equal ones are equal
    anchors, keys = (anchors * 16).round() / 16, (keys * 16).round() / 16
    sparse = keys.new_full((len(keys) * step, keys.shape[1]), math.nan)
    labels = torch.full((len(sparse),), -3)
    sparse[step - 1 :: step], labels[step - 1 :: step] = keys, key_labels
    pairs = (anchors, anchor_labels, sparse, labels)
    options = {"num_positives": 4, "num_negatives": 50, "hard_fraction": 0.3, "seed": 5}
    for sampling in selection.SAMPLINGS:
        found = pico_fast.select_keys(*pairs, sampling, **options)
        wanted = pico_fast.select_keys(*pairs, sampling, **options, impl="reference")
        with monkeypatch.context() as patch:
            patch.setattr(selection, "_MOSTLY_USED", 0.0)
            with_empty_slots = pico_fast.select_keys(*pairs, sampling, **options)
        dense = pico_fast.select_keys(anchors, anchor_labels, keys, key_labels, sampling, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, with_empty_slots, strict=True))
        for got, want in zip(found, wanted, strict=True):
            # the reference has equal similarities of a random draw in the order (class, index)
            by_class = sampling == "random" and got.dtype == torch.int64
            assert torch.equal(got.sort(1)[0], want.sort(1)[0]) if by_class else got.equal(want)
        for side in range(2):
            if sampling in ("hardest", "random"):
                index = torch.where(dense[side] < 0, -1, dense[side] * step + step - 1)
                assert torch.equal(found[side], index)
    labels[:] = -1
    for sampling in selection.SAMPLINGS:
        found = pico_fast.select_keys(*pairs, sampling, **options)
        assert all((index == -1).all() for index in found[:2])
        assert all((similarity == 0).all() for similarity in found[2:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n_keys", (30, 9000))
@pytest.mark.parametrize("fraction", (0.0, 0.02, 0.4, 1.0))
@pytest.mark.parametrize("in_batch", (False, True))
def test_picks_of_the_op_are_those_of_its_formula(dtype, n_keys, fraction, in_batch):
    """The same similarities, rounded so that many are equal: the picks agree index by index."""
    similarity = (torch.randn(20, n_keys, dtype=dtype) * 50).round() / 50
    similarity[:, ::7] *= -0.0
    keys, seed = torch.randint(-2, 5, (n_keys,)), torch.tensor(2**40 + 7)
    for key_index in (None, torch.arange(n_keys) * 3):
        # in batch the rows are anchors 3 to 22, and those that are no keys are empty slots
        names = torch.arange(n_keys) if key_index is None else key_index
        rows = torch.full((3 * n_keys,), -1).index_put_((names,), keys)[3:23]
        rows = rows if in_batch else torch.randint(-1, 4, (20,))
        for positive, count in ((True, 9), (False, 40), (False, n_keys + 5)):
            asked = (positive, count, fraction, seed, 5, 3, in_batch, key_index)
            found = torch.ops.pico_fast.pick_keys(similarity, rows, keys, *asked)
            assert torch.equal(found, picked.pick_torch(similarity, rows, keys, *asked))


def test_draws_go_by_the_index_among_all_keys():
    similarity, labels = torch.zeros(1, 60), torch.ones(60, dtype=torch.int64)
    asked = (False, 6, 1.0, torch.tensor(3), 6, 0, False)
    whole_labels = torch.full((600,), -1)
    whole_labels[5::10] = 1
    whole = picked.pick_torch(torch.zeros(1, 600), labels[:1] * 0, whole_labels, *asked)
    for op in (torch.ops.pico_fast.pick_keys, picked.pick_torch):
        part = op(similarity, labels[:1] * 0, labels, *asked, torch.arange(5, 600, 10))
        assert torch.equal(part * 10 + 5, whole)
        assert not torch.equal(op(similarity, labels[:1] * 0, labels, *asked) * 10 + 5, whole)


def picks(n, k, n_keys):
    """Indices [n, k], all different in a row, some -1 anywhere in it, all in the last row."""
    index = torch.rand(n, n_keys).argsort(1)[:, :k]
    index[torch.rand(n, k) < 0.2] = -1
    index[-1] = -1
    return index


@pytest.mark.parametrize("row_dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("dim", (1, 19, 256))
def test_picked_rows_are_ranked_and_summed(dtype, row_dtype, dim, monkeypatch):
    row_dtype = torch.float64 if dtype == torch.float64 else row_dtype
    keys, rows = torch.randn(90, dim).to(dtype), torch.randn(12, dim, dtype=row_dtype)
    keys[40:80] = keys[:40]  # ties
    index, weight = picks(12, 30, 90), torch.randn(12, 30, dtype=row_dtype)
    exact = rows.double() @ keys.double().T
    tolerance = 1e-11 if row_dtype == torch.float64 else 2e-6 * dim**0.5
    monkeypatch.setattr(picked, "_BLOCK", 4 * 30 * dim)
    for positive in (True, False):
        for op in (picked.rank_keys, picked.rank_torch):
            order, products = op(rows, keys, index, positive)
            assert torch.equal(order.sort(1)[0], index.sort(1)[0])
            assert products.dtype == row_dtype
            want = exact.gather(1, order.clamp(min=0)).masked_fill(order < 0, 0.0)
            torch.testing.assert_close(products.double(), want, rtol=0, atol=tolerance)
            there = order >= 0
            assert (there[:, :-1] >= there[:, 1:]).all() and (products[~there] == 0).all()
            hardness = (-products if positive else products).masked_fill(~there, -math.inf)
            assert (hardness[:, :-1] >= hardness[:, 1:]).all()
            equal = (hardness[:, :-1] == hardness[:, 1:]) & there[:, 1:]
            assert (order[:, :-1][equal] < order[:, 1:][equal]).all()
    dense = torch.zeros(12, 91, dtype=torch.float64)
    dense.scatter_(1, torch.where(index < 0, 90, index), weight.double())
    for dense_from in (0, 64):
        monkeypatch.setattr(picked, "_DENSE", dense_from)
        for op in (picked.weighted_rows, picked.rows_torch):
            sums = op(keys, index, weight * (index >= 0))
            assert sums.dtype == row_dtype
            want = dense[:, :-1] @ keys.double()
            torch.testing.assert_close(sums.double(), want, rtol=0, atol=4 * tolerance)


def test_a_picked_row_without_a_number_harms_no_other():
    keys, rows, index = torch.randn(500, 8), torch.randn(3, 8), picks(3, 400, 500)
    keys[index[1, :40].clamp(min=0)] = math.nan
    order, products = picked.rank_keys(rows, keys, index, False)
    assert torch.equal(order.sort(1)[0], index.sort(1)[0])
    known = ~products.isnan()
    want = (rows @ keys.T).gather(1, order.clamp(min=0)).masked_fill(order < 0, 0.0)
    torch.testing.assert_close(products[known], want[known])
    weight = torch.rand(3, 400).masked_fill(keys[index.clamp(min=0), 0].isnan(), 0.0)
    assert picked.weighted_rows(keys, index, weight).isfinite().all()


def test_rows_without_channels_are_all_alike():
    keys, index = torch.empty(5, 0), torch.tensor([[4, -1, 2], [-1, -1, -1]])
    for op in (picked.rank_keys, picked.rank_torch):
        order, products = op(torch.empty(2, 0), keys, index, False)
        assert order.tolist() == [[2, 4, -1], [-1, -1, -1]] and not products.any()
    for op in (picked.weighted_rows, picked.rows_torch):
        assert op(keys, index, torch.ones(2, 3)).shape == (2, 0)


def test_zeros_of_either_sign_are_equal_and_infinities_have_their_place():
    rows = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [0.0, 1.0]])
    index = torch.tensor([[4, 3, 1, 2, 0]])
    for dtype in (torch.float32, torch.float64):
        order, products = picked.rank_keys(rows.to(dtype), keys.to(dtype), index, False)
        assert order.tolist() == [[2, 0, 1, 4, 3]]
        assert products.tolist() == [[math.inf, 0.0, 0.0, 0.0, -math.inf]]
        assert picked.rank_keys(rows.to(dtype), keys.to(dtype), index, True)[0].tolist() == [
            [3, 0, 1, 4, 2]
        ]
