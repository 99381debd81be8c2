"""Selection on an NVIDIA GPU: launching the kernels of samples, of the hardest keys and of synthesis.

hardest: a threshold for each anchor from a sample of the keys, a walk over all keys that notes what
reaches it, and of these the wanted ones. Anchors for which the sample misled, and all where keys are few,
get their exact threshold digit by digit. Who those anchors are is known on the device alone: walks in
which nobody takes part end at once.
"""

import math

import torch
import triton
from torch import Tensor

from pico_fast import draws, reference
from pico_fast.kernels import candidates, configs, sample, synthesis
from pico_fast.kernels import hardest as kernels
from pico_fast.selection import bounds as bounding
from pico_fast.selection import launch as launches
from pico_fast.selection.layout import Cut, Layout

# most keys that the kernels select on one side
MAX_COUNT = 4096
# most channels of rows that a program of `synthesis` holds
MAX_CHANNELS = 1024
# up to so many keys for each one wanted, digits cost less than a sample
_FEW = 32
# classes that a program shares out at a time; slots of a program that draws
_CLASSES, _DRAWS = 512, 128
# words of a row's bits read at a time; values of rows that a program multiplies
_WORDS, _VALUES = 1024, 8192
_LEAST = kernels.LEAST.value


def takes_sample(ranges: Tensor, names: Tensor, key_order: Tensor | None, *rest) -> bool:
    """Whether the kernel is for these: some classes and slots."""
    capacity = rest[-1]
    return ranges.shape[0] > 0 and 0 < capacity < 2**31 and (key_order is None or len(key_order) > 0)


