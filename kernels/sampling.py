"""Selection from a dense sample of similarities in Triton: thresholds, and draws from the hardest."""

import triton
import triton.language as tl
from pico_fast.kernels.selection import lots_of, words_of

LEAST = tl.constexpr(-9223372036854775808)


@triton.jit
def digit_counts(
    number,  # [BLOCK] integer
    there,  # [BLOCK] bool
    known,  # [1] its digits above SHIFT + BITS, as a number
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    ABOVE: tl.constexpr,  # how many bits are known
):
    """How many of the numbers that share the known digits have which next digit: [2 ** BITS] int32."""
    if ABOVE > 0:
        there = there & (((number >> (SHIFT + BITS)) & ((1 << ABOVE) - 1)) == known)
    digit = ((number >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.histogram(tl.where(there, digit, 0), 1 << BITS, mask=there)


@triton.jit
def next_digit(
    counts,  # [2 ** BITS] int32
    wanted,  # rank among what was counted
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,  # ranks from below
):
    """The digit at the rank, and the rank that is left within it."""
    if LOWEST:
        beyond = tl.cumsum(counts, 0) - counts
    else:
        beyond = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    here = (beyond < wanted) & (beyond + counts >= wanted)
    digit = tl.sum(tl.where(here, tl.arange(0, 1 << BITS), 0), 0)
    return digit, wanted - tl.sum(tl.where(here, beyond, 0), 0)


@triton.jit
def estimate_digit(
    sample,
    row,
    known,  # [1] int32
    wanted,
    W,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One digit of the similarity at a rank; see `estimate_kernel`. Also how many there are."""
    counts = tl.zeros([1 << BITS], tl.int32)
    for start in range(0, W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(sample + row.to(tl.int64) * W + at, mask=at < W, other=float("-inf"))
        bits = (s + 0.0).to(tl.int32, bitcast=True)
        # as an unsigned number, in the order of the similarities
        number = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -2147483648
        counts += digit_counts(number, s > float("-inf"), known, SHIFT, BITS, ABOVE)
    digit, wanted = next_digit(counts, wanted, BITS, False)
    return (known << BITS) | digit, wanted, tl.sum(counts, 0)


@triton.jit
def estimate_kernel(
    sample,  # [R, W] float32 similarities, -inf where a pair is no candidate
    rank,  # [R] int32, 1 for the largest; more than there are: the least word of all
    threshold,  # [R] int64, out: the least word of the similarity at that rank
    W,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    rank = tl.load(rank + row)
    known = tl.full([1], 0, tl.int32)
    known, left, total = estimate_digit(sample, row, known, rank, W, 21, 11, 0, BLOCK)
    known, left, _ = estimate_digit(sample, row, known, left, W, 10, 11, 11, BLOCK)
    known, left, _ = estimate_digit(sample, row, known, left, W, 0, 10, 22, BLOCK)
    word = (tl.sum(known, 0) ^ -2147483648).to(tl.int64) << 32
    tl.store(threshold + row, tl.where(total >= rank, word, LEAST))


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
def draw_digit(
    sample,
    places,
    key_rows,
    row,
    low,
    high,
    state,
    least,  # int64, the least word whose lot counts
    known,  # [1] int64
    wanted,
    W,
    OF_LOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One digit of the word at a rank, or of the lot at a rank from below; see `draw_kernel`."""
    counts = tl.zeros([1 << BITS], tl.int32)
    for start in range(0, W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word, lot, there = words_and_lots(sample, places, key_rows, row, at, low, high, state, W)
        if OF_LOTS:
            counts += digit_counts(lot, there & (word >= least), known, SHIFT, BITS, ABOVE)
        else:  # flipping the sign makes words unsigned numbers
            counts += digit_counts(word ^ LEAST, there, known, SHIFT, BITS, ABOVE)
    digit, wanted = next_digit(counts, wanted, BITS, OF_LOTS)
    return (known << BITS) | digit.to(tl.int64), wanted


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
    a, b = tl.load(low + row), tl.load(high + row)
    g = tl.load(states + row)
    if a < 0:
        tl.store(found + row, 0)
        return
    size = tl.load(pool + row)
    none = tl.full([1], 0, tl.int64)
    s, p, k = sample, places, key_rows
    # the word at rank `size`, digit by digit
    x, left = draw_digit(s, p, k, row, a, b, g, none, none, size, W, False, 53, 11, 0, BLOCK)
    x, left = draw_digit(s, p, k, row, a, b, g, none, x, left, W, False, 42, 11, 11, BLOCK)
    x, left = draw_digit(s, p, k, row, a, b, g, none, x, left, W, False, 32, 10, 22, BLOCK)
    x, left = draw_digit(s, p, k, row, a, b, g, none, x, left, W, False, 21, 11, 32, BLOCK)
    x, left = draw_digit(s, p, k, row, a, b, g, none, x, left, W, False, 10, 11, 43, BLOCK)
    x, left = draw_digit(s, p, k, row, a, b, g, none, x, left, W, False, 0, 10, 54, BLOCK)
    least = x ^ LEAST
    # the lot at rank `count` from below, among the words that reach it
    left = tl.minimum(count, size)
    y, left = draw_digit(s, p, k, row, a, b, g, least, none, left, W, True, 21, 11, 0, BLOCK)
    y, left = draw_digit(s, p, k, row, a, b, g, least, y, left, W, True, 10, 11, 11, BLOCK)
    y, left = draw_digit(s, p, k, row, a, b, g, least, y, left, W, True, 0, 10, 22, BLOCK)
    n = 0
    for start in range(0, W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word, lot, there = words_and_lots(sample, places, key_rows, row, at, a, b, g, W)
        there = there & (word >= least) & (lot <= y)
        slot = n + tl.cumsum(there.to(tl.int32), 0) - 1
        held = there & (slot < CAPACITY)
        tl.store(candidates + row.to(tl.int64) * CAPACITY + slot, word, mask=held)
        n += tl.sum(there.to(tl.int32), 0)
    tl.store(found + row, n)
