"""Contrast with all keys in Triton: one pass over the negatives, one over the own class.

Anchors and keys stand class by class, so "same class" is a range of positions. A position is a row of
`keys`, or with GATHER an entry of `key_order`, which holds the row. Positions in use come in spans.

    negatives_kernel   anchors x a split of the spans: each tile of keys feeds both products, s = q kᵀ and
                       p k, so the sums of p and of p k come out of one reading of the keys
    positives_kernel   anchors x own class: loss, weights w and the sum of w k

What comes after each of them stands in `contrast_ends`.

Exponents are to base 2, shifted by `top`: the row's bound |q| / temperature, which makes sums of all
splits addable and needs no maximum; or, with RUNNING, the maximum so far. The bound holds for unit
keys. If sums leave the range that float32 is to be trusted in, merge_kernel raises a flag on the
device, and only then a second launch, with RUNNING, does any work.
"""

import triton
import triton.language as tl

# kernels run as Python, on tensors of any device: TRITON_INTERPRET=1, for tests without a GPU
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_rows(
    matrix,  # [n, D]
    rows,  # [R] integer
    used,  # [R] bool
    stride,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows [R, BD]: zero where unused, whatever stands there, and behind column D."""
    columns = tl.arange(0, BD)
    at = matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if BD == D:
        there = used[:, None]
    else:
        there = used[:, None] & (columns < D)[None, :]
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def load_block(
    matrix,  # [n, D] without gaps, or a descriptor of its blocks [R, BD]
    first,
    R: tl.constexpr,
    n,
    D: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows first to first + R: [R, BD], zero behind the last and behind column D."""
    if TMA:
        out = matrix.load([first, 0])
    else:
        rows = first + tl.arange(0, R)
        out = load_rows(matrix, rows, rows < n, D, D, BD)
    return out


@triton.jit
def store_block(
    parts,  # [splits, n, D]
    block,  # [R, BD]
    split,
    first,
    R: tl.constexpr,
    n,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Write rows first to first + R of one split's part."""
    rows = first + tl.arange(0, R)
    columns = tl.arange(0, BD)
    start = parts + (split.to(tl.int64) * n + first) * D
    offset = tl.arange(0, R)[:, None] * D + columns[None, :]
    if BD == D:
        there = (rows < n)[:, None]
    else:
        there = (rows < n)[:, None] & (columns < D)[None, :]
    tl.store(start + offset, block, mask=there)


@triton.jit
def load_keys(
    keys,  # [K, D], or a descriptor of its blocks [BN, BD]
    key_order,  # [K] int64: row of each position, with GATHER
    positions,  # [BN] int32, neighbours
    first,
    end,
    stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys [BN, BD] of neighbouring positions; behind `end` zeros, with TMA other keys."""
    if TMA:
        k = keys.load([first, 0])
    else:
        used = positions < end
        rows = positions
        if GATHER:
            rows = tl.load(key_order + positions, mask=used, other=0)
        k = load_rows(keys, rows, used, stride, D, BD)
    return k


@triton.jit
def negatives_kernel(
    queries,  # [A, D] in the product's type, class by class, empty slots last and 0; or a descriptor
    bound,  # [A] float32, |q| / temperature to base 2
    low,  # [A] int32, first position of the own class; -1: an empty slot
    high,  # [A] int32, one past its last
    keys,  # [K, D], or a descriptor of its blocks
    key_order,  # [K] int64, with GATHER
    spans,  # [n_spans, 2] int32, first position and length
    tiles,  # [n_spans + 1] int32, tiles of BN before each span
    bounds,  # [splits + 1] int32, first tile of each split
    first_span,  # [splits] int32, where that tile lies
    top,  # [splits, A] float32, out: what exponents are shifted by
    total,  # [splits, A] float32, out: sum of exp2(s - top)
    away,  # [splits, A] float32, out: sum of the inner products
    mean,  # [splits, A, D] float32, out: sum of exp2(s - top) k
    flag,  # [1] int32: with RUNNING_IF_FLAGGED nothing happens unless it is set
    n_anchors,
    key_stride,
    scale,  # log2(e) / temperature
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    TMA_QUERIES: tl.constexpr,
    RUNNING: tl.constexpr,
    RUNNING_IF_FLAGGED: tl.constexpr,
    WANT_MEAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if RUNNING_IF_FLAGGED:
        if tl.load(flag) == 0:
            return
    # anchors fastest: the blocks of one split are under way together and share its keys in the L2
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    mine = tl.load(low + rows, mask=rows < n_anchors, other=-1)
    behind = tl.load(high + rows, mask=rows < n_anchors, other=-1)
    used = mine >= 0
    own_end = tl.max(behind, 0)
    if own_end < 0:
        return  # nothing but empty slots: nobody reads what is not written
    own_first = tl.min(tl.where(used, mine, 2147483647), 0)
    q = load_block(queries, block * BM, BM, n_anchors, D, BD, TMA_QUERIES)
    if RUNNING:
        shift = tl.full([BM], float("-inf"), tl.float32)
    else:
        shift = tl.load(bound + rows, mask=used, other=0.0)
    sums = tl.zeros([BM], tl.float32)
    products = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)

    tile = tl.load(bounds + split)
    stop = tl.load(bounds + split + 1)
    span = tl.load(first_span + split)
    while tile < stop:
        begin = tl.load(tiles + span)
        last = tl.minimum(tl.load(tiles + span + 1), stop)
        start = tl.load(spans + 2 * span)
        end = start + tl.load(spans + 2 * span + 1)
        for j in tl.range(tile - begin, last - begin, num_stages=STAGES):
            first = start + j * BN
            at = first + tl.arange(0, BN)
            k = load_keys(keys, key_order, at, first, end, key_stride, D, BD, GATHER, TMA)
            k = k.to(PRODUCT)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            # only the few tiles that touch an own class or the end of a span pay for a mask
            touched = ((first < own_end) & (first + BN > own_first)) | (first + BN > end)
            if RUNNING:
                logits = s * scale
                if touched:
                    other = (at[None, :] < mine[:, None]) | (at[None, :] >= behind[:, None])
                    other = other & (at < end)[None, :]
                    logits = tl.where(other, logits, float("-inf"))
                    s = tl.where(other, s, 0.0)
                new = tl.maximum(shift, tl.max(logits, 1) - LIFT)
                # a row without a negative yet stays at -inf, and -inf - -inf would be nan
                safe = tl.where(new == float("-inf"), 0.0, new)
                fade = tl.exp2(shift - safe)
                p = tl.exp2(logits - safe[:, None])
                sums *= fade
                acc *= fade[:, None]
                shift = new
            else:
                p = tl.exp2(s * scale - shift[:, None])
                if touched:
                    other = (at[None, :] < mine[:, None]) | (at[None, :] >= behind[:, None])
                    other = other & (at < end)[None, :]
                    p = tl.where(other, p, 0.0)
                    s = tl.where(other, s, 0.0)
            sums += tl.sum(p, 1)
            products += tl.sum(s, 1)
            if WANT_MEAN:
                acc = tl.dot(p.to(PRODUCT), k, acc, input_precision=PRECISION)
        tile = tl.maximum(tile, last)
        span += 1

    out = split * n_anchors + rows
    inside = rows < n_anchors
    tl.store(top + out, shift, mask=inside)
    tl.store(total + out, sums, mask=inside)
    tl.store(away + out, products, mask=inside)
    if WANT_MEAN:
        store_block(mean, acc, split, block * BM, BM, n_anchors, D, BD)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), with full relative accuracy where it is small."""
    u = tl.exp(-tl.abs(x))
    small = u * (1.0 - u * (0.5 - u * 0.3333333333333333))
    return tl.maximum(x, 0.0) + tl.where(u < 0.01, small, tl.log(1.0 + u))


@triton.jit
def positives_kernel(
    queries,  # [A, D] in the product's type, class by class; or a descriptor
    low,  # [A] int32, -1: an empty slot
    high,  # [A] int32
    low_span,  # [A] int32, first span of the own class
    high_span,  # [A] int32, one past its last
    keys,  # [K, D], or a descriptor of its blocks
    key_order,  # [K] int64, with GATHER
    spans,  # [n_spans, 2] int32
    lse,  # [A] float32 in class order
    loss,  # [splits, A] float32, out: sum of softplus(Z - s)
    weight,  # [splits, A] float32, out: sum of w = sigmoid(Z - s)
    similar,  # [splits, A] float32, out: sum of the inner products
    pull,  # [splits, A, D] float32, out: sum of w k
    n_anchors,
    splits,
    key_stride,
    scale,  # 1 / temperature
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    TMA_QUERIES: tl.constexpr,
    IN_BATCH: tl.constexpr,
    WANT_PULL: tl.constexpr,
    PRODUCT: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    mine = tl.load(low + rows, mask=inside, other=-1)
    behind = tl.load(high + rows, mask=inside, other=-1)
    used = mine >= 0
    own_end = tl.max(behind, 0)
    if own_end < 0:
        return
    own_first = tl.min(tl.where(used, mine, 2147483647), 0)
    q = load_block(queries, block * BM, BM, n_anchors, D, BD, TMA_QUERIES)
    z = tl.load(lse + rows, mask=used, other=float("-inf"))
    losses = tl.zeros([BM], tl.float32)
    weights = tl.zeros([BM], tl.float32)
    products = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    # w is at most 1; float16 keeps more of a small one if it is lifted
    lift = tl.exp2(LIFT * 1.0)

    first_span = tl.min(tl.load(low_span + rows, mask=used, other=2147483647), 0)
    last_span = tl.max(tl.load(high_span + rows, mask=used, other=0), 0)
    for span in range(first_span, last_span):
        start = tl.load(spans + 2 * span)
        end = tl.minimum(start + tl.load(spans + 2 * span + 1), own_end)
        start = tl.maximum(start, own_first)
        tiles = tl.cdiv(tl.maximum(end - start, 0), BN)
        overlap = tl.where(used, tl.minimum(end, behind) - tl.maximum(start, mine), 0)
        if tl.max(overlap, 0) <= 0:
            tiles = 0  # between two classes of this block lie classes without an anchor in it
        for j in tl.range(split, tiles, splits, num_stages=STAGES):
            first = start + j * BN
            at = first + tl.arange(0, BN)
            k = load_keys(keys, key_order, at, first, end, key_stride, D, BD, GATHER, TMA)
            k = k.to(PRODUCT)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            own = (at[None, :] >= mine[:, None]) & (at[None, :] < behind[:, None])
            own = own & (at < end)[None, :]
            if IN_BATCH:  # position and place in class order are one: a row never with itself
                own = own & (at[None, :] != rows[:, None])
            above = tl.where(own, z[:, None] - s * scale, float("-inf"))
            losses += tl.sum(softplus(above), 1)
            products += tl.sum(tl.where(own, s, 0.0), 1)
            w = 1.0 / (1.0 + tl.exp(-above))
            weights += tl.sum(w, 1)
            if WANT_PULL:
                acc = tl.dot((w * lift).to(PRODUCT), k, acc, input_precision=PRECISION)
    out = split * n_anchors + rows
    tl.store(loss + out, losses, mask=inside)
    tl.store(weight + out, weights, mask=inside)
    tl.store(similar + out, products, mask=inside)
    if WANT_PULL:
        store_block(pull, acc / lift, split, block * BM, BM, n_anchors, D, BD)
