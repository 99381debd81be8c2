"""The hardest keys of each anchor in Triton: exact, without the matrix of similarities.

A word of 64 bits holds a pair: its similarity, as a number whose order is that of hardness, above its
key's index, inverted so that of equal similarities the lower index is the greater word. Words of one
anchor all differ, so "the n greatest" is one set, whatever order they are found in.

    walk_kernel     anchors x a split of the keys: pairs whose word reaches the anchor's threshold are
                    appended to its candidates, in the order in which they happen to come. With COUNT
                    it counts instead, of the pairs that share the known digits of the threshold, how
                    many have which next digit
    narrow_kernel   from those counts, the next digit of the word at the wanted rank
    order_kernel    candidates of an anchor, sorted: greatest word first

With DRAW a walk knows the threshold and looks at lots instead: the lowest lots among the pairs that reach
it are a uniform draw from them. What is done with a sample of the keys stands in `sampling`.

Six digits make a threshold exact. An estimate from a sample of the keys is nearly right for a sixteenth
of the cost; where it let too few or too many pairs through, `active` says so on the device, and
only those anchors go through the six digits.
"""

import triton
import triton.language as tl
from pico_fast.kernels.contrast import load_block, load_keys

# where digits of a word begin, from the top: 11, 11, 10 bits of hardness, 11, 11, 10 of the index
DIGITS = (53, 42, 32, 21, 10, 0)
# and digits of a lot: 11, 11, 10 bits
LOT_DIGITS = (21, 10, 0)
BINS = tl.constexpr(2048)


@triton.jit
def words_of(
    s,  # [BM, BN] float32 inner products
    rows,  # [BN] int32 rows of keys
    SIGN: tl.constexpr,
):
    """Words [BM, BN] int64; SIGN -1 makes the least similar pair the hardest."""
    # adding 0 makes -0 and 0 equal
    bits = (s * SIGN + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - rows.to(tl.int64))[None, :]


@triton.jit
def similarity_of(
    word,  # int64
    SIGN: tl.constexpr,
):
    """The inner product that a word was made of, float32."""
    ordered = (word >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True) * SIGN


@triton.jit
def lots_of(
    state,  # int64, the hash of (seed, stream, anchor)
    rows,  # int32 or int64 rows of keys
):
    """Lots, int64 below 2^32: one more round of the reference's hash, in which all keys differ."""
    x = (state.to(tl.uint32) ^ rows.to(tl.uint32)) + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (x ^ (x >> 15)).to(tl.int64)


