"""A training that is killed at any moment goes on as if it had never stopped; no checkpoint is half loaded.

The examples' checkpoint.py against kills, full disks, damaged files and files that do not fit.
"""

import errno
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import interrupted_training
import pytest
import torch
from interrupted_training import CPU, Disk, checkpoint

import pico_fast

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
NAN = float("nan")


def values(x: object, where: str = "") -> dict[str, object]:
    """All values of a nested state by their place, tensors as dtype, shape and bytes."""
    if isinstance(x, torch.Tensor):
        raw = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {where: (x.dtype, x.shape, raw)}
    if isinstance(x, (dict, list, tuple)):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        inner = (values(value, f"{where}.{key}") for key, value in items)
        return {where: type(x).__name__} | {k: v for found in inner for k, v in found.items()}
    return {where: x}


def same(a: object, b: object) -> None:
    """Fail unless two states agree bit for bit; names the places where they do not."""
    a, b = values(a), values(b)
    assert [k for k in a.keys() | b.keys() if a.get(k, a) != b.get(k, b)] == []


def stored(file: Path) -> dict:
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def run():
    """Run a task of interrupted_training.py; how it ended."""
    command = [sys.executable, interrupted_training.__file__]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, **pipes) as trainer:

        def run(file: Path, steps: int = 10**6, **task: object) -> dict:
            trainer.stdin.write(json.dumps({"file": str(file), "steps": steps, **task}) + "\n")
            trainer.stdin.flush()
            return json.loads(trainer.stdout.readline())

        yield run
        trainer.stdin.close()


def finish(run, cut: Path, more: int) -> tuple[dict, dict]:
    """The interrupted run `more` steps later, and one of as many steps that nothing has interrupted."""
    whole = cut.with_name("whole.pt")
    steps = stored(cut)["step"] + more
    for file in (cut, whole):
        assert run(file, steps) == {"ended": 0, "saved": steps, "writing": False}
    assert sorted(path.name for path in cut.parent.iterdir()) == sorted([cut.name, whole.name])
    return stored(cut), stored(whole)


def lost_entries(cut: dict, whole: dict) -> int:
    """How many filled slots of the uninterrupted bank the other does not hold, or holds otherwise."""
    name = "criterion.bank."
    theirs, mine = (state["parts"]["joint"] for state in (whole, cut))
    filled = theirs[name + "storage"].ne(0).any(2)
    assert filled.sum() > 1000
    assert (theirs[name + "pixel_count"] == 900).all(), "the ring has gone round"
    equal = (theirs[name + "storage"] == mine[name + "storage"]).all(2)
    return int((filled & ~equal).sum())


def test_killed_at_any_moment(run, tmp_path, full, figures):
    kills, cut, chance = 100 if full else 5, tmp_path / "cut.pt", random.Random(0)
    step = 0
    for _ in range(kills):
        # about half of them when the next checkpoint should be written
        share = chance.choice([chance.uniform(0, 1.2), chance.uniform(0.6, 1.1)])
        found = run(cut, kill=[chance.choice([0, 1, 2, 2, 3]), share])
        assert found["ended"] == -9
        figures.add("interrupted", "kills")
        figures.add("interrupted", "kills while writing", found["writing"])
        before = step
        step = stored(cut)["step"] if cut.exists() else 0
        # nothing that was said to be saved is gone, and no step is skipped
        assert max(before, found["saved"]) <= step <= max(before, found["saved"]) + 1
    mine, uninterrupted = finish(run, cut, 10)
    lost = lost_entries(mine, uninterrupted)
    figures.add("interrupted", "entries lost", lost)
    figures.add("interrupted", "steps", mine["step"])
    assert lost == 0
    same(mine, uninterrupted)


