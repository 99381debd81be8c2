"""A sweep of tiles: kernels with other rows of kernels/configs.py, in replays of a graph; one line each.

python bench/gpu_tiles.py
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import gpu_scenes as scenes
import measure
from cases import CHANNELS
from pico_fast.kernels import configs
from pico_fast.kernels.configs import Launch

KEY = (90, 2, CHANNELS)
# name: the table, its key, rows, and what makes the call that they are tried in
SWEEPS = {
    "negatives of all keys": (
        configs.NEGATIVES,
        KEY,
        (
            *(configs.NEGATIVES[KEY], Launch(128, 64, 8, 2), Launch(128, 64, 8, 4), Launch(128, 128, 8, 2)),
            *(Launch(128, 32, 8, 4), Launch(64, 64, 4, 3), Launch(64, 128, 4, 2), Launch(64, 128, 8, 2)),
        ),
        scenes.sums_of_all_keys,
    ),
    "semi_hard": (
        configs.CUT,
        KEY,
        (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 8, 3), Launch(64, 128, 8, 2)),
        functools.partial(scenes.against_the_bank, "semi_hard, random positives", scenes.MANY),
    ),
    "random": (
        configs.POSITIVES_OF,
        (*KEY, False),
        (Launch(32, 32, 4, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2), Launch(16, 64, 4, 2)),
        functools.partial(scenes.against_the_bank, "random", scenes.MANY),
    ),
}
SECONDS = 0.2


def tried(device: str) -> Iterator[tuple[str, measure.Call]]:
    """Names and calls, each to be made while its row stands in the table."""
    for name, (table, key, rows, make) in SWEEPS.items():
        call = make(device)
        for row in rows:
            with mock.patch.dict(table, {key: row}):
                yield f"{name}, {row}", call


def in_gluon(device: str) -> Iterator[tuple[str, measure.Call]]:
    """The kernel that is off, which Triton compiles here: it is in no cache."""
    with mock.patch.object(configs, "USE_ALL_KEYS", True):
        yield "negatives of all keys, in Gluon", scenes.sums_of_all_keys(device)


def with_every_row(device: str) -> Callable[[], list]:
    """A call that launches all that is swept."""
    return lambda: [call() for _, call in tried(device)]


def main() -> int:
    n_timed = 0
    for name, call in itertools.chain(tried("cuda"), in_gluon("cuda")):
        try:
            seconds = measure.of_many(measure.graph_of(call).replay, SECONDS)
        except Exception as error:  # a row that does not fit is a result
            print(f"{name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        n_timed += 1
        print(f"{name}: {1e3 * seconds:.3f} ms", flush=True)
    return 0 if n_timed else 1


if __name__ == "__main__":
    sys.exit(main())
