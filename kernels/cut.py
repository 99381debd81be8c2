"""The cut of a sample in Triton: of each anchor's keys the hardest share counts, below a ceiling.

    similarity_kernel  anchors x a split of the sample: inner products, as halves in the order of hardness
    cut_kernel         an anchor, its row in registers: the half at the wanted rank, by counting; of those
                       that equal it the last place that counts

The sums (`contrast`) multiply again with the tiles of similarity_kernel, so with the same bits, round the
same way and let a key count by `counts`. No list, no sort. A half tells similarities of 0.5 to 1 apart by
2^-11: how many keys count is exact, which ones is up to that.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import INT32_MAX, INTERPRETED, load_queries, load_tile, own_range

# keys of a row that a step of the search reads side by side
LANES = tl.constexpr(1024)
MOST = tl.constexpr(65504.0)


@triton.jit
def halves_of(
    hardness,  # float32
):
    """float16 in the same order; inf, the hardest, of nan and beyond the range; never -inf."""
    return tl.where(hardness == hardness, tl.maximum(hardness, -65504.0).to(tl.float16), float("inf"))


@triton.jit
def counts(
    half,  # [BM, BN] float16
    place,  # [1, BN] int32
    least,  # [BM, 1] float16
    last,  # [BM, 1] int32
):
    """Whether keys count: harder than the cut, or as hard and not behind its last place."""
    return (half > least) | ((half == least) & (place <= last))


@triton.jit
def similarity_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    anchor_class,  # [A] int64, empty slots last and -1
    ranges,  # [C, 1, 2] int64, one after the other from 0 on
    ends,  # [1] int64, how many keys the sample has
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks, or None
    key_order,  # [W] int64, or None
    own_key,  # [A] int64, the key that an anchor is itself; or None
    ceiling,  # [A] float32, only less similar keys are pairs; or None
    halves,  # [A, *] float16, out: hardness of the keys at each place, nan where a pair is none
    hardest,  # [splits, A] float32, out: that of the hardest
    n_anchors,
    half_stride,  # a multiple of BN
    splits,
    key_stride,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    OWN: tl.constexpr,  # the own class, whose keys have places from 0 on
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    block_end = tl.max(own_end, 0)
    if block_end < 0:
        return
    used = own_end >= 0
    block_begin = tl.min(tl.where(used, own_begin, INT32_MAX), 0)
    begin, end = 0, tl.load(ends).to(tl.int32)
    if OWN:
        # by contract a class is no longer than that
        own_end = tl.minimum(own_end, own_begin + half_stride)
        begin, end = block_begin, block_end
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    if own_key is not None:
        itself = tl.load(own_key + rows, mask=used, other=-1)
    if ceiling is not None:
        top = tl.load(ceiling + rows, mask=used, other=0.0)
    most = tl.full([BM], float("-inf"), tl.float32)
    of_row = halves + rows.to(tl.int64)[:, None] * half_stride
    for j in tl.range(split, tl.cdiv(end - begin, BN), splits, num_stages=STAGES):
        first = begin + j * BN
        position = first + tl.arange(0, BN)
        there = position < end
        k, key_rows = load_tile(keys, key_blocks, key_order, first, position, there, key_stride, D, BD)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32")
        if OWN:
            s = -s
            place = position[None, :] - own_begin[:, None]
            inside = (place >= 0) & (position[None, :] < own_end[:, None])
            pair = inside
            if own_key is not None:
                pair = pair & (key_rows[None, :] != itself[:, None])
            half = tl.where(pair, halves_of(s), float("nan"))
            s = tl.where(pair, s, float("-inf"))
        else:
            place = position[None, :]
            inside = used[:, None]
            half = halves_of(s)
            if ceiling is not None:
                under = s >= top[:, None]  # nan lies below it, so that it shows
                half = tl.where(under, float("nan"), half)
                s = tl.where(under, float("-inf"), s)
            # only the few tiles that touch an own class or the end pay for a mask
            if (first < block_end) & (first + BN > block_begin) | (first + BN > end):
                pair = (place < own_begin[:, None]) | (place >= own_end[:, None])
                pair = pair & there[None, :]
                half = tl.where(pair, half, float("nan"))
                s = tl.where(pair, s, float("-inf"))
        most = tl.maximum(most, tl.max(s, 1))
        tl.store(of_row + place, half, mask=inside)
    row = tl.arange(0, BM)
    tl.store(hardest + split * n_anchors + block * BM + row, most, mask=block * BM + row < n_anchors)


@triton.jit
def count_on(
    count,  # [LANES] float16
    half,  # [LANES] float16
    value,  # [LANES] float16
    EQUAL: tl.constexpr,
    IS_INTERPRETED: tl.constexpr = INTERPRETED,
):
    """count + (half >= value), or count + (half == value): on a GPU two instructions for two keys."""
    if IS_INTERPRETED:
        return count + ((half == value) if EQUAL else (half >= value)).to(tl.float16)
    else:
        how: tl.constexpr = "eq" if EQUAL else "ge"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; set." + how + ".f16x2.f16x2 t, $2, $3; add.f16x2 $0, $1, t; }",
            "=r,r,r,r",
            [count, half, value],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def widened(
    low,  # [LANES] float16
    high,  # [LANES] float16
    half,  # [LANES] float16, nan where there is none
    IS_INTERPRETED: tl.constexpr = INTERPRETED,
):
    """The least and greatest so far. Of nan and a number a GPU takes the number, the interpreter nan."""
    if IS_INTERPRETED:
        there = half == half
        return tl.where(there, tl.minimum(low, half), low), tl.where(there, tl.maximum(high, half), high)
    else:
        return tl.minimum(low, half), tl.maximum(high, half)


@triton.jit
def total(
    count,  # [LANES] float16
):
    """The sum of counts, exact."""
    return tl.sum(count.to(tl.float32), 0).to(tl.int32)


@triton.jit
def cut_kernel(
    halves,  # [A, *] float16, nan where a pair is none
    anchor_class,  # [A] int64
    ranges,  # [C, 1, 2] int64
    ends,  # [1] int64, how many keys the sample has
    hardest,  # [splits, A] float32
    fraction: tl.float64,  # of the keys how many count at most
    most,  # the most keys that count
    least,  # [A] float16, out: the half of the last key that counts
    last,  # [A] int32, out: of those that equal it the last place that counts
    shift,  # [A] float32, out: `scale` times the hardness of the hardest key
    pairs,  # [A] int64, out: how many keys are pairs
    n_anchors,
    half_stride,
    splits,
    scale,
    CHUNKS: tl.constexpr,  # of LANES, which hold a row
    SPLITS: tl.constexpr,  # at most
    OWN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    of = tl.load(anchor_class + row)
    n = 0
    if of >= 0:
        if OWN:
            n = tl.minimum(tl.load(ranges + 2 * of + 1).to(tl.int32), half_stride)
        else:
            n = tl.load(ends).to(tl.int32)
    upto = (n + 7) // 8 * 8
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float16)
    x = ()
    low, high, there = zero + float("inf"), zero + float("-inf"), zero
    for i in tl.static_range(CHUNKS):
        place = i * LANES + lane
        # whole vectors; behind the sample's last key its tile ends with nan
        half = tl.load(halves + row * half_stride + place, mask=place < upto, other=float("nan"))
        if OWN:
            half = tl.where(place < n, half, float("nan"))
        there = count_on(there, half, zero - MOST, False)
        low, high = widened(low, high, half)
        x = x + (half,)  # noqa: RUF005 (Triton knows no star)
    m = total(there)
    wanted = tl.minimum(tl.ceil(m.to(tl.float64) * fraction).to(tl.int64), most).to(tl.int32)
    # the bound lies from `low`, which `enough` keys reach, up to below `high`, which `fewer` than wanted do
    low, high = tl.min(low.to(tl.float32), 0), tl.max(high.to(tl.float32), 0)
    enough, fewer, found, middle = m, 0, -1, high
    while (found != wanted) & (middle > low):
        pivot = zero + middle.to(tl.float16)
        count = zero
        for i in tl.static_range(CHUNKS):
            count = count_on(count, x[i], pivot, False)
        found = total(count)
        enough, fewer = tl.where(found >= wanted, found, enough), tl.where(found >= wanted, fewer, found)
        low, high = tl.where(found >= wanted, middle, low), tl.where(found >= wanted, high, middle)
        half_way = tl.minimum((low + high) * 0.5, MOST).to(tl.float16).to(tl.float32)
        middle = tl.where(half_way < high, half_way, low)
    bound = low.to(tl.float16)
    spare, until = enough - wanted, INT32_MAX
    if spare > 0:
        # of those that equal the bound the last are too many: first the chunk of the last that counts
        chunk, keep = 0, wanted - fewer
        for k in tl.static_range(6):
            if 32 >> k < CHUNKS:
                later, count = chunk + (32 >> k), zero
                for i in tl.static_range(CHUNKS):
                    count = count_on(count, x[i], zero + tl.where(i >= later, bound, float("nan")), True)
                found = total(count)
                keep = tl.where(found > spare, found - spare, keep)
                chunk = tl.where(found > spare, later, chunk)
        equal = zero
        for i in tl.static_range(CHUNKS):
            equal = count_on(equal, x[i], zero + tl.where(i == chunk, bound, float("nan")), True)
        equal = equal.to(tl.int32)
        until = tl.max(tl.where((equal != 0) & (tl.cumsum(equal, 0) == keep), chunk * LANES + lane, -1), 0)
    tl.store(least + row, bound)
    tl.store(last + row, until)
    tl.store(pairs + row, m.to(tl.int64))
    split = tl.arange(0, SPLITS)
    top = tl.max(tl.load(hardest + split * n_anchors + row, mask=split < splits, other=float("-inf")), 0)
    tl.store(shift + row, tl.where(top > float("-inf"), top * scale, 0.0))
