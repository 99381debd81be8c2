"""The contrast in Triton, with or without a cut: one pass over the negatives, one over each own class.

Anchors and positions of keys stand class by class (`pico_fast.selection.layout`), so "same class" is a
range of positions. A position is a row of `keys`, or with `key_order` its entry there holds the row.

    negatives_kernel   anchors x a split of the tiles: each tile of keys feeds both products, s = q kᵀ and
                       p k, so the sums of p and of p k come out of one reading of the keys
    positives_kernel   anchors x own class: loss, weights w and the sum of w k
    keys_grad_kernel   keys x anchors: one side of the gradient of the keys

Splits of the negatives are added up in `merge`.

Exponents are to base 2, shifted by `top`: the row's bound |q| / temperature, which makes sums of all
splits addable and needs no maximum; or, with RUNNING, the maximum so far. The bound holds for unit
keys. If sums leave the range that float32 is to be trusted in, merge_kernel raises a flag on the
device, and only then a second launch, with RUNNING, does any work.
"""

import triton
import triton.language as tl
from pico_fast.kernels.cut import counts, halves_of
from pico_fast.kernels.rows import (
    INT32_MAX,
    INTERPRETED,
    load_queries,
    load_rows,
    load_tile,
    own_range,
    store_block,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def negatives_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    bound,  # [A] float32, |q| / temperature to base 2
    anchor_class,  # [A] int64, empty slots last and -1
    ranges,  # [C, PARTS, 2] int64
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks, whose rows are all finite; or None
    firsts,  # [n] int64, first position of each tile of BN; None: all from 0 on
    ends,  # one past the last position in use, [n] int64 of each tile, or [1] of all; None: tiles are whole
    n_tiles,  # [1] int64, how many there are; None: as many as reach `ends`
    least,  # [A] float16, the cut: only keys at least as hard count; or None, every key
    last,  # [A] int32, of keys as hard as that the last place that counts; or None
    ceiling,  # [A] float32, only less similar keys count; or None
    flag,  # [1] int32: nothing happens unless it is set; or None
    top,  # [splits, A] float32, out: what exponents are shifted by
    total,  # [splits, A] float32, out: sum of exp2(s - top)
    away,  # [splits, A] float32, out: sum of the inner products
    mean,  # [splits, A, D] float32, out: sum of exp2(s - top) k; or None
    n_anchors,
    splits,
    key_stride,
    scale,  # log2(e) / temperature
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    RUNNING: tl.constexpr,
):
    if flag is not None:
        if tl.load(flag) == 0:
            return
    # anchors fastest: the blocks of one split are under way together and share its keys in the L2
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    block_end = tl.max(own_end, 0)
    if block_end < 0:
        return  # nothing but empty slots: nobody reads what is not written
    block_begin = tl.min(tl.where(own_begin >= 0, own_begin, INT32_MAX), 0)
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    if RUNNING:
        shift = tl.full([BM], float("-inf"), tl.float32)
    else:
        shift = tl.load(bound + rows, mask=rows < n_anchors, other=0.0)
    sums = tl.zeros([BM], tl.float32)
    products = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    # float16 has few exponents: its weights are lifted by 2^14, and their sums let down in the end
    lift: tl.constexpr = 14.0 if (RUNNING or least is not None) and q.dtype == tl.float16 else 0.0
    unlift: tl.constexpr = 0.00006103515625 if lift > 0.0 else 1.0

    if least is not None:
        hard = tl.load(least + rows, mask=rows < n_anchors, other=0.0)[:, None]
        until = tl.load(last + rows, mask=rows < n_anchors, other=0)[:, None]
        if ceiling is not None:
            under = tl.load(ceiling + rows, mask=rows < n_anchors, other=0.0)[:, None]
    if n_tiles is None:
        n = tl.cdiv(tl.load(ends).to(tl.int32), BN)
    else:
        n = tl.load(n_tiles).to(tl.int32)
    for j in tl.range(split * n // splits, (split + 1) * n // splits, num_stages=STAGES):
        first = j * BN
        if firsts is not None:
            first = tl.load(firsts + j).to(tl.int32)
        position = first + tl.arange(0, BN)
        there = None
        if ends is not None:
            end = tl.load(ends if firsts is None else ends + j).to(tl.int32)
            there = position < end
        k, _ = load_tile(keys, key_blocks, None, first, position, there, key_stride, D, BD)
        k = k.to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="tf32")
        logits = s * scale
        if least is not None:
            counted = counts(halves_of(s), position[None, :], hard, until)
            if ceiling is not None:
                counted = counted & ((s >= under) == 0)
            logits = tl.where(counted, logits, float("-inf"))
            s = tl.where(counted, s, 0.0)
        # only the few tiles that touch an own class or the end of a part pay for a mask
        touched = (first < block_end) & (first + BN > block_begin)
        if ends is not None:
            touched = touched | (first + BN > end)
        if touched:
            other = (position[None, :] < own_begin[:, None]) | (position[None, :] >= own_end[:, None])
            if ends is not None:
                other = other & there[None, :]
            logits = tl.where(other, logits, float("-inf"))
            s = tl.where(other, s, 0.0)
        products += tl.sum(s, 1)
        if RUNNING:
            new = tl.maximum(shift, tl.max(logits, 1))
            # a row without a negative yet stays at -inf, and -inf - -inf would be nan
            safe = tl.where(new == float("-inf"), 0.0, new)
            fade = tl.exp2(shift - safe)
            # lifted last: a large maximum rounds what is added to it
            p = tl.exp2(logits - safe[:, None] + lift)
            sums *= fade
            acc *= fade[:, None]
            shift = new
        else:
            p = tl.exp2(logits - shift[:, None] + lift)
        sums += tl.sum(p, 1)
        if mean is not None:
            acc = tl.dot(p.to(q.dtype), k, acc, input_precision="tf32")

    # rows again, which no register need hold through the loop; offsets from one address on are short
    row = tl.arange(0, BM)
    inside = block * BM + row < n_anchors
    out_block = split.to(tl.int64) * n_anchors + block * BM
    tl.store(top + out_block + row, shift, mask=inside)
    tl.store(total + out_block + row, sums * unlift, mask=inside)
    tl.store(away + out_block + row, products, mask=inside)
    if mean is not None:
        store_block(mean, acc * unlift, out_block, inside, D, BD)


