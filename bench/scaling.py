"""What a step on several ranks sends and multiplies: a model, and docs/scaling.md made from it.

    python bench/scaling.py        write docs/scaling.md

tests/test_ranks.py counts what the real collectives are handed and compares it with `payloads`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Setting:
    """A training run: sizes of the bank, of a rank's batch and of the arithmetic."""

    ranks: int
    placement: str
    sampling: str
    classes: int = 171
    slots: int = 11_000  # of a class: pixels and regions
    channels: int = 256
    anchors: int = 1024  # of a rank
    positives: int = 1024
    negatives: int = 2048
    hard_fraction: float = 0.1
    max_images: int = 2
    pixels_per_image: int = 10
    regions: bool = True
    bank_bytes: int = 2
    anchor_bytes: int = 4
    sum_bytes: int = 4

    @property
    def keys(self) -> int:
        """K, of the whole bank."""
        return self.classes * self.slots

    @property
    def sample(self) -> int:
        """W, keys that semi_hard draws its negatives from on a sharded bank."""
        sharp = math.ceil(1.25 * max(self.negatives / self.hard_fraction, 8192))
        return min(sharp + self.slots, self.keys)


def payloads(s: Setting) -> dict[str, int]:
    """Bytes that a rank hands to the collectives of each kind in one training step."""
    if s.ranks == 1 or s.placement == "local":
        return {}
    pairs = s.classes * s.max_images
    entries = pairs * (s.pixels_per_image + s.regions)
    out = {"gather": 3 * 8 + entries * (s.channels * s.bank_bytes + 4), "reduce": 8}
    out |= {"scatter": 0, "exchange": 0}
    if s.placement == "replicated":
        return out
    everyone = s.ranks * s.anchors
    out["gather"] += s.anchors * (s.channels * s.anchor_bytes + 8)
    out["scatter"] += everyone * (3 + s.channels) * s.sum_bytes
    picked = s.sum_bytes + 8  # a similarity and the key's row
    told = s.anchors * (s.sum_bytes + 16)  # where the hardest end, and the last lot
    if s.sampling == "semi_hard":
        widest = max(1, math.ceil(s.hard_fraction * s.slots))
        out["exchange"] += everyone * widest * picked
        out["gather"] += told + s.anchors * s.sum_bytes
        out["reduce"] += s.sample * s.channels * s.bank_bytes
        return out
    if s.sampling == "hardest":
        out["exchange"] += everyone * (s.positives + s.negatives) * picked
        out["gather"] += 2 * told
    out["reduce"] += 2 * everyone * s.sum_bytes
    out["scatter"] += everyone * (1 + s.channels) * s.sum_bytes
    return out


def sent(s: Setting) -> float:
    """Bytes that leave a rank in one step, by ring algorithms."""
    n, out = s.ranks, payloads(s)
    if not out:
        return 0.0
    part = (n - 1) / n
    passed_on = out["scatter"] + out["exchange"] + 2 * out["reduce"]
    return (n - 1) * out["gather"] + part * passed_on


def operations(s: Setting) -> float:
    """Operations of a rank's matrix products in one step, with the kernels of a GPU."""
    shards = s.ranks if s.placement == "sharded" else 1
    rows, keys = shards * s.anchors, s.keys / shards
    own = s.slots / shards
    if s.sampling == "all":
        return 4 * rows * (keys + own) * s.channels
    if s.sampling == "hardest":
        return 2 * rows * (keys + own + shards * (s.positives + s.negatives)) * s.channels
    sample = min(32_768, s.keys) if s.placement != "sharded" else s.sample
    picks = s.anchors * (s.negatives + shards * shards * s.positives)
    return 2 * (s.anchors * sample + rows * own + picks) * s.channels


def memory(s: Setting) -> float:
    """Bytes of a rank's part of the bank, and of what arrives from the others in a step."""
    shards = s.ranks if s.placement == "sharded" else 1
    arriving = s.ranks * payloads(s).get("gather", 0) + payloads(s).get("exchange", 0)
    return s.keys * s.channels * s.bank_bytes / shards + arriving


# bytes a second that a GPU sends within a node of 8 and between nodes; operations a second (an H100)
INSIDE, BETWEEN, TENSOR = 300e9, 40e9, 790e12


def _row(s: Setting) -> str:
    link = INSIDE if s.ranks <= 8 else BETWEEN
    words = f"| {s.ranks} | {s.placement} | {s.sampling} "
    gigabytes, milliseconds = memory(s) / 1e9, sent(s) / link * 1e3
    return (
        f"{words}| {gigabytes:,.2f} | {sent(s) / 1e6:,.1f} | {milliseconds:,.2f}"
        f" | {operations(s) / 1e12:,.2f} | {operations(s) / TENSOR * 1e3:,.2f} |"
    )


