"""The `compare` fixture: checks every run against ours, then times all in turn; the table at the end."""

import functools
import itertools
import statistics
from pathlib import Path

import measure
import pytest
import torch
from results import Case, Results, Row, file_name, machine
from runs import Run, check_all
from tqdm import tqdm

DEVICE = pytest.StashKey[str]()
RESULTS = pytest.StashKey[Results]()
BAR = pytest.StashKey[tqdm]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--device", choices=("cpu", "cuda"), help="what to measure; CUDA where it is")
    group.addoption("--rounds", type=int, default=5, help="measured rounds of a case at most")
    group.addoption("--budget", type=float, default=12.0, help="seconds of a case, about")
    group.addoption("--margin", type=float, default=1.0, help="share of a bar that has to be met")
    group.addoption("--record", type=Path, help="folder that the results file goes to")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[DEVICE] = device
    config.stash[RESULTS] = Results(machine(device))
    config.addinivalue_line("markers", "gate: small enough for CI, with wide margins")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda"."""
    return request.config.stash[DEVICE]


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    """What this session has measured so far."""
    found = request.config.stash[RESULTS]
    if not found.ceilings:
        found.ceilings = measure.ceilings(request.config.stash[DEVICE])
    return found


def bars_missed(runs: dict[str, Run], medians: dict[str, float], margin: float) -> list[str]:
    """The bars that our median misses, in words."""
    return [
        f"{name} takes {medians[name] / medians['pico_fast']:.2f} x ours, the bar is {bar:g}"
        for name, bar in ((name, run.least_ratio) for name, run in runs.items())
        if bar and medians[name] < bar * margin * medians["pico_fast"]
    ]


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark, device, results):
    """compare(case, {name: Run}): the medians of what ran, in seconds; "pico_fast" is among the runs."""
    option = request.config.getoption
    clock = measure.CLOCKS[device]

    def compared(case: Case, runs: dict[str, Run]) -> dict[str, float]:
        rows = check_all(case, runs, device)
        results.rows += rows.values()
        wrong = [f"{name}: {row.why_not}" for name, row in rows.items() if row.why_not]
        agree = [name for name, run in runs.items() if run.tolerance and not rows[name].why_not]
        assert agree or not any(run.tolerance for run in runs.values()), f"none agrees: {wrong}"
        assert not any(text.startswith("pico_fast") for text in wrong), f"{case.title}: {wrong}"
        timed = {name: run for name, run in runs.items() if not rows[name].why_not}
        round_takes = 0.0
        for name, run in timed.items():  # warm by now, as the rounds will be
            call = run.call
            if name == "pico_fast":  # its first time is what pytest-benchmark keeps
                call = functools.partial(benchmark.pedantic, run.call, rounds=1)
            seconds = clock(call)
            rows[name].seconds.append(seconds)
            round_takes += seconds
        rounds = measure.rounds_within(round_takes, option("budget"), option("rounds"))
        for more in (rounds - 1, rounds):
            for _ in range(more):
                for name, run in timed.items():
                    rows[name].seconds.append(clock(run.call))
            medians = {name: statistics.median(rows[name].seconds) for name in timed}
            missed = bars_missed(timed, medians, option("margin"))
            if not missed:  # or else once more: something may have disturbed the machine
                break
        if device == "cuda":
            for name, run in timed.items():
                rows[name].peak_bytes = measure.peak_on_gpu(run.call)
        benchmark.extra_info.update(medians)
        assert not missed, f"{case.title}: {missed}"
        return medians

    return compared


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items and not session.config.getoption("collectonly"):
        # the terminal itself: whatever else is written is captured while a benchmark runs
        terminal = session.config.pluginmanager.getplugin("terminalreporter")._tw._file
        session.config.stash[BAR] = tqdm(
            total=len(session.items), unit="case", file=terminal, dynamic_ncols=True
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> object:
    bar = item.config.stash[BAR]
    bar.set_postfix_str(item.name)
    done = yield
    bar.update()
    folder, found = item.config.getoption("record"), item.config.stash[RESULTS]
    if folder and found.rows:  # after every benchmark: a session that is cut short keeps what it has
        found.write(folder / file_name(found.machine))
    return done


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: the bar shows what passed."""
    return ("passed", "", "") if report.passed and report.when == "call" else None


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    found = config.stash[RESULTS]
    if not found.rows:
        return
    terminalreporter.section("medians, and how many times ours")
    for case, rows in itertools.groupby(found.rows, key=lambda row: row.case):
        terminalreporter.write_line(case.title)
        rows = list(rows)
        ours = next((row.seconds for row in rows if row.run == "pico_fast"), [])
        for row in rows:
            terminalreporter.write_line(f"  {row.run:28} {in_words(row, ours)}")
    for name, count in found.counts.items():
        terminalreporter.write_line(f"{name}: {count}")
    if config.getoption("record"):
        terminalreporter.write_line(f"written: {config.getoption('record') / file_name(found.machine)}")


def in_words(row: Row, ours: list[float]) -> str:
    """A row of the table."""
    words = []
    if row.why_not:
        return f"not run: {row.why_not}"
    if row.seconds:
        median = statistics.median(row.seconds)
        words.append(f"{median * 1e3:10.3f} ms")
        if ours:
            words.append(f"x {median / statistics.median(ours):.2f}")
        if row.least_ratio and ours:
            met = median >= row.least_ratio * statistics.median(ours)
            words.append(f"bar {row.least_ratio:g}: {'met' if met else 'MISSED'}")
    if row.peak_bytes is not None:
        words.append(f"peak {row.peak_bytes / 2**20:,.0f} MiB")
    return "  ".join(words)