@triton.jit
def fast_log(
    x,  # float32 from 1 to 2
    IS_INTERPRETED: tl.constexpr = INTERPRETED,
):
    """Natural logarithm, within 2^-22: on a GPU one instruction and a product."""
    if IS_INTERPRETED:
        return tl.log(x)
    else:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
        return log2 * 0.6931471805599453


@triton.jit
def softplus(
    x,  # float32
):
    """log(1 + exp(x)), with full relative accuracy where it is small, and its derivative."""
    u = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    small = u * (1.0 - u * (0.5 - u * (0.3333333333333333 - u * 0.25)))
    value = tl.maximum(x, 0.0) + tl.where(u < 0.03, small, fast_log(1.0 + u))
    return value, tl.where(x >= 0.0, 1.0, u) / (1.0 + u)


@triton.jit
def positives_kernel(
    queries,  # [A, D] in the product's type, class by class, 0 in empty slots
    query_blocks,  # a descriptor of its blocks, or None
    anchor_class,  # [A] int64, empty slots last and -1
    ranges,  # [C, PARTS, 2] int64
    keys,  # [K, D]
    key_order,  # [W] int64, or None
    own_key,  # [A] int64, the key that an anchor is itself; or None
    least,  # [A] float16, the cut: only keys at least as hard count; or None, every key
    last,  # [A] int32, of keys as hard as that the last place that counts; or None
    lse,  # [A] float32
    loss,  # [splits, A] float32, out: sum of softplus(Z - s)
    weight,  # [splits, A] float32, out: sum of w = sigmoid(Z - s)
    similar,  # [splits, A] float32, out: sum of the inner products
    pull,  # [splits, A, D] float32, out: sum of w k; or None
    n_anchors,
    splits,
    key_stride,
    scale,  # 1 / temperature
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    n_blocks = tl.cdiv(n_anchors, BM)
    block, split = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_anchors
    own = tl.load(anchor_class + rows, mask=inside, other=-1).to(tl.int32)
    used = own >= 0
    q = load_queries(queries, query_blocks, block * BM, BM, n_anchors, D, BD)
    z = tl.load(lse + rows, mask=used, other=float("-inf"))
    if own_key is not None:
        itself = tl.load(own_key + rows, mask=used, other=-1).to(tl.int32)
    if least is not None:
        hard = tl.load(least + rows, mask=used, other=0.0)[:, None]
        until = tl.load(last + rows, mask=used, other=0)[:, None]
    losses = tl.zeros([BM], tl.float32)
    weights = tl.zeros([BM], tl.float32)
    products = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    # w is at most 1; float16 keeps more of a small one if it is lifted
    lift: tl.constexpr = 16384.0 if q.dtype == tl.float16 else 1.0

    behind = tl.max(own, 0) + 1
    first_class = tl.min(tl.where(used, own, behind), 0)
    for part in range(first_class * PARTS, behind * PARTS):
        start = tl.load(ranges + 2 * part).to(tl.int32)
        length = tl.load(ranges + 2 * part + 1).to(tl.int32)
        end = start + length
        # between two classes of this block may lie classes without an anchor in it
        mine = own == part // PARTS
        tiles = tl.where(tl.max(mine.to(tl.int32), 0) > 0, tl.cdiv(length, BN), 0)
        for j in tl.range(split, tiles, splits, num_stages=STAGES):
            first = start + j * BN
            position = first + tl.arange(0, BN)
            there = position < end
            k, key_rows = load_tile(keys, None, key_order, first, position, there, key_stride, D, BD)
            k = k.to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision="tf32")
            pair = mine[:, None] & there[None, :]
            if own_key is not None:
                pair = pair & (key_rows.to(tl.int32)[None, :] != itself[:, None])
            if least is not None:
                place = (j * BN + tl.arange(0, BN))[None, :]
                pair = pair & counts(halves_of(-s), place, hard, until)
            above = tl.where(pair, z[:, None] - s * scale, float("-inf"))
            loss_of_pair, w = softplus(above)
            losses += tl.sum(loss_of_pair, 1)
            products += tl.sum(tl.where(pair, s, 0.0), 1)
            weights += tl.sum(w, 1)
            if pull is not None:
                acc = tl.dot((w * lift).to(q.dtype), k, acc, input_precision="tf32")
    row = tl.arange(0, BM)
    out_block = split.to(tl.int64) * n_anchors + block * BM
    tl.store(loss + out_block + row, losses, mask=inside)
    tl.store(weight + out_block + row, weights, mask=inside)
    tl.store(similar + out_block + row, products, mask=inside)
    if pull is not None:
        store_block(pull, acc / lift, out_block, inside, D, BD)


