"""`select_keys`: lists of the keys that each anchor is compared with, for people who mine."""

from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import checks, reference
from pico_fast.contrast import flow
from pico_fast.contrast.function import check_pairs
from pico_fast.finite import finite_anchors
from pico_fast.selection.layout import Layout, of_labels
from pico_fast.selection.options import Selection, check_selection


class SelectedKeys(NamedTuple):
    """Keys chosen for each anchor, hardest first; P positives and N negatives were asked for."""

    positive_index: Tensor  # [A, P] int64 into keys, -1 behind the last
    negative_index: Tensor  # [A, N] int64 into keys, -1 behind the last
    positive_similarity: Tensor  # [A, P] float32 inner products, 0 behind the last
    negative_similarity: Tensor  # [A, N] float32 inner products, 0 behind the last


def _select(layout: Layout, selection: Selection, seed: Tensor) -> list[Tensor]:
    """Positives, negatives and their similarities, in the caller's order of anchors."""
    found, pulled = [], None
    for own in (True, False):
        side = pulled = flow.choose(layout, None, selection, own, seed, pulled, True)
        strategy, width = selection.strategy(own), selection.count(own)
        if strategy == "all":
            width = layout.keys.shape[0]
        elif strategy == "random":  # the one number that is read back
            count = side.count()
            width = int(count.max()) if count.numel() else 0
        found.append(flow.pool_of(side, selection, width))
    return [layout.restore(x) for pair in zip(*found, strict=True) for x in pair]


def select_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] integer
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] integer
    sampling: str = "hardest",
    positives: str | None = None,
    num_positives: int = 1024,
    num_negatives: int = 2048,
    hard_fraction: float = 0.1,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> SelectedKeys:
    """Choose the positives and negatives that each anchor is compared with.

    Args:
        anchors: [A, D] float32, bfloat16, float16 or float64.
        anchor_labels: [A], any integer dtype; a negative label is an empty slot and selects nothing.
        keys: [K, D]; None takes the anchors themselves, a row never with itself.
        key_labels: [K], any integer dtype; a negative label is an empty slot and is never selected.
        sampling: which keys:
            "all": every key; P = N = K whatever the counts say.
            "random": those of a sample that all anchors have in common; P and N are as many as the anchor
            has that meets most: `num_negatives` or a little more.
            "hardest": the most similar negatives and the least similar positives of all keys, exact.
            "semi_hard": the hardest `hard_fraction` of a sample, which is a uniform draw from the hardest
            `hard_fraction` of all keys up to the sample's own quantile.
            "bounded": of the sampled negatives that are less similar than the anchor's mean positive, the
            most similar `hard_fraction`; positives at random.
        positives: "all", "random", "hardest" or "semi_hard" for the positives alone; None is what
            `sampling` says.
        num_positives: P, most positives of an anchor.
        num_negatives: N, most negatives of an anchor.
        hard_fraction: share of an anchor's sampled keys that "semi_hard" and "bounded" take, (0, 1].
        seed: integer or 0-d int64 tensor; "hardest" and "all" do not depend on it.
        impl: None or "reference".

    Returns:
        SelectedKeys: indices into keys, hardest first, -1 behind the last, and inner products. An anchor
        that holds a nan or an infinity selects nothing and, in batch, is selected by none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or, on a CPU, keys in
            use that are not finite.

    Source: PiCo, TPAMI 2024, hard example sampling; Wang et al., ICCV 2021, section 3.2.
    """
    anchor_labels, key_labels = check_pairs(anchors, anchor_labels, keys, key_labels)
    selection = check_selection(sampling, positives, num_positives, num_negatives, hard_fraction)
    seed = checks.seed(seed, anchors.device)
    used, _ = finite_anchors(anchors, anchor_labels)
    pairs = (anchors.detach(), used, None if keys is None else keys.detach(), key_labels)
    if checks.implementation(impl):
        found = reference.select_keys(*pairs, selection, seed)
    else:
        with torch.no_grad():
            found = _select(of_labels(*pairs), selection, seed)
    return SelectedKeys(*found[:2], *(similarity.float() for similarity in found[2:]))
