"""The bank: pixel embeddings and region embeddings of all classes, gathered over many images."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pico_fast import checks, reference
from pico_fast.labels import clean_labels
from pico_fast.pixels import draw_pixels, gather_pixels, segment_counts
from pico_fast.regions import pool_regions

_STATE = ("storage", "pixel_count", "pixel_next", "region_count", "region_next", "step")


class MemoryBank(nn.Module):
    """Per class a ring of pixel embeddings and a ring of region embeddings.

    A region embedding is the mean of all pixels of one class in one image, brought back to unit
    length. Each `enqueue` stores up to `pixels_per_image` random pixels and the region of every class
    of every image; the oldest entries are overwritten.

    Args:
        num_classes: C.
        embedding_dim: D.
        pixel_queue_size: P, pixel slots of a class; 0 switches the queue off.
        region_queue_size: R, region slots of a class; 0 switches the queue off.
        pixels_per_image: most pixels stored of one class of one image.
        dtype: of the stored embeddings; the memory is C·(P + R)·D values of it.
        ignore_index: label of pixels to leave out.
        seed: integer; with `step` it decides which pixels are drawn.
        device: where the bank is made; `.to()` moves it like any module.
        impl: None or "reference".

    Attributes:
        storage: [C, P + R, D], a class's pixel slots first, then its region slots.
        pixel_count, region_count: [C] int64, filled slots.
        step: [] int64, how many batches were enqueued.

    The tensors are state, saved and loaded by `state_dict`, but neither parameters nor buffers: they
    follow the device of the module and keep their dtype, and no wrapper broadcasts or shards them.

    Source: PiCo, TPAMI 2024, section 3.3 (pixel queue and region memory).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        pixel_queue_size: int,
        region_queue_size: int,
        pixels_per_image: int = 10,
        dtype: torch.dtype = torch.bfloat16,
        ignore_index: int = 255,
        seed: int = 0,
        device: torch.device | str | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.classes(num_classes, ignore_index)
        checks.integer("embedding_dim", embedding_dim, 1)
        checks.integer("pixel_queue_size", pixel_queue_size, 0)
        checks.integer("region_queue_size", region_queue_size, 0)
        checks.integer("pixels_per_image", pixels_per_image, 1)
        checks.integer("seed", seed, -(2**63), 2**63 - 1)
        checks.floating_dtype("dtype", dtype)
        self._is_reference = checks.implementation(impl)
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.pixel_queue_size = pixel_queue_size
        self.region_queue_size = region_queue_size
        self.pixels_per_image = pixels_per_image
        self.ignore_index = ignore_index
        self.seed = seed
        slots = pixel_queue_size + region_queue_size
        shape = (num_classes, slots, embedding_dim)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        for name in _STATE[1:5]:
            setattr(self, name, torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes} classes x ({self.pixel_queue_size} pixels +"
            f" {self.region_queue_size} regions) x {self.embedding_dim}, {self.storage.dtype}"
        )

    def keys(self) -> tuple[Tensor, Tensor]:
        """All slots as keys: views of the bank [C·(P + R), D] and their labels, -1 where empty."""
        slot = torch.arange(self.storage.shape[1], device=self.storage.device)
        in_pixels = slot < self.pixel_count.unsqueeze(1)
        region = slot - self.pixel_queue_size
        in_regions = (region >= 0) & (region < self.region_count.unsqueeze(1))
        classes = torch.arange(self.num_classes, device=slot.device).unsqueeze(1)
        labels = torch.where(in_pixels | in_regions, classes, -1)
        return self.storage.flatten(0, 1), labels.flatten()

    def segments(self) -> Tensor:
        """Where the filled slots lie: [C, 2, 2] int64, first key and how many, of pixels and regions."""
        first = torch.arange(self.num_classes, device=self.storage.device) * self.storage.shape[1]
        parts = (first, self.pixel_count, first + self.pixel_queue_size, self.region_count)
        return torch.stack(parts, 1).view(-1, 2, 2)

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,  # [B, D, H, W] floating
        labels: Tensor,  # [B, H, W] integer
    ) -> None:
        """Store random pixels and the region of every class of every image, and advance `step`.

        Images count in batch order. Pixels are stored as they are, regions with unit length; a
        vector that is not finite is not stored, and takes no slot.

        Raises TypeError or ValueError, before anything is written, for tensors of the wrong type,
        shape or device and, on a CPU, for labels outside the classes.
        """
        checks.tensor("embeddings", embeddings, "[B, D, H, W]", "floating")
        checks.size("embeddings", embeddings, 1, self.embedding_dim, "embedding_dim")
        clean = clean_labels(labels, self.num_classes, self.ignore_index)
        for label_dim, dim in enumerate((0, 2, 3)):
            checks.size("labels", labels, label_dim, embeddings.shape[dim], "that of embeddings")
        checks.same_device("labels", labels, "embeddings", embeddings)
        checks.same_device("embeddings", embeddings, "the bank", self.storage)
        self.write(embeddings, clean)

    @torch.no_grad()
    def write(
        self,
        embeddings: Tensor,  # [B, D, H, W] floating
        labels: Tensor,  # [B, H, W] int64, -1 left out
    ) -> None:
        """`enqueue` behind its checks."""
        seed = reference.step_seed(self.seed, self.step)
        if self._is_reference:
            rings = (self.pixel_count, self.pixel_next, self.region_count, self.region_next)
            reference.update_bank(
                self.storage,
                *rings,
                self.pixel_queue_size,
                embeddings,
                labels,
                self.pixels_per_image,
                seed,
            )
        else:
            self._write_pixels(embeddings, labels, seed)
            self._write_regions(embeddings, labels)
        self.step.add_(1)

    def _write_pixels(self, embeddings: Tensor, labels: Tensor, seed: Tensor) -> None:
        images = labels.shape[0]
        flat = labels.flatten()
        if self.pixel_queue_size == 0 or flat.numel() == 0:
            return
        pixel = torch.arange(flat.numel(), device=flat.device)
        n_segments = self.num_classes * images
        segment = torch.where(
            flat >= 0, flat * images + pixel // (labels.shape[1] * labels.shape[2]), n_segments
        )
        counts = segment_counts(segment, n_segments)
        quota = counts.clamp(max=self.pixels_per_image)
        capacity = min(n_segments * self.pixels_per_image, flat.numel())
        lot = reference.hash32(seed, reference.BANK_PIXEL, pixel)
        drawn, of_slot = draw_pixels(segment, lot, counts, quota, capacity)
        classes = torch.where(of_slot >= 0, of_slot // images, -1)
        rows = gather_pixels(embeddings, drawn)
        self._push(classes, rows, 0, self.pixel_queue_size, self.pixel_count, self.pixel_next)

    def _write_regions(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.region_queue_size == 0 or labels.numel() == 0:
            return
        means, counts = pool_regions(embeddings, labels, self.num_classes)
        classes = torch.arange(self.num_classes, device=labels.device)
        classes = torch.where(counts > 0, classes, -1).T.flatten()
        rows = normalize(means, dim=2).transpose(0, 1).flatten(0, 1)
        first, size = self.pixel_queue_size, self.region_queue_size
        self._push(classes, rows, first, size, self.region_count, self.region_next)

    def _push(
        self,
        classes: Tensor,  # [n] int64, ascending where it is not -1 (nothing to store)
        rows: Tensor,  # [n, D]
        first_slot: int,
        ring_size: int,
        count: Tensor,  # [C] int64, updated
        next_slot: Tensor,  # [C] int64, updated
    ) -> None:
        """Append rows to the rings of their classes, in order."""
        rows = rows.to(self.storage.dtype)
        # the largest magnitude is nan or inf if any value is: two passes instead of five
        stored = (classes >= 0) & rows.abs().amax(1).isfinite()
        classes = classes.clamp(min=0)
        added = torch.zeros_like(count).scatter_add_(0, classes, stored.long())
        place = stored.long().cumsum(0) - 1 - (added.cumsum(0) - added).gather(0, classes)
        # of more entries than the ring has slots only the last ones stay
        stored &= place >= added.gather(0, classes) - ring_size
        slot = first_slot + (next_slot.gather(0, classes) + place) % ring_size
        target = classes * self.storage.shape[1] + slot
        # entries without a place repeat the first stored one, or rewrite row 0 with itself: a plain
        # write of fixed size in which equal targets carry equal rows
        flat = self.storage.flatten(0, 1)
        some = stored.any()
        leader = stored.long().argmax().view(1)
        target = torch.where(stored, target, torch.where(some, target.gather(0, leader), 0))
        filler = torch.where(some, rows.index_select(0, leader), flat.narrow(0, 0, 1))
        flat.index_put_((target,), torch.where(stored.unsqueeze(1), rows, filler))
        next_slot.add_(added).remainder_(ring_size)
        count.add_(added).clamp_(max=ring_size)

    def reset(self) -> None:
        """Empty both queues and start again at step 0."""
        for name in _STATE:
            getattr(self, name).zero_()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name in _STATE:
            value = getattr(self, name)
            # the bank follows the module's device; its dtype is its own
            device = fn(torch.empty(0, device=value.device)).device
            setattr(self, name, value.to(device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _STATE:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
    ) -> None:
        own = {prefix + name for name in _STATE}
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )
        found = {name: state_dict[prefix + name] for name in _STATE if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in _STATE if name not in found)
        wrong = [
            f"{prefix + name}: expected shape {list(getattr(self, name).shape)}, got"
            f" {checks.describe(value)}"
            for name, value in found.items()
            if not isinstance(value, Tensor) or value.shape != getattr(self, name).shape
        ]
        errors.extend(wrong)
        # a bank of another size is refused whole, never taken in part
        if not wrong:
            for name, value in found.items():
                getattr(self, name).copy_(value)