def test_death_at_every_stage_of_saving(run, tmp_path, full, figures):
    cut = tmp_path / "cut.pt"
    assert run(cut, steps=1)["ended"] == 0
    size, chance = cut.stat().st_size, random.Random(1)
    rooms = [0, 1, size // 2, size - 1, *(chance.randrange(size) for _ in range(40 * full))]
    deaths = [("write", room) for room in rooms]
    deaths += [(stage, 0) for stage in ("flush", "fsync", "replace", "replaced", "folder")]
    for stage, room in deaths:
        before = stored(cut)["step"]
        found = run(cut, die_at=stage, saves=1, room=room)
        # one step was saved before the fault was there
        assert found["ended"] == -9 and found["saved"] == before + 1
        is_new = stage in ("replaced", "folder")
        assert stored(cut)["step"] == before + 1 + is_new
        assert found["writing"] == (not is_new)
        figures.add("interrupted", "deaths at a stage of saving")
    same(*finish(run, cut, 8))


def trained(seed: int, steps: int = 3) -> dict:
    """Parts of a small training, some steps old."""
    torch.manual_seed(seed)
    criterion = pico_fast.PiCoLoss(
        4, 16, max_samples=16, pixel_queue_size=20, region_queue_size=4, pixels_per_image=4
    )
    network = torch.nn.Conv2d(3, 20, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    # the bank first: whatever does not fit behind it comes too late for it
    parts = {"joint": pico_fast.JointLoss(criterion), "network": network, "optimizer": optimizer}
    for _ in range(steps):
        out = network(torch.randn(2, 3, 8, 8))
        labels = torch.randint(0, 4, (2, 8, 8))
        parts["joint"](out[:, :4], torch.nn.functional.normalize(out[:, -16:]), labels).backward()
        optimizer.step()
    return parts


def state_of(parts: dict) -> dict:
    """What of the parts a checkpoint holds, as it is now."""
    file = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save(states | {"random": torch.get_rng_state()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Stopped(Exception):
    """No error that anybody expects."""


@pytest.mark.parametrize("stage", ["write", "flush", "fsync", "replace"])
def test_an_error_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, stage):
    file, partial = tmp_path / "run.pt", tmp_path / "run.pt.partial"
    parts, other = trained(0), trained(1)
    checkpoint.save_checkpoint(file, parts, 1, {}, CPU)
    first, size = file.read_bytes(), file.stat().st_size
    full_disk = OSError(errno.ENOSPC, "No space left on device")

    for error in (full_disk, KeyboardInterrupt(), Stopped()):

        def fail(error=error):
            raise error

        for room in (0, 100, size // 2, size - 1) if stage == "write" else (0,):
            disk = Disk(stage, fail, room)
            with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
                patch.setattr(checkpoint, "os", disk)
                patch.setattr(checkpoint, "open", disk.open_file, raising=False)
                checkpoint.save_checkpoint(file, other, 2, {}, CPU)
            assert disk.reached[-1] == stage and raised.value is error
            # a full disk has its room back
            assert file.read_bytes() == first and not partial.exists()
    partial.write_bytes(b"left by a kill" * size)
    checkpoint.save_checkpoint(file, other, 3, {}, CPU)
    assert not partial.exists()
    assert checkpoint.load_checkpoint(file, parts, {}, CPU) == 3
    same(state_of(parts), state_of(other))


def test_contents_then_name_reach_the_disk(tmp_path, monkeypatch):
    disk = Disk()
    monkeypatch.setattr(checkpoint, "os", disk)
    monkeypatch.setattr(checkpoint, "open", disk.open_file, raising=False)
    checkpoint.save_checkpoint(tmp_path / "new" / "run.pt", trained(0), 1, {}, CPU)
    # without the folder a power cut could still give the old name its old contents
    at_last = ["folder"] if os.name == "posix" else []
    in_order = ["flush", "fsync", "replace", "replaced", *at_last]
    assert disk.reached[-len(in_order) :] == in_order and disk.reached.count("fsync") == 1


def refused(file: Path, parts: dict, message: str) -> None:
    """Loading ends the script, tells why and where, and leaves everything as it was."""
    before = state_of(parts)
    with pytest.raises(SystemExit, match=message) as stop:
        checkpoint.load_checkpoint(file, parts, {}, CPU)
    assert str(file) in str(stop.value)
    same(before, state_of(parts))


def test_a_damaged_file_is_refused_or_read_right(tmp_path, full, figures):
    good, file, chance = tmp_path / "good.pt", tmp_path / "run.pt", random.Random(0)
    checkpoint.save_checkpoint(good, trained(0), 7, {}, CPU)
    truth, whole = stored(good), good.read_bytes()
    parts = trained(1)
    # empty, cut short, text, noise
    lengths = [0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))]
    contents = [whole[:length] for length in lengths]
    contents += [b"step 3\n" * 50, chance.randbytes(3000), b"\0" * len(whole)]
    for content in contents:
        file.write_bytes(content)
        refused(file, parts, "is damaged or no checkpoint.*start anew without --resume")
    seen = 0
    places = range(0, len(whole), 3) if full else chance.sample(range(len(whole)), 150)
    for place in places:
        bad = bytearray(whole)
        bad[place] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        try:
            found = checkpoint._read(file)
        except SystemExit:
            seen += 1
        else:
            # where the flipped bit means nothing
            same(found, truth)
    assert seen > len(places) / 8
    figures.add("interrupted", "damaged files", len(contents) + len(places))


@pytest.mark.parametrize("name", ["step", "settings", "parts", "random"])
def test_what_is_no_checkpoint_is_refused(tmp_path, name):
    file = tmp_path / "run.pt"
    checkpoint.save_checkpoint(file, trained(0), 7, {}, CPU)
    state = stored(file)
    del state[name]
    torch.save(state, file)
    refused(file, trained(1), f"it lacks .'{name}'")
    torch.save([state], file)
    refused(file, trained(1), "is damaged or no checkpoint")


WRONG = {
    "no network": lambda state: state["parts"].pop("network"),
    "one part more": lambda state: state["parts"].update(head={}),
    "shape": lambda state: state["parts"]["network"].update(bias=torch.zeros(3)),
    "no bias": lambda state: state["parts"]["network"].pop("bias"),
    "unknown weight": lambda state: state["parts"]["network"].update(scale=torch.zeros(3)),
    "no bank": lambda state: state["parts"]["joint"].pop("criterion.bank.storage"),
    "nan in the bank": lambda state: state["parts"]["joint"]["criterion.bank.storage"].fill_(NAN),
    "no step": lambda state: state["parts"]["joint"].pop("criterion.step"),
    "groups": lambda state: state["parts"]["optimizer"]["param_groups"].clear(),
    "no dictionary": lambda state: state["parts"].update(optimizer=3),
    "random state": lambda state: state["random"].update(cpu=torch.zeros(7, dtype=torch.uint8)),
    "no random state": lambda state: state["random"].pop("cpu"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_changes_nothing(tmp_path, what):
    file = tmp_path / "run.pt"
    checkpoint.save_checkpoint(file, trained(0, steps=5), 5, {}, CPU)
    state = stored(file)
    WRONG[what](state)
    torch.save(state, file)
    refused(file, trained(1), "does not fit, nothing was loaded")
    # nor is a part that has no state yet given any
    refused(file, trained(1, steps=0), "does not fit, nothing was loaded")


class Harmful:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_runs_no_code(tmp_path):
    file, made = tmp_path / "run.pt", tmp_path / "made"
    parts = trained(0)
    checkpoint.save_checkpoint(file, parts, 1, {}, CPU)
    state = stored(file)
    state["parts"]["joint"]["harmful"] = Harmful(made)
    torch.save(state, file)
    refused(file, parts, "is damaged or no checkpoint.*Weights only load failed")
    assert not made.exists()
    # it would have
    torch.load(file, weights_only=False)
    assert made.is_dir()
    # nor is a checkpoint in the old format, a bare pickle, taken
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    made.rmdir()
    refused(file, parts, "is damaged or no checkpoint")
    assert not made.exists()


def pico(**options: object) -> pico_fast.PiCoLoss:
    small = {"max_samples": 24, "pixel_queue_size": 24, "region_queue_size": 5}
    return pico_fast.PiCoLoss(4, 16, num_positives=6, num_negatives=10, **(small | options))


CRITERIA = {
    **{
        str(dtype): lambda dtype=dtype: pico(bank_dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    },
    "synthesis": lambda: pico(synthesis=pico_fast.Synthesis(3, 2, 4)),
    "pixels alone": lambda: pico(region_queue_size=0),
    "regions alone": lambda: pico(pixel_queue_size=0),
    "in batch": lambda: pico(pixel_queue_size=0, region_queue_size=0),
    "reference": lambda: pico(impl="reference"),
    "drop-in": lambda: pico_fast.PixelContrastLoss(max_samples=24, max_views=5),
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", CRITERIA)
def test_states_survive_the_disk_bit_for_bit(tmp_path, figures, name, joint):
    def make():
        criterion = CRITERIA[name]()
        return pico_fast.JointLoss(criterion, warmup_steps=2) if joint else criterion

    def step(loss):
        x = torch.nn.functional.normalize(torch.randn(2, 16, 9, 9), dim=1).requires_grad_()
        labels, logits = torch.randint(0, 4, (2, 9, 9)), torch.randn(2, 4, 9, 9)
        value = loss(logits, x, labels) if joint else loss(x, labels, logits)
        return value, torch.autograd.grad(value, x)[0]

    loss, file = make(), tmp_path / "loss.pt"
    for steps in (0, 1, 6):
        for _ in range(steps):
            step(loss)
        torch.save(loss.state_dict(), file)
        again = make()
        again.load_state_dict(torch.load(file, weights_only=True))
        same(loss.state_dict(), again.state_dict())
        figures.add("weights_only", "states loaded")
    random_state = torch.get_rng_state()
    expected = step(loss)
    torch.set_rng_state(random_state)
    same(expected, step(again))
    same(loss.state_dict(), again.state_dict())
    assert expected[0] > 0
