"""Confusion matrix and intersection over union."""

import torch
from torch import Tensor


def confusion_matrix(
    predictions: Tensor,  # [...] integer, 0 .. num_classes - 1
    labels: Tensor,  # [...] integer, same shape
    num_classes: int,
    ignore_index: int = 255,
) -> Tensor:
    """Pixels counted by true class (row) and predicted class (column): [C, C] int64."""
    counted = (labels != ignore_index) & (labels >= 0)
    if (labels[counted] >= num_classes).any():
        largest = labels[counted].max().item()
        raise ValueError(f"labels: expected classes 0 to {num_classes - 1}, got {largest}")
    pairs = labels[counted].long() * num_classes + predictions[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class [C] float64; NaN where a class occurs nowhere."""
    confusion = confusion.double()
    correct = confusion.diagonal()
    return correct / (confusion.sum(0) + confusion.sum(1) - correct)


def mean_iou(confusion: Tensor) -> float:
    """Mean over the classes that occur in labels or predictions."""
    return class_iou(confusion).nanmean().item()
