"""A bank in shares against the whole bank, anchor by anchor, whatever is asked for; ranks are threads."""

import math

import pytest
import torch
import virtual_ranks
from torch.nn.functional import normalize

import pico_fast
from pico_fast.contrast import flow, shares
from pico_fast.contrast.function import Settings, contrast_rows
from pico_fast.selection.options import POSITIVES, SAMPLINGS, check_selection

CLASSES, DIM, PIXELS, REGIONS, ANCHORS = 5, 6, 9, 4, 11
SLOTS = PIXELS + REGIONS
# an empty class, a full one, queues without the other
FILLED = ((9, 4), (0, 0), (5, 1), (7, 0), (0, 3))
SEED = torch.tensor(11)
SAMPLED = ("random", "semi_hard", "bounded")
MIXES = pico_fast.Synthesis(7, 5, 6)


def of_unit_length(*size):
    return normalize(torch.randn(*size, dtype=torch.float64), dim=-1)


def of_few_values(*size):
    """Exact products, and many pairs of one similarity."""
    return torch.randint(-1, 2, size).float()


def settings(sampling, positives=None, mixes=None, is_reference=False, temperature=0.3):
    selection = check_selection(sampling, positives, 3, 8, 0.5)
    return Settings(selection, temperature, mixes, is_reference)


def whole_bank(storage):
    """A bank of one process with these slots, as full as FILLED says."""
    bank = pico_fast.MemoryBank(CLASSES, DIM, PIXELS, REGIONS, dtype=storage.dtype, placement="local")
    return filled(bank, storage)


def filled(bank, storage):
    bank.storage.copy_(storage[:, bank.first_slot : bank.last_slot])
    for count, values in zip((bank.pixel_count, bank.region_count), zip(*FILLED, strict=True), strict=True):
        count.copy_(torch.tensor(values))
    return bank


def rows_of(bank, anchors, labels, how, first_row=0):
    """What the contrast says of these anchors, and their gradient."""
    x = anchors.clone().requires_grad_()
    rows = contrast_rows(x, labels, None, None, bank.share(), how, SEED, first_row)
    (grad,) = torch.autograd.grad(rows.loss.sum(), x)
    return rows.loss.detach(), *rows[1:], grad


def on_ranks(n, storage, monkeypatch, work):
    """Results of work(bank, rank) of n ranks with a share of the bank each."""

    def one(rank):
        sizes = (CLASSES, DIM, PIXELS, REGIONS)
        bank = pico_fast.MemoryBank(*sizes, dtype=storage.dtype, placement="sharded")
        return work(filled(bank, storage), rank)

    return virtual_ranks.run(n, one, monkeypatch)


def both(n, data, how, monkeypatch, wrong=None):
    """Rows of all ranks' anchors, from shares and from the whole bank."""
    storage = data(CLASSES, SLOTS, DIM)
    if wrong is not None:
        storage[0, 2, 1] = wrong
    anchors, labels = data(n, ANCHORS, DIM), torch.randint(-1, CLASSES, (n, ANCHORS))
    labels[n - 1] = -1  # a rank without an anchor
    found = on_ranks(
        n,
        storage,
        monkeypatch,
        lambda bank, rank: rows_of(bank, anchors[rank], labels[rank], how, rank * ANCHORS),
    )
    flat = (anchors.flatten(0, 1), labels.flatten())
    return (
        [torch.cat(parts) for parts in zip(*found, strict=True)],
        rows_of(whole_bank(storage), *flat, how),
        (storage, *flat),
    )


