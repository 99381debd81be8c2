"""The headline times on a GPU: replays of a graph, the eager step beside it, and what each kernel takes.

    python bench/gpu_times.py FOLDER     one JSON line a scene, printed and added to FOLDER/headlines.jsonl
    python bench/gpu_times.py --once     the main ones run once, for a profiler

Replays follow one another: what fits into the L2 cache (a sample does, a bank does not) is found there.
"""

import json
import re
import sys
from pathlib import Path

import gpu_scenes as scenes
import measure
import torch

# seconds of replays, and of eager steps
SECONDS = 0.3


def kernels_of(call: measure.Call) -> dict[str, list[float]]:
    """Launches and microseconds of each kernel of a call, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.key_averages():
        if event.device_time_total > 0:
            # without template arguments: PyTorch's names are pages long
            row = found.setdefault(re.split(r"[<(]", event.key.removeprefix("void "))[0][-60:], [0, 0.0])
            row[0] += event.count
            row[1] = round(row[1] + event.device_time_total, 1)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def timed(name: str, n_anchors: int, make) -> dict:
    """The line of a scene."""
    found = {"name": name, "anchors": n_anchors}
    call = make("cuda")
    call()
    found["eager_us"] = round(1e6 * measure.of_many(call, SECONDS), 1)
    graph = measure.graph_of(call)
    graph.replay()
    found["graph_us"] = round(1e6 * measure.of_many(graph.replay, SECONDS), 1)
    kernels = kernels_of(call)
    launches = sum(n for n, _ in kernels.values())
    return found | {"launches": launches, "device": torch.cuda.get_device_name(), "kernels": kernels}


def once() -> int:
    """The main scenes, each once."""
    for (name, n_anchors), make in scenes.times().items():
        if n_anchors != scenes.FEW and "step" not in name and "random" not in name:
            make("cuda")()
    torch.cuda.synchronize()
    return 0


def main(folder: str) -> int:
    path, failed = Path(folder) / "headlines.jsonl", 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for (name, n_anchors), make in scenes.times().items():
        try:
            found = timed(name, n_anchors, make)
        except Exception as error:  # the others still have their turn, unless the GPU is gone
            failed += 1
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found = {"name": name, "anchors": n_anchors, "error": why[:300]}
        text = json.dumps(found)
        print(text, flush=True)
        with path.open("a") as file:
            file.write(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"expected a folder or --once, got {sys.argv[1:]}")
    sys.exit(once() if sys.argv[1] == "--once" else main(sys.argv[1]))
