"""What a step on several ranks sends and multiplies: a model, and docs/scaling.md made from it.

    python bench/scaling.py        write docs/scaling.md

tests/test_ranks.py counts what the real collectives are handed and compares it with `payloads`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pico_fast.selection.options import Selection, check_selection

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SIDES = (True, False)  # the positives (own), the negatives


@dataclass(frozen=True)
class Setting:
    """A training run: sizes of the bank, of a rank's batch and of the arithmetic."""

    ranks: int
    placement: str
    sampling: str
    positives: str | None = None
    classes: int = 171
    slots: int = 11_000  # of a class: pixels and regions
    channels: int = 256
    anchors: int = 1024  # of a rank
    num_positives: int = 1024
    num_negatives: int = 2048
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
    def selection(self) -> Selection:
        """Which keys an anchor is compared with."""
        counts = (self.num_positives, self.num_negatives, self.hard_fraction)
        return check_selection(self.sampling, self.positives, *counts)

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold keys."""
        return self.placement == "sharded" and self.ranks > 1

    def sample(self, own: bool) -> int:
        """W, places of the sample of one side; 0 where all keys take part."""
        needed = self.selection.needed(own)
        if needed is None:
            return 0
        needed = min(needed, self.keys)
        if own:
            return self.classes * min(needed, self.slots)
        return min(self.keys, needed + self.slots + self.classes)


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
    everyone, stay = s.ranks * s.anchors, {own: s.sample(own) == 0 for own in SIDES}
    if any(stay.values()):
        out["gather"] += s.anchors * (s.channels * s.anchor_bytes + 8)
    for own in SIDES:
        out["reduce"] += s.sample(own) * s.channels * s.bank_bytes
        if s.selection.strategy(own) == "hardest":
            # similarities and the keys' rows; and where the hardest of all shares end
            picked = s.sum_bytes + 8
            out["exchange"] += everyone * s.selection.count(own) * picked
            out["gather"] += s.anchors * picked
    if stay[True]:
        out["gather"] += s.anchors * s.sum_bytes
        out["scatter"] += everyone * (3 + s.channels) * s.sum_bytes
        if s.sampling == "bounded":
            out["scatter"] += everyone * s.sum_bytes
    if stay[False]:
        out["reduce"] += everyone * s.sum_bytes
        out["scatter"] += everyone * (2 + s.channels) * s.sum_bytes
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
    """Operations of a rank's matrix products in one step."""
    pairs = 0.0  # of an anchor and a key, once for each product
    for own in SIDES:
        strategy, drawn = s.selection.strategy(own), s.sample(own)
        if drawn:
            met = drawn // s.classes if own else drawn
            # similarities, and a weighted sum of those that count
            weighed = min(met, s.selection.count(own)) if s.selection.is_cut(own) else met
            pairs += s.anchors * (met + weighed)
        else:
            # all ranks' anchors meet this share; of its class alone where they are positives
            shards = s.ranks if s.sharded else 1
            rows, met = shards * s.anchors, (s.slots if own else s.keys) / shards
            pairs += rows * (met + (s.selection.count(own) if strategy == "hardest" else met))
    return 2 * pairs * s.channels


def memory(s: Setting) -> float:
    """Bytes of a rank's part of the bank, and of what arrives from the others in a step."""
    shards = s.ranks if s.sharded else 1
    out = payloads(s)
    arriving = s.ranks * out.get("gather", 0) + out.get("exchange", 0) + out.get("reduce", 0)
    return s.keys * s.channels * s.bank_bytes / shards + arriving


# bytes a second that a GPU sends within a node of 8 and between nodes; operations a second (an H100)
INSIDE, BETWEEN, TENSOR = 300e9, 40e9, 790e12


# samplings and positives of the tables
REPLICATED = (("all", None), ("semi_hard", None))
SHARDED = (*REPLICATED, ("semi_hard", "random"), ("random", None), ("hardest", None))


def _row(s: Setting) -> str:
    link = INSIDE if s.ranks <= 8 else BETWEEN
    words = f"| {s.ranks} | {s.placement} | {s.sampling} | {s.positives or ''} "
    gigabytes, milliseconds = memory(s) / 1e9, sent(s) / link * 1e3
    return (
        f"{words}| {gigabytes:,.2f} | {sent(s) / 1e6:,.1f} | {milliseconds:,.2f}"
        f" | {operations(s) / 1e12:,.2f} | {operations(s) / TENSOR * 1e3:,.2f} |"
    )


def _table(base: Setting) -> str:
    head = "| ranks | placement | sampling | positives= | GB held | MB sent | ms sent | Tflop | ms multiplied |\n"
    lines = [
        _row(replace(base, ranks=n, placement=placement, sampling=sampling, positives=positives))
        for n in (8, 64, 1024)
        for placement, rows in (("replicated", REPLICATED), ("sharded", SHARDED))
        for sampling, positives in rows
    ]
    return head + "|---" * 9 + "|\n" + "\n".join(lines)


