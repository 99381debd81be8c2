"""Measuring: interleaved rounds, medians and ratios of one run, peak memory in a process of its own."""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROWS: list[dict] = []


def on_cpu(run: Callable[[], object]) -> float:
    """Seconds of one run by the wall clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@functools.cache
def _larger_than_the_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def on_gpu(run: Callable[[], object]) -> float:
    """Seconds of one run on the GPU between two events, its L2 cache cold."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _larger_than_the_cache().zero_()
    # the GPU waits here until the host has everything queued: launches are not part of the time
    torch.cuda._sleep(1_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, seconds_of: Callable[..., float]
) -> dict[str, list[float]]:
    """Seconds of each of `runs`, one of each in turn, `rounds` times after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds_of(run)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=5, help="measured rounds of each comparison")
    parser.addoption("--record", metavar="FILE", type=Path, help="write the rows to this JSON file")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark):
    """compare(case, runs): time all in turn and hand our median to pytest-benchmark."""

    def run(
        case: str, runs: dict[str, Callable[[], object]], device: str = "cpu"
    ) -> dict[str, float]:
        seconds_of = on_gpu if device == "cuda" else on_cpu
        seconds = interleaved(runs, request.config.getoption("--rounds"), seconds_of)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            row = {"case": case, "run": name, "seconds": sorted(times)}
            ROWS.append(row)
        benchmark.extra_info.update(medians)
        benchmark.pedantic(runs["pico_fast"], rounds=1)
        return medians

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    width = max(len(row["case"]) for row in ROWS)
    terminalreporter.section("medians and ratios of one run")
    ours = {row["case"]: row["seconds"] for row in ROWS if row.get("run") == "pico_fast"}
    for row in ROWS:
        if "kib" in row:
            sizes = ", ".join(f"{name} {kib / 1024:.0f} MiB" for name, kib in row["kib"].items())
            terminalreporter.write_line(f"{row['case']:{width}}  {sizes}")
            continue
        median = statistics.median(row["seconds"])
        ratio = median / statistics.median(ours[row["case"]])
        line = f"{row['case']:{width}}  {row['run']:22} {median * 1e3:10.3f} ms  x {ratio:.2f}"
        terminalreporter.write_line(line)
    path = config.getoption("--record")
    if path:
        gpu = torch.cuda.is_available()
        machine = {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": ROWS}, indent=1) + "\n")
        terminalreporter.write_line(f"written: {path}")
