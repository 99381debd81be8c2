"""bench/gpu.sh, with stubs in place of its steps: limits, later steps, what is printed when."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ["install", "first-light", "headlines", "ncu", "tiles", "tests"]
STEPS += ["memcheck", "synccheck", "racecheck"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bench/gpu.sh needs GNU's timeout and tail")
# a step that does nothing but what its name stands for
STUB = """#!/bin/sh
echo "$1 begins"
case $1 in
{cases}
esac
echo "$1 ends"
"""


class Ran:
    """A run of the script with stubs: how each step ended, what was printed and when."""

    def __init__(self, folder: Path, seconds: float, **cases: str):
        stub = folder / "stub"
        lines = (f"{name.replace('_', '-')}) {body};;" for name, body in cases.items())
        stub.write_text(STUB.format(cases="\n".join(lines)))
        stub.chmod(0o755)
        self.out = folder / "out"
        start, self.when = time.monotonic(), {}
        with subprocess.Popen(
            ["bash", ROOT / "bench" / "gpu.sh", self.out],
            env={**os.environ, "GPU_RUN": str(stub), "GPU_SECONDS": str(seconds)},
            stdout=subprocess.PIPE,
            text=True,
        ) as run:
            for line in run.stdout:
                self.when.setdefault(line.strip(), time.monotonic() - start)
        self.seconds, self.status = time.monotonic() - start, run.returncode
        text = "\n".join(self.when)
        self.ends = dict(re.findall(r"^([\w-]+): exit (\d+) after", text, re.MULTILINE))


def test_every_step_has_its_turn(tmp_path):
    ran = Ran(tmp_path, 48)
    assert ran.status == 0
    assert ran.ends == dict.fromkeys(STEPS, "0") and list(ran.ends) == STEPS
    log = (ran.out / "gpu.log").read_text()
    assert all(f"{name} begins\n{name} ends\n" in log for name in STEPS)
    assert len(list(ran.out.iterdir())) <= 8


def test_a_failing_step_fails_the_script_and_stops_no_other(tmp_path):
    ran = Ran(tmp_path, 48, first_light="exit 3", tests="kill -SEGV $$")
    assert ran.status == 1
    assert ran.ends == dict.fromkeys(STEPS, "0") | {"first-light": "3", "tests": "139"}
    assert "racecheck ends" in ran.when


def test_a_hanging_step_is_cut_off_at_its_second(tmp_path):
    # of 16 s first light ends at 3, the headlines at 5; who ignores an interrupt has a second more
    deaf = "trap '' INT TERM; while :; do sleep 0.1; done"
    ran = Ran(tmp_path, 16, first_light="trap 'echo so far; exit 1' INT; sleep 600", headlines=deaf)
    assert ran.status == 1
    assert ran.ends == dict.fromkeys(STEPS, "0") | {"first-light": "124", "headlines": "137"}
    assert "so far" in ran.when  # as pytest, which lists failures when it is interrupted
    # no sooner; on a busy machine somewhat later
    assert 2.8 <= ran.when["headlines begins"] <= 6.0
    assert 5.5 <= ran.when["ncu begins"] <= 9.0


def test_what_is_left_behind_holds_nothing_up(tmp_path):
    # in a session of its own no signal finds it, and it has the step's output open
    ran = Ran(tmp_path, 48, ncu="setsid sleep 15 & exit 0")
    assert ran.status == 0 and ran.seconds < 12


def test_what_a_step_leaves_goes_to_later_ones_and_lines_are_printed_at_once(tmp_path):
    # of 16 s first light has 2 s by its table, and here what the wheel has left
    ran = Ran(tmp_path, 16, first_light="sleep 2.3; echo late")
    assert ran.status == 0, ran.when
    assert ran.when["late"] - ran.when["first-light begins"] >= 2.0
    assert ran.when["first-light ends"] - ran.when["late"] < 1.5
