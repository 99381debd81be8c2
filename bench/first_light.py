"""Every op on a GPU against the eager ops in float64, twice for the same bits; steps as graphs.

    python bench/first_light.py            every check in a process of its own, one line each
    python bench/first_light.py CHECK      one of them, in this process
    python bench/first_light.py --list     their names

A process of its own, so that a crash ends one line. Exit status 1 unless all are ok.
"""

import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gpu_scenes as scenes
import measure
import torch

# processes side by side, most of whose time is the host's; seconds until one is given up
SIDE_BY_SIDE, LIMIT = 8, 40


def line(name: str, how: str, seconds: float) -> str:
    return f"{name:32} {how:60} {seconds:5.1f} s"


def checked(check: scenes.Check) -> str:
    """What a check says: "ok" or "FAILED", and its worst error."""
    found, again = check.call(), check.call()
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        return "FAILED: other bits the second time"
    # nan is worse than anything
    errors = check.errors(found)
    error, allowed = max(errors, key=lambda e: math.inf if e[0] != e[0] else e[0] / max(e[1], 1e-30))
    return f"{'ok' if error <= allowed else 'FAILED'}, error {error:.1e}, allowed {allowed:.0e}"


def replayed(step: scenes.Step) -> str:
    """Whether replays of a step's graph are the steps themselves, bit for bit."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = measure.graph_of(step)
    state = {name: value.clone() for name, value in step.criterion.state_dict().items()}
    expected = [[x.clone() for x in step()] for _ in range(3)]
    step.criterion.load_state_dict(state)
    for place, theirs in enumerate(expected):
        graph.replay()
        for what, mine, x in zip(("loss", "gradient"), graph.results, theirs, strict=True):
            if not (x.isfinite().all() and torch.equal(mine, x)):
                error = (mine.double() - x.double()).norm().item()
                return f"FAILED: {what} of replay {place} is off by {error:.1e}"
    return "ok, error 0, allowed 0"


def run(name: str) -> bool:
    """One check in this process; its line, and whether it is ok."""
    start = time.perf_counter()
    with torch.cuda.device(0):
        what = scenes.CHECKS[name]("cuda")
        how = replayed(what) if isinstance(what, scenes.Step) else checked(what)
        torch.cuda.synchronize()
    print(line(name, how, time.perf_counter() - start), flush=True)
    return how.startswith("ok")


def run_apart(name: str) -> bool:
    """One check in a process of its own; its line, or how the process ended."""
    start = time.perf_counter()
    command = [sys.executable, __file__, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        said = [*done.stderr.split("\n"), *done.stdout.split("\n")]
        how, said = f"exit {done.returncode}", [text for text in said if text.strip()]
    except subprocess.TimeoutExpired:
        done, how, said = None, f"none after {LIMIT} s", []
    if done and said and said[-1].startswith(name):
        print(said[-1], flush=True)
    else:
        last = said[-1] if said else "said nothing"
        print(line(name, f"FAILED: {how}: {last[:200]}", time.perf_counter() - start), flush=True)
    return bool(done) and done.returncode == 0


def main(names: list[str]) -> int:
    if names == ["--list"]:
        print("\n".join(scenes.CHECKS))
        return 0
    unknown = [name for name in names if name not in scenes.CHECKS]
    if unknown:
        sys.exit(f"CHECK: expected one of {list(scenes.CHECKS)}, got {unknown[0]!r}")
    if names:
        ok = [run(name) for name in names]
    else:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            ok = list(pool.map(run_apart, scenes.CHECKS))
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
