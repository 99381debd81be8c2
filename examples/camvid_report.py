"""Write docs/camvid.md and docs/camvid.svg from the result files in docs/camvid.

    python examples/camvid_report.py

A result file is what `train_segmentation.py --output docs/camvid/ARM-SEED.json` wrote. The arm
`ce` is what the others are compared with, seed by seed.
"""

import json
import shlex
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from train_segmentation import parse, settings_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
BASELINE = "ce"
NAMES = {
    "ce": "cross-entropy",
    "pico": "cross-entropy + PiCo",
    "pico-random": "cross-entropy + PiCo, random sampling",
    "pico-warmup": "cross-entropy + PiCo, warm-up",
    "pico-pool": "cross-entropy + PiCo, hardest half",
}
COLOURS = ("#555555", "#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e")
# two-sided 95 % quantiles of Student's t, by degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Result = dict[str, Any]
Arms = dict[str, dict[int, Result]]  # arm -> seed -> result


def read_results(folder: Path) -> Arms:
    """All result files, the baseline first."""
    arms: Arms = {}
    for path in sorted(folder.glob("*.json")):
        arm, _, seed = path.stem.rpartition("-")
        arms.setdefault(arm, {})[int(seed)] = json.loads(path.read_text())
    if BASELINE not in arms:
        raise SystemExit(f"{folder}: expected results {BASELINE}-SEED.json, found {sorted(arms)}")
    return dict(sorted(arms.items(), key=lambda item: (item[0] != BASELINE, item[0])))


def spread(values: list[float]) -> str:
    """Mean and, of more than one value, standard deviation; in percent."""
    text = f"{100 * mean(values):.1f}"
    return text + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def of_val(result: Result) -> Result:
    """IoU and mean IoU on val."""
    return result


def of_held_out(result: Result) -> Result:
    """IoU and mean IoU on the sequence that was not trained on."""
    return result["held_out"]


def paired(arm: dict[int, Result], baseline: dict[int, Result], where=of_val, name=None):
    """Differences of one IoU (None: the mean IoU) to the baseline, for seeds that both have."""

    def score(result: Result) -> float:
        return where(result)["miou"] if name is None else where(result)["iou"][name]

    return [score(arm[seed]) - score(baseline[seed]) for seed in sorted(arm.keys() & baseline)]


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of a few differences; None for a single one."""
    if not 2 <= len(values) <= len(T_QUANTILE) + 1:
        return None
    half = T_QUANTILE[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def verdict(arm: str, differences: list[float], where: str) -> str:
    """What the paired differences of the mean IoU allow one to say."""
    name = NAMES.get(arm, arm)
    change = f"{name}, {where}: {100 * mean(differences):+.1f} points of mean IoU"
    bounds = interval(differences)
    if bounds is None:
        return f"{change}, one seed: that says nothing about chance."
    low, high = bounds
    text = f"{change} over {len(differences)} seeds (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0:
        return f"{text}: a gain."
    if high < 0:
        return f"{text}: a loss."
    return f"{text}: no difference that so few seeds can tell from chance."


def command(results: dict[int, Result], arm: str) -> str:
    """The command that made an arm, from what its files say; only what is not the default."""
    kept = [{**r["settings"], "threads": r["machine"]["threads"], "seed": None} for r in results.values()]
    if any(settings != kept[0] for settings in kept):
        raise SystemExit(f"{arm}: its seeds were run with different settings")
    default = settings_of(parse(["--data", "camvid", "--root", "PATH"]))
    words = ["python examples/train_segmentation.py --data camvid --root PATH"]
    for name, value in kept[0].items():
        if name in ("data", "seed", "num_classes") or (name in default and value == default[name]):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([flag, *(shlex.quote(str(v)) for v in values)]))
    words.append(f"--seed SEED --output docs/camvid/{arm}-SEED.json")
    return " \\\n    ".join(words)


def draw_curves(arms: Arms, path: Path) -> None:
    """Mean IoU and training loss against steps: a thin line for each seed, a thick one for the mean."""
    plt.rcParams.update({"svg.hashsalt": "camvid", "svg.fonttype": "none", "font.size": 10})
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for colour, (arm, results) in zip(COLOURS, arms.items(), strict=False):
        steps = [point["step"] for point in next(iter(results.values()))["curve"]]
        for axes, key, factor in zip(panels, ("miou", "loss"), (100, 1), strict=True):
            lines = [[factor * p[key] for p in r["curve"]] for r in results.values()]
            for line in lines:
                axes.plot(steps, line, color=colour, linewidth=0.7, alpha=0.5)
            middle = [mean(values) for values in zip(*lines, strict=True)]
            axes.plot(steps, middle, color=colour, linewidth=2.2, label=NAMES.get(arm, arm))
    for axes, title in zip(
        panels, ("mean IoU on val, %", "training loss (with PiCo: the sum of both)"), strict=True
    ):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def class_table(arms: Arms, where) -> list[str]:
    """IoU of each class and arm, and the paired change."""
    others = [arm for arm in arms if arm != BASELINE]
    head = ["class", *(NAMES.get(arm, arm) for arm in arms)]
    head += [f"change by {NAMES.get(arm, arm).removeprefix('cross-entropy + ')}" for arm in others]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    of_baseline = [where(result)["iou"] for result in arms[BASELINE].values()]
    names: list[str | None] = [n for n in of_baseline[0] if of_baseline[0][n] is not None]
    names.append(None)
    for name in names:
        row = ["**mean**" if name is None else name]
        for results in arms.values():
            found = [where(result) for result in results.values()]
            row.append(spread([r["miou"] if name is None else r["iou"][name] for r in found]))
        for arm in others:
            row.append(f"{100 * mean(paired(arms[arm], arms[BASELINE], where, name)):+.1f}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def seed_table(arms: Arms) -> list[str]:
    """Mean IoU and training time of each single run."""
    lines = [
        "| arm | seed | val, % | held out, % | seconds per step |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, results in arms.items():
        for seed, result in sorted(results.items()):
            pace = result["seconds"] / result["steps"]
            scores = (100 * where(result)["miou"] for where in (of_val, of_held_out))
            cells = [f"{score:.1f}" for score in scores]
            lines.append(f"| {NAMES.get(arm, arm)} | {seed} | {' | '.join(cells)} | {pace:.2f} |")
    return lines


def criterion_table(arms: Arms) -> list[str]:
    """What the criterion saw in its first and last recorded step, mean over the seeds."""
    keys = (
        "positive_similarity",
        "negative_similarity",
        "hard_anchors",
        "pixel_fill",
        "region_fill",
    )
    lines = [f"| arm | step | {' | '.join(k.replace('_', ' ') for k in keys)} |"]
    lines.append("|---|---:|" + "---:|" * len(keys))
    for arm, results in arms.items():
        for place in (0, -1):
            points = [r["curve"][place] for r in results.values()]
            if any(key not in point for point in points for key in keys):
                continue
            values = (f"{mean(point[key] for point in points):.2f}" for key in keys)
            lines.append(f"| {NAMES.get(arm, arm)} | {points[0]['step']} | {' | '.join(values)} |")
    return lines


def verdicts_of(arms: Arms) -> list[str]:
    """A sentence for each arm and set."""
    return [
        verdict(arm, paired(results, arms[BASELINE], where), name)
        for arm, results in arms.items()
        if arm != BASELINE
        for where, name in ((of_held_out, "held-out sequence"), (of_val, "val"))
    ]


def write_report(arms: Arms, path: Path) -> None:
    """The page, from the results alone."""
    first = next(iter(arms[BASELINE].values()))
    settings, machine = first["settings"], first["machine"]
    height, width = settings["size"]
    epochs = first["steps"] * settings["batch_size"] / first["train_images"]
    seeds = sorted({seed for results in arms.values() for seed in results})
    seeds = ", ".join(map(str, seeds))
    length = f"{first['steps']} steps of {settings['batch_size']} images"
    held_out = settings["hold_out"]
    verdicts = [f"- {text}" for text in verdicts_of(arms)]
    precision = {"off": "float32"}.get(settings["amp"], f"{settings['amp']} autocast")
    commands = [f"```\n{command(results, arm)}\n```" for arm, results in arms.items()]
    text = f"""# CamVid, with and without PiCo

