"""A sweep of tiles: the negatives of all keys with other rows of kernels/configs.py; one line each.

python bench/gpu_tiles.py
"""

import sys
from unittest import mock

import gpu_scenes as scenes
import measure
from cases import CHANNELS

from pico_fast.kernels import configs
from pico_fast.kernels.configs import Launch

KEY = (90, 2, CHANNELS)
ROWS = (
    configs.NEGATIVES[KEY],
    Launch(128, 64, 8, 2),
    Launch(128, 64, 8, 4),
    Launch(128, 128, 8, 2),
    Launch(128, 32, 8, 4),
    Launch(64, 64, 4, 3),
    Launch(64, 128, 4, 2),
    Launch(64, 128, 8, 2),
)
SECONDS = 0.2


def with_row(row: Launch, call: measure.Call) -> measure.Call:
    """The call with a row of its own."""

    def run():
        with mock.patch.dict(configs.NEGATIVES, {KEY: row}):
            return call()

    return run


def with_every_row(device: str) -> measure.Call:
    """A call that launches all that is swept."""
    call = scenes.sums_of_all_keys(device)
    return lambda: [with_row(row, call)() for row in ROWS]


def main() -> int:
    call, n_timed = scenes.sums_of_all_keys("cuda"), 0
    operations = 4.0 * scenes.MANY * scenes.FULL.keys() * CHANNELS
    for row in ROWS:
        try:
            seconds = measure.of_many(with_row(row, call), SECONDS)
        except Exception as error:  # a row that does not fit is a result
            print(f"{row}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        n_timed += 1
        print(f"{row}: {1e3 * seconds:.3f} ms, {operations / seconds / 1e12:.0f} TFLOP/s", flush=True)
    return 0 if n_timed else 1


if __name__ == "__main__":
    sys.exit(main())