def page() -> str:
    """docs/scaling.md."""
    coco = Setting(8, "sharded", "all")
    # the paper's literal queues: 10 pixels and one region of each of 20,210 images
    ade = replace(coco, classes=150, slots=11 * 20_210)
    ade_gb = ade.keys * ade.channels * ade.bank_bytes / 1e9
    # a bank that leaves 40 GB of an 80 GB card to the training
    fits = int(40e9 / (coco.classes * coco.channels * coco.bank_bytes))
    entries = payloads(replace(coco, placement="replicated"))["gather"]
    hard, drawn = (replace(coco, sampling="semi_hard", positives=p) for p in (None, "random"))
    row = coco.channels * coco.bank_bytes
    return f"""# Several GPUs: what a step sends, multiplies and holds

This page is generated by `python bench/scaling.py`, and the model behind it stands in that file. It counts the bytes
that the collectives are handed (`payloads`); `tests/test_ranks.py` compares these with what they are really handed, on 2
and 4 processes. Times are **calculated, not measured**: {INSIDE / 1e9:.0f} GB/s a GPU within a node of 8, {BETWEEN / 1e9:.0f} GB/s between nodes,
{TENSOR / 1e12:.0f} TFLOP/s. No part of this has run on several GPUs.

Each rank draws A = {coco.anchors:,} anchors from {coco.max_images} images. Embeddings of {coco.channels} channels come in float32; the bank is bfloat16.
"MB sent" leaves each rank in one step, by ring algorithms. "GB held" is the rank's part of the bank and what arrives from
the others. Where `positives=` is empty, the positives are chosen as `sampling` says.

## COCO-Stuff: {coco.classes} classes x {coco.slots:,} slots, {coco.keys * row / 1e9:.2f} GB in all

{_table(coco)}

## ADE20K at the paper's literal size: {ade.classes} classes x {ade.slots:,} slots, {ade_gb:.1f} GB in all ({2 * ade_gb:.0f} GB in float32)

{_table(ade)}

## What follows

- **A bank that fits is better replicated.** Every rank then holds all of it, and only new entries are sent. Sharding saves
  memory alone: it begins to pay where the bank does not fit beside the training, above some {fits:,} slots a class
  for {coco.classes} classes if 40 GB are to spare.
- **What breaks first, replicated**, is the gather of entries. Places for every class of every image, {entries / 1e6:.1f} MB a rank
  with `max_images={coco.max_images}`, arrive from all ranks: {64 * entries / 1e6:,.0f} MB at 64, {1024 * entries / 1e9:.1f} GB at 1024. Without `max_images`
  the ranks send what they have (a class that is in no image takes no place), and one number is read back to the host.
  The gather runs beside the contrast.
- **Sharded, a sample travels once.** With random, semi_hard and bounded the sampled keys come to all ranks in one all-reduce
  whose size does not grow with the number of ranks, and everything after it is local. The negatives' sample of {hard.sample(False):,} keys is
  {hard.sample(False) * row / 1e6:.0f} MB.
- **The positives of semi_hard cost far more than that.** Their sample holds min(slots, num_positives / hard_fraction) keys of
  every class: {hard.sample(True) // hard.classes:,} x {hard.classes} classes are {hard.sample(True) * row / 1e6:.0f} MB, {hard.sample(True) / hard.keys:.0%} of the bank of COCO-Stuff, on every rank in every step. That
  gives up what sharding is for. `positives="random"` draws {drawn.sample(True) // drawn.classes:,} of each class and sends a tenth: {drawn.sample(True) * row / 1e6:.0f} MB. Choose it on a
  sharded bank.
- **all and hardest send all ranks' anchors through every rank**, so bytes and memory grow with N x A, and hardest adds
  N x A x (num_positives + num_negatives) candidates. 64 ranks are possible, 1024 are not. Give groups of 8 a bank in
  common then: `process_group=` takes any group, and DDP goes on averaging over all ranks.
- Sharding saves no operations with all and hardest: N ranks' anchors times an N-th of the keys are as many products as
  one rank's anchors times all keys.
- A ring overwrites its oldest entry, so N ranks together fill and renew a bank N times as fast. `pixel_queue_size` is the
  whole bank's.

## The collectives of a step

| placement | collective | of each rank |
|---|---|---|
| both | gather | three numbers: pixels, and how much comes; then entries in the bank's dtype with their classes |
| both | all-reduce | the number of anchors that count |
| sharded: a sampled side | all-reduce | the keys of the sample, 0 where they lie elsewhere |
| sharded: a side of all or hardest | gather | anchors and classes, once for both sides |
| sharded: hardest | all-to-all, gather | candidates with their rows; where the hardest of all shares end |
| sharded: negatives of all or hardest | all-reduce, reduce-scatter | the largest log-sum; sums and the softmax mean, to the anchors' ranks |
| sharded: positives of all or hardest | gather, reduce-scatter | log-sums of the negatives; loss, weight, similarity and pull |
| sharded: bounded, positives of all or hardest | reduce-scatter | the positives' similarities, for their mean |

Synthesis on a sharded bank adds nothing to sampled negatives. With all and hardest it adds one more exchange of `pool`
candidates, some small gathers and up to three small all-reduces; two negatives of different shares are not mixed with one another.
All sizes follow from the options, so a rank without an anchor or without an image takes part like any other. The
backward of the criterion has no collective.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
