"""Real processes and real collectives (gloo): agreement, bytes, wrappers, checkpoints, a rank that dies."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import test_ranks_agree as alike
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pico_fast
from pico_fast.selection.options import POSITIVES, SAMPLINGS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import scaling  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PLACEMENTS = ("replicated", "sharded")
STATE = ("storage", "pixel_count", "pixel_next", "region_count", "region_next", "step")


def start(rank, world, store, timeout=60):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )


def spawn(work, world, tmp_path, *args):
    store = tmp_path / f"store-{time.monotonic_ns()}"
    processes.spawn(work, args=(world, store, *args), nprocs=world)


def trained(criterion, first, last, world):
    """Steps on uneven batches, an empty one in every third."""
    losses = []
    for step in range(first, last):
        losses += alike.step_of(criterion, *alike.batches(step, world)[dist.get_rank()])
    return losses


class Counted:
    """Bytes handed to the collectives."""

    KINDS = {  # noqa: RUF012
        "all_gather_single": ("gather", 1),
        "reduce_scatter_single": ("scatter", 1),
        "all_to_all_single": ("exchange", 1),
        "all_reduce": ("reduce", 0),
    }

    def __enter__(self):
        self.bytes = dict.fromkeys(("gather", "scatter", "exchange", "reduce"), 0)
        self.originals = {name: getattr(dist, name) for name in self.KINDS}
        for name, original in self.originals.items():
            setattr(dist, name, self.counted(original, *self.KINDS[name]))
        return self.bytes

    def counted(self, original, kind, at):
        def call(*args, **words):
            self.bytes[kind] += args[at].numel() * args[at].element_size()
            return original(*args, **words)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def _agree(rank, world, store, sampling):
    """50 steps of every placement: the ranks' banks, and in some steps what one process makes of it."""
    start(rank, world, store)
    options = {"sampling": sampling, "max_images": 3}
    # several ranks are there, and this one is not of them
    everything = {"max_samples": world * alike.EVERY["max_samples"]}
    alone = alike.make(sampling=sampling, placement="local", **everything)
    banks = {}
    ranked = {p: alike.make(placement=p, **options) for p in PLACEMENTS}
    for step in range(50):
        found = {}
        parts = alike.batches(step, world)
        for placement, criterion in ranked.items():
            found[placement] = alike.step_of(criterion, *parts[rank])
            losses = torch.empty(world)
            dist.all_gather_single(losses, found[placement][0].view(1))
            found[placement] += (losses.mean(),)
        if step in (1, 7, 49):
            loss, grad = alike.step_of(alone, *alike.joined(parts))
            own = grad.split([len(x) for x, _ in parts])[rank]
            for mine in found.values():
                torch.testing.assert_close(mine[2], loss, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(mine[1] / world, own, rtol=1e-4, atol=1e-6)
        else:
            alone.bank.write(*alike.joined(parts))
            alone.step.add_(1)
    for placement, criterion in ranked.items():
        bank = banks[placement] = criterion.bank
        for name in STATE[1:]:
            assert torch.equal(getattr(bank, name), getattr(alone.bank, name)), name
    whole = banks["replicated"].storage
    everywhere = whole.new_empty(world * len(whole), *whole.shape[1:])
    dist.all_gather_single(everywhere, whole.contiguous())
    assert all(torch.equal(part, whole) for part in everywhere.chunk(world))
    assert torch.equal(whole.chunk(world, 1)[rank], banks["sharded"].storage)
    assert torch.equal(whole[:, :21], alone.bank.storage[:, :21])
    torch.testing.assert_close(whole, alone.bank.storage, rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


def _bytes(rank, world, store):
    """What the collectives are handed is what docs/scaling.md counts with."""
    start(rank, world, store)
    asked = [("replicated", sampling, None) for sampling in SAMPLINGS]
    chosen = (None, *POSITIVES) if world == 2 else (None,)
    asked += [("sharded", sampling, own) for sampling in SAMPLINGS for own in chosen]
    for placement, sampling, positives in asked:
        options = {"placement": placement, "sampling": sampling, "positives": positives}
        criterion = alike.make(max_images=3, **options)
        x, labels = alike.batches(0, world)[rank]
        x.requires_grad_()
        with Counted() as found:
            criterion(x, labels).backward()
        setting = scaling.Setting(
            world,
            **options,
            classes=alike.CLASSES,
            slots=27,
            channels=alike.DIM,
            anchors=alike.EVERY["max_samples"],
            num_positives=6,
            num_negatives=10,
            hard_fraction=0.5,
            max_images=3,
            pixels_per_image=4,
            bank_bytes=4,
        )
        assert found == scaling.payloads(setting), options
    dist.destroy_process_group()


class Whole(nn.Module):
    """Model and criterion in one module, as Lightning wraps them."""

    def __init__(self, placement):
        super().__init__()
        torch.manual_seed(3)
        self.head = pico_fast.ProjectionHead(3, alike.DIM)
        self.criterion = alike.make(placement=placement, max_images=4, sampling="all")

    def forward(self, images, labels):
        return self.criterion(self.head(images), labels)


def _wrapped(rank, world, store):
    """DDP, FSDP and a compiler leave the bank alone; gradients are those of the whole batch."""
    start(rank, world, store)
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(2 * world, 3, 6, 6, generator=g), None
    labels = torch.randint(-1, alike.CLASSES, (2 * world, 6, 6), generator=g)
    mine = slice(2 * rank, 2 * rank + 2)
    for placement in PLACEMENTS:
        # batch statistics are each rank's own here: one process cannot have them, eval does not need them
        alone = Whole("local")
        alone.criterion.sizes = (world * alike.EVERY["max_samples"], *alone.criterion.sizes[1:])
        wrapped = DistributedDataParallel(Whole(placement), broadcast_buffers=True)
        sharded = Whole(placement)
        from torch.distributed.fsdp import fully_shard

        fully_shard(sharded)
        for module in (alone, wrapped, sharded):
            module.train()
            for head in module.modules():
                if isinstance(head, pico_fast.ProjectionHead):
                    head.eval()
            for _ in range(3):
                module.zero_grad()
                if module is alone:
                    module(images, labels).backward()
                else:
                    module(images[mine], labels[mine]).backward()
        expected = dict(alone.named_parameters())
        bank = wrapped.module.criterion.bank
        assert sharded.criterion.bank.storage.shape == bank.storage.shape
        for name in STATE[1:]:
            for other in (bank, sharded.criterion.bank):
                assert torch.equal(getattr(other, name), getattr(alone.criterion.bank, name)), name
        for name, parameter in wrapped.module.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
        for name, parameter in sharded.named_parameters():
            full = parameter.grad.full_tensor()
            torch.testing.assert_close(full, expected[name].grad, rtol=1e-4, atol=1e-6)
        assert expected["head.0.weight"].grad.any()

        options = {"placement": placement, "max_images": 3}
        if placement == "sharded":  # lists that meet, and a sample that travels
            options |= {"sampling": "hardest", "positives": "random"}
        eager, compiled = (alike.make(**options) for _ in range(2))
        fast = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
        for step in range(3):
            x, y = alike.batch(2, 10 * step + rank)
            torch.testing.assert_close(fast(x, y), eager(x, y))
        assert torch.equal(compiled.bank.storage, eager.bank.storage)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(Whole("replicated"))
    assert isinstance(synced.head[1], nn.SyncBatchNorm)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "sampling"), ((2, "all"), (2, "semi_hard"), (4, "hardest"), (4, "bounded"))
)
def test_ranks_agree_over_50_steps(tmp_path, world, sampling):
    spawn(_agree, world, tmp_path, sampling)


