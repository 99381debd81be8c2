"""Measuring: interleaved rounds, medians and ratios of one run, peak memory in a process of its own."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROWS: list[dict] = []


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `runs`, one of each in turn, `rounds` times after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=5, help="measured rounds of each comparison")
    parser.addoption("--record", help="write the rows to bench/results/NAME.json")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark):
    """compare(case, ours, peers): time all in turn and hand our median to pytest-benchmark."""

    def run(case: str, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        seconds = interleaved(runs, request.config.getoption("--rounds"))
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
        line = f"{row['case']:{width}}  {row['run']:22} {median * 1e3:10.1f} ms  x {ratio:.2f}"
        terminalreporter.write_line(line)
    name = config.getoption("--record")
    if name:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        machine = {
            "device": device,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"machine": machine, "rows": ROWS}, indent=1) + "\n")
        terminalreporter.write_line(f"written: {path.relative_to(Path(__file__).parents[1])}")
