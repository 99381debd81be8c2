"""The hardest keys of each anchor, from the bits of those that may be among them (`kernels/hardest.py`).

    collect_kernel   an anchor: the keys of its bits, which are its candidates
    score_kernel     an anchor x some candidates: their words
    pick_kernel      an anchor: of its candidates the wanted ones, in the order of the keys

Words are those of `hardest`: similarity above inverted row.
"""

import triton
import triton.language as tl
from pico_fast.kernels.hardest import LEAST_NUMBER, LOW, number_value, numbers_of, tiles_of
from pico_fast.kernels.rows import INT32_MAX, load_row, load_rows, own_range


@triton.jit
def collect_kernel(
    bits,  # [A, n_words] int32
    anchor_class,  # [A] int64
    ranges,  # [C, PARTS, 2] int64
    key_order,  # [W] int64, or None
    firsts,  # [n] int64
    ends,  # [n] int64
    n_tiles,  # [1] int64
    active,  # [A] int32
    candidates,  # [A, capacity] int64, out: rows of keys
    found,  # [A] int32, out: how many there are, more than capacity too
    n_anchors,
    n_words,
    capacity,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    WORDS: tl.constexpr,  # read at a time
    OWN: tl.constexpr,
):
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    takes_part = (own_begin >= 0) & (tl.load(active + rows) != 0)
    if tl.max(takes_part.to(tl.int32), 0) == 0:
        return
    begin, n_own = tiles_of(ends, n_tiles, takes_part, own_begin, own_end, OWN)
    per_tile: tl.constexpr = BN // 32
    out = candidates + row.to(tl.int64) * capacity
    n = 0
    end = (begin + n_own) * per_tile
    for start in range(begin * per_tile, end, WORDS):
        at = start + tl.arange(0, WORDS)
        inside = at < end
        word = tl.load(bits + row.to(tl.int64) * n_words + at, mask=inside, other=0)
        hits = ones(word)
        slot = n + tl.cumsum(hits, 0) - hits
        n += tl.sum(hits, 0)
        first = tl.load(firsts + at // per_tile, mask=word != 0, other=0) + at % per_tile * 32
        while tl.max((word != 0).to(tl.int32), 0) > 0:
            left = (word != 0) & (slot < capacity)
            key = first + ones((word & -word) - 1)
            if key_order is not None:
                key = tl.load(key_order + key, mask=left, other=0)
            tl.store(out + slot, key, mask=left)
            word = word & (word - 1)
            slot += 1
    tl.store(found + row, n)


@triton.jit
def ones(
    word,  # int32
):
    """How many bits are set."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F


@triton.jit
def score_kernel(
    queries,  # [A, D]
    keys,  # [K, D]
    active,  # [A] int32
    found,  # [A] int32
    candidates,  # [A, capacity] int64, rows of keys; out: words
    capacity,
    key_stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
):
    anchor, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * ROWS + tl.arange(0, ROWS)
    used = at < tl.minimum(tl.load(found + anchor), capacity)
    if tl.load(active + anchor) == 0:
        return
    if tl.max(used.to(tl.int32), 0) == 0:
        return
    q = load_row(queries, anchor, D, D, BD)
    row = tl.load(candidates + anchor * capacity + at, mask=used, other=0)
    k = load_rows(keys, row, used, key_stride, D, BD).to(queries.dtype.element_ty).to(tl.float32)
    number = numbers_of(tl.sum(k * q[None, :], 1), OWN)
    tl.store(candidates + anchor * capacity + at, (number.to(tl.int64) << 32) | (row ^ LOW), mask=used)


@triton.jit
def reaching(
    value,  # [n] integers
    low,  # scalar, reached by so many or more
    high,  # scalar, the greatest of them
    wanted,  # scalar
):
    """The greatest number from low to high that `wanted` of the values reach."""
    while low < high:
        # half of the sum, rounded up: the sum itself may not fit
        middle = (low | high) - ((low ^ high) >> 1)
        enough = tl.sum((value >= middle).to(tl.int32), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def pick_kernel(
    candidates,  # [A, CAPACITY] int64
    found,  # [A] int32
    anchor_class,  # [A] int64, -1: an empty slot
    index,  # [A, N] int64, out: rows of the N greatest words, -1 behind the last
    similarity,  # [A, N] float32, out: 0 behind the last
    N,
    OWN: tl.constexpr,
    CAPACITY: tl.constexpr,
    PIECE: tl.constexpr,  # words written at a time
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    n = tl.where(tl.load(anchor_class + row) >= 0, tl.load(found + row), 0)
    held = slot < n
    wanted = tl.minimum(n, N)
    # a word's halves: whole words would take twice the registers
    of_row = candidates.to(tl.pointer_type(tl.int32), bitcast=True) + 2 * row * CAPACITY
    number = tl.load(of_row + 2 * slot + 1, mask=held, other=LEAST_NUMBER)
    lowest = tl.min(tl.where(held, number, INT32_MAX), 0)
    least = reaching(number, lowest, tl.max(number, 0), wanted)
    equal = held & (number == least)
    left = wanted - tl.sum((held & (number > least)).to(tl.int32), 0)
    least_row = LEAST_NUMBER
    if tl.sum(equal.to(tl.int32), 0) > left:
        # rows stand inverted, so the lowest are the greatest
        inverted = tl.load(of_row + 2 * slot, mask=equal, other=LEAST_NUMBER)
        lowest = tl.min(tl.where(equal, inverted, INT32_MAX), 0)
        least_row = reaching(inverted, lowest, tl.max(inverted, 0), left)
    n_chosen = 0
    for start in range(0, tl.maximum(n, N), PIECE):
        at = start + tl.arange(0, PIECE)
        there = at < n
        hardness = tl.load(of_row + 2 * at + 1, mask=there, other=LEAST_NUMBER)
        key = tl.load(of_row + 2 * at, mask=there, other=LEAST_NUMBER)
        chosen = there & ((hardness > least) | ((hardness == least) & (key >= least_row)))
        place = n_chosen + tl.cumsum(chosen.to(tl.int32), 0) - 1
        n_chosen += tl.sum(chosen.to(tl.int32), 0)
        s = number_value(hardness)
        tl.store(index + row * N + place, (key ^ -1).to(tl.int64), mask=chosen)
        tl.store(similarity + row * N + place, -s if OWN else s, mask=chosen)
        behind = (at >= wanted) & (at < N)
        tl.store(index + row * N + at, tl.full([PIECE], -1, tl.int64), mask=behind)
        tl.store(similarity + row * N + at, tl.zeros([PIECE], tl.float32), mask=behind)
