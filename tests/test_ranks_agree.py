"""Several ranks against one process that sees all of it; the ranks are threads (see virtual_ranks)."""

import copy
import math

import pytest
import torch
import virtual_ranks
from torch.nn.functional import normalize

import pico_fast
from pico_fast import draws
from pico_fast.selection.options import SAMPLINGS

CLASSES, DIM, SIZE = 5, 16, 6
PLACEMENTS = ("replicated", "sharded")
# every pixel is an anchor, whatever is drawn
EVERY = {"max_samples": 8 * SIZE * SIZE, "max_views": SIZE * SIZE}


def make(**options):
    small = {
        "num_positives": 6,
        "num_negatives": 10,
        "hard_fraction": 0.5,
        "pixel_queue_size": 21,
        "region_queue_size": 6,
        "pixels_per_image": 4,
        "bank_dtype": torch.float32,
    }
    return pico_fast.PiCoLoss(CLASSES, DIM, **(small | EVERY | options))


def batch(images, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    embeddings = normalize(torch.randn(images, DIM, SIZE, SIZE, generator=g), dim=1).to(dtype)
    labels = torch.randint(-1, CLASSES, (images, SIZE, SIZE), generator=g)
    # not every class on every rank
    labels = torch.where(labels == seed % CLASSES, -1, labels)
    return embeddings, labels


def batches(step, ranks, dtype=torch.float32):
    """Uneven batches: from no image to two."""
    return [batch((step + rank) % 3, 10 * step + rank, dtype) for rank in range(ranks)]


def precise_batches(step, ranks):
    return batches(step, ranks, torch.float64)


def joined(parts):
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def step_of(criterion, embeddings, labels):
    embeddings = embeddings.clone().requires_grad_()
    loss = criterion(embeddings, labels)
    (grad,) = torch.autograd.grad(loss, embeddings)
    return loss.detach(), grad


def whole_storage(criterions):
    return torch.cat([c.bank.storage for c in criterions], 1)


def train(n, monkeypatch, steps=5, of=batches, **options):
    def work(rank):
        criterion = make(**options)
        out = [step_of(criterion, *of(step, n)[rank]) for step in range(steps)]
        return criterion, out

    return virtual_ranks.run(n, work, monkeypatch)


@pytest.mark.parametrize(("n", "max_images"), ((2, None), (3, 3), (4, None)))
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_loss_gradient_and_bank_are_those_of_one_process(sampling, placement, n, max_images, monkeypatch):
    """In float64, so that no similarity lies within a rounding of a bound."""
    options = {"sampling": sampling, "bank_dtype": torch.float64}
    found = train(n, monkeypatch, 4, precise_batches, placement=placement, max_images=max_images, **options)
    alone = make(max_samples=n * EVERY["max_samples"], max_views=SIZE * SIZE, **options)
    for step in range(4):
        loss, grad = step_of(alone, *joined(precise_batches(step, n)))
        losses, grads = zip(*(out[step] for _, out in found), strict=True)
        # the mean over ranks, as DDP makes it
        torch.testing.assert_close(torch.stack(losses).mean(), loss)
        torch.testing.assert_close(torch.cat(grads) / n, grad)
        assert (loss > 0) == (step > 0) and grad.any() == (step > 0)
    for rank, (criterion, _) in enumerate(found):
        bank = criterion.bank
        for name in ("pixel_count", "pixel_next", "region_count", "region_next", "step"):
            assert torch.equal(getattr(bank, name), getattr(alone.bank, name)), name
        if placement == "replicated":
            torch.testing.assert_close(bank.storage, alone.bank.storage)
            assert torch.equal(bank.storage, found[0][0].bank.storage)
            assert torch.equal(bank.storage[:, :21], alone.bank.storage[:, :21])
        else:
            part = alone.bank.storage.chunk(n, 1)[rank]
            torch.testing.assert_close(bank.storage, part)
            keys, labels = bank.keys()
            expected = alone.bank.keys()[1].view(CLASSES, -1).chunk(n, 1)[rank].flatten()
            assert torch.equal(labels, expected) and keys.data_ptr() == bank.storage.data_ptr()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sharded_bank_gives_what_contrast_gives(sampling, dtype, monkeypatch):
    counts = {"num_positives": 6, "num_negatives": 10, "hard_fraction": 0.5}
    n = 3
    found = train(
        n,
        monkeypatch,
        of=lambda step, n: batches(step, n, dtype),
        sampling=sampling,
        placement="sharded",
        bank_dtype=dtype,
        **counts,
    )
    alone = make(bank_dtype=dtype)
    for step in range(5):
        parts = batches(step, n, dtype)
        anchors, labels = [], []
        for x, y in parts:
            pixel, label = pico_fast.sample_anchors(y, None, **EVERY, num_classes=CLASSES, ignore_index=255)
            rows = x.permute(0, 2, 3, 1).flatten(0, 2)
            anchors.append(rows[pixel] if len(rows) else rows.new_zeros(len(pixel), DIM))
            labels.append(label)
        keys, key_labels = alone.bank.keys()
        expected = pico_fast.contrast(
            torch.cat(anchors),
            torch.cat(labels),
            keys,
            key_labels,
            sampling=sampling,
            seed=draws.step_seed(0, torch.tensor(step)),
            **counts,
        )
        loss = torch.stack([out[step][0] for _, out in found]).mean()
        assert loss.dtype == torch.float32
        tolerance = 2e-3 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=1e-5)
        alone.bank.write(*joined(parts))
    assert found[0][1][4][0] > 0


