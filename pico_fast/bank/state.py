"""The bank on disk: what stands beside its tensors, which states are refused, and other queue sizes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import checks

# of the layout of the state; a later one has to read the earlier ones
VERSION = 1


class Ring(NamedTuple):
    """One queue of every class: its part of the slots, and how far each class has come."""

    first: int  # slot
    size: int
    count: Tensor  # [C] int64, filled slots
    next_slot: Tensor  # [C] int64, slot of the ring that is written next


def header(pixel_queue_size: int, region_queue_size: int, device: torch.device) -> dict[str, Tensor]:
    """What a state says of itself, as tensors: wrappers of checkpoints keep nothing else."""
    sizes = torch.tensor([pixel_queue_size, region_queue_size], device=device)
    return {"version": torch.tensor(VERSION, device=device), "queue_sizes": sizes}


def _known(value: object) -> bool:
    """Whether this is a tensor whose values can be looked at."""
    return isinstance(value, Tensor) and value.device.type != "meta"


def errors(
    found: dict[str, object],
    shapes: dict[str, torch.Size],
    pixel_queue_size: int,
    region_queue_size: int,
) -> list[str]:
    """What speaks against a complete state for a bank of these shapes and queue sizes; [] if it fits."""
    sizes = [pixel_queue_size, region_queue_size]
    version, given = (x.tolist() if _known(x) else x for x in (found["version"], found["queue_sizes"]))
    if version != VERSION and not isinstance(version, Tensor):
        return [f"version: expected {VERSION}, got {version!r}: a later pico_fast wrote this state"]
    if given != sizes and not isinstance(given, Tensor):
        return [
            f"queue_sizes: expected {sizes} (pixel, region), got {given!r}; load the state"
            " into a bank of its own size, then `bank.resize(...)`"
        ]
    return list(_shape_errors(found, shapes)) or list(_count_errors(found, *sizes))


def _shape_errors(found: dict[str, object], shapes: dict[str, torch.Size]) -> Iterator[str]:
    for name, shape in shapes.items():
        value = found[name]
        kind, dtypes = ("floating", checks.FLOATING) if name == "storage" else ("int64", (torch.int64,))
        if not (isinstance(value, Tensor) and value.shape == shape and value.dtype in dtypes):
            yield f"{name}: expected shape {list(shape)} {kind}, got {checks.describe(value)}"


def _count_errors(found: dict[str, Tensor], pixels: int, regions: int) -> Iterator[str]:
    highest = {"pixel_count": pixels, "pixel_next": max(0, pixels - 1)}
    highest |= {"region_count": regions, "region_next": max(0, regions - 1)}
    highest |= dict.fromkeys(("step", "refused"), torch.iinfo(torch.int64).max)
    for name, most in highest.items():
        value = found[name]
        if _known(value) and value.numel():
            low, high = int(value.min()), int(value.max())
            if low < 0 or high > most:
                yield f"{name}: expected values from 0 to {most}, got {low} to {high}"


def storage_errors(
    storage: Tensor,  # [C, n, D] as it comes
    labels: Tensor,  # [C·n] int64, -1 where a slot is empty
    dtype: torch.dtype,
) -> list[str]:
    """What speaks against these embeddings: in the bank's dtype the filled slots have to be finite."""
    if not _known(storage) or not _known(labels):
        return []
    for c, filled in enumerate(labels.view(storage.shape[:2]) >= 0):
        # class by class: no copy of the whole bank
        rows = storage[c].to(dtype)[filled.to(storage.device)]
        if not rows.isfinite().all():
            return [f"storage: expected finite values in filled slots, got others in class {c}"]
    return []


def newest(
    storage: Tensor,  # [C, n, D]
    ring: Ring,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The newest entries of a ring in one of another size: slots [C, size, D], count and next [C]."""
    kept = ring.count.clamp(max=size)
    place = torch.arange(size, device=storage.device)
    # oldest first: the ring goes on writing behind the newest
    slot = (ring.next_slot - kept).unsqueeze(1) + place
    slot = ring.first + slot % max(1, ring.size)
    filled = (place < kept.unsqueeze(1)).unsqueeze(2)
    slots = storage.new_zeros(storage.shape[0], size, storage.shape[2])
    if ring.size:
        rows = storage.gather(1, slot.unsqueeze(2).expand_as(slots))
        slots = torch.where(filled, rows, slots)
    return slots, kept, kept % max(1, size)
