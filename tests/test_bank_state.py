"""The bank's state: what it says of itself, what is refused, and how a bank gets another size."""

import copy
import io

import pytest
import torch
from test_bank import batch, make
from torch.nn.functional import normalize

import pico_fast


def filled(steps=5, **options):
    bank = make(**options)
    for step in range(steps):
        bank.enqueue(*batch(3, 4, step))
    return bank


def newest_first(bank, ring):
    """Entries of a ring of every class, youngest first: lists of rows."""
    first = 0 if ring == "pixel" else bank.pixel_queue_size
    size = getattr(bank, f"{ring}_queue_size")
    counts, places = getattr(bank, f"{ring}_count").tolist(), getattr(bank, f"{ring}_next").tolist()
    return [
        [bank.storage[c, first + (place - 1 - age) % size] for age in range(count)]
        for c, (count, place) in enumerate(zip(counts, places, strict=True))
    ]


@pytest.mark.parametrize("sizes", ((13, 4), (30, 9), (5, 2), (13, 0), (0, 4), (1, 1), (0, 0)))
@pytest.mark.parametrize("steps", (0, 1, 9))
def test_resize_keeps_the_newest_in_order(sizes, steps):
    bank = filled(steps)
    before = {ring: newest_first(bank, ring) for ring in ("pixel", "region")}
    bank.resize(*sizes)
    assert bank.storage.shape == (4, sum(sizes), 6) and bank.storage.is_contiguous()
    assert (bank.pixel_queue_size, bank.region_queue_size, bank.slots) == (*sizes, sum(sizes))
    for (ring, rows), size in zip(before.items(), sizes, strict=True):
        for mine, theirs in zip(newest_first(bank, ring), rows, strict=True):
            assert len(mine) == min(len(theirs), size)
            for a, b in zip(mine, theirs, strict=False):
                assert torch.equal(a, b)
    assert int(bank.step) == steps
    _, labels = bank.keys()
    slots = bank.storage.flatten(0, 1)
    assert not slots[labels < 0].any()


@pytest.mark.parametrize("sizes", ((30, 9), (5, 2)))
def test_after_a_resize_it_is_the_bank_that_always_had_that_size(sizes):
    """Where nothing was lost: the same entries, from the oldest on."""
    bank = filled(1, pixels_per_image=1)
    twin = filled(0, pixels=sizes[0], regions=sizes[1], pixels_per_image=1)
    twin.enqueue(*batch(3, 4, 0))
    bank.resize(*sizes)
    for step in range(1, 12):
        for b in (bank, twin):
            b.enqueue(*batch(2, 4, 50 + step))
        for ring in ("pixel", "region"):
            assert all(
                torch.equal(torch.stack(a), torch.stack(b))
                for a, b in zip(newest_first(bank, ring), newest_first(twin, ring), strict=True)
                if a or b
            )


def test_resize_takes_a_criterion_along_and_its_state():
    criterion = pico_fast.PiCoLoss(3, 8, pixel_queue_size=20, region_queue_size=5, max_samples=12)
    embeddings = normalize(torch.randn(2, 8, 5, 5), dim=1).requires_grad_()
    labels = torch.randint(0, 3, (2, 5, 5))
    for _ in range(4):
        criterion(embeddings, labels)
    criterion.bank.resize(7, 2)
    assert torch.isfinite(criterion(embeddings, labels))
    assert criterion.stats["pixel_fill"] == 1.0
    other = pico_fast.PiCoLoss(3, 8, pixel_queue_size=7, region_queue_size=2, max_samples=12)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(*(c(embeddings, labels) for c in (criterion, other)))


@pytest.mark.parametrize("name", ("pixel_queue_size", "region_queue_size"))
@pytest.mark.parametrize("value", (-1, 2.0, "3", None, True))
def test_a_wrong_size_is_named_and_changes_nothing(name, value):
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        bank.resize(**({"pixel_queue_size": 3, "region_queue_size": 3} | {name: value}))
    assert all(torch.equal(before[key], value) for key, value in bank.state_dict().items())


def broken(name, value):
    def change(state):
        state[name] = value(state[name]) if callable(value) else value

    return change


def at(index, value):
    def change(x):
        x = x.clone()
        x[index] = value
        return x

    return change