def sample_keys(
    ranges: Tensor,  # [C, G, 2] int64
    names: Tensor,  # [C] int64
    key_order: Tensor | None,  # [W] int64
    need: int,
    own: bool,
    seed: Tensor,  # [] int64
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The op `sample_keys`: keys drawn of each class [capacity], -1 behind the last; ranges [C, 1, 2]."""
    n_classes, parts = ranges.shape[:2]
    ranges = ranges.contiguous()
    until, drawn = ranges.new_empty(n_classes), ranges.new_empty(capacity)
    new_ranges = ranges.new_empty(n_classes, 1, 2)
    sample.share_kernel[(1,)](ranges, until, n_classes, need, PARTS=parts, BC=_CLASSES, OWN=own)
    sample.draw_kernel[(triton.cdiv(max(capacity, n_classes), _DRAWS),)](
        ranges=ranges,
        names=names.contiguous(),
        key_order=key_order if key_order is None else key_order.contiguous(),
        until=until,
        seed=seed,
        drawn=drawn,
        new_ranges=new_ranges,
        capacity=capacity,
        n_classes=n_classes,
        purpose=draws.POSITIVE if own else draws.NEGATIVE,
        PARTS=parts,
        STEPS=n_classes.bit_length(),
        BN=_DRAWS,
    )
    return drawn, new_ranges


def takes_hardest(layout: Layout, own: bool, ceiling: Tensor | None, count: int, by_place: bool, *_):
    """Whether the kernels are for these; see `launch.takes`. float32 rows of 512 do not fit."""
    wide = layout.anchors.shape[1] > 256 and layout.keys.dtype == torch.float32
    held = 0 < count <= MAX_COUNT
    return ceiling is None and not by_place and held and not wide and launches.takes(layout)


class _Side:
    """One side, positives or negatives, of all anchors."""

    def __init__(self, layout: Layout, own: bool, count: int) -> None:
        self.layout, self.own, self.count = layout, own, count
        n_anchors, device = len(layout.anchors), layout.keys.device
        of_keys = (layout.keys.dtype, layout.keys.shape[1])
        launch = configs.hardest(*of_keys)
        n = launches.n_positions(layout)
        self.tiles = launches.tile_list(*launches.parts(layout), n, launch.BN)
        self.digits = self._walk(launch)
        self.hits = self._walk(configs.hits(launches.gpu(device)[0], *of_keys, own))
        of_class = layout.sizes.take(layout.anchor_class.clamp(min=0))
        # in batch an anchor itself is among its class
        itself = int(layout.own_key is not None)
        self.available = of_class - itself if own else layout.sizes.sum() - of_class
        # four times as many as wanted: what an estimated threshold lets through hardly ever overflows
        self.capacity = triton.next_power_of_2(max(4 * count, 16))
        self.found = torch.zeros(n_anchors, dtype=torch.int32, device=device)
        self.candidates = torch.empty(n_anchors, self.capacity, dtype=torch.int64, device=device)
        n_words = len(self.tiles["firsts"]) * (launch.BN // 32)
        self.bits = torch.empty(n_anchors, n_words, dtype=torch.int32, device=device)

    def _walk(self, launch: configs.Launch) -> tuple[int, dict]:
        """Programs of a walk over the keys, and what all walks take."""
        layout = self.layout
        blocks = triton.cdiv(len(layout.anchors), launch.BM)
        processors, most = launches.gpu(layout.keys.device)[1], min(len(self.tiles["firsts"]), 64)
        splits = launches.choose_splits(blocks, processors, most)
        options = {
            "key_blocks": launches.key_blocks(layout, launch),
            "own_key": layout.own_key if self.own else None,
            "splits": splits,
            "OWN": self.own,
        }
        return blocks * splits, options | launches.options(layout, launch) | self.tiles

    def collect(self, active: Tensor, threshold: Tensor, is_exact: bool) -> None:
        """Candidates of the active anchors: pairs whose word reaches the threshold [A]."""
        layout, n_anchors, n_words = self.layout, *self.bits.shape
        programs, options = self.hits
        kernels.hits_kernel[(programs,)](
            active=active,
            threshold=threshold,
            bits=self.bits,
            n_words=n_words,
            EXACT=is_exact,
            **options,
        )
        candidates.collect_kernel[(n_anchors,)](
            bits=self.bits,
            anchor_class=layout.anchor_class,
            ranges=layout.ranges,
            key_order=layout.key_order,
            active=active,
            candidates=self.candidates,
            found=self.found,
            n_anchors=n_anchors,
            n_words=n_words,
            capacity=self.capacity,
            PARTS=layout.ranges.shape[1],
            BN=options["BN"],
            WORDS=_WORDS,
            OWN=self.own,
            **self.tiles,
        )
        sizes = launches.sizes(layout.keys)
        rows = max(4, _VALUES // sizes["BD"])
        candidates.score_kernel[(n_anchors, triton.cdiv(self.capacity, rows))](
            queries=layout.anchors,
            keys=layout.keys,
            active=active,
            found=self.found,
            candidates=self.candidates,
            capacity=self.capacity,
            key_stride=layout.keys.stride(0),
            ROWS=rows,
            OWN=self.own,
            **sizes,
        )

    def exact_threshold(self, active: Tensor) -> Tensor:
        """The word [A] of the last key wanted of each active anchor; the least where it has no more."""
        takes_part = ((active != 0) & (self.available > self.count)).int()
        word = torch.where(takes_part != 0, 0, _LEAST)
        rank = torch.full_like(word, self.count)
        counts = torch.zeros(len(rank), 2048, dtype=torch.int32, device=rank.device)
        programs, options = self.digits
        for shift in kernels.DIGITS:
            kernels.digits_kernel[(programs,)](
                active=takes_part, threshold=word, counts=counts, SHIFT=shift, **options
            )
            kernels.narrow_kernel[(len(rank),)](takes_part, counts, word, rank, SHIFT=shift)
        return word

    def picked(self) -> tuple[Tensor, Tensor]:
        """The hardest candidates, in the order of positions: indices and similarities [A, count]."""
        n_anchors = len(self.found)
        index = self.candidates.new_empty(n_anchors, self.count)
        similarity = torch.empty(n_anchors, self.count, device=index.device)
        candidates.pick_kernel[(n_anchors,)](
            self.candidates,
            self.found,
            self.layout.anchor_class,
            index,
            similarity,
            self.count,
            OWN=self.own,
            CAPACITY=self.capacity,
            PIECE=min(self.capacity, _WORDS),
            num_warps=configs.pick_warps(self.capacity),
        )
        return index, similarity


def _thinned(layout: Layout, step: int) -> Layout:
    """Every `step`-th key in use."""
    first, length = layout.ranges.flatten(0, 1).unbind(1)
    behind = length.cumsum(0)
    place = torch.arange(0, launches.n_positions(layout), step, device=first.device)
    part = torch.searchsorted(behind, place, right=True).clamp(max=len(behind) - 1)
    rows = first.take(part) + place - (behind - length).take(part)
    rows = rows.clamp(max=launches.n_positions(layout) - 1)
    if layout.key_order is not None:
        rows = layout.key_order.take(rows)
    until = (behind.view(layout.ranges.shape[:2])[:, -1:] + step - 1) // step
    begin = torch.nn.functional.pad(until, (0, 0, 1, 0))[:-1]
    return layout._replace(key_order=rows, ranges=torch.stack([begin, until - begin], 2), own_key=None)


def _sampled_threshold(side: _Side) -> Tensor:
    """A word [A] that somewhat more than the wanted keys of each anchor should reach.

    Of every `step`-th key as large a part is wanted, t, give or take the root of t (1 - 1 / step). Six of
    these more are let through; and every key of anchors that meet no more of the sample. Positives meet
    one class alone, so they afford more of it.
    """
    longest = n = launches.n_positions(side.layout)
    if side.own and side.layout.key_order is None:
        longest = triton.cdiv(n, len(side.layout.ranges))  # the slots of a class
    step = max(4 if side.own else 16, triton.cdiv(longest, bounding.MOST_WIDTH))
    t = side.count / step
    cut = Cut(None, math.ceil(t + 6 * math.sqrt(t * (1 - 1 / step))))
    layout, ends = bounding.gathered(_thinned(side.layout, step))
    of_keys = (launches.gpu(ends.device)[0], layout.keys.dtype, layout.keys.shape[1])
    launch = configs.positives(*of_keys, True) if side.own else configs.cut(*of_keys)
    found = bounding.bounds(layout, cut, side.own, ends, triton.cdiv(longest, step), launch, 1.0)
    # as a half it may be rounded up
    least = found.least.float().clamp(max=65504)
    bits = (least - least.abs() * 2.0**-11).view(torch.int32)
    word = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return torch.where(found.pairs <= cut.count, _LEAST, word)


def _ordered(index: Tensor, similarity: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Lists [A, count] hardest first, of equal ones the lower index, -1 behind the last."""
    hardness = (-similarity if own else similarity).masked_fill(index < 0, -math.inf)
    by_index = index.argsort(dim=1)
    order = hardness.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    order = by_index.gather(1, order)
    return index.gather(1, order), similarity.gather(1, order)


def hardest(
    layout: Layout, own: bool, ceiling: None, count: int, by_place: bool, in_order: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hardest`: rows of keys [A, count] and their inner products."""
    none = layout.anchor_class.new_empty(0)
    layout = launches.dense(layout)
    side = _Side(layout, own, count)
    used = (layout.anchor_class >= 0).int()
    if launches.n_positions(layout) <= _FEW * count:
        side.collect(used, side.exact_threshold(used), True)
    else:
        side.collect(used, torch.where(side.available <= count, _LEAST, _sampled_threshold(side)), False)
        misled = (side.found < side.available.clamp(max=count)) | (side.found > side.capacity)
        misled = (misled & (used != 0)).int()
        side.collect(misled, side.exact_threshold(misled), True)
    found = side.picked()
    return *(_ordered(*found, own) if in_order else found), none


def _takes_rows(*tensors: Tensor) -> bool:
    """Whether a program holds rows [n, D] of these: not float64, not too wide, and there are some."""
    narrow = all(t.dtype != torch.float64 and 0 < t.shape[1] <= MAX_CHANNELS for t in tensors)
    return narrow and all(t.shape[0] > 0 for t in tensors)


def takes_weighted(keys: Tensor, index: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is for these."""
    return 0 not in index.shape and weight.dtype == torch.float32 and _takes_rows(keys)


def takes_mixes(anchors: Tensor, keys: Tensor, pool_index: Tensor, *_) -> bool:
    """Whether the kernel is for these."""
    return pool_index.shape[1] > 0 and _takes_rows(anchors, keys)


def _sizes(keys: Tensor) -> dict:
    """Constants of kernels that read rows of keys; the values of some rows fit the registers."""
    width = launches.padded(keys.shape[1])
    return {"D": keys.shape[1], "BD": width, "ROWS": max(4, min(64, 8192 // width))}


def _readable(x: Tensor) -> Tensor:
    """x [n, D] with neighbouring channels; the interpreter has no bfloat16."""
    return launches.with_rows(x.to(launches.tile_dtype(x.dtype)))


def weighted_rows(
    keys: Tensor,  # [K, D]
    index: Tensor,  # [A, n] int64, -1 where there is none
    weight: Tensor,  # [A, n] float32
) -> Tensor:
    """The op `weighted_rows`: the indexed keys by weight, summed in float32: [A, D]."""
    keys = _readable(keys)
    out = weight.new_empty(weight.shape[0], keys.shape[1])
    synthesis.weighted_kernel[(len(out),)](
        keys,
        index.contiguous(),
        weight.contiguous(),
        out,
        index.shape[1],
        keys.stride(0),
        **_sizes(keys),
    )
    return out


def mix_negatives(
    anchors: Tensor,  # [A, D]
    keys: Tensor,  # [K, D]
    pool_index: Tensor,  # [A, pool] int64 into keys, -1 behind the last
    row: Tensor,  # [A] int64, number of each anchor in its draws
    negative_negative: int,
    negative_anchor: int,
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """The op `mix_negatives`: log-sum of exp(<a, h> / temperature) over the mixes h, and their mean."""
    anchors, keys = _readable(anchors), _readable(keys)
    how = (negative_negative, negative_anchor, seed)
    first, second, share = reference.draw_mixes(pool_index, row, *how)
    lse = torch.empty(len(anchors), device=anchors.device)
    mean = torch.empty(anchors.shape, device=anchors.device)
    sizes = _sizes(keys)
    sizes["ROWS"] = max(4, sizes["ROWS"] // 2)  # two rows of a mix, and the mix
    synthesis.mix_kernel[(len(anchors),)](
        anchors,
        keys,
        first,
        second,
        share,
        lse,
        mean,
        first.shape[1],
        anchors.stride(0),
        keys.stride(0),
        1 / temperature,
        reference.SHORTEST_MIX,
        **sizes,
    )
    return lse, mean
