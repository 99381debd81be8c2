"""Selection on an NVIDIA GPU: launching `pico_fast.kernels.selection` and `.sampling`.

hardest, negatives: a threshold for each anchor from a sample of the keys, a walk over all keys that appends
what reaches it, a sort of what was appended. Anchors for which the sample misled, and the positives, whose
class is a small part of the keys, get their exact threshold digit by digit. Who those anchors are is
known on the device alone: walks in which nobody takes part end at once.

semi_hard, negatives: a random sample of the keys, the same for all anchors, is cut at its own quantile for
each anchor. Anchors of which the sample holds too few negatives, and the positives, are drawn from the
exact pool by two exact thresholds, of hardness and of the lot.
"""

import functools

import torch
import triton
from torch import Tensor

from pico_fast import class_order, pass_gpu, reference
from pico_fast.kernels import configs, sampling, selection
from pico_fast.selection import permute_torch

# most keys that the kernels select on one side; consumer cards sort half as many
MAX_COUNT = 8192
# keys of a sample; similarities of a block of anchors with it
_SAMPLE = 2**16
_SAMPLE_VALUES = 2**24
# up to so many keys for each one wanted, digits cost less than a sample
_FEW = 32
# negatives that a sample must hold for its quantile to be sharp
_SHARP = 8192
_LEAST = torch.iinfo(torch.int64).min


def takes(anchors: Tensor, keys: Tensor | None, sampling: str, *counts: int) -> bool:
    """Whether the kernels are for these; see `pass_gpu.takes`. float32 rows of 512 do not fit."""
    wide = anchors.shape[1] > 256 and (anchors if keys is None else keys).dtype == torch.float32
    small = configs.family(pass_gpu.device_of(anchors)[0]) == 86
    most = MAX_COUNT // 2 if small else MAX_COUNT
    hard = sampling in ("hardest", "semi_hard") and max(counts) <= most
    return hard and not wide and pass_gpu.takes(anchors, keys)