BROKEN = {
    "a later version": ("version", torch.tensor(2), "a later pico_fast"),
    "a version in words": ("version", "1", "version: expected 1, got '1'"),
    "sizes in words": ("queue_sizes", "13, 4", "queue_sizes: expected"),
    "no number of a version": ("version", torch.tensor([1, 1]), "version: expected 1"),
    "as many slots, cut elsewhere": ("queue_sizes", torch.tensor([12, 5]), "queue_sizes"),
    "other classes": ("storage", lambda x: x[:3], r"storage: expected shape \[4, 17, 6\] floating"),
    "integers": ("storage", lambda x: x.long(), "storage: expected shape"),
    "complex": ("storage", lambda x: x.to(torch.complex64), "storage: expected shape"),
    "no tensor": ("storage", "storage", "storage: expected shape"),
    "too many pixels": ("pixel_count", at(2, 14), "pixel_count: expected values from 0 to 13"),
    "fewer than none": ("pixel_count", at(2, -1), "pixel_count: expected values from 0"),
    "behind the ring": ("pixel_next", at(0, 13), "pixel_next: expected values from 0 to 12"),
    "too many regions": ("region_count", at(0, 5), "region_count: expected values from 0 to 4"),
    "before the ring": ("region_next", at(3, -5), "region_next: expected values from 0 to 3"),
    "halves": ("region_next", lambda x: x + 0.5, "region_next: expected shape"),
    "a negative step": ("step", torch.tensor(-1), "step: expected values from 0"),
    "nan in a pixel": ("storage", at((1, 0, 0), torch.nan), "finite values in filled slots"),
    "infinity in a region": ("storage", at((3, 13, 5), torch.inf), "finite values in filled slots"),
    "too large for the bank": ("storage", at((0, 0, 0), 1e30), "finite values in filled slots"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_state_that_no_bank_can_have_is_refused_whole(what, figures):
    name, value, message = BROKEN[what]
    # float16 cannot hold 1e30
    bank, state = filled(2, dtype=torch.float16), filled(5).state_dict()
    broken(name, value)(state)
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(state)
    assert all(torch.equal(before[key], value) for key, value in bank.state_dict().items())
    figures.add("state", "broken states refused")


def test_an_empty_slot_may_hold_anything():
    state = filled(1, pixels=100).state_dict()
    state["storage"][:, 60:] = torch.nan
    bank = make(pixels=100)
    bank.storage.zero_()
    with pytest.raises(RuntimeError, match="finite values in filled slots"):
        bank.load_state_dict(state)  # regions are behind the pixels
    state["storage"][:, 100:] = 0.5
    bank.load_state_dict(state)
    bank.enqueue(*batch(2, 4, 9))


@pytest.mark.parametrize("missing", ("version", "queue_sizes", "refused", "storage"))
def test_a_state_with_something_missing_says_what_and_is_not_taken(missing):
    state, bank = filled().state_dict(), filled(2)
    del state[missing]
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        bank.load_state_dict(state)
    found = bank.load_state_dict(state, strict=False)
    assert found.missing_keys == [missing]
    assert all(torch.equal(before[key], value) for key, value in bank.state_dict().items())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_states_load_without_executing_anything(dtype, figures):
    bank, file = filled(dtype=dtype), io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = make(dtype=dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    for (name, a), b in zip(bank.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    figures.add("state", "states loaded by weights_only")


def test_refused_vectors_are_counted_saved_and_reset():
    criterion = pico_fast.PiCoLoss(2, 4, pixel_queue_size=50, region_queue_size=5)
    embeddings = normalize(torch.randn(1, 4, 3, 3), dim=1)
    labels = torch.zeros(1, 3, 3, dtype=torch.int64)
    criterion(embeddings, labels)
    assert criterion.stats["refused"] == 0
    kept = criterion.stats["refused"]
    embeddings[0, 0, 1, 1] = torch.nan
    criterion(embeddings, labels)
    # the pixel, if it was drawn (all nine are), and the region that it belongs to
    assert criterion.stats["refused"] == 2 and kept == 0
    assert criterion.bank.state_dict()["refused"] == 2
    assert criterion.bank.pixel_count.tolist() == [17, 0]
    criterion.bank.reset()
    assert criterion.bank.refused == 0
