"""One way of doing a case, and whether its result is ours: what is timed has passed this first."""

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
from results import Case, Row
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One way of doing a case.

    `tolerance` is relative, in the norm of each tensor that the run and ours return; None where the run
    gives something else: a ceiling, or a draw of its own. `needs` are bytes beyond its inputs.
    """

    call: Callable[[], object]
    tolerance: float | None = None
    needs: int = 0
    least_ratio: float | None = None  # the bar: its median is at least so many times ours


def why_not_run(run: Run, device: str) -> str | None:
    """What keeps a run from being tried."""
    free = measure.free_bytes(device)
    if run.needs > 0.9 * free:
        return f"out of memory: needs {run.needs / 1e9:.0f} GB of {free / 1e9:.0f} GB"
    return None


def what_differs(ours: object, theirs: object, tolerance: float) -> str | None:
    """Where two results, tensors or tuples of them, are further apart than allowed."""
    pairs = itertools.zip_longest(
        *(found if isinstance(found, tuple) else (found,) for found in (ours, theirs))
    )
    for place, (a, b) in enumerate(pairs):
        distance = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)
        if not distance <= tolerance:
            return f"result {place} differs by {distance:.1e}, allowed are {tolerance:.0e}"
    return None


def check_all(case: Case, runs: dict[str, Run], device: str) -> dict[str, Row]:
    """A row for each run: without `why_not` its result is ours, and it may be timed."""
    ours = runs["pico_fast"].call()
    rows = {}
    for name, run in runs.items():
        why_not = why_not_run(run, device) or _why_not_ours(run, ours)
        rows[name] = Row(case, name, least_ratio=run.least_ratio, why_not=why_not)
        gc.collect()
    return rows


def _why_not_ours(run: Run, ours: object) -> str | None:
    """What is wrong with the result of a run, if it gives one."""
    try:
        theirs = run.call()
    except Exception as error:  # a peer that cannot run is a result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return what_differs(ours, theirs, run.tolerance) if run.tolerance else None


def with_gradient(
    loss: Callable[..., Tensor],
    anchors: Tensor,  # [A, D]
    *args: object,
    **options: object,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives a scalar loss and its gradient on the anchors [A, D]."""

    def run() -> tuple[Tensor, Tensor]:
        leaf = anchors.detach().requires_grad_()
        value = loss(leaf, *args, **options)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run
