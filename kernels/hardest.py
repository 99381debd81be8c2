"""The hardest keys of each anchor in Triton: exact, without the matrix of similarities.

A word of 64 bits holds a pair: its similarity, as a number whose order is that of hardness, above its
key's row, inverted so that of equal similarities the lower row is the greater word. Words of one
anchor all differ, so "the n greatest" is one set, whatever order they are found in.

    estimate_kernel  the similarity at a rank of each anchor's in a sample of the keys
    walk_kernel      anchors x a split of the keys: pairs whose word reaches the anchor's threshold are
                     appended to its candidates, in the order in which they happen to come. Without
                     candidates it counts instead, of the pairs that share the known digits of the
                     threshold, how many have which next digit
    narrow_kernel    from those counts, the next digit of the word at the wanted rank
    order_kernel     candidates of an anchor, sorted: greatest word first

Six digits make a threshold exact. An estimate from a sample of the keys is nearly right for a sixteenth
of the cost; where it let too few or too many pairs through, `active` says so on the device, and
only those anchors go through the six digits.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import INT32_MAX, load_queries, load_tile, own_range

# where digits of a word begin, from the top: 11, 11, 10 bits of hardness, 11, 11, 10 of the row
DIGITS = (53, 42, 32, 21, 10, 0)
BINS = tl.constexpr(2048)
LEAST = tl.constexpr(-9223372036854775808)


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
    return tl.where(s == s, bits ^ ((bits >> 31) & 0x7FFFFFFF), INT32_MAX)


@triton.jit
def similarity_of(
    word,  # int64
    OWN: tl.constexpr,
):
    """The inner product that a word was made of, float32."""
    ordered = (word >> 32).to(tl.int32)
    s = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if OWN:
        s = -s
    return s


@triton.jit
def estimate_kernel(
    sample,  # [R, W] float32 similarities
    sample_class,  # [W] int32
    anchor_class,  # [R] int64
    rank,  # [] int32, 1 for the largest
    threshold,  # [R] int64, out: the least word of the negative at that rank, or of one behind it
    W,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(anchor_class + row).to(tl.int32)
    # of the similarities that share a slot only the greatest counts: the wanted are few for so many slots
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, W, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < W
        s = tl.load(sample + row * W + offset, mask=inside, other=float("-inf"))
        of = tl.load(sample_class + offset, mask=inside, other=0)
        best = tl.maximum(best, tl.where(of == own, float("-inf"), s))
    number = numbers_of(best, False)
    wanted = tl.load(rank)
    found = tl.full([], -2147483648, tl.int64)
    bit = tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        greater = found + bit
        enough = tl.sum((number >= greater.to(tl.int32)).to(tl.int32), 0) >= wanted
        found = tl.where(enough, greater, found)
        bit = bit >> 1
    tl.store(threshold + row, found << 32)


@triton.jit
def walk_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    anchor_class,  # [A] int64, -1: an empty slot
    ranges,  # [C, PARTS, 2] int64
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks, or None
    key_order,  # [W] int64, or None
    own_key,  # [A] int64, the key that an anchor is itself; or None
    spans,  # [n, 2] int64, first position and length of what is in use
    tiles,  # [n] int64, tiles of BN up to and with each span
    split_tiles,  # [splits + 1] int64, first tile of each split
    split_span,  # [splits] int64, where that tile lies
    active,  # [A] int32: 0 leaves an anchor out
    threshold,  # [A] int64: the least word to append, or the known digits of the word at the rank
    found,  # [A] int32, pairs that reached the threshold; or counts [A, BINS] int32 of digits
    candidates,  # [A, capacity] int64, out; None: count digits
    capacity,
    n_anchors,
    key_stride,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    OWN: tl.constexpr,
    SHIFT: tl.constexpr,  # where the digit to count begins
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    takes_part = (own_begin >= 0) & (tl.load(active + rows, mask=inside, other=0) != 0)
    own_end = tl.where(takes_part, own_end, -1)
    block_end = tl.max(own_end, 0)
    if block_end < 0:
        return
    block_begin = tl.min(tl.where(takes_part, own_begin, INT32_MAX), 0)
    least = tl.load(threshold + rows, mask=inside, other=0)
    if own_key is not None:
        itself = tl.load(own_key + rows, mask=inside, other=-1)
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    rows = rows.to(tl.int64)
    tile = tl.load(split_tiles + split).to(tl.int32)
    stop = tl.load(split_tiles + split + 1).to(tl.int32)
    span = tl.load(split_span + split).to(tl.int32)
    while tile < stop:
        start = tl.load(spans + 2 * span).to(tl.int32)
        length = tl.load(spans + 2 * span + 1).to(tl.int32)
        end = start + length
        upto = tl.load(tiles + span).to(tl.int32)
        before = upto - tl.cdiv(length, BN)
        last = tl.minimum(upto, stop)
        from_tile = tile - before
        to_tile = last - before
        if OWN:  # of this span, the tiles that touch the own classes of the block
            from_tile = tl.maximum(from_tile, tl.maximum(block_begin - start, 0) // BN)
            to_tile = tl.minimum(to_tile, tl.cdiv(tl.maximum(block_end - start, 0), BN))
        for j in tl.range(from_tile, to_tile, num_stages=STAGES):
            first = start + j * BN
            position = first + tl.arange(0, BN)
            there = position < end
            k, key_rows = load_tile(keys, key_blocks, key_order, first, position, there, key_stride, D, BD)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32")
            own = (position[None, :] >= own_begin[:, None]) & (position[None, :] < own_end[:, None])
            pair = there[None, :] & takes_part[:, None]
            if OWN:
                pair = pair & own
                if own_key is not None:
                    pair = pair & (key_rows[None, :] != itself[:, None])
            else:
                pair = pair & (own == 0)
            low = (0xFFFFFFFF - key_rows.to(tl.int64))[None, :]
            word = (numbers_of(s, OWN).to(tl.int64) << 32) | low
            if candidates is None:
                bits: tl.constexpr = 10 if SHIFT == 32 or SHIFT == 0 else 11
                if SHIFT < 53:  # the first digit has none above it
                    above: tl.constexpr = SHIFT + bits
                    pair = pair & ((word >> above) == (least >> above)[:, None])
                if tl.max(pair.to(tl.int32)) > 0:
                    digit = (word >> SHIFT) & ((1 << bits) - 1)
                    tl.atomic_add(found + rows[:, None] * BINS + digit, 1, mask=pair, sem="relaxed")
            else:
                hit = pair & (word >= least[:, None])
                if tl.max(hit.to(tl.int32)) > 0:  # most tiles have none for most anchors
                    one = tl.full([BM, BN], 1, tl.int32)
                    counter = tl.broadcast_to(found + rows[:, None], [BM, BN])
                    slot = tl.atomic_add(counter, one, mask=hit, sem="relaxed")
                    offset = rows[:, None] * capacity + slot
                    tl.store(candidates + offset, word, mask=hit & (slot < capacity))
        tile = last
        span += 1


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
    key = tl.where(chosen, 0xFFFFFFFF - (word & 0xFFFFFFFF), -1)
    s = tl.where(chosen, similarity_of(word, OWN), 0.0)
    tl.store(index + row * N + slot, key, mask=slot < N)
    tl.store(similarity + row * N + slot, s, mask=slot < N)