class _Side:
    """One side, positives or negatives, of all anchors."""

    def __init__(self, work: pass_gpu.Pass, own: bool, in_batch: bool, count: int) -> None:
        self.work, self.count = work, count
        n_anchors = work.queries.shape[0]
        arranged = work.arranged
        self.launch = configs.selection(work.keys.dtype, work.queries.shape[1])
        tiles = triton.cdiv(work.keys.shape[0], self.launch.BN)
        blocks = triton.cdiv(n_anchors, self.launch.BM)
        self.splits = pass_gpu.choose_splits(blocks, work.processors, min(tiles, 64))
        spread = class_order.spread_tiles(arranged.spans, self.launch.BN, self.splits)
        self.options = {
            **work.options(self.launch),
            **dict(zip(("tiles", "bounds", "first_span"), spread, strict=True)),
            "OWN": own,
            "IN_BATCH": in_batch,
            "SIGN": -1 if own else 1,
        }
        del self.options["LIFT"]
        self.grid = (blocks * self.splits,)
        self.available = arranged.positives if own else arranged.negatives
        self.capacity = triton.next_power_of_2(max(2 * count, 16))
        new = functools.partial(torch.empty, device=work.queries.device)
        self.found = new(n_anchors, dtype=torch.int32)
        self.candidates = new(n_anchors, self.capacity, dtype=torch.int64)

    def _walk(self, active: Tensor, threshold: Tensor, found: Tensor, **how) -> None:
        how = {"states": threshold, "lots": threshold, "DRAW": False, "COUNT": True} | how
        selection.walk_kernel[self.grid](
            active=active,
            threshold=threshold,
            found=found,
            candidates=self.candidates,
            CAPACITY=self.capacity,
            **how,
            **self.options,
        )

    def append(self, active: Tensor, threshold: Tensor, **lots: Tensor) -> None:
        """Candidates of the active anchors: pairs whose word reaches the threshold [A].

        With `states` [A] and `lots` [A] only those whose lot is at most that.
        """
        self.found.masked_fill_(active != 0, 0)
        self._walk(active, threshold, self.found, COUNT=False, SHIFT=0, DRAW=bool(lots), **lots)

    def exact_threshold(self, active: Tensor, rank: Tensor) -> Tensor:
        """The word [A] at a rank [A] of each active anchor's; the least where it has no more."""
        takes_part = ((active != 0) & (self.available > rank)).int()
        word = torch.where(takes_part != 0, 0, _LEAST)
        self._digits(takes_part, word, rank, selection.DIGITS, False, threshold=word)
        return word

    def exact_lot(self, active: Tensor, threshold: Tensor, rank: Tensor, states: Tensor) -> Tensor:
        """The lot [A] at a rank [A] from below, among the words that reach the threshold [A]."""
        lot = torch.where(active != 0, 0, reference.WORD)
        how = {"threshold": threshold, "states": states, "lots": lot, "DRAW": True}
        self._digits(active, lot, rank, selection.LOT_DIGITS, True, **how)
        return lot

    def _digits(
        self,
        active: Tensor,  # [A] int32
        number: Tensor,  # [A] int64, filled in digit by digit
        rank: Tensor,  # [A] int64
        digits: tuple[int, ...],
        lowest: bool,
        threshold: Tensor,  # [A] int64
        **how,
    ) -> None:
        rank = rank.clone()
        counts = torch.zeros(len(rank), 2048, dtype=torch.int32, device=rank.device)
        for shift in digits:
            self._walk(active, threshold, counts, SHIFT=shift, **how)
            selection.narrow_kernel[(len(rank),)](
                active, counts, number, rank, LOWEST=lowest, SHIFT=shift
            )

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Indices [A, count] and similarities [A, count] of the candidates, anchors as they came."""
        n_anchors = len(self.found)
        index = self.candidates.new_empty(n_anchors, self.count)
        similarity = torch.empty(n_anchors, self.count, device=index.device)
        selection.order_kernel[(n_anchors,)](
            self.candidates,
            self.found,
            self.work.arranged.low,
            self.work.arranged.order,
            index,
            similarity,
            self.count,
            SIGN=self.options["SIGN"],
            CAPACITY=self.capacity,
            num_warps=configs.order_warps(self.capacity),
        )
        return index, similarity


class _Sample:
    """Some of the positions in use, their keys and how many of them are an anchor's negatives."""

    def __init__(self, side: _Side, place: Tensor, there: Tensor) -> None:
        """`place` [W] int64 counts positions in use; `there` [W] bool says which of them are meant."""
        arranged = side.work.arranged
        spans = arranged.spans
        behind = spans[:, 1].cumsum(0)
        span = torch.searchsorted(behind, place, right=True).clamp(max=len(spans) - 1)
        position = spans[span, 0] + place - (behind[span] - spans[span, 1])
        position = torch.where(there, position, 0)
        rows = position if arranged.key_order is None else arranged.key_order[position]
        self.keys = side.work.keys.index_select(0, rows).to(side.work.queries.dtype)
        self.rows = rows
        self.position = torch.where(there, position, -1).int()
        in_order = self.position.sort()[0]
        own = torch.searchsorted(in_order, arranged.high) - torch.searchsorted(
            in_order, arranged.low
        )
        self.negatives = torch.where(arranged.low < 0, 0, there.sum() - own)  # [A]

    def blocks(self, side: _Side):
        """Blocks of anchors, as slices, and their inner products [n, W] with the sample."""
        block = max(1, _SAMPLE_VALUES // len(self.rows))
        for first in range(0, len(self.negatives), block):
            here = slice(first, first + block)
            yield here, _inner_products(side.work.queries[here], self.keys)


def _inner_products(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products [n, W] float32 of queries [n, D] and keys [W, D] of one dtype."""
    if queries.is_cuda and queries.dtype != torch.float32:
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries.float() @ keys.float().T


def _sampled_threshold(side: _Side) -> Tensor:
    """A word [A] that somewhat more than the wanted negatives of each anchor should reach.

    Of n negatives, `count` are wanted, and m are in the sample: about t = count m / n of them belong to
    the wanted, give or take the root of t. Four roots more are let through.
    """
    arranged = side.work.arranged
    n_valid = arranged.spans[:, 1].sum()
    size = min(_SAMPLE, max(side.work.keys.shape[0] // 16, 1))
    # evenly over all positions in use, so over all classes
    place = torch.arange(size, device=n_valid.device) * n_valid // size
    sample = _Sample(side, place, (n_valid > 0).expand(size))
    t = side.count * sample.negatives / arranged.negatives.clamp(min=1)
    rank = (t + 4 * t.sqrt()).ceil().clamp(min=1).int()
    threshold = torch.empty_like(arranged.order)
    for here, s in sample.blocks(side):
        low, high = arranged.low[here, None], arranged.high[here, None]
        s.masked_fill_((sample.position >= low) & (sample.position < high), -torch.inf)
        sampling.estimate_kernel[(len(s),)](s, rank[here], threshold[here], size, BLOCK=2048)
    return threshold


def _hardest(side: _Side, used: Tensor) -> None:
    """Candidates of all anchors in use [A] int32: exactly the hardest, if there are enough."""
    rank = torch.full_like(side.work.arranged.order, side.count)
    if side.options["OWN"] or side.work.keys.shape[0] <= _FEW * side.count:
        side.append(used, side.exact_threshold(used, rank))
        return
    few = side.available <= side.count
    side.append(used, torch.where(few, _LEAST, _sampled_threshold(side)))
    wanted = side.available.clamp(max=side.count)
    misled = (side.found < wanted) | (side.found > side.capacity)
    misled = (misled & (used != 0)).int()
    side.append(misled, side.exact_threshold(misled, rank))


def _share(available: Tensor, fraction: float) -> Tensor:
    """Size of the hardest pool of so many keys: [A] int64."""
    return (available.double() * fraction).ceil().long().clamp(min=1)


def _semi_hard(side: _Side, used: Tensor, fraction: float, seed: Tensor, stream: int) -> None:
    """Candidates of all anchors in use [A] int32: a draw from the hardest `fraction` of each."""
    arranged = side.work.arranged
    states = reference.hash32(seed, stream, arranged.order)
    sharp = max(side.count / fraction, _SHARP)
    if not side.options["OWN"]:
        size = triton.next_power_of_2(int(1.25 * sharp))
        n_keys = side.work.keys.shape[0]
        n_valid = arranged.spans[:, 1].sum()
        place = torch.arange(min(size, n_keys), device=n_valid.device)
        there = place < n_valid
        if n_keys > size:
            # a draw without replacement; where all fit, the first ones are all
            drawn = permute_torch(
                place, n_valid.clamp(min=1), seed, reference.SAMPLE, place[:1] * 0
            )
            place = torch.where(n_valid > size, drawn, place)
        sample = _Sample(side, place, there)
        pool = torch.minimum(_share(sample.negatives, fraction), sample.negatives).int()
        for here, s in sample.blocks(side):
            sampling.draw_kernel[(len(s),)](
                s,
                sample.position,
                sample.rows,
                arranged.low[here],
                arranged.high[here],
                states[here],
                pool[here],
                side.count,
                side.candidates[here],
                side.found[here],
                len(place),
                BLOCK=2048,
                CAPACITY=side.capacity,
                num_warps=configs.DRAW_WARPS,
            )
        # a sample of all keys in use is exact, however few they are
        used = (used != 0) & (n_valid > size) & (sample.negatives < sharp)
        used = used.int()
    pool = _share(side.available, fraction)
    threshold = side.exact_threshold(used, pool)
    rank = torch.minimum(pool, side.available).clamp(max=side.count)
    lot = side.exact_lot(used, threshold, rank, states)
    side.append(used, threshold, states=states, lots=lot)


def select_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    seed: Tensor,  # [] int64
    segments: Tensor | None = None,  # [C, G, 2] int64, instead of key_labels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `select_keys` for "hardest" and "semi_hard"."""
    arranged = class_order.class_order(anchor_labels, key_labels, segments)
    # a temperature is the loss's affair
    work = pass_gpu.make_pass(anchors, keys, arranged, 1.0)
    used = (arranged.low >= 0).int()
    found = []
    for own, count in ((True, num_positives), (False, num_negatives)):
        if count == 0:  # one side alone is wanted: no walk over the other's keys
            none = anchor_labels.new_empty(len(used), 0)
            found.append((none, torch.empty(none.shape, device=none.device)))
            continue
        side = _Side(work, own, keys is None, count)
        if sampling == "hardest":
            _hardest(side, used)
        else:
            stream = reference.POSITIVE if own else reference.NEGATIVE
            _semi_hard(side, used, hard_fraction, seed, stream)
        found.append(side.ordered())
    (positive, similar), (negative, away) = found
    return positive, negative, similar, away