def assert_same_rows(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("data", (of_unit_length, of_few_values))
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_shares_give_what_the_whole_bank_gives(sampling, positives, data, monkeypatch):
    for n in (2, 3, 4):
        how = settings(sampling, positives)
        found, expected, (storage, *pairs) = both(n, data, how, monkeypatch)
        assert_same_rows(found, expected)
        assert expected[0].any() and not expected[1].all()
        how = settings(sampling, positives, is_reference=True)
        reference = rows_of(whole_bank(storage), *pairs, how)
        torch.testing.assert_close(found[0], reference[0])
        torch.testing.assert_close(found[-1], reference[-1])


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("sampling", SAMPLED)
def test_mixes_of_sampled_negatives_are_those_of_one_process(sampling, positives, monkeypatch):
    for n in (2, 3, 4):
        how = settings(sampling, positives, MIXES)
        found, expected, _ = both(n, of_unit_length, how, monkeypatch)
        assert_same_rows(found, expected)
        assert expected[0].any()


# those of two negatives are pairs of one share: a little less than all pairs of a small pool
@pytest.mark.parametrize(("counts", "tolerance"), (((0, 6000), 0.05), ((6000, 0), 0.2)))
@pytest.mark.parametrize("sampling", sorted(set(SAMPLINGS) - set(SAMPLED)))
def test_mixes_of_shares_have_the_sum_of_one_process(sampling, counts, tolerance, monkeypatch):
    """Where keys stay in their shares the mixes are others: of many the log-sum has one expectation."""
    mixes = pico_fast.Synthesis(*counts, 20)
    for n in (2, 3):
        how = settings(sampling, None, mixes, temperature=1.0)
        found, expected, _ = both(n, of_unit_length, how, monkeypatch)
        without = settings(sampling, temperature=1.0)
        plain, _, _ = both(n, of_unit_length, without, monkeypatch)
        used = expected[0] > 0
        assert used.any() and expected[0][used].min() > plain[0].max() + 2
        torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0)
        assert (found[-1] - expected[-1]).norm() < tolerance * expected[-1].norm()


@pytest.mark.parametrize("sampling", SAMPLED)
def test_a_sample_is_that_of_one_process_to_the_bit(sampling, monkeypatch):
    storage = of_unit_length(CLASSES, SLOTS, DIM)
    anchors, labels = of_unit_length(ANCHORS, DIM), torch.randint(0, CLASSES, (ANCHORS,))
    selection = settings(sampling).selection

    def sampled(bank, rank=0):
        share = bank.share()
        layout = flow.lay_out(anchors, labels, None, None, share)
        out = []
        for own in (True, False):
            layout_ = flow.choose(layout, share, selection, own, SEED, None if own else out[0])
            out.append(layout_)
        return out

    expected = sampled(whole_bank(storage))
    for n in (2, 3):
        for sides in on_ranks(n, storage, monkeypatch, sampled):
            for side, other in zip(sides, expected, strict=True):
                mine, theirs = side.layout, other.layout
                count = int(mine.sizes.sum())
                assert count > 0 and torch.equal(mine.ranges, theirs.ranges)
                rows = [x.keys[x.key_order[:count]] for x in (mine, theirs)]
                assert torch.equal(*rows)
                # in the order of the bank, so that pools of mixes are in one order
                assert torch.equal(*(x.key_order[:count].argsort() for x in (mine, theirs)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_without_a_gradient_nothing_else_changes(sampling, monkeypatch):
    storage, anchors = of_unit_length(CLASSES, SLOTS, DIM), of_unit_length(2, ANCHORS, DIM)
    labels, how = torch.randint(0, CLASSES, (2, ANCHORS)), settings(sampling, None, MIXES)

    def work(bank, rank):
        pairs = (bank, anchors[rank], labels[rank], how, rank * ANCHORS)
        with torch.no_grad():
            x = (*pairs[1:3], None, None, bank.share(), how, SEED, rank * ANCHORS)
            without = contrast_rows(*x)
        return without, rows_of(*pairs)[:4]

    for without, expected in on_ranks(2, storage, monkeypatch, work):
        assert_same_rows(without, expected)


@pytest.mark.parametrize("sampling", ("all", "hardest"))
def test_a_key_of_nan_shows_on_every_rank(sampling, monkeypatch):
    """A bank takes none; what was written into its memory past it is not hidden."""
    found, _, (_, _, labels) = both(3, of_unit_length, settings(sampling), monkeypatch, wrong=math.nan)
    meets = (labels > 0) & found[1]
    assert meets.any() and found[0][meets].isnan().all()


def test_rows_of_shares_are_found_and_named(monkeypatch):
    """Row by row of a bank whose slots are cut unevenly, the last share empty."""
    storage = torch.arange(CLASSES * SLOTS).view(CLASSES, SLOTS, 1).expand(-1, -1, DIM).float()
    row = torch.cat([torch.arange(CLASSES * SLOTS), torch.tensor([shares._LAST])])

    def work(bank, rank):
        share = bank.share()
        local = shares._local(share, row)
        own = local[local >= 0]
        assert torch.equal(shares._names(share, own), share.keys[own, 0].long())
        assert torch.equal(own, torch.arange(len(share.keys)))
        assert (shares._names(share, torch.tensor([-1])) == shares._LAST).all()
        return row[local >= 0]

    for n in (1, 2, 5, 6, 12):
        found = torch.cat(on_ranks(n, storage, monkeypatch, work))
        assert torch.equal(found.sort()[0], row[:-1])
