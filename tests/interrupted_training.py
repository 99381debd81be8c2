"""A small training that tests/test_interrupted.py kills, again and again.

Reads tasks from stdin, a line of JSON each, runs each in a fork of itself, which has torch imported
already, and answers with a line of JSON: how the fork ended, the last step that it had saved, and whether
that was in the midst of writing.
"""

import functools
import json
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import checkpoint

import pico_fast

CLASSES, CHANNELS, SIZE = 8, 256, 16
CPU = torch.device("cpu")


class Disk:
    """What checkpoint.py asks of the system, in order, with a fault at one stage of it."""

    def __init__(self, stage: str | None = None, fault: Callable = lambda: None, room: int = 0):
        self.stage, self.fault, self.room = stage, fault, room
        self.reached: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def reach(self, stage: str) -> None:
        self.reached.append(stage)
        if stage == self.stage:
            self.fault()

    def open_file(self, path: Path, mode: str) -> "File":
        return File(self, open(path, mode))

    def fsync(self, number: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        self.reach("folder" if is_folder else "fsync")
        os.fsync(number)

    def replace(self, old: Path, new: Path) -> None:
        self.reach("replace")
        os.replace(old, new)
        self.reach("replaced")


class File:
    """A file on such a disk."""

    def __init__(self, disk: Disk, file: Any):
        self.disk, self.file = disk, file
        self.fileno = file.fileno

    def write(self, data: bytes) -> int:
        data = memoryview(data).cast("B")
        if self.disk.stage == "write" and len(data) > self.disk.room:
            self.file.write(data[: self.disk.room])
            self.file.flush()
            self.disk.room = 0
            self.disk.reach("write")
        self.disk.room -= len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.disk.reach("flush")
        self.file.flush()

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a step; the classes look different."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (4, SIZE, SIZE), generator=generator)
    noise = torch.randn(4, 3, SIZE, SIZE, generator=generator)
    return noise + labels.unsqueeze(1) / CLASSES, labels


def build() -> dict[str, Any]:
    """All that a checkpoint holds, at its start."""
    torch.manual_seed(0)
    # dropout draws from the random state
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.2))
    head = pico_fast.ProjectionHead(16, CHANNELS)
    network = nn.ModuleDict({"body": body, "head": head, "classifier": nn.Conv2d(16, CLASSES, 1)})
    criterion = pico_fast.PiCoLoss(
        CLASSES,
        CHANNELS,
        num_positives=32,
        num_negatives=64,
        max_samples=128,
        # 4 MB: to write them takes about as long as a step
        pixel_queue_size=900,
        region_queue_size=60,
        pixels_per_image=20,
        synthesis=pico_fast.Synthesis(8, 8, 16),
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    return {
        "network": network,
        "joint": pico_fast.JointLoss(criterion, warmup_steps=3),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.9),
    }


def train(file: Path, steps: int) -> Iterator[int]:
    """Train up to a number of steps from wherever the file stands; tells each step that is saved."""
    parts = build()
    network, joint = parts["network"], parts["joint"]
    start = checkpoint.load_checkpoint(file, parts, {}, CPU) if file.exists() else 0
    for step in range(start + 1, steps + 1):
        images, labels = batch(step)
        features = network["body"](images)
        loss = joint(network["classifier"](features), network["head"](features), labels)
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()
        parts["scheduler"].step()
        checkpoint.save_checkpoint(file, parts, step, {}, CPU)
        yield step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_exit(task: dict[str, Any], reports: int) -> None:
    """A fork's life: train, with a fault where the task wants one."""
    status = 1
    try:
        signal.alarm(120)
        for saved, step in enumerate(train(Path(task["file"]), task["steps"]), 1):
            os.write(reports, f"{step}\n".encode())
            if task["die_at"] and saved == task["saves"]:
                disk = Disk(task["die_at"], die, task["room"])
                checkpoint.os, checkpoint.open = disk, disk.open_file
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a fork, kill it when the task says so, and tell how it ended.

    kill: [saves, share]; so many saves after its start, and then a share of the time that one takes.
    """
    read, write = os.pipe()
    begin = time.time_ns()
    child = os.fork()
    if child == 0:
        os.close(read)
        run_and_exit(task, write)
    os.close(write)
    with os.fdopen(read) as reports:
        steps, took = [], 0.1
        if task["kill"]:
            saves, share = task["kill"]
            since = time.perf_counter()
            for line in map(int, iter(reports.readline, "")) if saves else ():
                steps.append(line)
                now = time.perf_counter()
                took, since = now - since, now
                if len(steps) == saves:
                    break
            time.sleep(share * took)
            os.kill(child, signal.SIGKILL)
        steps += map(int, reports)
    _, status = os.waitpid(child, 0)
    partial = Path(task["file"] + ".partial")
    # an older one is what an earlier kill has left
    writing = partial.exists() and partial.stat().st_mtime_ns > begin
    ended = os.waitstatus_to_exitcode(status)
    return {"ended": ended, "saved": max(steps, default=0), "writing": writing}


def warm_up() -> None:
    """Import what a first step imports, so that no fork has to; backward would forbid to fork."""
    torch.set_num_threads(1)
    parts = build()
    images, labels = batch(0)
    features = parts["network"]["body"](images)
    parts["joint"](parts["network"]["classifier"](features), parts["network"]["head"](features), labels)
    parts["optimizer"].step()


def main() -> None:
    warm_up()
    reply = functools.partial(print, flush=True)
    for line in sys.stdin:
        nothing = {"kill": None, "die_at": None, "saves": 0, "room": 0}
        reply(json.dumps(answer(nothing | json.loads(line))))


if __name__ == "__main__":
    main()
