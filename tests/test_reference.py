"""The specification against numbers worked out by hand: nothing here asks the package what is right."""

import pytest
import torch
from torch import tensor

from pico_fast import draws, reference
from pico_fast.selection.options import EVERYTHING, SAMPLINGS, check_selection

NAN = float("nan")


def hand_hash(seed, stream, *counters):
    """hash32 once more, in plain integers and another notation."""
    state = 0
    for word in (seed, seed >> 32, stream, *counters):
        x = ((state ^ (word % 2**32)) + 0x9E3779B9) % 2**32
        x = ((x ^ (x // 2**16)) * 569420461) % 2**32
        x = ((x ^ (x // 2**15)) * 1935289751) % 2**32
        state = x ^ (x // 2**15)
    return state


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_one_positive_two_negatives_by_hand():
    a = tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    keys = tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    loss, counted = reference.contrast(a, tensor([0]), keys, tensor([0, 1, 1]), 1.0, EVERYTHING)
    # s = 1 | 0, -1; Z = log(1 + 1/e) = 0.313262; loss = log(1 + exp(Z - 1)) = log(1.503215)
    close(loss, [0.407606])
    assert counted.tolist() == [True]
    loss.sum().backward()
    # w = 0.503215 / 1.503215 = 0.334759; softmax of the negatives = 0.731059, 0.268941
    # w (0.731059 (0,1) + 0.268941 (-1,0)) - w (1,0)
    close(a.grad, [[-0.424789, 0.244729]])


def test_every_positive_has_its_own_denominator():
    keys = tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    a, labels = tensor([[1.0, 0.0]]), tensor([3])
    loss, _ = reference.contrast(a, labels, keys, tensor([3, 3, 0]), 0.5, EVERYTHING)
    # s = 2, 0 | Z = -2; softplus(-4) = 0.018150, softplus(-2) = 0.126928; mean
    # (SupCon's common denominator would give more: the other positive counts there)
    close(loss, [0.072539])


def test_in_batch_a_row_never_meets_itself():
    a = tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    loss, counted = reference.contrast(a, tensor([0, 0, 1]), None, None, 1.0, EVERYTHING)
    # row 0: positive 0, negative -1: softplus(-1); row 1: 0 and 0: log 2; row 2: alone in its class
    close(loss, [0.313262, 0.693147, 0.0])
    assert counted.tolist() == [True, True, False]


def test_missing_sides_and_empty_slots():
    a = tensor([[1.0, 0.0], [1.0, 0.0], [NAN, NAN], [0.0, 1.0]], requires_grad=True)
    keys = tensor([[1.0, 0.0], [NAN, NAN], [0.0, 1.0]], requires_grad=True)
    labels = tensor([0, 7, -1, 2])
    loss, counted = reference.contrast(a, labels, keys, tensor([0, -1, 2]), 0.5, EVERYTHING)
    # rows 0 and 3: s = 2 | 0: softplus(-2); row 1: no key of class 7; row 2: an empty slot
    close(loss, [0.126928, 0.0, 0.0, 0.126928])
    assert counted.tolist() == [True, False, False, True]
    loss.sum().backward()
    assert a.grad.isfinite().all() and keys.grad.isfinite().all()
    assert (a.grad[1:3] == 0).all() and (keys.grad[1] == 0).all()
    # positives but no negative: 0 and counted
    key_labels = tensor([0, -1, 0])
    loss, counted = reference.contrast(a[:1], labels[:1], keys, key_labels, 0.5, EVERYTHING)
    assert loss.tolist() == [0.0] and counted.tolist() == [True]


def test_mixes_equal_hand_mixes_with_the_drawn_shares():
    torch.manual_seed(1)
    a, keys = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    pool = tensor([[4, 0, 2], [5, 1, -1], [3, -1, -1]])
    mixed, exists = reference.synthesise(a, keys, pool, tensor([0, 1, 7]), 4, 3, 11)
    assert mixed.shape == (3, 7, 4)
    assert exists.tolist() == [[True] * 7, [True] * 7, [False] * 4 + [True] * 3]
    for i, (row, members) in enumerate([(0, [0, 2, 4]), (1, [1, 5]), (7, [3])]):
        n = len(members)
        for m in range(4 if n > 1 else 0):
            first = hand_hash(11, draws.MIX_FIRST, row, m) * n // 2**32
            second = hand_hash(11, draws.MIX_SECOND, row, m) * (n - 1) // 2**32
            second += second >= first
            g = (hand_hash(11, draws.MIX_SHARE, row, m) >> 8) / 2**24
            h = g * keys[members[first]] + (1 - g) * keys[members[second]]
            close(mixed[i, m], h / h.norm(), 1e-12)
        for m in range(3):
            one = hand_hash(11, draws.MIX_WITH_ANCHOR, row, m) * n // 2**32
            share = (hand_hash(11, draws.MIX_ANCHOR_SHARE, row, m) >> 8) / 2**25
            h = share * a[i] + (1 - share) * keys[members[one]]
            close(mixed[i, 4 + m], h / h.norm(), 1e-12)


def test_shares_are_uniform_and_the_two_negatives_differ():
    a = torch.eye(3)[:1].repeat(40, 1)
    pool = tensor([[1, 2]]).repeat(40, 1)
    mixed, exists = reference.synthesise(a, torch.eye(3), pool, torch.arange(40), 50, 50, 3)
    assert exists.all()
    close(mixed.norm(dim=2), torch.ones(40, 100))
    of_two, of_anchor = mixed[:, :50], mixed[:, 50:]
    # the part of e_1 of a mix of e_1 and e_2 is its share, whichever came first
    g = of_two[..., 1] / of_two.sum(2)
    assert (of_two[..., 0] == 0).all() and 0 <= g.min() < 0.01 and 0.99 < g.max() <= 1
    share = of_anchor[..., 0] / of_anchor.sum(2)
    assert 0 <= share.min() < 0.005 and 0.495 < share.max() <= 0.5
    for values, width in ((g, 1.0), (share, 0.5)):
        # Kolmogorov-Smirnov over 2,000 draws: above 0.044 once in a thousand seeds
        ranks = torch.arange(1, 2001) / 2000
        assert (values.flatten().sort()[0] / width - ranks).abs().max() < 0.044
    with_second = (of_anchor[..., 2] > 0).float().mean()
    assert 0.45 < with_second < 0.55


def test_a_mix_of_opposite_rows_has_no_direction():
    keys = tensor([[0.0, 1.0], [0.0, -1.0]])
    a, pool, row = tensor([[1.0, 0.0]]), tensor([[0, 1]]), tensor([0])
    mixed, exists = reference.synthesise(a, keys, pool, row, 4000, 0, 0)
    # |2g - 1| < 0.01: about one in a hundred is left out, all others are whole
    assert 10 < (~exists).sum() < 90
    assert mixed[exists].isfinite().all() and mixed.isfinite().all()


def test_no_gradient_goes_through_the_making_of_a_mix():
    torch.manual_seed(2)
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    anchor_labels, key_labels, tau = tensor([0, 1]), tensor([0, 0, 1, 1, 2]), 0.7
    pairs = (a, anchor_labels, keys, key_labels)
    loss, _ = reference.contrast(*pairs, tau, EVERYTHING, mixes=(3, 2, 2), seed=4)
    got = torch.autograd.grad(loss.sum(), (a, keys))
    similar = (a @ keys.T).tolist()
    pools = [
        sorted((j for j in range(5) if key_labels[j] != i), key=lambda j: -similar[i][j]) for i in range(2)
    ]
    pool = tensor([sorted(p[:2]) for p in pools])
    h, _ = reference.synthesise(a.detach(), keys.detach(), pool, torch.arange(2), 3, 2, 4)
    total = 0.0
    for i in range(2):
        own = key_labels == i
        terms = torch.cat([keys[~own] @ a[i], h[i] @ a[i]]) / tau
        each = torch.log1p(torch.exp(terms.logsumexp(0) - keys[own] @ a[i] / tau))
        close(loss[i].detach(), each.mean().detach(), 1e-12)
        total = total + each.mean()
    for mine, theirs in zip(got, torch.autograd.grad(total, (a, keys)), strict=True):
        close(mine, theirs, 1e-12)


@pytest.mark.parametrize(("in_batch", "mixes"), [(False, None), (True, None), (False, (3, 0, 4))])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_gradient_equals_finite_differences(sampling, mixes, in_batch):
    torch.manual_seed(3)
    a = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    # a mix is a constant: where mixes are made of keys, keys cannot be moved
    keys = torch.randn(9, 3, dtype=torch.float64, requires_grad=mixes is None)
    anchor_labels = tensor([0, 0, 1, 1, -1, 2])
    key_labels = tensor([0, 1, 2, -1, 0, 1, 2, 0, 3])

    def loss(a, keys):
        pair = (None, None) if in_batch else (keys, key_labels)
        selection = check_selection(sampling, None, 2, 3, 0.5)
        return reference.contrast(a, anchor_labels, *pair, 0.5, selection, mixes, 1)[0]

    assert (loss(a, keys) > 0).sum() >= 4
    # a picked key must not change under the differences: no tie is near with this seed
    assert torch.autograd.gradcheck(loss, (a, keys), eps=1e-7, atol=1e-6)


GRID = tensor([[[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, -1, -1, -1]]])
# wrong: pixels 0, 1, 2 of class 0 and the only one of class 2
PREDICTED = tensor([[[1, 1, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 2]]])


@pytest.mark.parametrize("seed", range(5))
def test_anchors_of_a_small_map(seed):
    pixel, label = reference.sample_anchors(GRID, PREDICTED, 12, 100, 1, 3, seed)
    # three pairs, 12 // 3 = 4 views: 2 hard and 2 correct; all of class 1; all of class 2
    assert label.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, -1, -1, -1]
    pixel = pixel.tolist()
    assert len(set(pixel[:2]) & {0, 1, 2}) == 2 and len(set(pixel[2:4]) & {3, 4, 5, 6, 7}) == 2
    assert sorted(pixel[4:8]) == [8, 9, 10, 11] and pixel[8:] == [12, -1, -1, -1]
    # min_pixels = 2: two pairs, 6 views, 3 hard and 3 correct
    pixel, label = reference.sample_anchors(GRID, PREDICTED, 12, 100, 2, 3, seed)
    assert label.tolist() == [0] * 6 + [1] * 4 + [-1] * 2
    assert set(pixel[:3].tolist()) == {0, 1, 2} and set(pixel[3:6].tolist()) < set(range(3, 8))
    # 8 views of class 0, 4 hard asked for, 3 there: the correct ones fill up; max_views caps
    assert (reference.sample_anchors(GRID, PREDICTED, 24, 8, 1, 3, seed)[1] == 0).sum() == 8
    assert (reference.sample_anchors(GRID, PREDICTED, 24, 5, 1, 3, seed)[1] == 0).sum() == 5
    # the correct ones are short: hard ones fill up
    wrong = PREDICTED.clone()
    wrong[0, :2] = 2
    wrong[0, 1, 3] = 0
    pixel, _ = reference.sample_anchors(GRID, wrong, 12, 100, 1, 3, seed)
    assert pixel[3] == 7 and len(set(pixel[:3].tolist()) & set(range(7))) == 3


def test_anchors_choose_pairs_by_hash_and_pixels_uniformly():
    pairs, firsts = set(), []
    for seed in range(400):
        pixel, label = reference.sample_anchors(GRID, None, 2, 100, 1, 3, seed)
        assert len(set(label.tolist())) == 2 and label.min() >= 0
        pairs.add(tuple(label.tolist()))
        firsts += [int(p) for p, c in zip(pixel, label, strict=True) if c == 0]
    assert pairs == {(0, 1), (0, 2), (1, 2)}
    share = [firsts.count(p) / len(firsts) for p in range(8)]
    assert min(share) > 0.07 and max(share) < 0.19  # 1/8 each


def test_random_easy_anchors_may_be_hard_ones_too():
    hard = set()
    for seed in range(40):
        pixel, _ = reference.sample_anchors(GRID, PREDICTED, 12, 100, 1, 3, seed, "random")
        own = pixel[:4].tolist()
        assert len(set(own)) == 4 and set(own[:2]) < {0, 1, 2}
        hard.add(len(set(own) & {0, 1, 2}))
    assert hard == {2, 3}


def test_region_means_by_hand():
    features = tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 4.0], [-1.0, NAN]]]])
    means, counts = reference.region_pool(features, tensor([[[0, 0], [1, -1]]]), 3)
    close(means, [[[1.5, 2.0], [3.0, -1.0], [0.0, 0.0]]])
    assert counts.tolist() == [[2, 1, 0]]


def fresh_bank(classes, pixels, regions, dim):
    rings = [torch.zeros(classes, dtype=torch.int64) for _ in range(4)]
    return torch.zeros(classes, pixels + regions, dim), *rings, pixels


def test_rings_overwrite_the_oldest_and_keep_the_last_of_a_long_batch():
    bank = fresh_bank(2, 3, 2, 2)
    # images of one pixel: (3, 4)·k has the region (0.6, 0.8); class 1 has the signs turned
    image = tensor([3.0, 4.0]).reshape(1, 2, 1, 1)

    def write(*factors):
        batch = torch.cat([image * k for k in factors])
        labels = tensor([0 if k > 0 else 1 for k in factors]).reshape(-1, 1, 1)
        reference.update_bank(*bank, batch, labels, 10, 0)

    write(1.0, 2.0)
    close(bank[0][0, :, 0], [3.0, 6.0, 0.0, 0.6, 0.6])
    assert [b.tolist() for b in bank[1:5]] == [[2, 0], [2, 0], [2, 0], [0, 0]]
    write(3.0, -1.0, 4.0)
    close(bank[0][0, :3, 0], [12.0, 6.0, 9.0])
    close(bank[0][1], [[-3.0, -4.0], [0, 0], [0, 0], [-0.6, -0.8], [0, 0]])
    assert [b.tolist() for b in bank[1:5]] == [[3, 1], [1, 1], [2, 1], [0, 1]]
    # seven into three slots from slot 1: 5 6 7 8 9 10 11 at 1 2 0 1 2 0 1
    write(5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0)
    close(bank[0][0, :3, 0], [30.0, 33.0, 27.0])
    close(bank[0][0, 3:], [[0.6, 0.8], [0.6, 0.8]])
    assert [b.tolist() for b in bank[1:5]] == [[3, 1], [2, 1], [2, 1], [1, 1]]


def test_bank_draws_distinct_pixels_and_drops_what_is_not_finite():
    bank = fresh_bank(2, 8, 3, 1)
    embeddings = torch.arange(1.0, 19.0).reshape(2, 1, 3, 3)
    embeddings[0, 0, 0, 0] = NAN
    labels = torch.zeros(2, 3, 3, dtype=torch.int64)
    labels[0, 2], labels[0, 1, 0] = 1, -1
    reference.update_bank(*bank, embeddings, labels, 5, 7)
    # image 0: class 0 owns pixels 1 (nan), 2, 3, 5, 6, class 1 owns 7, 8, 9; image 1: 10 to 18
    first, second = bank[0][0, :8, 0].tolist(), bank[0][1, :8, 0].tolist()
    # four finite ones, then five of image 1: nine in eight slots
    assert bank[1].tolist() == [8, 3] and bank[2].tolist() == [1, 3]
    assert len(set(first)) == 8 and sum(v >= 10 for v in first) == 5
    assert sum(v in (2, 3, 5, 6) for v in first) == 3 and sorted(second[:3]) == [7, 8, 9]
    # the region with the nan takes no slot
    assert bank[3].tolist() == [1, 1] and bank[0][:, 8, 0].tolist() == [1.0, 1.0]
    assert bank[0].isfinite().all()


def test_hash_has_its_published_values():
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789012345):
        for counters in ((), (0,), (5, 7), (2**32 - 1, -1), (2**40, 3)):
            expected = hand_hash(seed, 6, *counters)
            assert draws.hash32(seed, 6, *counters) == expected
            on_tensors = draws.hash32(tensor(seed), 6, *(tensor(c) for c in counters))
            assert int(on_tensors) == expected
    assert [hand_hash(0, 1), hand_hash(42, 5, 3, 7)] == [2072525241, 299539336]
    low, high = (hand_hash(9, draws.STEP, 4, 0, half) for half in (0, 1))
    assert draws.step_seed(9, 4) == low + (high % 2**31) * 2**32
    assert int(draws.step_seed(9, tensor(4))) == draws.step_seed(9, 4)


def test_hash_is_a_bijection_of_its_last_word_and_uniform():
    words = torch.arange(2**20) * 4096 % 2**32 + torch.arange(2**20) // 2**10
    assert len(words.unique()) == 2**20
    out = draws.hash32(3, 1, words)
    # a random function would meet itself about 128 times
    assert len(out.unique()) == 2**20
    out = draws.hash32(3, 1, torch.arange(2**16))
    for shift in (0, 8, 16, 24):
        counts = ((out >> shift) & 255).bincount(minlength=256)
        chi2 = ((counts - 256.0) ** 2 / 256).sum()
        assert 160 < chi2 < 370  # 255 degrees of freedom: four and a half sigma
    for bit in range(32):
        flipped = draws.hash32(3, 1, torch.arange(2**12) ^ (1 << bit)) ^ out[: 2**12]
        ones = sum((flipped >> b & 1).float().mean() for b in range(32)) / 32
        assert 0.48 < ones < 0.52, bit
