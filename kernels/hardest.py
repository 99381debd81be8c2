"""The hardest keys of each anchor in Triton: exact, without the matrix of similarities.

A word of 64 bits holds a pair: its similarity, as a number whose order is that of hardness, above its
key's row, inverted so that of equal similarities the lower row is the greater word. Words of one
anchor all differ, so "the n greatest" is one set, whatever order they are found in.

    hits_kernel      anchors x a split of the keys: a bit for each pair, set where its word
                     reaches the anchor's threshold
    collect_kernel   an anchor: the keys of its bits, which are its candidates
    score_kernel     an anchor x some candidates: their words
    order_kernel     an anchor: its candidates sorted, greatest word first
    digits_kernel    anchors x a split of the keys: of the pairs that share the known digits of the
                     threshold, how many have which next digit
    narrow_kernel    from those counts, the next digit of the word at the wanted rank

Six digits make a threshold exact. An estimate from a sample of the keys is nearly right for a sixteenth
of the cost; where it let too few or too many pairs through, `active` says so on the device, and
only those anchors go through the six digits.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import INT32_MAX, load_queries, load_row, load_rows, load_tile, own_range

# where digits of a word begin, from the top: 11, 11, 10 bits of hardness, 11, 11, 10 of the row
DIGITS = (53, 42, 32, 21, 10, 0)
BINS = tl.constexpr(2048)
# the word that every pair reaches: the number of -inf above zeros
LEAST = tl.constexpr(-2139095041 << 32)
LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def numbers_of(
    s,  # float32
    OWN: tl.constexpr,  # the least similar is the hardest
):
    """int32 numbers in the order of hardness; nan is the hardest."""
    if OWN:
        s = -s
    # adding 0 makes -0 and 0 equal
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(s == s, bits ^ ((bits >> 31) & 0x7FFFFFFF), 2147483647)


@triton.jit
def number_value(
    number,  # int32
):
    """The hardness that a number stands for, float32."""
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_tile(
    ends,  # [n] int64, ascending, one past the last position of each tile
    n,
    position,
):
    """The first of n tiles that ends behind a position; n where none does."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        is_behind = tl.load(ends + middle) > position
        high = tl.where(is_behind, middle, high)
        low = tl.where(is_behind, low, middle + 1)
    return low


@triton.jit
def tiles_of(
    ends,  # [n] int64
    n_tiles,  # [1] int64
    takes_part,  # [R] bool
    own_begin,  # [R] int32
    own_end,  # [R] int32
    OWN: tl.constexpr,
):
    """The first tile that anchors walk over, and how many: all, or those that touch own classes."""
    begin = 0
    n = tl.load(n_tiles).to(tl.int32)
    if OWN:
        begin = first_tile(ends, n, tl.min(tl.where(takes_part, own_begin, 2147483647), 0))
        last = tl.max(tl.where(takes_part, own_end, 0), 0) - 1
        n = tl.minimum(first_tile(ends, n, last) + 1, n) - begin
    return begin, n


