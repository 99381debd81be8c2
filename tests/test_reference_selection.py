"""Which keys the specification selects, by numbers worked out by hand: samples and what counts of them."""

import math

import pytest
import torch
from test_reference import close, hand_hash
from torch import tensor

from pico_fast import draws, reference
from pico_fast.selection.options import POSITIVES, SAMPLINGS, Selection, check_selection

# one channel, so that a key is its similarity with the anchor (1.0), class 0
KEYS = tensor([0.9, 0.1, -0.5, 0.8, 0.8, 0.3, -1.0, 0.95])[:, None]
LABELS = tensor([0, 0, 0, 1, 1, 2, 1, -1])


def pick(sampling, num_positives, num_negatives, hard_fraction=0.5, positives=None, seed=0):
    """What one anchor of class 0 is compared with: positives, negatives, their similarities."""
    selection = check_selection(sampling, positives, num_positives, num_negatives, hard_fraction)
    found = reference.select_keys(
        torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), KEYS, LABELS, selection, seed
    )
    return [x[0].tolist() for x in found]


def test_hardest_is_ordered_and_ties_go_by_index():
    positive, negative, to_positive, to_negative = pick("hardest", 2, 5)
    assert (positive, negative) == ([2, 1], [3, 4, 5, 6, -1])
    close(tensor(to_positive), [-0.5, 0.1])
    close(tensor(to_negative), [0.8, 0.8, 0.3, -1.0, 0.0])
    assert pick("hardest", 1, 1)[1] == [3]


def test_all_takes_every_key_whatever_the_counts():
    positive, negative, *_ = pick("all", 1, 1)
    assert (positive, negative) == ([2, 1, 0] + [-1] * 5, [3, 4, 5, 6] + [-1] * 4)


def hand_sample(sizes, wanted, seed, stream):
    """The sample of classes 0, 1, ... as pairs of a class and a place in it, in plain integers."""
    drawn = []
    for c, (n, k) in enumerate(zip(sizes, wanted, strict=True)):
        turn = hand_hash(seed, stream, c) * n // 2**32
        for t in range(k):
            begin, end = t * n // k, (t + 1) * n // k
            within = hand_hash(seed, stream, c, t) * (end - begin) // 2**32
            drawn.append((c, (begin + within + turn) % n))
    return drawn


# keys of each class, how many are needed, how many are drawn of each for negatives and for positives
SAMPLES = [
    # 4 keys are not of the largest class: a share of 3 / 4, of 5 keys 3.75
    ([5, 3, 1], 3, [4, 3, 1], [3, 3, 1]),
    # a share of 2 / 6; of 1 key still one
    ([6, 5, 1], 2, [2, 2, 1], [2, 2, 1]),
    # a share of 10 / 1000
    ([1000, 500, 500], 10, [10, 5, 5], [10, 10, 10]),
    # no more than are needed: all
    ([5, 3, 1], 4, [5, 3, 1], [4, 3, 1]),
    ([7, 0, 2], 100, [7, 0, 2], [7, 0, 2]),
    # nobody has a negative
    ([9], 2, [9], [2]),
    ([], 2, [], []),
]


@pytest.mark.parametrize(("sizes", "need", "of_negatives", "of_positives"), SAMPLES)
def test_the_sample_by_hand(sizes, need, of_negatives, of_positives):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), tensor(sizes, dtype=torch.int64))
    labels = torch.cat([labels, tensor([-1] * 4)])[torch.randperm(len(labels) + 4)]
    for own, wanted in ((False, of_negatives), (True, of_positives)):
        for seed in (0, -5, 2**40 + 1):
            found = reference.sample_keys(labels, need, own, seed).tolist()
            stream = draws.POSITIVE if own else draws.NEGATIVE
            drawn = hand_sample(sizes, wanted, seed, stream)
            keys = [(labels == c).nonzero()[:, 0].tolist() for c in range(len(sizes))]
            assert found == [keys[c][place] for c, place in drawn]
            assert len(set(found)) == len(found)
    # even an anchor of the largest class meets what it needs, or all there are
    others = sum(sizes) - max(sizes, default=0)
    for c in range(len(sizes)):
        assert sum(of_negatives) - of_negatives[c] >= min(need, others)


@pytest.mark.parametrize("own", (True, False))
def test_every_key_is_in_the_sample_equally_often(own):
    labels, runs = torch.arange(47) % 5 % 3, 500  # 19, 19 and 9 keys
    hits = torch.zeros(47)
    for seed in range(runs):
        hits[reference.sample_keys(labels, 7, own, seed)] += 1
    for c, (n, k) in enumerate(((19, 7 if own else 5), (19, 7 if own else 5), (9, 7 if own else 3))):
        count, expected = hits[labels == c], runs * k / n
        assert count.sum() == runs * k
        # draws without replacement vary less than a multinomial: this bound is wide
        assert ((count - expected) ** 2 / expected).sum() < n + 5 * math.sqrt(2 * n)


def test_random_is_what_the_sample_offers():
    for seed in range(20):
        positive, negative, *_ = pick("random", 2, 2, seed=seed)
        own, other = ({0, 1, 2}, {3, 4, 5, 6})
        drawn = {e: reference.sample_keys(LABELS, 2, e, seed).tolist() for e in (True, False)}
        # of three positives two; a share of 2 / 4 of three keys is two, and of one key one
        assert len(positive) == 2 and set(positive) == set(drawn[True]) & own
        assert len(negative) == 3 and set(negative) == set(drawn[False]) & other and 5 in negative
    # as many as are there: all, hardest first, and equal ones by place in the sample
    positive, negative, *_ = pick("random", 5, 6)
    assert positive == [2, 1, 0] and negative[2:] == [5, 6]
    turned = [key for key in reference.sample_keys(LABELS, 6, False, 0).tolist() if key in (3, 4)]
    assert negative[:2] == turned
    orders = {tuple(pick("random", 5, 6, seed=seed)[1][:2]) for seed in range(20)}
    assert orders == {(3, 4), (4, 3)}