def _table(base: Setting) -> str:
    head = (
        "| ranks | placement | sampling | GB held | MB sent | ms sent | Tflop | ms multiplied |\n"
    )
    lines = [
        _row(replace(base, ranks=n, placement=placement, sampling=sampling))
        for n in (8, 64, 1024)
        for placement in ("replicated", "sharded")
        for sampling in ("all", "hardest", "semi_hard")
    ]
    return head + "|---" * 8 + "|\n" + "\n".join(lines)


def page() -> str:
    """docs/scaling.md."""
    coco = Setting(8, "sharded", "all")
    # the paper's literal queues: 10 pixels and one region of each of 20,210 images
    ade = replace(coco, classes=150, slots=11 * 20_210)
    ade_gb = ade.keys * ade.channels * ade.bank_bytes / 1e9
    # a bank that leaves 40 GB of an 80 GB card to the training
    fits = int(40e9 / (coco.classes * coco.channels * coco.bank_bytes))
    return f"""# Several GPUs: what a step sends, multiplies and holds

This page is generated by `python bench/scaling.py`; the model stands in that file. What the collectives are handed
(`payloads`) is compared by `tests/test_ranks.py` with what they are really handed, at 2 and 4 processes; times are
**calculated, not measured**: {INSIDE / 1e9:.0f} GB/s a GPU within a node of 8, {BETWEEN / 1e9:.0f} GB/s between nodes, {TENSOR / 1e12:.0f} TFLOP/s. No part of
this has run on several GPUs.

Each rank draws A = {coco.anchors:,} anchors from {coco.max_images} images; embeddings of {coco.channels} channels come in float32; the bank is bfloat16.
"MB sent" leaves each rank in one step, by ring algorithms; "GB held" is the rank's part of the bank and what
arrives from the others.

## COCO-Stuff: {coco.classes} classes x {coco.slots:,} slots, {coco.keys * coco.channels * coco.bank_bytes / 1e9:.2f} GB in all

{_table(coco)}

## ADE20K at the paper's literal size: {ade.classes} classes x {ade.slots:,} slots, {ade_gb:.1f} GB in all ({2 * ade_gb:.0f} GB in float32)

{_table(ade)}

## What follows

- **A bank that fits is better replicated.** Sharding does not save operations: N ranks' anchors times an N-th of the
  keys are as many products as one rank's anchors times all keys. What it saves is memory, and what it costs is sent
  on top. It begins to pay where the bank does not fit beside the training: above some {fits:,} slots a class for
  {coco.classes} classes if 40 GB are to spare.
- **What breaks first, replicated**, is the gather of entries: places for every class of every image, {payloads(replace(coco, placement="replicated"))["gather"] / 1e6:.1f} MB a rank
  with `max_images={coco.max_images}`, arrive from all ranks: {64 * payloads(replace(coco, placement="replicated"))["gather"] / 1e6:,.0f} MB at 64, {1024 * payloads(replace(coco, placement="replicated"))["gather"] / 1e9:.1f} GB at 1024. Without `max_images`
  the ranks send what they have (a class that is in no image takes no place), at the price of one number read
  back to the host. The gather runs beside the contrast.
- **What breaks first, sharded**, is that all ranks' anchors pass through every rank: memory and bytes grow with N x A, and
  with hardest sampling N x A x (positives + negatives) candidates; semi_hard sends a tenth of a class for each anchor.
  At COCO-Stuff's size 64 ranks are possible with "all" and "semi_hard";
  1024 are not. Give groups of 8 a bank in common then: `process_group=` takes any group, and DDP goes on
  averaging over all ranks.
- A ring overwrites its oldest entry, so N ranks together fill and renew a bank N times as fast; `pixel_queue_size` is the
  whole bank's.

## The collectives of a step

| placement | collective | of each rank |
|---|---|---|
| both | gather | three numbers: pixels, and how much comes; then entries in the bank's dtype with their classes |
| both | all-reduce | the number of anchors that count |
| sharded | gather | anchors and labels |
| sharded: all, hardest, random | 2 all-reduces | the negatives' log-sum: its maximum, its sum |
| sharded: all, hardest, random | reduce-scatter | softmax mean of the negatives, to the anchors' ranks, while the positives are summed |
| sharded | reduce-scatter | loss, weight and pull of the positives |
| sharded: hardest (semi_hard: positives) | all-to-all, gather | candidates with their rows; where the hardest of all shares end |
| sharded: semi_hard | all-reduce, gather | a sample of keys, 0 where they lie elsewhere; Z |

Synthesis on a sharded bank adds, but for semi_hard, one more exchange of `pool` candidates and three small all-reduces.
All sizes follow from the options, so a rank without an anchor or without an image takes part like any other. The
backward of the criterion has no collective.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
