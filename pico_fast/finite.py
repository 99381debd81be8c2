"""Rows that hold a nan or an infinity: kept away from all other rows, and never hidden."""

import math

import torch
from torch import Tensor

torch.library.define(
    "pico_fast::labels_of_finite", "(str name, Tensor rows, Tensor labels, bool refuse) -> Tensor"
)


def _labels_of_finite(name: str, rows: Tensor, labels: Tensor, refuse: bool) -> Tensor:
    # the largest magnitude is nan or inf if any value is
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1)
    return torch.where(largest < math.inf, labels, labels.clamp(max=-1))


def _labels_of_finite_cpu(name: str, rows: Tensor, labels: Tensor, refuse: bool) -> Tensor:
    # a finite sum has finite terms, and costs a tenth of the maximum of each row
    if rows.sum().abs() < math.inf:
        return labels.clone()
    found = _labels_of_finite(name, rows, labels, refuse)
    spoiled = found != labels
    if refuse and spoiled.any():
        raise ValueError(
            f"{name}: expected finite values in every row with a label of 0 or more, got nan or"
            f" infinity in {int(spoiled.sum())} of {spoiled.numel()} rows, first in row"
            f" {int(spoiled.long().argmax())}"
        )
    return found


torch.library.impl("pico_fast::labels_of_finite", "CPU", _labels_of_finite_cpu)
torch.library.impl("pico_fast::labels_of_finite", "CompositeExplicitAutograd", _labels_of_finite)


@torch.library.register_fake("pico_fast::labels_of_finite")
def _(name, rows, labels, refuse):
    return torch.empty_like(labels)


def finite_anchors(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
) -> tuple[Tensor, Tensor]:
    """Labels [A], -1 for each anchor that holds a nan or an infinity, and which become that [A] bool.

    Their loss and gradient are nan, which shows and reaches no other anchor; in batch they are no keys.
    """
    labels = torch.ops.pico_fast.labels_of_finite.default("anchors", anchors.detach(), anchor_labels, False)
    return labels, labels != anchor_labels


def check_keys(
    name: str,
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
) -> None:
    """Raise ValueError on a CPU for a key in use that is not finite; `name` is what the caller calls keys.

    Elsewhere the check would read every key once more and synchronise; there a key of nan makes the
    anchors that it is compared with nan.
    """
    if keys.device.type == "cpu":
        torch.ops.pico_fast.labels_of_finite.default(name, keys.detach(), key_labels, True)