@pytest.mark.parametrize(
    ("num_positives", "num_negatives", "hard_fraction", "positive", "negative"),
    [
        # ceil(0.5 · 4) = 2 negatives, ceil(0.5 · 3) = 2 positives
        (3, 3, 0.5, [2, 1, -1], [{3, 4}, {3, 4}, -1]),
        # no more than asked for, of a sample that is everything
        (2, 3, 0.9, [2, 1], [{3, 4}, {3, 4}, 5]),
        (3, 4, 1.0, [2, 1, 0], [{3, 4}, {3, 4}, 5, 6]),
        # ceil(0.01 · n) = 1
        (1, 2, 0.01, [2], [{3, 4}, -1]),
    ],
)
def test_semi_hard_is_the_hard_part_of_the_sample(
    num_positives, num_negatives, hard_fraction, positive, negative
):
    found = pick("semi_hard", num_positives, num_negatives, hard_fraction)
    assert found[0] == positive
    for key, allowed in zip(found[1], negative, strict=True):
        assert key in (allowed if isinstance(allowed, set) else {allowed})
    assert len(set(found[1][:2])) == 2


def test_semi_hard_of_a_part_of_the_keys():
    # one negative of the hardest half: the sample has two of class 1 and the one of class 2
    for seed in range(10):
        _, (negative,), *_ = pick("semi_hard", 3, 1, 0.5, seed=seed)
        drawn = [k for k in reference.sample_keys(LABELS, 2, False, seed).tolist() if k > 2]
        hardness = KEYS[drawn, 0]
        assert negative == drawn[int(hardness.argmax())]


@pytest.mark.parametrize(
    ("own", "num_positives", "num_negatives", "hard_fraction", "negative"),
    [
        # mean of the positives 0.5: of 0.75, 0.7, 0.5, 0.3, -1.0 two lie below; ceil(0.5 · 2) = 1
        ([0.9, 0.1], 2, 3, 0.5, [6, -1, -1]),
        ([0.9, 0.1], 2, 3, 1.0, [6, 7, -1]),
        # mean 0.9: all five, ceil(0.5 · 5) = 3; no more than two
        ([0.9, 0.9], 2, 3, 0.5, [3, 4, 5]),
        ([0.9, 0.9], 2, 5, 1.0, [3, 4, 5, 6, 7]),
        # mean -1.0: none is less similar
        ([-1.0, -1.0], 2, 3, 0.5, [-1, -1, -1]),
        # without a positive nothing bounds them
        ([], 2, 3, 0.5, [3, 4, 5]),
    ],
)
def test_bounded_takes_the_hard_part_below_the_mean_positive(
    own, num_positives, num_negatives, hard_fraction, negative
):
    of_key = [0.0, *own, *[0.0] * (2 - len(own)), 0.75, 0.7, 0.5, 0.3, -1.0]
    labels = [-1, *[0] * len(own), *[-1] * (2 - len(own)), 1, 2, 3, 1, 4]
    selection = check_selection("bounded", None, num_positives, num_negatives, hard_fraction)
    anchor = (torch.ones(1, 1, dtype=torch.float64), tensor([0]))
    keys = tensor(of_key, dtype=torch.float64)[:, None]
    found = reference.select_keys(*anchor, keys, tensor(labels), selection, 0)
    assert found[1].tolist() == [negative]
    assert set(found[0][0].tolist()) == ({1, 2} if own else set())


def test_positives_may_be_chosen_apart_from_the_negatives():
    for sampling in SAMPLINGS:
        usual = pick(sampling, 2, 4, 0.5)
        chosen = {name: pick(sampling, 2, 4, 0.5, name) for name in POSITIVES}
        assert chosen["all"][0][:3] == [2, 1, 0] and chosen["hardest"][0] == [2, 1]
        assert chosen["semi_hard"][0] == [2, 1] and len(chosen["random"][0]) == 2
        same = "random" if sampling == "bounded" else sampling
        assert usual == chosen[same]
        for name in POSITIVES:
            if sampling != "bounded":  # whose ceiling is the mean of the positives that are offered
                assert chosen[name][1] == usual[1]
    assert check_selection("bounded", None, 1, 1, 1.0) == Selection("random", "bounded", 1, 1, 1.0)


def test_in_batch_selection_leaves_out_the_own_row():
    a = tensor([[1.0], [1.0], [0.5], [-1.0]])
    for sampling in SAMPLINGS:
        selection = check_selection(sampling, None, 4, 4, 1.0)
        found = reference.select_keys(a, tensor([0, 0, 0, 1]), None, None, selection, 0)
        positive = [[key for key in row if key >= 0] for row in found[0].tolist()]
        assert [row[:1] for row in positive] == [[2], [2], positive[2][:1], []], sampling
        assert [set(row) for row in positive] == [{1, 2}, {0, 2}, {0, 1}, set()], sampling
        negative = [[key for key in row if key >= 0] for row in found[1].tolist()]
        assert negative[:3] == [[3]] * 3
        # row 3 is -1: its products are -1, -1, -0.5
        assert negative[3][0] == 2 and set(negative[3][1:]) == {0, 1}
