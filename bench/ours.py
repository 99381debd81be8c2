"""pico_fast as it is called: against a bank, the way a criterion calls it, or on keys with labels."""

import cases
import torch
from runs import with_gradient
from torch import Tensor

import pico_fast
from pico_fast.bank.share import Share
from pico_fast.contrast.function import Settings, contrast_rows
from pico_fast.selection import layout as layouts
from pico_fast.selection.options import Selection, check_selection
from pico_fast.selection.sample import draw_sample

COUNTS = dict(zip(("num_positives", "num_negatives"), cases.COUNTS, strict=True))
# the contrast of a sample, as cases name it: options of the public function
SAMPLED = {
    "semi_hard, random positives": {"sampling": "semi_hard", "positives": "random"},
    "semi_hard": {"sampling": "semi_hard"},
    "bounded": {"sampling": "bounded"},
    "random": {"sampling": "random"},
}
OPTIONS = {**SAMPLED, "hardest": {"sampling": "hardest"}, "all": {"sampling": "all"}}


def selection_of(name: str) -> Selection:
    """The selection that a case of this name asks for."""
    return check_selection(**{"positives": None, **OPTIONS[name]}, **COUNTS, hard_fraction=0.1)


def bank_of(pairs: cases.Pairs, times: int = 1) -> pico_fast.MemoryBank:
    """A bank with these keys in the first slots of its pixel queues, `times` as many slots as keys.

    Without empty slots the keys are its storage, not a copy.
    """
    classes = int(pairs.key_labels[-1]) + 1
    keys = pairs.keys.unflatten(0, (classes, -1))
    slots = times * keys.shape[1]
    options = {"dtype": keys.dtype, "device": keys.device}
    bank = pico_fast.MemoryBank(classes, keys.shape[2], slots, 0, **options)
    if times == 1:
        bank.storage = keys
    else:
        bank.storage[:, : keys.shape[1]] = keys
    bank.pixel_count.fill_(keys.shape[1])
    return bank


def bank_loss(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    bank: pico_fast.MemoryBank,
    settings: Settings,
    seed: Tensor,  # [] int64
) -> Tensor:
    """Mean loss of anchors against a bank, as `PiCoLoss` computes it: a scalar."""
    rows = contrast_rows(anchors, anchor_labels, None, None, bank.share(), settings, seed)
    return rows.loss.sum() / rows.counted.sum().clamp(min=1)


def against_a_bank(
    pairs: cases.Pairs,
    name: str = "all",
    synthesis: pico_fast.Synthesis | None = None,
    times: int = 1,
):
    """A call that gives loss and gradient of the anchors against a bank of the keys."""
    settings = Settings(selection_of(name), cases.TEMPERATURE, synthesis, False)
    seed = torch.zeros((), dtype=torch.int64, device=pairs.anchors.device)
    bank = bank_of(pairs, times)
    return with_gradient(bank_loss, *pairs[:2], bank, settings, seed)


def on_labelled_keys(pairs: cases.Pairs, name: str = "all"):
    """A call that gives loss and gradient by the public function, which is told each key's label."""
    options = {**OPTIONS[name], **COUNTS}
    return with_gradient(pico_fast.contrast, *pairs, cases.TEMPERATURE, **options)


def sampled_rows(
    pairs: cases.Pairs, name: str
) -> tuple[tuple[Tensor, list[int]], tuple[Tensor, list[int]]]:
    """The sample that such a call draws, of positives and of negatives: rows of keys [W] and how many of
    each class; where all keys take part, all of them."""
    bank = bank_of(pairs)
    share: Share = bank.share()
    layout = layouts.of_bank(*pairs[:2], share.keys, share.ranges)
    seed = torch.zeros((), dtype=torch.int64, device=pairs.anchors.device)
    found = []
    for own in (True, False):
        drawn = draw_sample(layout, selection_of(name), own, seed, share.slots)
        sizes = drawn.sizes.tolist()
        found.append((drawn.key_order[: sum(sizes)], sizes))
    return tuple(found)
