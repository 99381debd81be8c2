"""Entries: what a batch brings to the bank, drawn by each rank from its images, gathered from all."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pico_fast import draws
from pico_fast.collectives import Ranks
from pico_fast.pixels import draw_pixels, gather_pixels, segment_counts
from pico_fast.regions import pool_regions


class Rows(NamedTuple):
    """Embeddings on their way into a queue, class by class, in the order in which they are stored."""

    classes: Tensor  # [n] int64, ascending where it is not -1 (nothing to store)
    rows: Tensor  # [n, D]


class Wanted(NamedTuple):
    """What entries are made for."""

    num_classes: int
    pixels_per_image: int  # 0: no pixel queue
    regions: bool
    dtype: torch.dtype  # of the bank
    max_images: int | None  # of a rank; None: ranks tell one another how much they bring


def _meet(ranks: Ranks, counts: Tensor, labels: Tensor, wanted: Wanted) -> tuple[Tensor, int, int]:
    """How many pixels the ranks before this one have, and how many rows each rank sends to each queue."""
    drawn = counts.clamp(max=wanted.pixels_per_image).sum()
    present = (counts > 0).sum() * int(wanted.regions)
    size = torch.full_like(drawn, labels.numel())
    sizes = ranks.gather(torch.stack([size, drawn, present]).unsqueeze(0))
    first_pixel = sizes.narrow(0, 0, ranks.rank).narrow(1, 0, 1).sum()
    if wanted.max_images is not None:
        pairs = wanted.num_classes * wanted.max_images
        return first_pixel, pairs * wanted.pixels_per_image, pairs * int(wanted.regions)
    _, pixels, regions = sizes.amax(0).tolist()  # the one thing that is read back
    return first_pixel, pixels, regions


def _to_bytes(entries: Rows, n: int) -> Tensor:
    """Rows and classes side by side, so that they travel together: [n, bytes of a row + 4] uint8.

    The n places have -1 behind the last entry, or fewer gaps between the entries.
    """
    classes, rows = entries
    gaps = classes.numel() - n
    if gaps > 0:
        kept = (classes < 0).long().argsort(stable=True).narrow(0, 0, n)
        classes, rows = classes.gather(0, kept), rows.index_select(0, kept)
    else:
        classes, rows = pad(classes, (0, -gaps), value=-1), pad(rows, (0, 0, 0, -gaps))
    return torch.cat([rows.view(torch.uint8), classes.int().unsqueeze(1).view(torch.uint8)], 1)


def _from_bytes(x: Tensor, dtype: torch.dtype) -> Rows:
    """The entries of all ranks: class by class, those of one class in rank order."""
    width = x.shape[1] - 4
    classes = x.narrow(1, width, 4).contiguous().view(torch.int32).squeeze(1).long()
    classes, order = classes.sort(stable=True)
    rows = x.narrow(1, 0, width).index_select(0, order).view(dtype)
    return Rows(classes, rows)


def start_entries(
    embeddings: Tensor,  # [B, D, H, W] without a gradient
    labels: Tensor,  # [B, H, W] int64, -1 left out
    wanted: Wanted,
    seed: Tensor,  # [] int64
    ranks: Ranks,
) -> Callable[[], list[Rows]]:
    """Draw this rank's entries and begin to gather those of all ranks; the result waits for them.

    It gives the rows for the pixel queue and those for the region queue, none for a queue of size 0.
    """
    images, n_pixels = labels.shape[0], labels.numel()
    n_segments = wanted.num_classes * images
    flat = labels.flatten()
    pixel = torch.arange(n_pixels, device=flat.device)
    image = pixel // max(1, n_pixels // max(1, images))
    segment = torch.where(flat >= 0, flat * images + image, n_segments)
    counts = segment_counts(segment, n_segments)
    first_pixel, *sizes = _meet(ranks, counts, labels, wanted) if ranks.size > 1 else (0, 0, 0)

    none = Rows(flat.narrow(0, 0, 0), embeddings.new_empty(0, embeddings.shape[1]))
    pixels = regions = none
    if wanted.pixels_per_image:
        quota = counts.clamp(max=wanted.pixels_per_image)
        capacity = min(n_segments * wanted.pixels_per_image, n_pixels)
        # pixels are known by their place in the batch of all ranks
        lot = draws.hash32(seed, draws.BANK_PIXEL, first_pixel + pixel)
        drawn, of_slot = draw_pixels(segment, lot, counts, quota, capacity)
        classes = torch.where(of_slot >= 0, of_slot // max(1, images), -1)
        pixels = Rows(classes, gather_pixels(embeddings, drawn))
    if wanted.regions:
        means, n_pooled = pool_regions(embeddings, labels, wanted.num_classes)
        classes = torch.arange(wanted.num_classes, device=flat.device)
        classes = torch.where(n_pooled > 0, classes, -1).T.flatten()
        regions = Rows(classes, normalize(means, dim=2).transpose(0, 1).flatten(0, 1))
    own = [Rows(x.classes, x.rows.to(wanted.dtype)) for x in (pixels, regions)]
    if ranks.size == 1 or not (wanted.pixels_per_image or wanted.regions):
        return lambda: own

    sent = [_to_bytes(x, n) for x, n in zip(own, sizes, strict=True)]
    arrived = ranks.start_gather(torch.cat(sent))

    def wait() -> list[Rows]:
        parts = arrived().unflatten(0, (ranks.size, sum(sizes))).split(sizes, 1)
        return [_from_bytes(part.flatten(0, 1), wanted.dtype) for part in parts]

    return wait
