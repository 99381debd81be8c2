"""The demo's picture: predictions of both networks and a flat map of their features."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scenes import CLASSES, IGNORE
from torch import Tensor

COLOURS = ("#8ecae6", "#8d8d8d", "#a0522d", "#f28e2b", "#d62728", "#1b7837", "#a6d854", "#7b3294")
SHOWN = 4


def colour_labels(labels: Tensor) -> np.ndarray:
    """Labels [H, W] as colours [H, W, 3] float; ignored pixels white."""
    table = np.ones((256, 3))
    table[: len(COLOURS)] = [matplotlib.colors.to_rgb(c) for c in COLOURS]
    return table[labels.numpy().clip(0, IGNORE)]


def pick_scenes(labels: Tensor, count: int) -> list[int]:
    """The scenes of [N, H, W] with most classes, by ground truth alone."""
    kinds = [len(torch.unique(scene)) for scene in labels]
    return sorted(range(len(kinds)), key=lambda i: -kinds[i])[:count]


def pick_pixels(labels: Tensor, grid: tuple[int, int], per_class: int) -> tuple[Tensor, Tensor]:
    """Equally many pixels of each class: indices into N·H·W of the feature grid, and labels [M]."""
    small = F.interpolate(labels[:, None].float(), grid, mode="nearest").long().flatten()
    random = torch.Generator().manual_seed(0)
    picks = []
    for label in range(len(CLASSES)):
        members = (small == label).nonzero().squeeze(1)
        picks.append(members[torch.randperm(len(members), generator=random)[:per_class]])
    index = torch.cat(picks)
    return index, small[index]


def unit_features(features: Tensor, index: Tensor) -> Tensor:
    """The picked pixels' features [M, D] of [N, D, H, W], centred on their mean, length 1."""
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)[index].double()
    return F.normalize(rows - rows.mean(0), dim=1)


def separation(rows: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine of two pixels of one class and of two classes, each class counting alike."""
    classes = torch.unique(labels)
    means = torch.stack([rows[labels == c].mean(0) for c in classes])
    # the mean over all pairs of rows is the product of the means
    cosines = means @ means.T
    n = len(classes)
    within = cosines.diagonal().mean()
    between = (cosines.sum() - cosines.diagonal().sum()) / max(1, n * (n - 1))
    return within.item(), between.item()


def _project(rows: Tensor) -> tuple[Tensor, float]:
    """First two principal components [M, 2] and their share of the variance."""
    centred = rows - rows.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    # singular vectors have no sign: fix it, so that maps can be compared between runs
    axes = axes[:2] * axes[:2].sum(1, keepdim=True).sign()
    return centred @ axes.T, (singular[:2] ** 2).sum().item() / (singular**2).sum().item()


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=11)


def draw_picture(
    path: Path,
    images: Tensor,  # [N, 3, H, W], -1 .. 1
    labels: Tensor,  # [N, H, W]
    predictions: dict[str, Tensor],  # name of the run -> [N, H, W]
    features: dict[str, Tensor],  # name of the run -> [N, D, h, w]
    miou: dict[str, float],
) -> None:
    """Write scenes with ground truth and predictions on the left, feature maps on the right."""
    figure = plt.figure(figsize=(15.5, 8.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4 * 2.1, 7))
    names = list(predictions)
    grid = left.subplots(SHOWN, 2 + len(names), squeeze=False)
    for number, scene in enumerate(pick_scenes(labels, SHOWN)):
        row, first = grid[number], number == 0
        photograph = ((images[scene].permute(1, 2, 0).numpy() + 1) / 2).clip(0, 1)
        _show(row[0], photograph, "image" if first else "")
        _show(row[1], colour_labels(labels[scene]), "ground truth" if first else "")
        for axes, name in zip(row[2:], names, strict=True):
            title = f"{name}\nmean IoU {100 * miou[name]:.1f} %" if first else ""
            _show(axes, colour_labels(predictions[name][scene]), title)

    grid_size = tuple(next(iter(features.values())).shape[2:])
    index, kinds = pick_pixels(labels, grid_size, per_class=150)
    for axes, name in zip(right.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        rows = unit_features(features[name], index)
        points, share = _project(rows)
        within, between = separation(rows, kinds)
        for label, colour in enumerate(COLOURS):
            chosen = points[kinds == label]
            axes.scatter(*chosen.T.numpy(), s=11, color=colour, alpha=0.75, linewidths=0)
        axes.set_title(
            f"{name}: mean cosine {within:.2f} within a class, {between:.2f} between", fontsize=11
        )
        axes.set_xlabel(f"first two principal components ({100 * share:.0f} % of the variance)")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
    right.suptitle(
        "features before the classifier (centred, unit length); the same test pixels in both",
        fontsize=12,
    )
    marks = [Line2D([], [], marker="s", linestyle="", color=c, markersize=9) for c in COLOURS]
    figure.legend(marks, CLASSES, loc="outside lower center", ncols=len(CLASSES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
