"""The method whole: PiCoLoss and JointLoss over several training steps, and what surrounds them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize, one_hot

import pico_fast
from pico_fast import draws
from pico_fast.selection.options import POSITIVES, SAMPLINGS

CLASSES, DIM = 4, 16
IN_BATCH = {"pixel_queue_size": 0, "region_queue_size": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(**options):
    small = {
        "num_positives": 6,
        "num_negatives": 10,
        "hard_fraction": 0.5,
        "max_samples": 24,
        "max_views": 5,
        "pixel_queue_size": 24,
        "region_queue_size": 5,
        "pixels_per_image": 4,
        "bank_dtype": torch.float32,
    }
    return pico_fast.PiCoLoss(CLASSES, DIM, **(small | options))


def batch(step=0, images=2, size=10, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    embeddings = normalize(torch.randn(images, DIM, size, size, generator=g, dtype=dtype), dim=1)
    labels = torch.randint(0, CLASSES, (images, 2 * size, 2 * size), generator=g)
    labels[:, :4] = 255
    logits = torch.randn(images, CLASSES, size, size, generator=g)
    return embeddings.requires_grad_(), labels, logits


def train(criterion, steps=3, first=0, of=batch):
    out = []
    for step in range(first, first + steps):
        embeddings, labels, logits = of(step)
        loss = criterion(embeddings, labels, logits)
        out += [loss.detach(), *torch.autograd.grad(loss, embeddings)]
    return out


def same_bits(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and same_bits(first.values(), second.values())


@pytest.mark.parametrize("queues", [(24, 5), (24, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("synthesis", [None, pico_fast.Synthesis(5, 4, 6)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_training_equals_the_reference(sampling, synthesis, queues):
    sizes = dict(zip(IN_BATCH, queues, strict=True))
    options = {"sampling": sampling, "synthesis": synthesis, **sizes}
    if synthesis is None:  # each sampling with other positives than its own as well
        options["positives"] = POSITIVES[(SAMPLINGS.index(sampling) + 1) % len(POSITIVES)]
    fast, slow = make(**options), make(impl="reference", **options)
    losses = []
    for step in range(4):
        (x, labels, logits), (y, _, _) = batch(step), batch(step)
        mine, theirs = fast(x, labels, logits), slow(y, labels, logits)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
        for name in ("anchors", "hard_anchors", "pixel_fill", "region_fill"):
            assert fast.stats[name] == slow.stats[name], name
        for name in ("positive_similarity", "negative_similarity"):
            torch.testing.assert_close(fast.stats[name], slow.stats[name], rtol=1e-4, atol=1e-6)
        (grad,), (expected,) = torch.autograd.grad(mine, x), torch.autograd.grad(theirs, y)
        # the same anchors, and no other pixel has a gradient
        assert torch.equal(grad.abs().sum(1) > 0, expected.abs().sum(1) > 0)
        assert (grad - expected).norm() <= 1e-4 * expected.norm()
        mine, theirs = fast.bank.storage, slow.bank.storage
        assert torch.equal(mine[:, : queues[0]], theirs[:, : queues[0]])
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        for name in ("pixel_count", "region_count"):
            assert torch.equal(getattr(fast.bank, name), getattr(slow.bank, name))
        losses.append(expected.norm() > 0)
    # the first step meets an empty bank; without queues the batch is compared with itself
    assert losses == [queues == (0, 0), True, True, True]
    assert fast.stats["anchors"] == 24 and int(fast.step) == 4


def test_the_bank_is_read_as_it_was_before_the_batch():
    criterion, bank = make(sampling="all"), pico_fast.MemoryBank(4, DIM, 24, 5, 4, torch.float32)
    train(criterion, 2)
    for step in range(3):
        x, labels, logits = batch(step)
        on_grid = interpolate(labels[:, None].float(), (10, 10), mode="nearest")[:, 0].long()
        if step < 2:
            bank.enqueue(x, on_grid)
    assert same_state(criterion.bank, bank)
    keys, key_labels = bank.keys()
    pixel, anchor_labels = pico_fast.sample_anchors(
        on_grid, logits, 24, 5, 1, num_classes=CLASSES, seed=draws.step_seed(0, 2)
    )
    anchors = x.permute(0, 2, 3, 1).flatten(0, 2)[pixel]
    expected = pico_fast.contrast(anchors.double(), anchor_labels, keys, key_labels, impl="reference")
    loss = criterion(x, labels, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # the update came before this backward and left no trace in it
    (grad,), (theirs,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes_and_sentinels_mean_the_same(dtype):
    expected = train(make())
    assert expected[2] > 0

    def marked(step, ignored=255):
        x, labels, logits = batch(step)
        if dtype != torch.uint8:
            labels[:, 1], labels[:, 2] = -1, -100
        return x, labels.where(labels != 255, ignored).to(dtype), logits

    assert same_bits(train(make(), of=marked), expected)
    if dtype != torch.uint8:
        for ignored in (-1, -100):
            criterion = make(ignore_index=ignored)
            assert same_bits(train(criterion, of=lambda s: marked(s, -1)), expected)


def test_logits_of_any_resolution_integer_predictions_or_none():
    def after(change):
        def of(step):
            x, labels, logits = batch(step)
            return x, labels, change(logits)

        criterion = make()
        # the last is the share of hard anchors
        return [*train(criterion, of=of), criterion.stats["hard_anchors"]]

    expected = after(lambda z: z)
    assert 0 < expected[-1] < 1
    assert same_bits(after(lambda z: z.argmax(1)), expected)
    assert same_bits(after(lambda z: z.argmax(1).to(torch.uint8)), expected)
    assert same_bits(after(lambda z: z.repeat_interleave(3, 2).repeat_interleave(2, 3)), expected)
    assert same_bits(
        after(lambda z: z[..., ::2, ::2]),
        after(lambda z: z[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)),
    )
    without = after(lambda z: None)
    assert without[-1] == 0 and not torch.equal(without[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_dtypes(dtype):
    criterion, exact = make(sampling="all"), make(sampling="all", impl="reference")
    for step in range(3):
        x, labels, logits = batch(step)
        x = x.detach().to(dtype).requires_grad_()
        loss = criterion(x, labels, logits)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.dtype == dtype and grad.isfinite().all()
        expected = exact(x.detach().double(), labels, logits)
        close = {"rtol": 1e-5 if dtype.itemsize >= 4 else 1e-2, "atol": 1e-6}
        torch.testing.assert_close(loss.detach().double(), expected, **close)
    assert criterion.bank.storage.dtype == torch.float32 and loss > 0


def test_base_temperature_scales():
    plain, scaled = make(temperature=0.2), make(temperature=0.2, base_temperature=0.05)
    for a, b in zip(train(plain), train(scaled), strict=True):
        torch.testing.assert_close(b, 4 * a)


EMPTY = {
    "first step": ({}, lambda x, y, z: (x, y, z)),
    "no image": ({}, lambda x, y, z: (x[:0], y[:0], z[:0])),
    "no image, in batch": (IN_BATCH, lambda x, y, z: (x[:0], y[:0], z[:0])),
    "no class has enough": ({"min_pixels": 500}, lambda x, y, z: (x, y, z)),
    "all ignored": ({}, lambda x, y, z: (x, torch.full_like(y, 255), z)),
    "one class alone": (IN_BATCH, lambda x, y, z: (x, torch.zeros_like(y), z)),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_compare_is_zero_on_the_graph(name, impl):
    options, change = EMPTY[name]
    criterion = make(impl=impl, **options)
    for step in range(1 if name == "first step" else 2):
        x, labels, logits = batch(step)
        loss = criterion(*change(x, labels, logits))
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0.0 and (grad == 0).all()
        assert all(value.isfinite() for value in criterion.stats.values())
    assert int(criterion.step) == step + 1
    if name in ("no image", "all ignored"):
        assert criterion.bank.pixel_count.sum() == 0 and criterion.bank.region_count.sum() == 0


def test_fewer_pixels_than_asked():
    criterion = make(max_samples=500, max_views=400)
    losses = train(criterion)
    assert criterion.stats["anchors"] == 2 * 8 * 10 and losses[-2] > 0


def test_a_vector_that_is_not_finite_is_not_stored():
    criterion = make()
    x, labels, logits = batch(images=1)
    labels[:, 4:] = 1
    labels[:, 4:, 10:] = 2
    with torch.no_grad():
        x[0, 3, 6, 1], x[0, 0, 5, 1] = float("nan"), float("inf")
    for _ in range(30):
        criterion(x, labels, logits)
    bank = criterion.bank
    assert bank.storage.isfinite().all()
    assert bank.pixel_count.tolist() == [0, 24, 24, 0] and bank.region_count.tolist() == [
        0,
        0,
        5,
        0,
    ]


def test_eval_neither_advances_nor_writes():
    criterion = make()
    train(criterion, 2)
    before = copy.deepcopy(criterion)
    criterion.eval()
    first, second = (criterion(*batch(2)).detach() for _ in range(2))
    assert same_state(criterion, before)
    assert torch.equal(first, second) and torch.equal(first, before(*batch(2)).detach())
    assert not same_state(criterion, before) and first > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_autocast_changes_nothing(sampling):
    plain = make(sampling=sampling, synthesis=pico_fast.Synthesis(3, 3, 5))
    other = copy.deepcopy(plain)
    expected = train(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(train(other), expected)
    assert same_state(plain, other)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_resumed_training_equals_uninterrupted_training(sampling):
    whole = make(sampling=sampling, synthesis=pico_fast.Synthesis(3, 3, 5))
    train(whole, 3)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    resumed = make(sampling=sampling, synthesis=pico_fast.Synthesis(3, 3, 5))
    resumed.load_state_dict(state)
    assert same_bits(train(resumed, 3, first=3), train(whole, 3, first=3))
    assert same_state(resumed, whole)


@pytest.mark.parametrize(
    "options", [{"pixel_queue_size": 23}, {"region_queue_size": 0}, {"num_classes": 5}]
)
def test_a_bank_of_another_size_is_refused_whole(options):
    trained = make()
    train(trained, 2)
    words = {"num_classes": CLASSES, "pixel_queue_size": 24, "region_queue_size": 5} | options
    other = pico_fast.PiCoLoss(embedding_dim=DIM, **words)
    before = copy.deepcopy(other.bank)
    with pytest.raises(RuntimeError, match=r"bank\.(storage|queue_sizes): expected"):
        other.load_state_dict(trained.state_dict())
    assert same_state(other.bank, before)
    state = trained.state_dict()
    del state["bank.pixel_next"]
    with pytest.raises(RuntimeError, match=r"bank\.pixel_next"):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"bank\.extra"):
        make().load_state_dict(trained.state_dict() | {"bank.extra": torch.zeros(1)})


def test_the_bank_is_no_buffer_and_survives_copies_and_casts():
    criterion = make(bank_dtype=torch.bfloat16)
    assert [name for name, _ in criterion.named_buffers()] == ["step"]
    assert list(criterion.parameters()) == []
    train(criterion, 2)
    twin = copy.deepcopy(criterion)
    assert same_state(twin, criterion)
    train(twin, 1, first=2)
    assert not same_state(twin, criterion) and int(criterion.step) == 2
    before = copy.deepcopy(criterion)
    for cast in (lambda m: m.to(torch.float16), lambda m: m.double(), lambda m: m.half()):
        assert same_state(cast(criterion), before)
        assert criterion.bank.storage.dtype == torch.bfloat16
        assert criterion.step.dtype == criterion.bank.pixel_count.dtype == torch.int64
    assert same_bits(train(criterion, 2, first=2), train(before, 2, first=2))


def test_one_rank_of_a_group_and_the_wrapper(tmp_path):
    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        alone = train(make(), 3)
        for placement in ("replicated", "sharded", "local"):
            assert same_bits(train(make(placement=placement), 3), alone)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))
                self.criterion = make(process_group=dist.group.WORLD)

            def forward(self, x, labels, logits):
                return self.criterion(x * self.scale, labels, logits)

        wrapped = nn.parallel.DistributedDataParallel(Net())
        assert same_bits(train(wrapped, 3), alone)
    finally:
        dist.destroy_process_group()


class Dice(nn.Module):
    def forward(self, logits, labels):
        used = (labels != 255)[:, None]
        target = one_hot(labels.where(labels != 255, 0), CLASSES).movedim(-1, 1) * used
        share = logits.softmax(1) * used
        return 1 - 2 * (share * target).sum() / (share + target).sum().clamp(min=1)


class Ohem(nn.Module):
    def forward(self, logits, labels):
        each = cross_entropy(logits, labels, ignore_index=255, reduction="none").flatten()
        return each.topk(each.numel() // 4)[0].mean()


SEGMENTATION = {
    "default": (None, nn.CrossEntropyLoss(ignore_index=255)),
    "weighted": 2 * (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 0.5]), ignore_index=255),),
    "dice": (Dice(), Dice()),
    "ohem": (Ohem(), Ohem()),
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_joint_loss_is_the_sum_and_warms_up(name):
    given, expected_segmentation = SEGMENTATION[name]
    joint = pico_fast.JointLoss(make(), 0.3, warmup_steps=3, segmentation_loss=given)
    alone = make()
    for step in range(5):
        x, labels, logits = batch(step)
        logits.requires_grad_()
        marked = labels.clone()
        marked[:, 1], marked[:, 2] = -1, -9
        total = joint(logits, x, marked.int())
        wide = interpolate(logits, (20, 20), mode="bilinear", align_corners=False)
        contrast = alone(x, labels, logits) * (0.3 if step >= 3 else 0.0)
        expected = expected_segmentation(wide, labels) + contrast
        torch.testing.assert_close(total, expected)
        grads = (torch.autograd.grad(value, (x, logits)) for value in (total, expected))
        torch.testing.assert_close(*grads)
        assert same_state(joint.criterion, alone)
    assert contrast > 0 and int(joint.step) == 5


def test_joint_loss_without_a_pixel_is_finite_and_serves_the_dropin():
    x, labels, logits = batch()
    logits.requires_grad_()
    for criterion in (make(), pico_fast.PixelContrastLoss(max_views=3)):
        joint = pico_fast.JointLoss(criterion)
        nothing = joint(logits, x, torch.full_like(labels, 255))
        grads = torch.autograd.grad(nothing, (x, logits))
        assert nothing.item() == 0.0 and all((grad == 0).all() for grad in grads)
        assert joint(logits, x, labels) > 1
        joint.eval()
        joint(logits, x, labels)
        assert int(joint.step) == int(criterion.step) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_has_unit_length(dtype):
    head = pico_fast.ProjectionHead(6, 12).to(dtype)
    features = (torch.randn(2, 6, 5, 7) * 30).to(dtype)
    tolerance = 1e-5 if dtype.itemsize >= 4 else 2e-2
    for autocast in (False, True) if dtype == torch.float32 else (False,):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = head(features)
        assert out.shape == (2, 12, 5, 7)
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        length = out.double().norm(dim=1)
        assert (length - 1).abs().max() < (2e-2 if autocast else tolerance)
        out.float().square().sum().backward()
        assert all(p.grad is not None for p in head.parameters())
