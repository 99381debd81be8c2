"""Filling a bank and drawing anchors with one Python iteration for each class of each image."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def _append(
    ring: Tensor,  # [slots, D], written
    rows: Tensor,  # [n, D]
    count: Tensor,  # [] int64, filled slots, updated
    next_slot: Tensor,  # [] int64, updated
) -> None:
    """Write rows behind the newest entry; of more than the ring holds, the last ones."""
    size = len(ring)
    if size == 0:
        return
    end = int(next_slot) + len(rows)
    kept = rows[-size:]
    slots = torch.arange(end - len(kept), end, device=ring.device) % size
    ring[slots] = kept.to(ring.dtype)
    next_slot.fill_(end % size)
    count.fill_(min(int(count) + len(rows), size))


@torch.no_grad()
def loop_enqueue(
    storage: Tensor,  # [C, P + R, D], pixel queue then region queue of each class, written
    pixel_count: Tensor,  # [C] int64, filled slots, updated
    pixel_next: Tensor,  # [C] int64, slot that is written next, updated
    region_count: Tensor,  # [C] int64, updated
    region_next: Tensor,  # [C] int64, updated
    pixel_queue_size: int,
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64, -1 left out
    pixels_per_image: int = 10,
) -> None:
    """Random pixels and the mean of each class of each image go into the rings of that class.

    The pixels are of the class, and a pointer moves by as many slots as were written: with the same
    picks, the bank that pico_fast makes.
    """
    for image, label in zip(embeddings.flatten(2), labels.flatten(1), strict=True):
        for c in label.unique().tolist():
            if c < 0:
                continue
            pixels = (label == c).nonzero()[:, 0]
            of_class = image[:, pixels]
            chosen = torch.randperm(len(pixels), device=pixels.device)[:pixels_per_image]
            queue, regions = storage[c, :pixel_queue_size], storage[c, pixel_queue_size:]
            _append(queue, of_class[:, chosen].T, pixel_count[c], pixel_next[c])
            region = normalize(of_class.mean(1), dim=0)
            _append(regions, region[None], region_count[c], region_next[c])


class Bank:
    """Rings of pixels and regions that `loop_enqueue` fills."""

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        pixel_queue_size: int,
        region_queue_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        slots = pixel_queue_size + region_queue_size
        self.pixel_queue_size = pixel_queue_size
        self.storage = torch.zeros(num_classes, slots, embedding_dim, dtype=dtype, device=device)
        self.rings = torch.zeros(4, num_classes, dtype=torch.int64, device=device).unbind()

    def enqueue(
        self,
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, H, W] int64, -1 left out
    ) -> None:
        """Store a batch."""
        loop_enqueue(self.storage, *self.rings, self.pixel_queue_size, embeddings, labels)


@torch.no_grad()
def loop_anchors(
    labels: Tensor,  # [B, H, W] int64, -1 left out
    predictions: Tensor,  # [B, H, W] int64
    max_samples: int,
    max_views: int,
    num_classes: int,
    min_pixels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pixel [A] into B·H·W and label [A] of anchors, half of each class and image predicted wrong.

    A class takes part in an image that has at least `min_pixels` pixels of it; None asks for more than
    `max_views`, as published code does. All pairs of image and class give the same number of anchors;
    where one kind is short, the other fills up.
    """
    least = max_views + 1 if min_pixels is None else min_pixels
    flat, guessed = labels.flatten(1), predictions.flatten(1)
    pairs = []
    for b, label in enumerate(flat):
        for c in label.unique().tolist():
            if 0 <= c < num_classes and int((label == c).sum()) >= least:
                pairs.append((b, c))
    pairs = pairs[:max_samples]
    chosen, classes = [flat.new_empty(0)], []
    n_view = min(max_samples // max(1, len(pairs)), max_views)
    for b, c in pairs:
        hard = ((flat[b] == c) & (guessed[b] != c)).nonzero()[:, 0]
        easy = ((flat[b] == c) & (guessed[b] == c)).nonzero()[:, 0]
        n_hard = min(len(hard), max(n_view // 2, n_view - len(easy)))
        hard = hard[torch.randperm(len(hard), device=hard.device)[:n_hard]]
        easy = easy[torch.randperm(len(easy), device=easy.device)[: n_view - n_hard]]
        chosen += [b * flat.shape[1] + hard, b * flat.shape[1] + easy]
        classes += [c] * (len(hard) + len(easy))
    return torch.cat(chosen), torch.tensor(classes, dtype=torch.int64, device=flat.device)
