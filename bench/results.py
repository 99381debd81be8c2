"""The files under results/: one for each machine, raw seconds of every run, and nothing derived."""

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import pico_fast

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """What was measured. Operations and bytes are those that any way of doing it needs at least."""

    bench: str  # what is done, e.g. "contrast, all keys"
    data_set: str
    keys: int = 0
    anchors: int = 0
    share: float = 1.0  # of the paper's queue
    data: str = "clustered"
    detail: str = ""  # what else tells it from its neighbours, e.g. "forward"
    operations: float = 0.0  # multiplications and additions of the matrix products
    bytes: float = 0.0  # read and written

    @property
    def title(self) -> str:
        """One line for tables and messages."""
        parts = [self.bench, self.detail, self.data_set]
        if self.share != 1.0:
            parts[-1] += f" at {self.share:g} of the queue"
        if self.anchors:
            parts.append(f"{self.anchors:,} x {self.keys:,}" if self.keys else f"{self.anchors:,}")
        if self.data != "clustered":
            parts.append(self.data)
        return ", ".join(part for part in parts if part)


@dataclass
class Row:
    """One way of doing a case: its seconds, or why there are none."""

    case: Case
    run: str  # "pico_fast", "pico_fast, ...", or the peer's name
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # beyond inputs, while it ran
    least_ratio: float | None = None  # the bar: its median is at least so many times ours
    why_not: str | None = None


@dataclass
class Results:
    """Everything of one machine. Ceilings: rates of this run; counts: what no noise touches."""

    machine: dict[str, str]
    ceilings: dict[str, float] = field(default_factory=dict)  # "float32 product": operations/s, ...
    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write as JSON: case by case, each with its runs."""
        cases: dict[Case, list] = {}
        for row in self.rows:
            runs = {key: value for key, value in asdict(row).items() if key != "case"}
            runs["seconds"] = [float(f"{value:.4g}") for value in row.seconds]
            cases.setdefault(row.case, []).append(runs)
        text = {
            "machine": self.machine,
            "ceilings": self.ceilings,
            "counts": self.counts,
            "cases": [{**asdict(case), "runs": runs} for case, runs in cases.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(text, indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Results":
        """What `write` wrote."""
        text = json.loads(path.read_text())
        rows = []
        for case in text.pop("cases"):
            runs = case.pop("runs")
            rows += [Row(Case(**case), **run) for run in runs]
        return Results(rows=rows, **text)


def machine(device: str) -> dict[str, str]:
    """The device and the versions of what ran on it."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    found = {
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pico_fast": pico_fast.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        import triton

        found["device"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["triton"] = triton.__version__
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.splitlines()[0]
    return found


def file_name(machine: dict[str, str]) -> str:
    """Name of a machine's file: its device, and on a CPU its threads."""
    name = machine["device"].lower().replace(" ", "-")
    return f"cpu-{machine['threads']}-threads.json" if name == "cpu" else f"{name}.json"
