"""The sample in Triton: which keys of each class are drawn, and reading them once.

Draws are the words of `pico_fast.draws`, in arithmetic of 32 bits.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import load_rows, store_block


@triton.jit
def fold(
    state,  # uint32
    word,  # uint32
):
    """One more word into the state of a hash: `draws.fold`."""
    x = (state ^ word) + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def below(
    word,  # uint32
    n,  # int64
):
    """Uniform int64 in [0, n)."""
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def sizes_of(
    ranges,  # [C, PARTS, 2] int64, first position and length
    c,  # [BC] int32
    n_classes,
    PARTS: tl.constexpr,
):
    """Keys of classes [BC] int64, 0 behind the last."""
    n = tl.zeros(c.shape, tl.int64)
    for part in tl.static_range(PARTS):
        n += tl.load(ranges + (c.to(tl.int64) * PARTS + part) * 2 + 1, mask=c < n_classes, other=0)
    return n


@triton.jit
def share_kernel(
    ranges,  # [C, PARTS, 2] int64
    until,  # [C] int64, out: keys to draw of each class and of those before it
    n_classes,
    need,  # keys that an anchor is to meet
    PARTS: tl.constexpr,
    BC: tl.constexpr,
    OWN: tl.constexpr,
):
    lane = tl.arange(0, BC)
    others = tl.full([], 1, tl.int64)
    if not OWN:
        total = tl.zeros([BC], tl.int64)
        largest = tl.zeros([BC], tl.int64)
        for start in range(0, n_classes, BC):
            n = sizes_of(ranges, start + lane, n_classes, PARTS)
            total += n
            largest = tl.maximum(largest, n)
        others = tl.maximum(tl.sum(total, 0) - tl.max(largest, 0), 1)
    before = tl.full([], 0, tl.int64)
    for start in range(0, n_classes, BC):
        n = sizes_of(ranges, start + lane, n_classes, PARTS)
        wanted = n * 0 + need
        if not OWN:
            wanted = (n * need + others - 1) // others
        wanted = tl.minimum(wanted, n)
        tl.store(until + start + lane, before + tl.cumsum(wanted, 0), mask=start + lane < n_classes)
        before += tl.sum(wanted, 0)


@triton.jit
def draw_kernel(
    ranges,  # [C, PARTS, 2] int64, first position and length
    names,  # [C] int64, what classes are called in draws
    key_order,  # [W] int64, the key at each position; None: itself
    until,  # [C] int64, keys drawn of each class and of those before it
    seed,  # [] int64
    drawn,  # [capacity] int64, out: -1 behind the last
    new_ranges,  # [C, 1, 2] int64, out: where the keys of each class stand there
    capacity,
    n_classes,
    purpose,  # what is drawn; not called stream: a launch takes no argument of that name
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,  # 2^STEPS > C
    BN: tl.constexpr,
):
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    is_class = slot < n_classes
    behind = tl.load(until + slot, mask=is_class, other=0)
    before = tl.load(until + slot - 1, mask=is_class & (slot > 0), other=0)
    tl.store(new_ranges + 2 * slot.to(tl.int64), before, mask=is_class)
    tl.store(new_ranges + 2 * slot.to(tl.int64) + 1, behind - before, mask=is_class)

    there = slot < tl.load(until + n_classes - 1)
    # how many classes end at or before the slot
    of = tl.zeros([BN], tl.int32)
    for i in tl.static_range(STEPS):
        more = of + (1 << (STEPS - 1 - i))
        ends = tl.load(until + more - 1, mask=there & (more <= n_classes), other=9223372036854775807)
        of = tl.where(ends <= slot, more, of)
    first = tl.load(until + of - 1, mask=there & (of > 0), other=0)
    k = tl.load(until + of, mask=there, other=1) - first
    n = tl.where(there, sizes_of(ranges, of, n_classes, PARTS), 1)
    word = tl.load(seed)
    state = fold(fold(tl.zeros([BN], tl.uint32), word.to(tl.uint32)), (word >> 32).to(tl.uint32))
    state = fold(state, purpose.to(tl.uint32))
    state = fold(state, tl.load(names + of, mask=there, other=0).to(tl.uint32))
    t = slot - first
    begin = t * n // k
    place = begin + below(fold(state, t.to(tl.uint32)), (t + 1) * n // k - begin) + below(state, n)
    place = tl.where(place < n, place, place - n)
    position = tl.zeros([BN], tl.int64)
    for part in tl.static_range(PARTS):
        of_part = ranges + (of.to(tl.int64) * PARTS + part) * 2
        length = tl.load(of_part + 1, mask=there, other=0)
        inside = (place >= 0) & (place < length)
        position = tl.where(inside, tl.load(of_part, mask=there, other=0) + place, position)
        place -= length
    if key_order is not None:
        position = tl.load(key_order + position, mask=there, other=-1)
    tl.store(drawn + slot, tl.where(there, position, -1), mask=slot < capacity)


@triton.jit
def gather_kernel(
    keys,  # [K, D]
    key_order,  # [W] int64
    ends,  # [1] int64, how many of them are in use
    out,  # [W, D], out: zeros behind these
    width,  # W
    key_stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BN
    place = first + tl.arange(0, BN)
    used = place < tl.load(ends)
    row = tl.load(key_order + place, mask=used, other=0)
    store_block(out, load_rows(keys, row, used, key_stride, D, BD), first, place < width, D, BD)