@triton.jit
def walk_tile(
    q,  # [BM, D]
    mine,  # [BM] int32, first position of the own class
    behind,  # [BM] int32, one past its last
    keys,  # [K, D], or a descriptor of its blocks
    key_order,  # [K] int64, with GATHER
    first,
    end,
    key_stride,
    own_position,  # [BM] int32, with IN_BATCH
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    OWN: tl.constexpr,
    IN_BATCH: tl.constexpr,
    SIGN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Words [BM, BN] of the positions from `first` on, which are candidates, and rows [BN] of keys."""
    at = first + tl.arange(0, BN)
    k = load_keys(keys, key_order, at, first, end, key_stride, D, BD, GATHER, TMA).to(PRODUCT)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    own = (at[None, :] >= mine[:, None]) & (at[None, :] < behind[:, None])
    pair = (at < end)[None, :] & (mine >= 0)[:, None]
    if OWN:
        pair = pair & own
    else:
        pair = pair & (own == 0)
    if IN_BATCH:
        pair = pair & (at[None, :] != own_position[:, None])
    rows = at
    if GATHER:
        rows = tl.load(key_order + at, mask=at < end, other=0).to(tl.int32)
    return words_of(s, rows, SIGN), pair, rows


@triton.jit
def walk_kernel(
    queries,  # [A, D] in the product's type, class by class; or a descriptor
    low,  # [A] int32, first position of the own class; -1: an empty slot
    high,  # [A] int32, one past its last
    active,  # [A] int32: 0 leaves an anchor out
    threshold,  # [A] int64: the least word to append, or the known digits of the word at the rank
    states,  # [A] int64, what lots are drawn with, with DRAW
    lots,  # [A] int64, with DRAW: the greatest lot to append, or the known digits of it
    found,  # [A] int32, pairs that reached the threshold; or counts [A, BINS] int32 of digits
    candidates,  # [A, CAPACITY] int64, out; not with COUNT
    keys,  # [K, D], or a descriptor of its blocks
    key_order,  # [K] int64, with GATHER
    spans,  # [n_spans, 2] int32, first position and length
    tiles,  # [n_spans + 1] int32, tiles of BN before each span
    bounds,  # [splits + 1] int32, first tile of each split
    first_span,  # [splits] int32, where that tile lies
    n_anchors,
    key_stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    TMA_QUERIES: tl.constexpr,
    OWN: tl.constexpr,
    IN_BATCH: tl.constexpr,
    SIGN: tl.constexpr,
    COUNT: tl.constexpr,
    DRAW: tl.constexpr,
    SHIFT: tl.constexpr,
    CAPACITY: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    mine = tl.load(low + rows, mask=inside, other=-1)
    behind = tl.load(high + rows, mask=inside, other=-1)
    mine = tl.where(tl.load(active + rows, mask=inside, other=0) != 0, mine, -1)
    behind = tl.where(mine >= 0, behind, -1)
    own_end = tl.max(behind, 0)
    if own_end < 0:
        return
    own_first = tl.min(tl.where(mine >= 0, mine, 2147483647), 0)
    least = tl.load(threshold + rows, mask=inside, other=0)
    if DRAW:
        state = tl.load(states + rows, mask=inside, other=0)
        lot_limit = tl.load(lots + rows, mask=inside, other=0)
    q = load_block(queries, block * BM, BM, n_anchors, D, BD, TMA_QUERIES)
    tile = tl.load(bounds + split)
    stop = tl.load(bounds + split + 1)
    span = tl.load(first_span + split)
    while tile < stop:
        begin = tl.load(tiles + span)
        last = tl.minimum(tl.load(tiles + span + 1), stop)
        start = tl.load(spans + 2 * span)
        end = start + tl.load(spans + 2 * span + 1)
        from_tile = tile - begin
        to_tile = last - begin
        if OWN:  # of this span, the tiles that touch the own classes of the block
            from_tile = tl.maximum(from_tile, (own_first - start) // BN)
            to_tile = tl.minimum(to_tile, tl.cdiv(own_end - start, BN))
        for j in tl.range(from_tile, to_tile, num_stages=STAGES):
            word, pair, key_rows = walk_tile(
                q,
                mine,
                behind,
                keys,
                key_order,
                start + j * BN,
                end,
                key_stride,
                rows,
                D,
                BD,
                BN,
                GATHER,
                TMA,
                OWN,
                IN_BATCH,
                SIGN,
                PRODUCT,
                PRECISION,
            )
            if DRAW:
                pair = pair & (word >= least[:, None])
                lot = lots_of(state[:, None], key_rows[None, :])
            if COUNT:
                width: tl.constexpr = 1024 if SHIFT == 32 or SHIFT == 0 else BINS
                above: tl.constexpr = SHIFT + (10 if SHIFT == 32 or SHIFT == 0 else 11)
                if DRAW:
                    number = lot
                    known = lot_limit
                else:
                    number = word
                    known = least
                if (21 if DRAW else 53) > SHIFT:  # the first digit has none above it
                    pair = pair & ((number >> above) == (known >> above)[:, None])
                if tl.max(pair.to(tl.int32)) > 0:
                    digit = (number >> SHIFT) & (width - 1)
                    at = found + rows[:, None] * BINS + digit
                    tl.atomic_add(at, 1, mask=pair, sem="relaxed")
            else:
                hit = pair & (word >= least[:, None])
                if DRAW:
                    hit = hit & (lot <= lot_limit[:, None])
                if tl.max(hit.to(tl.int32)) > 0:  # most tiles have none for most anchors
                    one = tl.full([BM, BN], 1, tl.int32)
                    counter = tl.broadcast_to(found + rows[:, None], [BM, BN])
                    slot = tl.atomic_add(counter, one, mask=hit, sem="relaxed")
                    at = candidates + rows.to(tl.int64)[:, None] * CAPACITY + slot
                    tl.store(at, word, mask=hit & (slot < CAPACITY))
        tile = tl.maximum(tile, last)
        span += 1


@triton.jit
def narrow_kernel(
    active,  # [A] int32
    counts,  # [A, BINS] int32, zeroed again behind the last use
    threshold,  # [A] int64, its next digit is filled in
    rank,  # [A] int64, how many words at or above the threshold are still to be told apart
    LOWEST: tl.constexpr,  # ranks from below
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(active + row) == 0:
        return
    width: tl.constexpr = 1024 if SHIFT == 32 or SHIFT == 0 else BINS
    digit = tl.arange(0, width)
    at = counts + row * BINS + digit
    n = tl.load(at)
    # the top digit carries the sign: as a number its upper half is negative
    if SHIFT == 53:
        place = digit ^ 1024
    else:
        place = digit
    ascending = tl.load(counts + row * BINS + place)
    upto = tl.cumsum(ascending, 0)
    total = tl.sum(n, 0)
    wanted = tl.load(rank + row).to(tl.int32)
    if LOWEST:
        above = upto - ascending  # words with a lower digit
    else:
        above = total - upto  # words with a greater digit
    here = (above < wanted) & (above + ascending >= wanted)
    chosen = tl.sum(tl.where(here, place, 0), 0)
    beyond = tl.sum(tl.where(here, above, 0), 0)
    word = tl.load(threshold + row)
    tl.store(threshold + row, word | (chosen.to(tl.int64) << SHIFT))
    tl.store(rank + row, (wanted - beyond).to(tl.int64))
    tl.store(at, tl.zeros([width], tl.int32))


@triton.jit
def order_kernel(
    candidates,  # [A, CAPACITY] int64
    found,  # [A] int32
    low,  # [A] int32, -1: an empty slot
    order,  # [A] int64, where an anchor of class order stands in its own
    index,  # [A, N] int64, out, in the anchors' own order: -1 behind the last
    similarity,  # [A, N] float32, out: 0 behind the last
    N,
    SIGN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0)
    here = tl.load(order + row)
    slot = tl.arange(0, CAPACITY)
    n = tl.minimum(tl.minimum(tl.load(found + row), CAPACITY), N)
    n = tl.where(tl.load(low + row) >= 0, n, 0)
    nothing = tl.full([CAPACITY], -9223372036854775808, tl.int64)
    held = slot < tl.minimum(tl.load(found + row), CAPACITY)
    word = tl.load(candidates + row.to(tl.int64) * CAPACITY + slot, mask=held, other=0)
    word = tl.sort(tl.where(held, word, nothing), descending=True)
    chosen = slot < n
    key = tl.where(chosen, 0xFFFFFFFF - (word & 0xFFFFFFFF), -1)
    s = tl.where(chosen, similarity_of(word, SIGN), 0.0)
    tl.store(index + here * N + slot, key, mask=slot < N)
    tl.store(similarity + here * N + slot, s, mask=slot < N)
