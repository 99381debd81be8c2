"""The drop-in against the formula that the authors released; all losses under a compiler.

A compiler needs whole graphs, and no value that is read back to the host.
"""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import interpolate, normalize

import pico_fast
from pico_fast import draws
from pico_fast.selection.options import SAMPLINGS

# the compiler lists torch's functions once; it must see the true ones, before a fixture wraps any
torch._dynamo.trace_rules.get_torch_obj_rule_map()

MIXES = pico_fast.Synthesis(3, 2, 4)


def authors_formula(anchors, labels, temperature, base_temperature):
    """`_contrastive` of the released code: the batch against itself."""
    same = (labels[:, None] == labels).to(anchors.dtype)
    logits = anchors @ anchors.T / temperature
    logits = logits - logits.max(1, keepdim=True)[0].detach()
    exp_logits = torch.exp(logits)
    neg_sum = (exp_logits * (1 - same)).sum(1, keepdim=True)
    positive = same * (1 - torch.eye(len(labels), dtype=same.dtype))
    log_prob = logits - torch.log(exp_logits + neg_sum)
    mean_log_prob = (positive * log_prob).sum(1) / positive.sum(1)
    return -(temperature / base_temperature) * mean_log_prob.mean()


def queue_formula(anchors, labels, queue, temperature):
    """Every row of queue [C, T, D] is a key of its class; float64, anchor by anchor."""
    each = []
    for anchor, label in zip(anchors.double(), labels.tolist(), strict=True):
        s = queue.double() @ anchor / temperature
        z = torch.cat([s[c] for c in range(len(queue)) if c != label]).logsumexp(0)
        each.append(torch.log1p(torch.exp(z - s[label])).mean())
    return torch.stack(each).mean()


def batch(classes=4, images=2, dim=16, size=16, dtype=torch.float32):
    feats = normalize(torch.randn(images, dim, size, size, dtype=dtype), dim=1)
    labels = torch.randint(0, classes, (images, size, size))
    labels[:, :2] = 255
    predict = torch.randint(0, classes, (images, size, size))
    return feats.requires_grad_(), labels, predict


def anchors_of(loss, feats, labels, predict, step=0):
    """The rows that the module compares: its own sampling at this step."""
    pixel, label = pico_fast.sample_anchors(
        labels,
        predict,
        loss.max_samples,
        loss.max_views,
        loss.max_views + 1,
        num_classes=loss.num_classes,
        seed=draws.step_seed(loss.seed, step),
    )
    rows = feats.permute(0, 2, 3, 1).flatten(0, 2)[pixel[pixel >= 0]]
    return rows, label[pixel >= 0]


