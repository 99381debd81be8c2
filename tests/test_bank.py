"""The bank: what is stored, in which order, and how it is saved."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast


def batch(images, classes, seed, dim=6, size=(5, 7)):
    g = torch.Generator().manual_seed(seed)
    embeddings = normalize(torch.randn(images, dim, *size, generator=g), dim=1)
    labels = torch.randint(-1, classes, (images, *size), generator=g)
    # not every class in every image
    labels = torch.where(labels == torch.arange(images)[:, None, None] % classes, 255, labels)
    return embeddings, labels


def make(pixels=13, regions=4, classes=4, **options):
    options = {"pixels_per_image": 3, "dtype": torch.float32, "seed": 5} | options
    return pico_fast.MemoryBank(classes, 6, pixels, regions, **options)


@pytest.mark.parametrize("sizes", ((13, 4), (2, 1), (0, 3), (5, 0), (0, 0)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_after_any_sequence_it_is_the_reference_bank(sizes, dtype):
    fast, slow = make(*sizes, dtype=dtype), make(*sizes, dtype=dtype, impl="reference")
    for step, images in enumerate((2, 1, 0, 5, 3, 2, 2)):
        embeddings, labels = batch(images, 4, step)
        fast.enqueue(embeddings, labels)
        slow.enqueue(embeddings, labels)
        assert torch.equal(fast.pixel_count, slow.pixel_count)
        assert torch.equal(fast.region_count, slow.region_count)
        assert torch.equal(fast.pixel_next, slow.pixel_next)
        p = sizes[0]
        assert torch.equal(fast.storage[:, :p], slow.storage[:, :p])
        # region means are sums of float32 in another order, rounded to the bank's dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            fast.storage[:, p:], slow.storage[:, p:], rtol=tolerance, atol=tolerance / 10
        )
    assert fast.step == 7


def test_each_stored_row_is_of_its_class_and_the_oldest_go_first():
    """An independent account of the rings: lists of what each step may have stored."""
    bank = make()
    pixels = {c: [] for c in range(4)}
    regions = {c: [] for c in range(4)}
    for step in range(12):
        embeddings, labels = batch(2, 4, 100 + step)
        before = bank.storage.clone()
        bank.enqueue(embeddings, labels)
        for b in range(2):
            for c in range(4):
                mask = labels[b] == c
                if not mask.any():
                    continue
                rows = embeddings[b][:, mask].T
                pixels[c] += [rows] * min(3, len(rows))
                regions[c].append(normalize(rows.double().mean(0), dim=0).float())
        for c in range(4):
            # the newest stands before next, and so on backwards around the ring
            n = int(bank.pixel_count[c])
            assert n == min(13, len(pixels[c]))
            for age in range(n):
                slot = (int(bank.pixel_next[c]) - 1 - age) % 13
                rows = pixels[c][-1 - age]
                assert (rows == bank.storage[c, slot]).all(1).any()
            n = int(bank.region_count[c])
            assert n == min(4, len(regions[c]))
            for age in range(n):
                slot = 13 + (int(bank.region_next[c]) - 1 - age) % 4
                torch.testing.assert_close(bank.storage[c, slot], regions[c][-1 - age])
        changed = (bank.storage != before).any(2).sum()
        assert changed > 0
    # class 0 is a class like any other
    assert bank.pixel_count[0] == 13 and bank.region_count[0] == 4


def test_keys_are_views_with_labels():
    bank = make()
    keys, labels = bank.keys()
    assert keys.shape == (4 * 17, 6) and (labels == -1).all()
    bank.enqueue(*batch(2, 4, 0))
    assert keys.data_ptr() == bank.storage.data_ptr() and keys.any()
    _, labels = bank.keys()
    filled = labels.view(4, 17) >= 0
    assert torch.equal(filled[:, :13].sum(1), bank.pixel_count)
    assert torch.equal(filled[:, 13:].sum(1), bank.region_count)
    assert torch.equal(filled, bank.storage.ne(0).any(2))
    assert set(labels.tolist()) <= {-1, 0, 1, 2, 3}


def test_rows_that_are_not_finite_take_no_slot():
    for impl in (None, "reference"):
        bank = make(50, 9, pixels_per_image=99, impl=impl)
        embeddings, labels = batch(3, 4, 1)
        embeddings[1, 2, 0, 0] = torch.nan
        labels[1, 0, 0] = 2
        embeddings[2, 0, 3, 3] = torch.inf
        labels[2, 3, 3] = 0
        bank.enqueue(embeddings, labels)
        assert bank.storage.isfinite().all()
        counts = torch.stack([(labels == c).sum() for c in range(4)])
        assert (counts - bank.pixel_count).tolist() == [1, 0, 1, 0]
        present = torch.stack([(labels == c).flatten(1).any(1).sum() for c in range(4)])
        assert (present - bank.region_count).tolist() == [1, 0, 1, 0]
        assert bank.refused == 4


def test_pixels_are_drawn_equally_often_and_another_step_draws_others():
    embeddings = torch.arange(40.0).view(1, 1, 5, 8)
    labels = torch.zeros(1, 5, 8, dtype=torch.int64)
    bank = pico_fast.MemoryBank(1, 1, 4 * 500, 0, pixels_per_image=4, dtype=torch.float32)
    for _ in range(500):
        bank.enqueue(embeddings, labels)
    hits = bank.storage.flatten().long().bincount(minlength=40)
    assert hits.sum() == 2000
    deviation = (hits - 50) / (500 * 0.1 * 0.9) ** 0.5
    assert deviation.abs().max() < 4.5
    draws = {tuple(row.tolist()) for row in bank.storage.view(500, 4)}
    assert len(draws) > 490


def test_reset_empties_and_starts_again():
    bank, fresh = make(), make()
    bank.enqueue(*batch(2, 4, 0))
    bank.reset()
    bank.enqueue(*batch(2, 4, 1))
    fresh.enqueue(*batch(2, 4, 1))
    assert all(torch.equal(a, b) for a, b in zip(*_states(bank, fresh), strict=True))


def _states(*banks):
    return [list(bank.state_dict().values()) for bank in banks]


def test_state_goes_around_and_another_size_is_refused_whole():
    bank, other = make(), make()
    bank.enqueue(*batch(2, 4, 0))
    state = copy.deepcopy(bank.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(state)
    for b in (bank, other):
        b.enqueue(*batch(3, 4, 1))
    assert all(torch.equal(a, b) for a, b in zip(*_states(bank, other), strict=True))
    smaller = make(pixels=12)
    with pytest.raises(RuntimeError, match=r"queue_sizes: expected \[12, 4\] .*, got \[13, 4\]"):
        smaller.load_state_dict(state)
    assert not smaller.storage.any() and smaller.step == 0
    del state["pixel_next"]
    with pytest.raises(RuntimeError, match="pixel_next"):
        make().load_state_dict(state)


def test_modules_move_and_cast_without_touching_the_stored_dtype():
    bank = make(dtype=torch.bfloat16)
    bank.enqueue(*batch(2, 4, 0))
    before = bank.storage.clone()
    bank.double().half()
    assert bank.storage.dtype == torch.bfloat16 and torch.equal(bank.storage, before)
    assert bank.step.dtype == torch.int64
    assert not list(bank.buffers()) and not list(bank.parameters())
    assert make().to("meta").storage.device.type == "meta"
    twin = copy.deepcopy(bank)
    twin.enqueue(*batch(2, 4, 1))
    assert torch.equal(bank.storage, before)
