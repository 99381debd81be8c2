"""The bank: pixel embeddings and region embeddings of all classes, gathered over many images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pico_fast import checks, draws, reference
from pico_fast.bank import state
from pico_fast.bank.entries import Rows, Wanted, start_entries
from pico_fast.bank.share import Share
from pico_fast.bank.state import Ring
from pico_fast.collectives import Ranks, check_placement
from pico_fast.grid import clean_labels

_RINGS = ("pixel_count", "pixel_next", "region_count", "region_next")
_STATE = ("storage", *_RINGS, "step", "refused")


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
        process_group: ranks that fill one bank; None is the default group, if there is one.
        placement: "local": each rank has a bank of its own. "replicated": every rank holds the same
            bank, bit for bit, that one process would hold which sees all ranks' batches one after the
            other. "sharded": the same bank, of which each rank holds its share of every class's slots,
            cut as `torch.chunk` cuts; made after the process group. But for "local" every rank has to
            call `enqueue` as often as the others, with an empty batch where it has none.
        max_images: most images in a rank's batch. None: ranks tell one another how much they bring,
            which reads one small tensor back to the host in every step; a number saves that (CUDA
            graphs and torch.compile(fullgraph=True) need it) and sends places for all classes of so
            many images.

    Attributes:
        storage: [C, P + R, D], a class's pixel slots first, then its region slots; sharded: this rank's
            share of them.
        pixel_count, region_count: [C] int64, filled slots of the whole bank.
        step: [] int64, how many batches were enqueued.
        refused: [] int64, how many vectors were not stored because they hold a nan or an infinity (in the
            bank's dtype). It should stay 0: watch it.

    The tensors are state, saved and loaded by `state_dict`, but neither parameters nor buffers: they
    follow the device of the module and keep their dtype, and no wrapper broadcasts or shards them. The
    state of a sharded bank is the whole bank as a DTensor: torch.distributed.checkpoint saves it on N
    ranks and loads it on M, and a state of the whole bank loads into any placement. Its version and its
    queue sizes stand in it: a bank of another size, values that no bank can have, or a state of which
    something is missing, are refused whole.

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
        process_group: "torch.distributed.ProcessGroup | None" = None,
        placement: str = "replicated",
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        check_placement(process_group, placement)
        if max_images is not None:
            checks.integer("max_images", max_images, 1)
        checks.classes(num_classes, ignore_index)
        self.num_classes = num_classes
        self.embedding_dim = checks.integer("embedding_dim", embedding_dim, 1)
        self.pixel_queue_size = checks.integer("pixel_queue_size", pixel_queue_size, 0)
        self.region_queue_size = checks.integer("region_queue_size", region_queue_size, 0)
        self.pixels_per_image = checks.integer("pixels_per_image", pixels_per_image, 1)
        self.seed = checks.integer("seed", seed, -(2**63), 2**63 - 1)
        checks.floating_dtype("dtype", dtype)
        self._is_reference = checks.implementation(impl)
        self.ignore_index = ignore_index
        self.slots = pixel_queue_size + region_queue_size
        self.max_images = max_images
        self.ranks = Ranks(process_group, placement)
        # a share is cut once: who holds which slots cannot change under a bank
        self._cut_for = self.ranks.size if placement == "sharded" else 1
        self.first_slot, self.last_slot = self.ranks.share(self.slots) if self.sharded else (0, self.slots)
        shape = (num_classes, self.last_slot - self.first_slot, embedding_dim)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        for name in _RINGS:
            setattr(self, name, torch.zeros(num_classes, dtype=torch.int64, device=device))
        for name in ("step", "refused"):
            setattr(self, name, torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes} classes x ({self.pixel_queue_size} pixels +"
            f" {self.region_queue_size} regions) x {self.embedding_dim}, {self.storage.dtype}"
        )

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a share of the bank, not all of it."""
        return self._cut_for > 1

    def keys(self) -> tuple[Tensor, Tensor]:
        """All slots as keys: views of the bank [C·(P + R), D] and their labels, -1 where empty.

        Sharded: the slots of this rank's share, class by class.
        """
        return self.storage.flatten(0, 1), self._labels(self.pixel_count, self.region_count)

    def _labels(self, pixel_count: Tensor, region_count: Tensor) -> Tensor:
        """The class of each slot that is here [C·(P + R)], -1 where these counts leave it empty."""
        slot = torch.arange(self.first_slot, self.last_slot, device=pixel_count.device)
        in_pixels = slot < pixel_count.unsqueeze(1)
        region = slot - self.pixel_queue_size
        in_regions = (region >= 0) & (region < region_count.unsqueeze(1))
        classes = torch.arange(self.num_classes, device=slot.device).unsqueeze(1)
        return torch.where(in_pixels | in_regions, classes, -1).flatten()

    def _ranges(self, first: int, last: int) -> Tensor:
        """Where filled slots stand among the slots `first` to `last` of all classes: [C, 2, 2] int64.

        Of each class and queue the first row, in a bank that holds no other slots, and how many.
        """
        base = torch.arange(self.num_classes, device=self.storage.device) * (last - first)
        parts = []
        for start, size, count, _ in self._rings():
            begin = min(max(start, first), last)
            end = max(begin, min(start + size, last))
            if end - begin < size:
                count = (count - (begin - start)).clamp(0, end - begin)
            parts += [base + (begin - first), count]
        return torch.stack(parts, 1).view(-1, 2, 2)

    def share(self) -> Share:
        """What this rank holds, class by class."""
        whole = self._ranges(0, self.slots)
        here = self._ranges(self.first_slot, self.last_slot) if self.sharded else whole
        ranks = self.ranks if self.sharded else None
        return Share(self.storage.flatten(0, 1), here, whole, self.slots, self.first_slot, ranks)

    def enqueue(
        self,
        embeddings: Tensor,  # [B, D, H, W] floating
        labels: Tensor,  # [B, H, W] integer
    ) -> None:
        """Store random pixels and the region of every class of every image, and advance `step`.

        Images count in batch order, those of several ranks in rank order. Pixels are stored as they
        are, regions with unit length; a vector that is not finite is not stored, takes no slot and is
        counted in `refused`.

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
        self.check_ranks(labels.shape[0])
        self.write(embeddings, clean)

    def check_ranks(self, images: int) -> None:
        """Raise unless the ranks are those that the bank was made for, and `images` are not too many."""
        ranks = self.ranks.size
        if ranks > 1 and self._is_reference:
            raise ValueError(
                f"impl: expected None where {ranks} ranks have a bank in common, got 'reference': it is"
                " the specification of one process (placement='local' takes it)"
            )
        if self.ranks.placement == "sharded" and ranks != self._cut_for:
            raise ValueError(
                f"placement: expected the {self._cut_for} ranks that this sharded bank was made for, got"
                f" {ranks}; make it after torch.distributed.init_process_group"
            )
        if self.max_images is not None and images > self.max_images:
            raise ValueError(f"labels: expected at most max_images = {self.max_images}, got {images}")

    def write(
        self,
        embeddings: Tensor,  # [B, D, H, W] floating
        labels: Tensor,  # [B, H, W] int64, -1 left out
    ) -> None:
        """`enqueue` behind its checks."""
        self.start_write(embeddings, labels)()

    @torch.no_grad()
    def start_write(
        self,
        embeddings: Tensor,  # [B, D, H, W] floating
        labels: Tensor,  # [B, H, W] int64, -1 left out
    ) -> Callable[[], None]:
        """Begin to bring a batch together from all ranks; the bank changes when the result is called."""
        seed = draws.step_seed(self.seed, self.step)
        if self._is_reference:
            return lambda: self._write_reference(embeddings, labels, seed)
        per_image = self.pixels_per_image if self.pixel_queue_size else 0
        queues = (per_image, self.region_queue_size > 0)
        wanted = Wanted(self.num_classes, *queues, self.storage.dtype, self.max_images)
        entries = start_entries(embeddings, labels, wanted, seed, self.ranks)
        return lambda: self._store(entries())

    @torch.no_grad()
    def _write_reference(self, embeddings: Tensor, labels: Tensor, seed: Tensor) -> None:
        tensors = (getattr(self, name) for name in ("storage", *_RINGS))
        refused = reference.update_bank(
            *tensors, self.pixel_queue_size, embeddings, labels, self.pixels_per_image, seed
        )
        self.refused.add_(refused)
        self.step.add_(1)

    @torch.no_grad()
    def _store(self, entries: list[Rows]) -> None:
        for rows, ring in zip(entries, self._rings(), strict=True):
            if rows.classes.numel():
                self._push(rows, ring)
        self.step.add_(1)

    def _rings(self) -> tuple[Ring, Ring]:
        """The pixel queue and the region queue; their counts are the bank's own."""
        p, r = self.pixel_queue_size, self.region_queue_size
        pixels = Ring(0, p, self.pixel_count, self.pixel_next)
        return pixels, Ring(p, r, self.region_count, self.region_next)

    def _push(self, entries: Rows, ring: Ring) -> None:
        """Append rows to the rings of their classes, in order."""
        classes, rows = entries
        first_slot, ring_size, count, next_slot = ring
        # the largest magnitude is nan or inf if any value is: two passes instead of five
        used = classes >= 0
        stored = used & (rows.abs().amax(1) < math.inf)
        self.refused.add_((used != stored).sum())
        classes = classes.clamp(min=0)
        added = torch.zeros_like(count).scatter_add_(0, classes, stored.long())
        place = stored.long().cumsum(0) - 1 - (added.cumsum(0) - added).gather(0, classes)
        # of more entries than the ring has slots only the last ones stay
        stored &= place >= added.gather(0, classes) - ring_size
        slot = first_slot + (next_slot.gather(0, classes) + place) % ring_size
        next_slot.add_(added).remainder_(ring_size)
        count.add_(added).clamp_(max=ring_size)
        if self.sharded:
            stored = stored & (slot >= self.first_slot) & (slot < self.last_slot)
            slot = slot - self.first_slot
        if self.storage.shape[1] == 0:
            return
        target = classes * self.storage.shape[1] + slot
        # entries without a place repeat the first stored one, or rewrite row 0 with itself: a plain
        # write of fixed size in which equal targets carry equal rows
        flat = self.storage.flatten(0, 1)
        some = stored.any()
        leader = stored.long().argmax().view(1)
        target = torch.where(stored, target, torch.where(some, target.gather(0, leader), 0))
        filler = torch.where(some, rows.index_select(0, leader), flat.narrow(0, 0, 1))
        flat.index_put_((target,), torch.where(stored.unsqueeze(1), rows, filler))

    @torch.no_grad()
    def resize(self, pixel_queue_size: int, region_queue_size: int) -> None:
        """Give both queues another size; of every class the newest entries stay, in their order.

        Several ranks call it together; a sharded bank is brought together on every rank and cut anew.
        `storage` becomes another tensor [C, P + R, D]: CUDA graphs have to be captured again.

        Raises TypeError or ValueError, before anything is changed, for sizes that are no integers >= 0.
        """
        checks.integer("pixel_queue_size", pixel_queue_size, 0)
        checks.integer("region_queue_size", region_queue_size, 0)
        whole = self.storage
        if self.sharded:
            # shares but the last ones are of one size: what those lack comes behind all slots
            share = -(-self.slots // self.ranks.size)
            own = pad(whole.transpose(0, 1), (0, 0, 0, 0, 0, share - whole.shape[1]))
            whole = self.ranks.gather(own)[: self.slots].transpose(0, 1)
        sizes = (pixel_queue_size, region_queue_size)
        parts = [state.newest(whole, ring, size) for ring, size in zip(self._rings(), sizes, strict=True)]
        self.pixel_queue_size, self.region_queue_size = sizes
        self.slots = sum(sizes)
        self.first_slot, self.last_slot = self.ranks.share(self.slots) if self.sharded else (0, self.slots)
        whole = torch.cat([slots for slots, _, _ in parts], 1)
        self.storage = whole[:, self.first_slot : self.last_slot].clone()
        (_, self.pixel_count, self.pixel_next), (_, self.region_count, self.region_next) = parts

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
        if self.sharded:
            destination[prefix + "storage"] = self.ranks.whole(self.storage, 1, self.slots)
        sizes = (self.pixel_queue_size, self.region_queue_size)
        for name, value in state.header(*sizes, self.storage.device).items():
            destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        names = {prefix + name: name for name in (*_STATE, "version", "queue_sizes")}
        others = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, errors)
        own_missing = [key for key in names if key not in state_dict]
        missing.extend(own_missing)
        if not own_missing:
            found = {name: state_dict[key] for key, name in names.items()}
            errors.extend(prefix + error for error in self._take(found))

    def _take(self, found: dict[str, Tensor]) -> list[str]:
        """Take a complete state over, or nothing of it and say what speaks against it."""
        shapes = {name: getattr(self, name).shape for name in _STATE}
        shapes["storage"] = torch.Size((self.num_classes, self.slots, self.embedding_dim))
        wrong = state.errors(found, shapes, self.pixel_queue_size, self.region_queue_size)
        if wrong:
            return wrong
        own = self.ranks.own_part(found["storage"], 1, self.first_slot, self.last_slot)
        labels = self._labels(found["pixel_count"], found["region_count"])
        wrong = state.storage_errors(own, labels, self.storage.dtype)
        if not wrong:
            for name in _STATE:
                getattr(self, name).copy_(own if name == "storage" else found[name])
        return wrong