def test_local_is_one_process_each(monkeypatch):
    found = train(2, monkeypatch, placement="local")
    for rank, (criterion, out) in enumerate(found):
        alone = make()
        for step in range(5):
            for mine, theirs in zip(out[step], step_of(alone, *batches(step, 2)[rank]), strict=True):
                assert torch.equal(mine, theirs)
        assert torch.equal(criterion.bank.storage, alone.bank.storage)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_more_ranks_than_slots(sampling, monkeypatch):
    """So few keys that every sampling takes all; the last rank holds none."""
    small = {"pixel_queue_size": 2, "region_queue_size": 1, "num_negatives": 20}
    small |= {"sampling": sampling, "hard_fraction": 1.0}
    found = train(4, monkeypatch, placement="sharded", **small)
    alone = make(max_samples=4 * EVERY["max_samples"], **small)
    for step in range(5):
        loss, _ = step_of(alone, *joined(batches(step, 4)))
        losses = torch.stack([out[step][0] for _, out in found])
        torch.testing.assert_close(losses.mean(), loss, rtol=1e-5, atol=1e-6)
    assert found[3][0].bank.storage.shape[1] == 0 and loss > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_in_batch_the_mean_is_over_all_ranks(placement, monkeypatch):
    queues = {"pixel_queue_size": 0, "region_queue_size": 0, "sampling": "all"}
    found = train(2, monkeypatch, 2, placement=placement, **queues)
    for step in range(2):
        sums, counts = [], []
        for x, y in batches(step, 2):
            criterion = make(**queues)
            counts.append((y >= 0).sum())
            sums.append(criterion(x, y).detach() * counts[-1])
        expected = sum(sums) / sum(counts)
        losses = torch.stack([out[step][0] for _, out in found])
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-6)
        assert expected > 1


def test_wrong_ranks_are_named(monkeypatch):
    def reference_of_two(rank):
        make(impl="reference")(*batch(1, 0))

    with pytest.raises(ValueError, match=r"^impl: expected None"):
        virtual_ranks.run(2, reference_of_two, monkeypatch)

    def too_many(rank):
        make(max_images=1)(*batch(2, 0))

    with pytest.raises(ValueError, match=r"^labels: expected at most max_images = 1"):
        virtual_ranks.run(2, too_many, monkeypatch)
    alone = make(placement="sharded")

    def grown(rank):
        criterion = copy.copy(alone)
        criterion.bank.ranks = make(placement="sharded").bank.ranks
        criterion(*batch(1, 0))

    with pytest.raises(ValueError, match=r"^placement: expected the 1 ranks"):
        virtual_ranks.run(2, grown, monkeypatch)


@pytest.mark.parametrize("sizes", ((33, 7), (9, 2), (1, 0)))
@pytest.mark.parametrize("n", (2, 3))
def test_a_sharded_bank_gets_the_size_that_a_whole_one_gets(n, sizes, monkeypatch):
    def work(rank):
        criterion = make(sampling="all", placement="sharded")
        for step in range(3):
            step_of(criterion, *batches(step, n)[rank])
        criterion.bank.resize(*sizes)
        return criterion, step_of(criterion, *batches(3, n)[rank])

    found = virtual_ranks.run(n, work, monkeypatch)
    alone = make(sampling="all", max_samples=n * EVERY["max_samples"], max_views=SIZE * SIZE)
    for step in range(3):
        step_of(alone, *joined(batches(step, n)))
    alone.bank.resize(*sizes)
    loss, _ = step_of(alone, *joined(batches(3, n)))
    losses = torch.stack([loss for _, (loss, _) in found])
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-5, atol=1e-6)
    for rank, (criterion, _) in enumerate(found):
        part = alone.bank.storage.chunk(n, 1)
        part = part[rank] if rank < len(part) else alone.bank.storage[:, :0]
        torch.testing.assert_close(criterion.bank.storage, part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_nan_on_one_rank_is_refused_by_all_and_spoils_none(placement, sampling, monkeypatch):
    def work(rank):
        criterion = make(sampling=sampling, placement=placement)
        out = []
        for step in range(3):
            embeddings, labels = batch(2, 20 + step + 7 * rank)
            if rank == 1 and step == 1:
                embeddings[1, 3, 2, 2] = math.nan
                labels[1, 2, 2] = 3
            out.append(step_of(criterion, embeddings, labels))
        return criterion, out

    found = virtual_ranks.run(2, work, monkeypatch)
    refused = {int(criterion.bank.refused) for criterion, _ in found}
    assert len(refused) == 1 and refused <= {1, 2}  # its region, and the pixel where it was drawn
    others = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    others[1, 2, 2] = False
    for rank, (criterion, out) in enumerate(found):
        assert criterion.bank.storage.isfinite().all()
        for step, (loss, grad) in enumerate(out):
            spoiled = rank == 1 and step == 1
            kept = grad.movedim(1, 3)[others] if spoiled else grad
            assert loss.isnan() == spoiled and kept.isfinite().all()


def test_a_recorded_backward_raises_on_shards_too(monkeypatch):
    def work(rank):
        criterion = make(sampling="all", placement="sharded")
        embeddings, labels = batch(2, rank)
        criterion(embeddings, labels)
        x = embeddings.requires_grad_()
        with pytest.raises(RuntimeError, match="contrast: expected a backward without create_graph"):
            torch.autograd.grad(criterion(x, labels), x, create_graph=True)

    virtual_ranks.run(2, work, monkeypatch)
