"""The contrast of a sample in plain PyTorch: the same algorithm, the same sample, the same result.

The strongest form that stock operations have: the sample is gathered once, anchors stand class by
class, so that "same class" is a slice and no mask, the gradient is made by hand, and nothing is kept
for a backward. The sample is handed in: to draw it costs the peer nothing.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Sampled(NamedTuple):
    """What one side is compared with."""

    rows: Tensor  # [W] int64 into keys, class by class
    sizes: list[int]  # how many of each class

    def firsts(self) -> list[int]:
        """Where each class begins, and behind the last."""
        found = [0]
        for size in self.sizes:
            found.append(found[-1] + size)
        return found


def own_class(
    anchors: Tensor,  # [n, D] class by class
    classes: list[tuple[int, int, int]],  # class, and its first and last anchor
    keys: Tensor,  # [K, D]
    sample: Sampled,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Class by class: its anchors, its sampled keys [m, D] and their inner products [n, m]."""
    firsts = sample.firsts()
    for c, start, stop in classes:
        rows = sample.rows[firsts[c] : firsts[c + 1]]
        if len(rows):
            own = keys[rows].to(anchors.dtype)
            yield slice(start, stop), own, anchors[start:stop] @ own.T


def hardest(
    hardness: Tensor,  # [n, m], -inf where a pair does not count
    candidates: list[int],  # [n] how many pairs of each row count
    count: int,
    fraction: float,
) -> tuple[Tensor, Tensor]:
    """Values [n, k] and places [n, k] of each row's hardest; -inf behind its last."""
    wanted = [min(count, math.ceil(fraction * m)) for m in candidates]
    most = max(wanted)
    values, places = hardness.topk(most, dim=1, sorted=min(wanted) < most)
    if min(wanted) < most:
        behind = torch.arange(most, device=values.device) >= torch.tensor(
            wanted, device=values.device
        ).unsqueeze(1)
        values = values.masked_fill_(behind, -torch.inf)
    return values, places


def _negatives(
    anchors: Tensor,  # [n, D] a block, class by class
    classes: list[tuple[int, int, int]],
    keys: Tensor,  # [W, D] the sample's, in the anchors' dtype
    sample: Sampled,
    ceiling: Tensor | None,  # [n]
    count: int | None,  # None: all that are sampled
    fraction: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Z [n] and the softmax mean [n, D] of the negatives."""
    firsts = sample.firsts()
    s = anchors @ keys.T
    for c, start, stop in classes:
        s[start:stop, firsts[c] : firsts[c + 1]] = -torch.inf
    if count is None:
        z = s.div_(temperature).logsumexp(1)
        return z, s.sub_(z[:, None]).exp_() @ keys
    if ceiling is None:
        candidates = [0] * len(anchors)
        for c, start, stop in classes:
            candidates[start:stop] = [len(keys) - sample.sizes[c]] * (stop - start)
    else:
        s.masked_fill_(s >= ceiling[:, None], -torch.inf)
        candidates = (s > -torch.inf).sum(1).tolist()
    values, places = hardest(s, candidates, count, fraction)
    values = values.div_(temperature)
    z = values.logsumexp(1)
    # a product with weights that are mostly 0 is faster than to gather 2048 rows for each anchor
    weights = s.zero_().scatter_(1, places, values.sub_(z[:, None]).exp_())
    return z, weights @ keys


@torch.no_grad()
def plain(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    positives: Sampled,
    negatives: Sampled,
    sampling: str,
    positive_strategy: str,
    num_positives: int,
    num_negatives: int,
    temperature: float,
    hard_fraction: float = 0.1,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [A, D] with a sample that all anchors have in common.

    `sampling`: "random", "semi_hard" or "bounded"; `positive_strategy`: "random" or "semi_hard". Every
    anchor needs a positive and a negative, below its ceiling where there is one.
    """
    labels, order = anchor_labels.sort()
    rows = anchors[order]
    against = keys[negatives.rows].to(rows.dtype)
    loss, gradient = torch.zeros_like(rows[:, 0]), torch.zeros_like(rows)
    count = None if sampling == "random" else num_negatives
    for first in range(0, len(rows), block):
        here = slice(first, first + block)
        queries = rows[here]
        present, counts = labels[here].unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        classes = list(zip(present.tolist(), (stops - counts).tolist(), stops.tolist(), strict=True))
        ceiling = None
        if sampling == "bounded":
            ceiling = torch.empty_like(queries[:, 0])
            for own, _, s in own_class(queries, classes, keys, positives):
                ceiling[own] = s.mean(1)
        how = (ceiling, count, hard_fraction, temperature)
        z, mean = _negatives(queries, classes, against, negatives, *how)
        for own, rows_of_class, s in own_class(queries, classes, keys, positives):
            if positive_strategy == "semi_hard":
                asked = ([s.shape[1]] * len(s), num_positives, hard_fraction)
                chosen, places = hardest(-s, *asked)
                above = z[own, None] + chosen / temperature
                w = above.sigmoid()
                dense = s.zero_().scatter_(1, places, w)
            else:
                above = z[own, None] - s / temperature
                dense = w = above.sigmoid()
            n = above.shape[1]
            loss[here][own] = softplus(above).mean(1)
            pull = dense @ rows_of_class / n
            gradient[here][own] = w.mean(1, keepdim=True) * mean[own] - pull
    gradient /= temperature * len(rows)
    return loss.mean(), torch.empty_like(gradient).index_copy_(0, order, gradient)


def bytes_needed(
    anchors: int,
    channels: int,
    positives: Sampled,
    negatives: Sampled,
    block: int = 256,
) -> int:
    """Bytes that `plain` allocates beyond its inputs: rather too many, to refuse what cannot fit."""
    block, sampled = min(anchors, block), len(negatives.rows)
    of_class = max(positives.sizes)
    values = (
        4 * anchors * channels
        + 2 * sampled * channels
        + 4 * block * sampled
        + 2 * of_class * (channels + 4 * block)
    )
    return 4 * values
