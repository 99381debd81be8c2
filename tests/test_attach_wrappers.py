"""A tapped model in what models get wrapped in, and with labels as they come."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from tapped import CLASSES, IN_BATCH, Network, assert_same, batch, gradients, joint, make, seeded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# the compiler lists torch's functions once; it must see the true ones, before a fixture wraps any
torch._dynamo.trace_rules.get_torch_obj_rule_map()


def _rank(rank, world, store):
    """One of two processes: gradients are the mean of those that each would have alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, labels = batch(seed=rank)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model, tap = make()
        expected = gradients(model, tap, images, labels, placement="local")
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= world
        model.zero_grad()
        wrapped = DistributedDataParallel(model, **options)
        loss_function = joint(**IN_BATCH, placement="local")
        for _ in range(2):  # DDP learns the order of the gradients in the first step
            wrapped.zero_grad()
            loss_function.criterion.step.zero_()
            loss_function(wrapped(images), tap.embeddings(), labels).backward()
            assert_same({n: p.grad for n, p in model.named_parameters()}, expected, atol=1e-5)
    # first: a group that goes with its last wrapper may wait for a thread that waits for the interpreter
    del wrapped
    dist.destroy_process_group()


class Whole(nn.Module):
    """Model and loss in one module, as Lightning wraps them."""

    def __init__(self):
        super().__init__()
        self.model, self.tap = make()
        self.joint = joint(placement="local")

    def forward(self, images, labels):
        return self.joint(self.model(images), self.tap.embeddings(), labels)


def _rank_with_a_bank(rank, world, store):
    """DDP copies the first rank's buffers to all others before each step; the bank is none of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, labels = batch(seed=rank)
    alone, whole = Whole(), Whole()
    wrapped = DistributedDataParallel(whole)
    for _ in range(3):
        alone(images, labels)
        wrapped(images, labels)
    bank, expected = whole.joint.criterion.bank, alone.joint.criterion.bank
    assert bank.pixel_count.sum() > 0
    assert torch.equal(bank.pixel_count, expected.pixel_count)
    found = [torch.empty_like(bank.storage) for _ in range(world)]
    dist.all_gather(found, bank.storage)
    assert not torch.equal(*found)
    del wrapped
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("work", [_rank, _rank_with_a_bank])
def test_two_ranks_of_ddp(tmp_path, work):
    processes.spawn(work, args=(2, tmp_path / "store"), nprocs=2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(backend):
    torch.compiler.reset()
    model, tap = make()
    images, labels = batch()
    expected = gradients(model, tap, images, labels)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(gradients(model, tap, images, labels, compiled), expected, atol=1e-5)
    compiled.eval()(images)
    with pytest.raises(RuntimeError, match="no features"):
        tap.embeddings()


def test_a_whole_step_compiles_without_a_break():
    torch.compiler.reset()
    model, tap = make()
    images, labels = batch()
    loss_function = joint()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, labels):
        return loss_function(model(images), tap.embeddings(), labels)

    for _ in range(2):
        step(images, labels).backward()
    assert loss_function.criterion.step == 2 and tap.head[0].weight.grad.abs().sum() > 0


def test_checkpointing_without_reentry():
    images, labels = batch()
    expected = gradients(*make(), images, labels)
    assert_same(gradients(*make(model=seeded(Network, "no reentry")), images, labels), expected)


def test_reentrant_checkpointing_says_what_to_do():
    model, tap = make(model=Network("reentrant"))
    images, _ = batch()
    model(images.requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        tap.embeddings()


def test_autocast():
    model, tap = make()
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        loss = joint(**IN_BATCH)(logits, tap.embeddings(), labels)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16_gets_a_head_in_bfloat16():
    model, tap = make(model=Network().bfloat16())
    images, labels = batch()
    gradients(model, tap, images.bfloat16(), labels)
    assert tap.head[0].weight.dtype == torch.bfloat16


def test_accumulated_gradients_are_the_sum():
    model, tap = make()
    batches = [batch(seed) for seed in range(3)]
    parts = [gradients(model, tap, *one) for one in batches]
    model.zero_grad()
    for images, labels in batches:
        joint(**IN_BATCH)(model(images), tap.embeddings(), labels).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    assert_same(whole, {name: sum(part[name] for part in parts) for name in whole}, atol=1e-5)


def test_channels_last():
    model, tap = make()
    images, labels = batch()
    expected = gradients(model, tap, images, labels)
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    assert_same(gradients(model, tap, images, labels), expected, atol=1e-5)


# labels as they come


def test_pixels_to_leave_out_change_nothing():
    model, tap = make()
    images, labels = batch()
    left_out = torch.rand(labels.shape) < 0.3
    losses = []
    for value in (255, -1):
        loss_function = joint(**IN_BATCH)
        losses.append(loss_function(model(images), tap.embeddings(), labels.masked_fill(left_out, value)))
    assert torch.equal(*losses) and losses[0].isfinite()


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (33, 21), (3, 5)])
def test_labels_of_any_size(size):
    model, tap = make()
    images, _ = batch()
    labels = torch.randint(0, CLASSES, (2, *size))
    loss = joint(**IN_BATCH)(model(images), tap.embeddings(), labels)
    loss.backward()
    assert loss.isfinite() and tap.head[3].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("labels", ["all left out", "too few of each class"])
def test_a_batch_in_which_no_class_qualifies(labels):
    model, tap = make()
    images, some = batch()
    options = {} if labels == "all left out" else {"min_pixels": 1000}
    some = torch.full_like(some, 255) if labels == "all left out" else some
    loss_function = joint(**options)
    loss_function(model(images), tap.embeddings(), some).backward()
    assert loss_function.criterion.stats["anchors"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in tap.parameters())
