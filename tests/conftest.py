"""Every test starts from the same seed, and memory that the package leaves unwritten is poison."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # without a GPU the Triton kernels run as Python; they want to know before they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pico_fast

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
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
