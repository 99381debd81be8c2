"""Runs the commands of docs/models.md as they stand there, and reads what they print."""

import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
COMMANDS = re.findall(r"^    (python examples/.*)$", PAGE, re.MULTILINE)


def run(command: str, folder: Path) -> str:
    """What a command prints, started in an empty folder."""
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in command.split()[1:]]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def check(
    printed: str,
    pattern: str,  # of loss, similarity to the own class and to others
) -> None:
    """The loss falls, and in the end pixels are more like their own class than like others."""
    found = [tuple(map(float, numbers)) for numbers in re.findall(pattern, printed)]
    assert len(found) >= 3, printed[-4000:]
    assert all(math.isfinite(number) for numbers in found for number in numbers)
    assert found[-1][0] < found[0][0], found
    assert found[-1][1] > found[-1][2] + 0.1, found