@pytest.mark.parametrize("max_views", [5, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_in_batch_equals_the_authors_formula(temperature, max_views):
    feats, labels, predict = batch()
    loss = pico_fast.PixelContrastLoss(temperature, max_samples=100, max_views=max_views, seed=3)
    for step in range(3):
        mine = loss(feats, labels, predict)
        rows, row_labels = anchors_of(loss, feats, labels, predict, step)
        assert len(rows) == 8 * min(100 // 8, max_views)
        theirs = authors_formula(rows.double(), row_labels, temperature, 0.07)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(mine, feats)
        (expected,) = torch.autograd.grad(theirs, feats)
        assert (grad - expected).norm() < 1e-5 * expected.norm()
    assert int(loss.step) == 3


def test_queue_equals_the_formula_and_wants_no_gradient():
    feats, labels, predict = batch()
    queue = normalize(torch.randn(4, 30, 16), dim=2)
    loss = pico_fast.PixelContrastLoss(0.1, 0.2, max_samples=64, max_views=10)
    mine = loss(feats, labels, predict, queue=queue)
    rows, row_labels = anchors_of(loss, feats, labels, predict)
    theirs = queue_formula(rows, row_labels, queue, 0.1) * 0.5
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(mine, feats)
    (expected,) = torch.autograd.grad(theirs, feats)
    assert (grad - expected).norm() < 1e-5 * expected.norm()
    # anchors of a class that the queue does not have find no positive and do not count
    few = pico_fast.PixelContrastLoss(0.1, 0.2, max_samples=64, max_views=10)
    known = row_labels < 2
    expected = queue_formula(rows[known], row_labels[known], queue[:2], 0.1) * 0.5
    torch.testing.assert_close(few(feats, labels, predict, queue[:2]).double(), expected, rtol=1e-5, atol=0)


def test_labels_and_predictions_come_at_any_resolution():
    feats, _, _ = batch()
    labels = torch.randint(0, 4, (2, 31, 50))
    scores = torch.randn(2, 6, 7, 9)

    def value(labels, predict):
        return pico_fast.PixelContrastLoss(max_views=4, max_samples=64)(feats, labels, predict)

    resized = interpolate(labels[:, None].float(), (16, 16), mode="nearest")[:, 0].long()
    predicted = interpolate(scores.argmax(1)[:, None].float(), (16, 16), mode="nearest")[:, 0]
    expected = value(resized, predicted.long())
    assert torch.equal(value(labels, scores), expected)
    assert torch.equal(value(labels.int(), scores.argmax(1)), expected)
    assert torch.equal(value(labels.to(torch.uint8), predicted.to(torch.uint8)), expected)
    # what was predicted decides which pixels are drawn
    assert not torch.equal(value(labels, None), expected)


def test_a_class_needs_more_than_max_views_pixels():
    feats, labels, predict = batch()
    few = torch.full_like(labels, 255)
    few[:, 0, :5], few[:, 1, :5] = 0, 1
    loss = pico_fast.PixelContrastLoss(max_views=5)
    for used in (few, torch.full_like(labels, 255), torch.full_like(labels, -7)):
        value = loss(feats, used, predict)
        (grad,) = torch.autograd.grad(value, feats)
        assert float(value.detach()) == 0.0 and (grad == 0).all()
        queue = torch.randn(2, 3, 16)
        assert float(loss(feats, used, predict, queue).detach()) == 0.0
    few[:, 0, 5] = 0
    few[:, 1, 5] = 1
    assert float(loss(feats, few, predict).detach()) > 0.0


def test_step_advances_in_training_only_and_decides_the_draw():
    feats, labels, predict = batch()
    loss = pico_fast.PixelContrastLoss(max_views=4, max_samples=32)
    first, second = loss(feats, labels, predict), loss(feats, labels, predict)
    assert not torch.equal(first, second) and int(loss.step) == 2
    loss.eval()
    assert torch.equal(loss(feats, labels, predict), loss(feats, labels, predict))
    assert int(loss.step) == 2 and loss.step.dtype == torch.int64
    again = pico_fast.PixelContrastLoss(max_views=4, max_samples=32)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(feats, labels, predict), loss(feats, labels, predict))
    other = pico_fast.PixelContrastLoss(max_views=4, max_samples=32, seed=1)
    assert not torch.equal(other(feats, labels, predict), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    feats, labels, predict = batch()
    cast = feats.detach().to(dtype).requires_grad_()
    loss = pico_fast.PixelContrastLoss(max_views=10, max_samples=64)
    value = loss(cast, labels, predict)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad(value, cast)
    assert grad.dtype == dtype
    rows, row_labels = anchors_of(loss, cast.detach().double(), labels, predict)
    expected = authors_formula(rows, row_labels, 0.1, 0.07)
    tolerance = 1e-5 if dtype.itemsize >= 4 else 1e-2
    torch.testing.assert_close(value.detach().double(), expected, rtol=tolerance, atol=0)


# --- under a compiler

GPU = "cuda:0"


def make(**options):
    small = {
        "num_positives": 6,
        "num_negatives": 10,
        "max_samples": 24,
        "pixel_queue_size": 24,
        "region_queue_size": 5,
        "pixels_per_image": 4,
        "synthesis": MIXES,
    }
    return pico_fast.PiCoLoss(4, 16, **(small | options))


def any_batch(device="cpu"):
    x = normalize(torch.randn(2, 16, 10, 10, device=device), dim=1).requires_grad_()
    labels = torch.randint(0, 4, (2, 20, 20), device=device)
    return x, labels, torch.randn(2, 4, 5, 5, device=device)


def rows(dtype=torch.float32):
    anchors, keys = torch.randn(7, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    anchor_labels = torch.tensor([0, 0, 1, 1, 2, -1, 3])
    return anchors, anchor_labels, keys, torch.arange(11) % 4 - (torch.arange(11) == 5).long() * 9


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_contrast_compiles_whole(sampling, in_batch):
    torch._dynamo.reset()  # one function is compiled for all of these, and it knows a limit
    anchors, anchor_labels, keys, key_labels = rows()
    pair = (None, None) if in_batch else (keys.requires_grad_(), key_labels)
    wants = [anchors.requires_grad_()] + [t for t in pair[:1] if t is not None]

    counts = {"num_positives": 3, "num_negatives": 4, "hard_fraction": 0.5}

    def loss(seed):
        return pico_fast.contrast(
            anchors, anchor_labels, *pair, sampling=sampling, synthesis=MIXES, seed=seed, **counts
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        mine, expected = compiled(torch.tensor(seed)), loss(seed)
        assert torch.equal(mine, expected) and expected > 0
        for grad, other in zip(
            torch.autograd.grad(mine, wants), torch.autograd.grad(expected, wants), strict=True
        ):
            torch.testing.assert_close(grad, other)


@pytest.mark.parametrize(
    ("sampling", "queues"), [*((name, (24, 5)) for name in SAMPLINGS), ("all", (0, 0))]
)
def test_the_criterion_step_compiles_whole(sampling, queues):
    criterion = make(sampling=sampling, pixel_queue_size=queues[0], region_queue_size=queues[1])
    joint = pico_fast.JointLoss(criterion, warmup_steps=2)
    eager = copy.deepcopy(joint)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(joint, fullgraph=True, backend=frames)
    for _ in range(4):
        x, labels, logits = any_batch()
        mine, expected = compiled(logits, x, labels), eager(logits, x, labels)
        torch.testing.assert_close(mine, expected)
        (grad,), (other,) = torch.autograd.grad(mine, x), torch.autograd.grad(expected, x)
        torch.testing.assert_close(grad, other)
        state = eager.state_dict()
        for name, value in joint.state_dict().items():
            torch.testing.assert_close(value, state[name], msg=name)
    assert grad.norm() > 0 and int(criterion.step) == 4
    # neither the steps nor the end of the warm-up compile anew
    assert frames.frame_count == 1


@pytest.mark.parametrize("queues", [(24, 5), (0, 0)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_reads_nothing_back(sampling, queues):
    # tensors without values: whatever would have to wait for one raises here
    options = {"pixel_queue_size": queues[0], "region_queue_size": queues[1]}
    criterion = make(sampling=sampling, **options).to("meta")
    for _ in range(2):
        x, labels, logits = any_batch("meta")
        loss = pico_fast.JointLoss(criterion).to("meta")(logits, x, labels)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.dtype == torch.float32 and grad.shape == x.shape and grad.is_meta
    # the branches of a GPU; autograd wants the driver, so this half is without a gradient
    with FakeTensorMode(), torch.no_grad():
        criterion = make(sampling=sampling, **options).to(GPU)
        assert criterion.bank.storage.is_cuda and criterion.step.is_cuda
        loss = criterion(*any_batch(GPU))
        assert loss.is_cuda and loss.dtype == torch.float32
        assert all(value.is_cuda for value in criterion.stats.values())


def test_reading_back_would_be_noticed():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones((), device=GPU).item()
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()
    with pytest.raises(NotImplementedError):
        torch.ones(3, device="meta").nonzero()


def test_the_dropin_compiles_whole_and_reads_nothing_back():
    loss = pico_fast.PixelContrastLoss(max_samples=40, max_views=4)
    eager = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    queue = torch.randn(4, 6, 16)
    for step in range(3):
        x, labels, logits = any_batch()
        mine, expected = (f(x, labels, logits, queue) for f in (compiled, eager))
        torch.testing.assert_close(mine, expected)
        (grad,), (other,) = torch.autograd.grad(mine, x), torch.autograd.grad(expected, x)
        torch.testing.assert_close(grad, other)
        assert grad.norm() > 0 and int(loss.step) == step + 1
    x, labels, logits = any_batch("meta")
    (grad,) = torch.autograd.grad(eager.to("meta")(x, labels, logits, queue.to("meta")), x)
    assert grad.shape == x.shape and grad.is_meta
