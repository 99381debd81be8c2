"""docs/trust.md: what the package promises, the tests that check it, and what they reached.

python tests/trust.py                    writes docs/trust.md anew from docs/trust.json
python tests/trust.py FIGURES.json START takes what `make stress` reached since START (seconds) over first
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton

DOCS = Path(__file__).parents[1] / "docs"
FIGURES, PAGE = DOCS / "trust.json", DOCS / "trust.md"


class Promise(NamedTuple):
    text: str
    tests: str  # files in tests/, without test_ and .py
    figures: str  # names under which these note what they reached


PROMISES = {
    "Numbers": (
        Promise(
            "Loss and gradient lie within an error budget of float64, whatever the shapes, strides,"
            " dtypes, classes, sampling and temperature (0.005 to 5), with rows of length 1e-40 to 1e4,"
            " all equal or opposite.",
            "budget",
            "budget",
        ),
        Promise(
            "The order of keys, anchors and class names, a rotation of the space, what empty slots hold"
            " and how keys are split between holders do not matter; one more negative never lowers the"
            " loss; finite differences agree.",
            "invariance",
            "invariance",
        ),
        Promise(
            "Anchors, stored pixels, counts and refused entries are those of the specification, bit for bit.",
            "exact bank anchors",
            "exact",
        ),
        Promise("Offsets beyond 2^31 and 2^32 are right.", "large", "large"),
        Promise(
            "Every Triton kernel compiles for sm_80, sm_86, sm_90 and sm_100, without spills and within the"
            " shared memory; interpreted, they keep the error budget.",
            "kernels_compile kernels_budget kernels_contrast kernels_cut kernels_hardest",
            "kernels",
        ),
    ),
    "A pixel that goes wrong": (
        Promise(
            "A nan or an infinity in one embedding makes the loss nan where that pixel is an anchor, which"
            " shows; gradients of all other pixels are as if it were not there, in batch as well.",
            "finite",
            "finite",
        ),
        Promise(
            'It never enters the bank; `bank.refused` and `stats["refused"]` count what was refused.',
            "exact finite bank_state",
            "refused",
        ),
    ),
    "State": (
        Promise(
            "Training that is killed at any moment goes on from its last checkpoint bit for bit as if it"
            " had never stopped; a damaged checkpoint is refused whole.",
            "interrupted",
            "interrupted",
        ),
        Promise(
            "A state that no bank of this size can have is refused whole: another version, other queue"
            " sizes, counts outside the rings, embeddings that are not finite. `bank.resize()` gives"
            " another size and keeps the newest entries.",
            "bank_state",
            "state",
        ),
        Promise(
            "States load with `weights_only=True`: nothing in them is executed.",
            "interrupted bank_state",
            "weights_only",
        ),
    ),
    "Misuse": (
        Promise(
            "A wrong argument is named, with what was expected and what came, before anything is changed.",
            "errors op_guards",
            "wrong calls",
        ),
        Promise(
            "Unusual circumstances give the right result or a clear error: views of any layout, second"
            " derivatives, transforms, no_grad and inference mode, deterministic mode, other default"
            " dtypes and devices, inputs changed before the backward, threads, copies.",
            "misuse circumstances",
            "misuse",
        ),
    ),
    "Memory and time": (
        Promise("Memory does not grow with the steps.", "soak", "soak"),
        Promise(
            "torch.compile compiles once, whatever the batches hold.",
            "soak dropin",
            "no recompilation",
        ),
        Promise(
            "The C++ is free of errors that AddressSanitizer and UndefinedBehaviorSanitizer see, compiled"
            " with -Wall -Wextra -Werror.",
            "op_guards",
            "sanitizers",
        ),
    ),
    "Supply": (
        Promise(
            "Development dependencies are pinned with hashes; a wheel is the same bit for bit from the same"
            " commit; importing and running ask no network; licence files are in the wheel.",
            "release",
            "reproducible",
        ),
    ),
}

LIMITS = """\
## Not promised

- **Second derivatives** of the contrast: its gradient is made in the forward, so `create_graph=True` raises.
  `contrast(impl="reference")` has them, and so has `region_pool`. Forward-mode differentiation and `torch.func` transforms
  raise.
- **Keys of your own** that are not finite raise on a CPU; elsewhere the check would read every key once more, and the
  anchors that meet such a key get nan instead. The bank never holds any.
- **One criterion in several threads at once**: its bank would be written by both. One for each thread is fine.
- **float16** ends at 65,504: a gradient beyond is an infinity, as loss scaling expects.
- **A GPU.** Nothing of this has run on one yet. The tests for it are there ({gpu}), and `bench/gpu.sh` runs
  them with compute-sanitizer.

## How errors are bounded

Inputs are rounded to their dtype first, so that truth is made of the same numbers. With eps the rounding of a
product's inputs (2^-22 in float32, 2^-7 where bfloat16 is multiplied as it is, 2^-50 in float64), an inner product of D
channels may be off by delta = (8 + 4 √D) eps |a| |k|. A loss may then be off by 2 delta / τ + 64 eps (1 + loss), a
gradient by min(4 delta / τ, 1) of the largest it could be, and a selected key may be easier than the one that truth
selects by 2 delta at most. The worst share of a budget that was reached stands in the table.
"""


def written(what: str, value: float) -> str:
    """A figure in words."""
    number = f"{value:,}" if isinstance(value, int) else f"{value:.2g}"
    return f"{number} {what}" if isinstance(value, int) else f"{what}: {number}"


def reached(found: dict, promise: Promise) -> str:
    """What the tests of a promise reached, and how many of them passed."""
    words = [written(*item) for item in found["figures"].get(promise.figures, {}).items()]
    passed = sum(found["figures"]["passed"].get(f"test_{n}.py", 0) for n in promise.tests.split())
    return "; ".join([*words, f"{passed:,} tests passed"])


def page(found: dict) -> str:
    """The text of docs/trust.md."""
    tests = DOCS.parent / "tests"
    gpu = ", ".join(f"`{path.name}`" for path in sorted(tests.glob("test_*_gpu.py")))
    lines = [
        "# What you can rely on",
        "",
        "Each promise, the tests that check it, and what they reached in the last run of `make stress`, which",
        f"took {found['seconds'] / 60:.0f} minutes: {found['machine']}, {found['date']}. `make test` runs",
        "representatives of all of it.",
    ]
    for section, promises in PROMISES.items():
        lines += ["", f"## {section}", "", "| promise | tests | reached |", "|---|---|---|"]
        for promise in promises:
            files = ", ".join(f"`test_{name}.py`" for name in promise.tests.split())
            lines.append(f"| {promise.text} | {files} | {reached(found, promise)} |")
    return "\n".join([*lines, "", LIMITS.format(gpu=gpu)])


def take(path: Path, start: float) -> None:
    """Keep what a run reached, with the machine it ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    found = {
        "machine": f"{machine}, torch {torch.__version__}, triton {triton.__version__}, {gpu}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - start),
        "figures": json.loads(path.read_text()),
    }
    FIGURES.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        take(Path(sys.argv[1]), float(sys.argv[2]))
    PAGE.write_text(page(json.loads(FIGURES.read_text())))
