"""Selection from a dense sample of similarities in Triton: thresholds, and draws from the hardest."""

import triton
import triton.language as tl

from pico_fast.kernels.selection import lots_of, words_of

LEAST = tl.constexpr(-9223372036854775808)


@triton.jit
def estimate_kernel(
    sample,  # [R, W] float32 similarities, -inf where a pair is no candidate
    rank,  # [R] int32, 1 for the largest; more than there are: the least word of all
    threshold,  # [R] int64, out: the least word of the similarity at that rank
    W,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    wanted = tl.load(rank + row)
    known = tl.full([1], 0, tl.int32)
    for digit in tl.static_range(3):
        shift: tl.constexpr = 21 if digit == 0 else (10 if digit == 1 else 0)
        width: tl.constexpr = 2048 if digit < 2 else 1024
        counts = tl.zeros([width], tl.int32)
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            s = tl.load(sample + row.to(tl.int64) * W + at, mask=at < W, other=float("-inf"))
            bits = (s + 0.0).to(tl.int32, bitcast=True)
            # as an unsigned number, in the order of the similarities
            number = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -2147483648
            part = (number >> shift) & (width - 1)
            there = s > float("-inf")
            if digit > 0:
                above: tl.constexpr = 21 if digit == 1 else 10
                mask: tl.constexpr = 2047 if digit == 1 else 4194303
                there = there & (((number >> above) & mask) == known)
            counts += tl.histogram(tl.where(there, part, 0), width, mask=there)
        total = tl.sum(counts, 0)
        above_it = total - tl.cumsum(counts, 0)
        here = (above_it < wanted) & (above_it + counts >= wanted)
        chosen = tl.sum(tl.where(here, tl.arange(0, width), 0), 0)
        if digit == 0:
            enough = total >= wanted
        wanted -= tl.sum(tl.where(here, above_it, 0), 0)
        known = (known << (11 if digit < 2 else 10)) | chosen
    ordered = (tl.sum(known, 0) ^ -2147483648).to(tl.int64)
    lowest = tl.full([], -9223372036854775808, tl.int64)
    tl.store(threshold + row, tl.where(enough, ordered << 32, lowest))


@triton.jit
def words_and_lots(
    sample,  # [R, W] float32
    places,  # [W] int32
    key_rows,  # [W] int64
    row,
    at,  # [BLOCK] int32
    low,
    high,
    state,
    W,
):
    """Words and lots [BLOCK] of a stretch of one row's pairs, and which of them are candidates."""
    inside = at < W
    place = tl.load(places + at, mask=inside, other=-1)
    s = tl.load(sample + row.to(tl.int64) * W + at, mask=inside, other=0.0)
    key = tl.load(key_rows + at, mask=inside, other=0)
    word = tl.reshape(words_of(s[None, :], key.to(tl.int32), 1), [s.shape[0]])
    there = (place >= 0) & ((place < low) | (place >= high))
    return word, lots_of(state, key), there


@triton.jit
def draw_kernel(
    sample,  # [R, W] float32 inner products with the sampled keys
    places,  # [W] int32, position of each sampled key, -1 where the sample is not full
    key_rows,  # [W] int64, its row
    low,  # [R] int32, first position of the own class; -1: an empty slot
    high,  # [R] int32, one past its last
    states,  # [R] int64, what lots are drawn with
    pool,  # [R] int32, how many of the hardest to draw from
    count,  # how many to draw
    candidates,  # [R, CAPACITY] int64, out: their words
    found,  # [R] int32, out
    W,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0)
    first, last = tl.load(low + row), tl.load(high + row)
    state = tl.load(states + row)
    if first < 0:
        tl.store(found + row, 0)
        return
    # the word at rank `pool`, digit by digit; flipping the sign makes words unsigned numbers
    wanted = tl.load(pool + row)
    known = tl.full([1], 0, tl.int64)
    for turn in tl.static_range(6):
        shift: tl.constexpr = (53, 42, 32, 21, 10, 0)[turn]
        bits: tl.constexpr = (11, 11, 10, 11, 11, 10)[turn]
        width: tl.constexpr = 1 << bits
        counts = tl.zeros([width], tl.int32)
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            word, _, there = words_and_lots(
                sample, places, key_rows, row, at, first, last, state, W
            )
            number = word ^ LEAST
            if turn > 0:
                above: tl.constexpr = shift + bits
                mask: tl.constexpr = (1 << (64 - above)) - 1
                there = there & (((number >> above) & mask) == known)
            digit = ((number >> shift) & (width - 1)).to(tl.int32)
            counts += tl.histogram(tl.where(there, digit, 0), width, mask=there)
        greater = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        here = (greater < wanted) & (greater + counts >= wanted)
        wanted -= tl.sum(tl.where(here, greater, 0), 0)
        known = (known << bits) | tl.sum(tl.where(here, tl.arange(0, width), 0), 0).to(tl.int64)
    least = known ^ LEAST
    # the lot at rank `count` from below, among the words that reach it
    wanted = tl.minimum(count, tl.load(pool + row))
    limit = tl.full([1], 0, tl.int64)
    for turn in tl.static_range(3):
        shift: tl.constexpr = (21, 10, 0)[turn]
        bits: tl.constexpr = (11, 11, 10)[turn]
        width: tl.constexpr = 1 << bits
        counts = tl.zeros([width], tl.int32)
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            word, lot, there = words_and_lots(
                sample, places, key_rows, row, at, first, last, state, W
            )
            there = there & (word >= least)
            if turn > 0:
                there = there & ((lot >> (shift + bits)) == limit)
            digit = ((lot >> shift) & (width - 1)).to(tl.int32)
            counts += tl.histogram(tl.where(there, digit, 0), width, mask=there)
        lower = tl.cumsum(counts, 0) - counts
        here = (lower < wanted) & (lower + counts >= wanted)
        wanted -= tl.sum(tl.where(here, lower, 0), 0)
        limit = (limit << bits) | tl.sum(tl.where(here, tl.arange(0, width), 0), 0).to(tl.int64)
    n = 0
    for start in range(0, W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word, lot, there = words_and_lots(sample, places, key_rows, row, at, first, last, state, W)
        there = there & (word >= least) & (lot <= limit)
        slot = n + tl.cumsum(there.to(tl.int32), 0) - 1
        held = there & (slot < CAPACITY)
        tl.store(candidates + row.to(tl.int64) * CAPACITY + slot, word, mask=held)
        n += tl.sum(there.to(tl.int32), 0)
    tl.store(found + row, n)
