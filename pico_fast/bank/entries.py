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


class Entries(NamedTuple):
    """Rows for the pixel queue and for the region queue; None where a queue is switched off."""

    pixels: Rows | None
    regions: Rows | None


class Wanted(NamedTuple):
    """What entries are made for."""

    num_classes: int
    pixels_per_image: int  # 0: no pixel queue
    regions: bool
    dtype: torch.dtype  # of the bank
    max_images: int | None  # of a rank; None: ranks tell one another how much they bring


class _Meeting(NamedTuple):
    """What ranks have to know of one another before they gather."""

    first_pixel: Tensor | int  # [] int64, pixels of the ranks before this one
    pixels: int  # rows that each rank sends
    regions: int


def _meet(ranks: Ranks, counts: Tensor, labels: Tensor, wanted: Wanted) -> _Meeting:
    drawn = counts.clamp(max=wanted.pixels_per_image).sum()
    present = (counts > 0).sum() * int(wanted.regions)
    size = torch.full_like(drawn, labels.numel())
    sizes = ranks.gather(torch.stack([size, drawn, present]).unsqueeze(0))
    first_pixel = sizes.narrow(0, 0, ranks.rank).narrow(1, 0, 1).sum()
    if wanted.max_images is not None:
        pairs = wanted.num_classes * wanted.max_images
        return _Meeting(first_pixel, pairs * wanted.pixels_per_image, pairs * int(wanted.regions))
    _, pixels, regions = sizes.amax(0).tolist()  # the one thing that is read back
    return _Meeting(first_pixel, pixels, regions)


def _pixels(
    embeddings: Tensor,  # [B, D, H, W]
    segment: Tensor,  # [B·H·W] int64
    counts: Tensor,  # [C·B] int64
    per_image: int,
    seed: Tensor,  # [] int64
    first_pixel: Tensor | int,
) -> Rows:
    images = embeddings.shape[0]
    quota = counts.clamp(max=per_image)
    capacity = min(counts.numel() * per_image, segment.numel())
    pixel = torch.arange(segment.numel(), device=segment.device)
    # pixels are known by their place in the batch of all ranks
    lot = draws.hash32(seed, draws.BANK_PIXEL, first_pixel + pixel)
    drawn, of_slot = draw_pixels(segment, lot, counts, quota, capacity)
    classes = torch.where(of_slot >= 0, of_slot // max(1, images), -1)
    return Rows(classes, gather_pixels(embeddings, drawn))


def _regions(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    num_classes: int,
) -> Rows:
    means, counts = pool_regions(embeddings, labels, num_classes)
    classes = torch.arange(num_classes, device=labels.device)
    classes = torch.where(counts > 0, classes, -1).T.flatten()
    return Rows(classes, normalize(means, dim=2).transpose(0, 1).flatten(0, 1))


def _sized(entries: Rows, n: int) -> Rows:
    """The same entries in n places: -1 behind the last, or fewer gaps between them."""
    classes, rows = entries
    gaps = classes.numel() - n
    if gaps > 0:
        kept = (classes < 0).long().argsort(stable=True).narrow(0, 0, n)
        return Rows(classes.gather(0, kept), rows.index_select(0, kept))
    return Rows(pad(classes, (0, -gaps), value=-1), pad(rows, (0, 0, 0, -gaps)))


def _bytes(entries: Rows) -> Tensor:
    """Rows and classes side by side: [n, bytes of a row + 4] uint8, so that they travel together."""
    classes = entries.classes.int().unsqueeze(1).view(torch.uint8)
    return torch.cat([entries.rows.view(torch.uint8), classes], 1)


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
) -> Callable[[], Entries]:
    """Draw this rank's entries and begin to gather those of all ranks; the result waits for them."""
    images, n_pixels = labels.shape[0], labels.numel()
    n_segments = wanted.num_classes * images
    flat = labels.flatten()
    image = torch.arange(n_pixels, device=flat.device) // max(1, n_pixels // max(1, images))
    segment = torch.where(flat >= 0, flat * images + image, n_segments)
    counts = segment_counts(segment, n_segments)
    meeting = _Meeting(0, 0, 0)
    if ranks.size > 1:
        meeting = _meet(ranks, counts, labels, wanted)

    own = Entries(None, None)
    if wanted.pixels_per_image:
        quota = (wanted.pixels_per_image, seed, meeting.first_pixel)
        own = own._replace(pixels=_pixels(embeddings, segment, counts, *quota))
    if wanted.regions:
        own = own._replace(regions=_regions(embeddings, labels, wanted.num_classes))
    own = Entries(*(x and Rows(x.classes, x.rows.to(wanted.dtype)) for x in own))
    if ranks.size == 1:
        return lambda: own

    sizes = [n for n, x in zip(meeting[1:], own, strict=True) if x is not None]
    sent = [_bytes(_sized(x, n)) for n, x in zip(sizes, filter(None, own), strict=True)]
    if not sent:
        return lambda: own
    arrived = ranks.start_gather(torch.cat(sent))

    def wait() -> Entries:
        parts = arrived().unflatten(0, (ranks.size, sum(sizes))).split(sizes, 1)
        found = iter(_from_bytes(part.flatten(0, 1), wanted.dtype) for part in parts)
        return Entries(*(x and next(found) for x in own))

    return wait
