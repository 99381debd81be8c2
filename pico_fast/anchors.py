"""Anchors: which pixels of the batch get a loss (segmentation-aware hard anchor sampling)."""

import torch
from torch import Tensor

from pico_fast import checks, draws, reference
from pico_fast.grid import check_predictions, clean_labels, predictions_on_grid
from pico_fast.pixels import draw_pixels, segment_counts

EASY = ("correct", "random")


def check_sizes(max_samples: int, max_views: int, min_pixels: int, easy: str) -> None:
    """Raise unless the options of anchor sampling are possible ones."""
    checks.integer("max_samples", max_samples, 1)
    checks.integer("max_views", max_views, 1)
    checks.integer("min_pixels", min_pixels, 1)
    checks.choice("easy", easy, EASY)


def draw_anchors(
    labels: Tensor,  # [B, H, W] int64, -1 left out
    predictions: Tensor | None,  # [B, H, W] int64
    max_samples: int,
    max_views: int,
    min_pixels: int,
    num_classes: int,
    seed: Tensor,  # [] int64
    easy: str = "correct",
) -> tuple[Tensor, Tensor]:
    """`sample_anchors` behind its checks: pixel [A], label [A]; equal to `reference.sample_anchors`."""
    images, height, width = labels.shape
    flat = labels.flatten()
    pixel = torch.arange(flat.numel(), device=flat.device)
    # segments are in the order of the slots: class, image, hard before easy
    n_pairs = num_classes * images
    pair = torch.where(flat >= 0, flat * images + pixel // max(1, height * width), n_pairs)
    counts = segment_counts(pair, n_pairs)

    eligible = counts >= min_pixels
    # pairs are known to the hash by their place in [B, C]
    name = torch.arange(n_pairs, device=flat.device)
    name = name % max(1, images) * num_classes + name // max(1, images)
    lot = draws.hash32(seed, draws.ANCHOR_PAIR, name)
    rank = torch.where(eligible, lot, draws.WORD + 1).argsort().argsort()
    taking_part = eligible & (rank < max_samples)
    n_view = (max_samples // eligible.sum().clamp(min=1)).clamp(min=1, max=max_views)

    wrong = torch.zeros_like(flat, dtype=torch.bool)
    if predictions is not None:
        wrong = predictions.flatten() != flat
    hard = torch.where(wrong, pair, n_pairs)
    hard_counts = segment_counts(hard, n_pairs)
    n_hard = n_view // 2
    if easy == "correct":
        n_hard = torch.maximum(n_hard, n_view - (counts - hard_counts))
    hard_quota = torch.where(taking_part, torch.minimum(hard_counts, n_hard), 0)
    lot = draws.hash32(seed, draws.ANCHOR_PIXEL, pixel)
    if easy == "random":
        # the rest comes from all pixels that were not taken as hard ones
        taken, _ = draw_pixels(hard, lot, hard_counts, hard_quota, max_samples)
        taken = torch.where(taken >= 0, taken, flat.numel())
        wrong = wrong.new_zeros(flat.numel() + 1).index_fill_(0, taken, True).narrow(0, 0, flat.numel())
        hard_counts = segment_counts(torch.where(wrong, pair, n_pairs), n_pairs)
        lot = torch.where(wrong, lot, draws.hash32(seed, draws.ANCHOR_EASY, pixel))
    easy_counts = counts - hard_counts
    easy_quota = torch.where(taking_part, torch.minimum(easy_counts, n_view - hard_quota), 0)

    segment = torch.where(flat >= 0, 2 * pair + 1 - wrong.long(), 2 * n_pairs)
    counts = torch.stack([hard_counts, easy_counts], 1).flatten()
    quota = torch.stack([hard_quota, easy_quota], 1).flatten()
    drawn, of_slot = draw_pixels(segment, lot, counts, quota, max_samples)
    label = torch.where(of_slot >= 0, of_slot // max(1, 2 * images), -1)
    return drawn, label


def sample_anchors(
    labels: Tensor,  # [B, H, W] integer
    predictions: Tensor | None,  # [B, C, H, W] scores or [B, H, W] integer
    max_samples: int = 1024,
    max_views: int = 100,
    min_pixels: int = 1,
    *,
    num_classes: int,
    ignore_index: int = 255,
    seed: int | Tensor = 0,
    easy: str = "correct",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the pixels that get a contrastive loss.

    Every (image, class) pair with at least `min_pixels` pixels gets up to
    n_view = max(1, min(max_samples // pairs, max_views)) distinct pixels; with more pairs than
    max_samples a hash chooses pairs. n_view // 2 of them are hard (prediction wrong), the rest correct;
    where one kind is short the other fills up. Without predictions the draw is uniform.

    Args:
        labels: ground truth [B, H, W], any integer dtype; negative values and ignore_index left out.
        predictions: class scores [B, C, H, W], predicted classes [B, H, W], or None.
        max_samples: slots A of the result.
        max_views: most pixels of one class in one image.
        min_pixels: pixels a class needs in an image to take part there.
        num_classes: C; a label of C or more raises on a CPU and is left out elsewhere.
        ignore_index: label of pixels to leave out; not one of the classes.
        seed: integer or 0-d int64 tensor; the same seed draws the same anchors on every device.
        easy: where the other half comes from: "correct" pixels, or "random" ones of all that remain.
        impl: None or "reference".

    Returns:
        pixel [A] int64 into B·H·W and label [A] int64, in the order (class, image, hard before easy),
        -1 in empty slots, which come last.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Source: Wang et al., ICCV 2021, section 3.2, as released; PiCo, TPAMI 2024.
    """
    clean = clean_labels(labels, num_classes, ignore_index)
    check_predictions("predictions", predictions, num_classes, labels)
    check_sizes(max_samples, max_views, min_pixels, easy)
    seed = checks.seed(seed, labels.device)
    if predictions is not None:
        for dim in (-2, -1):
            checks.size("predictions", predictions, dim, labels.shape[dim], "labels")
        predictions = predictions_on_grid(predictions, *labels.shape[1:])
    sample = reference.sample_anchors if checks.implementation(impl) else draw_anchors
    return sample(clean, predictions, max_samples, max_views, min_pixels, num_classes, seed, easy)