This page is generated by `python examples/camvid_report.py` from the files in `docs/camvid`.

## What came out

{chr(10).join(verdicts)}

![curves](camvid.svg)

IoU in %, mean ± standard deviation over the seeds; the change is paired by seed. On sequence
{held_out} of train, {first["held_out"]["images"]} images that were not trained on:

{chr(10).join(class_table(arms, of_held_out))}

On val:

{chr(10).join(class_table(arms, of_val))}

{chr(10).join(seed_table(arms))}

The seconds are the whole training step with data loading, on a shared machine: they are no
benchmark of the loss.

What the contrast saw (inner products with the selected positives and negatives; share of hard
anchors; share of the bank's slots in use):

{chr(10).join(criterion_table(arms))}

## What was run

- Images resized to {width} x {height} (of 480 x 360). IoU is counted at the labels' full resolution.
- {length} ({epochs:.0f} epochs of {first["train_images"]} images), seeds {seeds},
  from random weights, {precision}.
- `examples/network.py` with width {settings["width"]}, a small DeepLabV3+; the same initial weights,
  images, augmentation and schedule for all arms of one seed.
- {machine["device"]}, {machine["threads"]} thread(s) each run, torch {machine["torch"]}.

## How to read it

- The val frames are video frames a fifteenth of a second apart and close to train frames: near
  duplicates. A score on val is optimistic, and it rewards remembering the street. The held-out
  sequence is another drive, at dusk: it asks whether what was learned carries over.
- Reduced resolution, a short schedule and a small network: the numbers stand for this setting and
  are not comparable with published ones.
- Weight, temperature, warm-up and sampling were set once and not tuned on val. The learning rate
  was chosen between two values on short cross-entropy runs that were evaluated on val.
- CamVid is for research use and may not be redistributed: no image of it is in this repository.

## Commands

PATH is a folder with `images/{{train,val}}` and `labels/{{train,val}}`; SEED is one of {seeds}.

{chr(10).join(commands)}
"""
    path.write_text(text)


def main() -> None:
    arms = read_results(DOCS / "camvid")
    draw_curves(arms, DOCS / "camvid.svg")
    write_report(arms, DOCS / "camvid.md")
    print("\n".join(verdicts_of(arms)))


if __name__ == "__main__":
    main()
