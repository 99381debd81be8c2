"""The hardest keys of each anchor in Triton: thresholds, and bits of what reaches them.

A word of 64 bits holds a pair: its similarity, as a number whose order is that of hardness, above its
key's row, inverted so that of equal similarities the lower row is the greater word. Words of one
anchor all differ, so "the n greatest" is one set, whatever order they are found in.

    hits_kernel      anchors x a split of the keys: a bit for each pair, set where its word
                     reaches the anchor's threshold
    digits_kernel    anchors x a split of the keys: of the pairs that share the known digits of the
                     threshold, how many have which next digit
    narrow_kernel    from those counts, the next digit of the word at the wanted rank

Six digits make a threshold exact. An estimate from a sample of the keys is nearly right for a sixteenth
of the cost; where it let too few or too many pairs through, `active` says so on the device, and
only those anchors go through the six digits. `candidates` makes exact lists of the bits.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import INT32_MAX, load_queries, load_tile, own_range

# where digits of a word begin, from the top: 11, 11, 10 bits of hardness, 11, 11, 10 of the row
DIGITS = (53, 42, 32, 21, 10, 0)
BINS = tl.constexpr(2048)
# the word that every pair reaches: the number of -inf above zeros
LEAST_NUMBER = tl.constexpr(-2139095041)
LEAST = tl.constexpr(LEAST_NUMBER.value << 32)
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
    EXACT: tl.constexpr,  # the threshold is a word; otherwise all that are as hard as it hit
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
    bit = (1 << (tl.arange(0, BN) % 32))[None, :]
    out = bits + rows.to(tl.int64)[:, None] * n_words + tl.arange(0, BN // 32)[None, :]
    for j in tl.range(begin + split * n // splits, begin + (split + 1) * n // splits, num_stages=STAGES):
        first, end = tl.load(firsts + j).to(tl.int32), tl.load(ends + j).to(tl.int32)
        position = first + tl.arange(0, BN)
        there = position < end
        k, key_rows = load_tile(keys, key_blocks, key_order, first, position, there, key_stride, D, BD)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32")
        if OWN:
            s = -s
        # nan is the hardest
        hit = tl.where(s < least, 0, bit)
        if EXACT:
            hit = tl.where((s == least) & (key_rows.to(tl.int32)[None, :] > until), 0, hit)
        # elsewhere all are negatives
        if (first < block_end) & (first + BN > block_begin) | (first + BN > end):
            pair = (position[None, :] >= own_begin[:, None]) & (position[None, :] < own_end[:, None])
            if OWN:
                if own_key is not None:
                    pair = pair & (key_rows[None, :] != itself[:, None])
            else:
                pair = pair == 0
            hit = tl.where(pair & there[None, :], hit, 0)
        words = tl.sum(tl.reshape(hit, [BM, BN // 32, 32]), 2)
        tl.store(out + j * (BN // 32), words, mask=takes_part[:, None])


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
