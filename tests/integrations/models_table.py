"""What the criterion adds to a training step of each model, and the table of docs/models.md.

    PYTHONPATH=.integrations/hub:tests/integrations/shims \\
        .venv/bin/python tests/integrations/models_table.py hub_cases
    PYTHONPATH=.integrations/mmseg:tests/integrations/shims \\
        .venv/bin/python tests/integrations/models_table.py mmseg_cases

Steps with and without take turns on one thread of the CPU; given are medians, and the median of the ratios
of neighbours. Numbers go to docs/models.json, and from there into the page; without a name only the page is
drawn anew.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from model_case import CLASSES, Case, draw_batch
from torch import nn

import pico_fast

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: tests/integrations/models_table.py -->\n", "<!-- end of table -->\n"
LIBRARIES = ("torchvision", "segmentation_models_pytorch", "transformers", "mmsegmentation")
IMAGES, SIZE, DIM, ROUNDS = 4, 128, 64, 11
CRITERION = {
    "sampling": "random",
    "num_positives": 64,
    "num_negatives": 256,
    "max_samples": 256,
    "pixel_queue_size": 500,
    "region_queue_size": 100,
}


class Step:
    """A training step of a model, with the tap and the criterion or without."""

    def __init__(self, case: Case, has_contrast: bool) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.build().train()
        self.tap = pico_fast.attach(self.model, embedding_dim=DIM) if has_contrast else None
        criterion = pico_fast.PiCoLoss(CLASSES, DIM, **CRITERION)
        self.joint = pico_fast.JointLoss(criterion)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.images, self.labels = draw_batch(IMAGES, SIZE)

    def _loss(self) -> torch.Tensor:
        scores, own = self.case.call(self.model, self.images, self.labels)
        if self.tap is None and own is None:
            return _segmentation(scores, self.labels)
        if self.tap is None:
            return own
        if own is None:
            return self.joint(scores, self.tap.embeddings(), self.labels)
        return own + self.joint.criterion(self.tap.embeddings(), self.labels, scores)

    def run(self) -> float:
        """Its time in milliseconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._loss().backward()
        self.optimizer.step()
        return 1e3 * (time.perf_counter() - start)


def _segmentation(
    scores: torch.Tensor,  # [B, C, h, w]
    labels: torch.Tensor,  # [B, H, W]
) -> torch.Tensor:
    scores = nn.functional.interpolate(scores, labels.shape[1:], mode="bilinear")
    return nn.functional.cross_entropy(scores, labels, ignore_index=255)


def measure(case: Case) -> dict:
    """A row of the table."""
    steps = [Step(case, has_contrast) for has_contrast in (False, True)]
    for step in steps * 2:
        step.run()
    rounds = []
    for number in range(ROUNDS):
        # neither is always the first
        order = (0, 1) if number % 2 else (1, 0)
        times = {which: steps[which].run() for which in order}
        rounds.append((times[0], times[1]))
    without, with_contrast = map(statistics.median, zip(*rounds, strict=True))
    model = steps[0].model
    return {
        "library": case.library,
        "name": case.name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tap": steps[1].tap.path,
        "stride": case.stride,
        "step_ms": round(without, 1),
        "step_with_contrast_ms": round(with_contrast, 1),
        "ratio": round(statistics.median(b / a for a, b in rounds), 2),
    }


def table(results: dict) -> str:
    """The rows of docs/models.md."""
    lines = [
        "| library | model | class | tap | stride | parameters | step | with PiCo | ratio |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(results["models"].values(), key=lambda row: LIBRARIES.index(row["library"])):
        lines.append(
            f"| {row['library']} | {row['name']} | `{row['class']}` | `{row['tap']}` | {row['stride']}"
            f" | {row['parameters'] / 1e6:.1f} M | {row['step_ms']:.0f} ms"
            f" | {row['step_with_contrast_ms']:.0f} ms | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def page(text: str, results: dict) -> str:
    """The text of docs/models.md with its table drawn anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(results)}{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="?", choices=("hub_cases", "mmseg_cases"))
    options = parser.parse_args(arguments)
    data = DOCS / "models.json"
    results = json.loads(data.read_text()) if data.exists() else {"models": {}}
    if options.cases:
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)
        results["settings"] = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
            "images": [IMAGES, 3, SIZE, SIZE],
            "rounds": ROUNDS,
            "classes": CLASSES,
            "embedding_dim": DIM,
            **CRITERION,
        }
        for case in importlib.import_module(options.cases).CASES:
            results["models"][case.key] = row = measure(case)
            print(f"{case.key}: {row['step_ms']} ms, with PiCo x {row['ratio']}", flush=True)
        data.write_text(json.dumps(results, indent=1) + "\n")
    models = DOCS / "models.md"
    models.write_text(page(models.read_text(), results))


if __name__ == "__main__":
    main()