@pytest.mark.parametrize("world", (2, 4))
def test_bytes_are_those_of_the_model(tmp_path, world):
    spawn(_bytes, world, tmp_path)


def test_wrappers_leave_the_bank_alone(tmp_path):
    spawn(_wrapped, 2, tmp_path)


def test_the_page_is_what_the_model_says():
    assert scaling.PAGE.read_text() == scaling.page()


def _save(rank, world, store, folder):
    start(rank, world, store)
    for placement in PLACEMENTS:
        criterion = alike.make(placement=placement, sampling="hardest")
        trained(criterion, 0, 6, world)
        dcp.save({"loss": criterion.state_dict()}, checkpoint_id=str(folder / placement))
    dist.destroy_process_group()


def _loaded(folder, saved, placement):
    criterion = alike.make(placement=placement, sampling="hardest")
    state = {"loss": criterion.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / saved))
    criterion.load_state_dict(state["loss"])
    return criterion


def _load(rank, world, store, folder):
    start(rank, world, store)
    for saved in PLACEMENTS:
        found = {p: _loaded(folder, saved, p) for p in PLACEMENTS}
        whole = found["replicated"].bank
        assert whole.pixel_count.sum() > 0 and int(found["sharded"].step) == 6
        assert torch.equal(whole.storage.chunk(world, 1)[rank], found["sharded"].bank.storage)
        more = [trained(found[p], 6, 8, world) for p in PLACEMENTS]
        for mine, theirs in zip(*more, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        # a state of the whole bank, from anywhere, loads into a share; one of a share does not
        other = alike.make(placement="sharded")
        other.load_state_dict(found["replicated"].state_dict())
        assert torch.equal(other.bank.storage, found["sharded"].bank.storage)
        part = found["sharded"].state_dict()
        part["bank.storage"] = other.bank.storage
        with pytest.raises(RuntimeError, match=r"bank\.storage: expected shape \[5, 27, 16\]"):
            other.load_state_dict(part)
        alike.make().load_state_dict(found["sharded"].state_dict())
    dist.destroy_process_group()


def test_saved_on_four_ranks_loaded_on_two_and_one(tmp_path):
    spawn(_save, 4, tmp_path, tmp_path)
    spawn(_load, 2, tmp_path, tmp_path)
    states = [_loaded(tmp_path, saved, "replicated").state_dict() for saved in PLACEMENTS]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert states[0]["bank.pixel_count"].sum() > 0


def _dies(rank, world, store, folder, placement):
    """Rank 1 is killed in step 5; step 3 was the last to be saved."""
    start(rank, world, store, timeout=10)
    criterion = alike.make(placement=placement)
    trained(criterion, 0, 3, world)
    dcp.save({"loss": criterion.state_dict()}, checkpoint_id=str(folder / "last"))
    trained(criterion, 3, 4, world)
    if rank == 1:
        os.kill(os.getpid(), 9)
    began = time.monotonic()
    try:
        trained(criterion, 4, 5, world)
    except (RuntimeError, dist.DistBackendError):
        (folder / "ended").write_text(str(time.monotonic() - began))
        os._exit(1)
    (folder / "went on").touch()
    os._exit(0)


def _resumes(rank, world, store, folder, placement):
    start(rank, world, store)
    whole, resumed = (alike.make(placement=placement) for _ in range(2))
    trained(whole, 0, 3, world)
    state = {"loss": resumed.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / "last"))
    resumed.load_state_dict(state["loss"])
    for mine, theirs in zip(trained(resumed, 3, 6, world), trained(whole, 3, 6, world), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(resumed.bank.storage, whole.bank.storage)
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_killed_rank_ends_the_others_and_the_checkpoint_resumes(tmp_path, placement):
    with pytest.raises((processes.ProcessExitedException, processes.ProcessRaisedException)):
        # every process is joined: the first to end would end the others otherwise
        context = processes.spawn(_dies, (2, tmp_path / "store", tmp_path, placement), nprocs=2, join=False)
        for process in context.processes:
            process.join(60)
        context.join()
    assert not (tmp_path / "went on").exists()
    assert float((tmp_path / "ended").read_text()) < 20
    spawn(_resumes, 2, tmp_path, tmp_path, placement)


def test_the_example_trains_and_goes_on_with_other_ranks(tmp_path):
    """On two ranks sharded, then from its checkpoint on one."""
    example = str(ROOT / "examples" / "several_gpus.py")
    for ranks, steps, said in ((2, 4, "step 4"), (1, 6, "step 6")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), example, "--placement", "sharded"]
        command += ["--steps", str(steps), "--every", "2", "--checkpoints", str(tmp_path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr
        assert said in run.stdout and "bank" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-6"]
