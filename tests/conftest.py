"""Every test starts from the same seed, and memory that the package leaves unwritten is poison.

`make test` runs representatives, `make stress` the full tables (`--full`) and notes what they reached
(`--figures`), which docs/trust.md shows.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    # without a GPU the Triton kernels run as Python; they want to know before they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._dynamo.trace_rules import get_torch_obj_rule_map

import pico_fast

# the same examples on every machine, or new ones and more of them
settings.register_profile("representative", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("full", max_examples=1500, deadline=None, database=None)

# lists torch's functions once; it must see the true ones, before a fixture wraps any
_device_constructors()

PACKAGE = [
    str(Path(pico_fast.__file__).parent),
    str(Path(pico_fast.__file__).parents[1] / "kernels"),
]


def _poison(out: torch.Tensor) -> torch.Tensor:
    """`out` filled with NaN, or for integers with a number that is no index of anything."""
    if out.dtype.is_floating_point:
        return out.fill_(float("nan"))
    return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        # a compiler would have to look into frames; it traces the real function
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_code.co_filename
        return _poison(out) if caller.startswith(tuple(PACKAGE)) else out

    return wrapper


@pytest.fixture(autouse=True)
def unwritten_memory_is_poison(monkeypatch):
    """torch.empty and its kin return NaN when the package calls them: reading it shows."""
    # the compiler's list of functions has to hold the true ones; a wrapper for several ranks empties it
    get_torch_obj_rule_map()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tensors so small that more threads gain nothing."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class Figures:
    """What tests reached, by promise: counts that add up, and the worst of what was measured."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self.worst: dict[str, dict[str, float]] = {}

    def add(self, promise: str, what: str, count: int = 1) -> None:
        of_promise = self.counts.setdefault(promise, {})
        of_promise[what] = of_promise.get(what, 0) + count

    def most(self, promise: str, what: str, value: float) -> None:
        of_promise = self.worst.setdefault(promise, {})
        of_promise[what] = max(of_promise.get(what, float("-inf")), float(value))

    def take(self, counts: dict, worst: dict) -> None:
        """Those of another process as well."""
        for promise, found in counts.items():
            for what, count in found.items():
                self.add(promise, what, count)
        for promise, found in worst.items():
            for what, value in found.items():
                self.most(promise, what, value)


FIGURES = Figures()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full tables, not representatives")
    parser.addoption("--figures", type=Path, help="JSON file that is given what tests reached")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "representative")


def pytest_runtest_logreport(report):
    # of several processes the one that writes hears of all tests
    if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        FIGURES.add("passed", Path(report.location[0]).name)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if not error:  # a process that died has told nothing
        FIGURES.take(*node.workeroutput["figures"])


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = (FIGURES.counts, FIGURES.worst)
        return
    path = session.config.getoption("--figures")
    if path is not None:
        # several runs add to one file
        known = json.loads(path.read_text()) if path.is_file() else {}
        for found in (FIGURES.counts, FIGURES.worst):
            for promise, values in found.items():
                known[promise] = known.get(promise, {}) | values
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def figures() -> Figures:
    """Where a test notes what it reached."""
    return FIGURES


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the full tables run."""
    return request.config.getoption("--full")