@triton.jit
def hits_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    anchor_class,  # [A] int64, -1: an empty slot
    ranges,  # [C, PARTS, 2] int64
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks, or None
    key_order,  # [W] int64, or None
    own_key,  # [A] int64, the key that an anchor is itself; or None
    firsts,  # [n] int64, first position of each tile of BN
    ends,  # [n] int64, one past its last position in use
    n_tiles,  # [1] int64, how many of them there are
    active,  # [A] int32: 0 leaves an anchor out
    threshold,  # [A] int64: the least word that hits
    bits,  # [A, n BN / 32] int32, out: a bit for each pair, tile by tile; own: of the own tiles alone
    n_anchors,
    n_words,
    splits,
    key_stride,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    OWN: tl.constexpr,
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    own_end = tl.where(tl.load(active + rows, mask=inside, other=0) != 0, own_end, -1)
    if tl.max(own_end, 0) < 0:
        return
    takes_part = own_end >= 0
    begin, n = tiles_of(ends, n_tiles, takes_part, own_begin, own_end, OWN)
    word = tl.load(threshold + rows, mask=inside, other=0)
    least = number_value((word >> 32).to(tl.int32))[:, None]
    until = tl.minimum((word & LOW) ^ LOW, INT32_MAX).to(tl.int32)[:, None]
    block_begin, block_end = tl.min(tl.where(takes_part, own_begin, INT32_MAX), 0), tl.max(own_end, 0)
    if own_key is not None:
        itself = tl.load(own_key + rows, mask=inside, other=-1)
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    out = bits + rows.to(tl.int64)[:, None] * n_words + tl.arange(0, BN // 32)[None, :]
    for j in tl.range(begin + split * n // splits, begin + (split + 1) * n // splits, num_stages=STAGES):
        first, end = tl.load(firsts + j).to(tl.int32), tl.load(ends + j).to(tl.int32)
        position = first + tl.arange(0, BN)
        there = position < end
        k, key_rows = load_tile(keys, key_blocks, key_order, first, position, there, key_stride, D, BD)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32")
        if OWN:
            s = -s
        # not "s > least": nan is the hardest
        hit = ((s <= least) == 0) | ((s == least) & (key_rows.to(tl.int32)[None, :] <= until))
        # elsewhere all are negatives
        if (first < block_end) & (first + BN > block_begin) | (first + BN > end):
            pair = (position[None, :] >= own_begin[:, None]) & (position[None, :] < own_end[:, None])
            if OWN:
                if own_key is not None:
                    pair = pair & (key_rows[None, :] != itself[:, None])
            else:
                pair = pair == 0
            hit = hit & pair & there[None, :]
        of_word = tl.reshape(hit.to(tl.int32), [BM, BN // 32, 32]) << tl.arange(0, 32)[None, None, :]
        tl.store(out + j * (BN // 32), tl.sum(of_word, 2), mask=takes_part[:, None])


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
def digits_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    anchor_class,  # [A] int64, -1: an empty slot
    ranges,  # [C, PARTS, 2] int64
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks, or None
    key_order,  # [W] int64, or None
    own_key,  # [A] int64, the key that an anchor is itself; or None
    firsts,  # [n] int64, first position of each tile of BN
    ends,  # [n] int64, one past its last position in use
    n_tiles,  # [1] int64, how many of them there are
    active,  # [A] int32: 0 leaves an anchor out
    threshold,  # [A] int64: the known digits of the word at the rank
    counts,  # [A, BINS] int32, in and out: how many words have which next digit
    n_anchors,
    splits,
    key_stride,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    OWN: tl.constexpr,
    SHIFT: tl.constexpr,  # where the digit begins
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    own_end = tl.where(tl.load(active + rows, mask=inside, other=0) != 0, own_end, -1)
    if tl.max(own_end, 0) < 0:
        return
    takes_part = own_end >= 0
    begin, n = tiles_of(ends, n_tiles, takes_part, own_begin, own_end, OWN)
    least = tl.load(threshold + rows, mask=inside, other=0)
    if own_key is not None:
        itself = tl.load(own_key + rows, mask=inside, other=-1)
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    rows = rows.to(tl.int64)
    for j in tl.range(begin + split * n // splits, begin + (split + 1) * n // splits, num_stages=STAGES):
        first, end = tl.load(firsts + j).to(tl.int32), tl.load(ends + j).to(tl.int32)
        position = first + tl.arange(0, BN)
        there = position < end
        k, key_rows = load_tile(keys, key_blocks, key_order, first, position, there, key_stride, D, BD)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32")
        pair = (position[None, :] >= own_begin[:, None]) & (position[None, :] < own_end[:, None])
        if OWN:
            if own_key is not None:
                pair = pair & (key_rows[None, :] != itself[:, None])
        else:
            pair = pair == 0
        pair = pair & there[None, :] & takes_part[:, None]
        word = (numbers_of(s, OWN).to(tl.int64) << 32) | (key_rows.to(tl.int64) ^ LOW)[None, :]
        bits: tl.constexpr = 10 if SHIFT == 32 or SHIFT == 0 else 11
        if SHIFT < 53:  # the first digit has none above it
            above: tl.constexpr = SHIFT + bits
            pair = pair & ((word >> above) == (least >> above)[:, None])
        if tl.max(pair.to(tl.int32)) > 0:
            digit = (word >> SHIFT) & ((1 << bits) - 1)
            tl.atomic_add(counts + rows[:, None] * BINS + digit, 1, mask=pair, sem="relaxed")


@triton.jit
def narrow_kernel(
    active,  # [A] int32
    counts,  # [A, BINS] int32, zeroed again behind the last use
    threshold,  # [A] int64, its next digit is filled in
    rank,  # [A] int64, how many words at or above the threshold are still to be told apart
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) == 0:
        return
    width: tl.constexpr = 1024 if SHIFT == 32 or SHIFT == 0 else BINS
    digit = tl.arange(0, width)
    # the top digit carries the sign: as a number its upper half is negative
    if SHIFT == 53:
        digit = digit ^ 1024
    of_row = counts + row * BINS + digit
    ascending = tl.load(of_row)
    upto = tl.cumsum(ascending, 0)
    above = tl.sum(ascending, 0) - upto  # words with a greater digit
    wanted = tl.load(rank + row).to(tl.int32)
    here = (above < wanted) & (above + ascending >= wanted)
    chosen = tl.sum(tl.where(here, digit, 0), 0)
    beyond = tl.sum(tl.where(here, above, 0), 0)
    word = tl.load(threshold + row)
    tl.store(threshold + row, word | (chosen.to(tl.int64) << SHIFT))
    tl.store(rank + row, (wanted - beyond).to(tl.int64))
    tl.store(of_row, tl.zeros([width], tl.int32))


@triton.jit
def order_kernel(
    candidates,  # [A, CAPACITY] int64
    found,  # [A] int32
    anchor_class,  # [A] int64, -1: an empty slot
    index,  # [A, N] int64, out: -1 behind the last
    similarity,  # [A, N] float32, out: 0 behind the last
    N,
    OWN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    n = tl.where(tl.load(anchor_class + row) >= 0, tl.load(found + row), 0)
    held = slot < n
    word = tl.load(candidates + row * CAPACITY + slot, mask=held, other=0)
    word = tl.sort(tl.where(held, word, LEAST), descending=True)
    chosen = slot < tl.minimum(n, N)
    key = tl.where(chosen, (word & LOW) ^ LOW, -1)
    s = number_value((word >> 32).to(tl.int32))
    s = tl.where(chosen, -s if OWN else s, 0.0)
    tl.store(index + row * N + slot, key, mask=slot < N)
    tl.store(similarity + row * N + slot, s, mask=slot < N)
