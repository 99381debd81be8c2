"""Triton kernels compile for every supported generation: no spills, within the shared memory.

All of them in the full tables, for one generation those that stand for their kind otherwise.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

offline = pytest.importorskip("offline", reason="needs Triton")
# one datacentre and one consumer card of the first generation, Hopper, Blackwell
GENERATIONS = (80, 86, 90, 100)


@pytest.fixture(scope="module")
def generations(full) -> tuple[int, ...]:
    return GENERATIONS if full else (90,)


@pytest.fixture(scope="module")
def rows(full, generations) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("compiled_kernels.py"),
            *map(str, generations),
            *(["--full"] if full else []),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_resources(rows, capsys, figures):
    names = ("registers", "spilled", "shared", "matrix", "copies", "instructions")
    table = [f"{'sm':>4} {'kernel':34} {'launch':>16} " + " ".join(f"{n:>12}" for n in names)]
    for row in rows:
        launch = "x".join(map(str, row["launch"]))
        cells = " ".join(f"{row[name]!s:>12}" for name in names)
        table.append(f"{row['generation']:>4} {row['kernel']:34} {launch:>16} {cells}")
    with capsys.disabled():
        if os.environ.get("PICO_FAST_TABLE"):
            print("\n" + "\n".join(table))
    bad = []
    for row, line in zip(rows, table[1:], strict=True):
        multiplies = "_kernel" not in row["kernel"]
        several = row["launch"][3] > 1
        narrow = "fp32" not in row["kernel"]  # float32 tiles are transposed on their way
        if (
            row["spilled"] != 0
            or row["shared"] > offline.SHARED_LIMIT[row["generation"]]
            or (multiplies and not row["matrix"])
            or (multiplies and narrow and several and not row["copies"])
        ):
            bad.append(line)
    assert not bad, "\n".join([table[0], *bad])
    figures.add("kernels", "kernels compiled for GPUs that are not there", len(rows))


def test_every_generation_has_every_kernel(rows, full, generations):
    counts = [sum(row["generation"] == g for row in rows) for g in generations]
    assert min(counts) >= (100 if full else 25)