@triton.jit
def keys_grad_kernel(
    queries,  # [A, D] in the product's type, class by class
    anchor_class,  # [A] int64, -1: an empty slot
    keys,  # [K, D]
    key_order,  # [W] int64, or None
    key_class,  # [W] int64, class at each position; -1: in no range
    own_begin,  # [C] int64, first anchor of each class; None: with the anchors of all others
    own_end,  # [C] int64, one past its last; or None
    own_key,  # [A] int64, or None
    lse,  # [A] float32
    factor,  # [A] float32
    out,  # [K, D] float32, zeroed, out: the gradient of one side
    n_anchors,
    n_positions,
    key_stride,
    scale,  # 1 / temperature
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    first = tl.program_id(0) * BN
    position = first + tl.arange(0, BN)
    of = tl.load(key_class + position, mask=position < n_positions, other=-1).to(tl.int32)
    there = of >= 0
    k, key_rows = load_tile(keys, None, key_order, first, position, there, key_stride, D, BD)
    k = k.to(queries.dtype.element_ty)
    acc = tl.zeros([BN, BD], tl.float32)
    begin, end = 0, n_anchors
    if own_begin is not None:  # some neighbouring classes, whose anchors are neighbours
        begin = tl.min(tl.load(own_begin + of, mask=there, other=INT32_MAX), 0).to(tl.int32)
        end = tl.max(tl.load(own_end + of, mask=there, other=0), 0).to(tl.int32)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        own = tl.load(anchor_class + rows, mask=rows < n_anchors, other=-1).to(tl.int32)
        used = own >= 0
        q = load_rows(queries, rows, used, D, D, BD)
        z = tl.load(lse + rows, mask=used, other=float("-inf"))
        f = tl.load(factor + rows, mask=used, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="tf32")
        far = (z[None, :] - s * scale) * LOG2E
        pair = there[:, None] & (used & (z != float("-inf")))[None, :]
        same = of[:, None] == own[None, :]
        if own_begin is not None:
            pair = pair & same
            if own_key is not None:
                itself = tl.load(own_key + rows, mask=used, other=-1).to(tl.int32)
                pair = pair & (key_rows.to(tl.int32)[:, None] != itself[None, :])
            c = -f[None, :] / (1.0 + tl.exp2(-far))
        else:
            pair = pair & (same == 0)
            c = f[None, :] * tl.exp2(-far)
        c = tl.where(pair, c, 0.0)
        acc = tl.dot(c.to(WEIGHTS), q.to(WEIGHTS), acc, input_precision="tf32")
    columns = tl.arange(0, BD)
    offset = key_rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out + offset, acc, mask=there[:, None] & (columns < D)[None, :])
