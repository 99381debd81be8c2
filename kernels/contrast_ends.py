"""After the passes over the keys: adding up splits, and the keys' side of the gradient, in Triton."""

import triton
import triton.language as tl
from pico_fast.kernels.contrast import load_rows

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# sums of exp2(s - top) outside lost terms, or soon will: then the running maximum decides
TRUSTED_LOW = tl.constexpr(2.0**-90)
TRUSTED_HIGH = tl.constexpr(2.0**90)


@triton.jit
def merge_kernel(
    order,  # [A] int64
    low,  # [A] int32, -1: an empty slot
    top,  # [splits, A] float32
    total,  # [splits, A] float32
    away,  # [splits, A] float32
    negatives,  # [A] int32
    mean,  # [splits, A, D] float32
    mix_lse,  # [A] float32 in the anchors' own order, with MIXED
    mix_mean,  # [A, D] float32, with MIXED
    lse,  # [A] float32 in class order, out: Z, -inf without a negative
    dissimilar,  # [A] float32, out: sum of the inner products with the negatives
    centre,  # [A, D] float32, out: their softmax mean
    flag,  # [1] int32, out: set where sums are not to be trusted
    n_anchors,
    splits,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    RUNNING: tl.constexpr,
    RUNNING_IF_FLAGGED: tl.constexpr,
    WANT_MEAN: tl.constexpr,
    MIXED: tl.constexpr,
):
    if RUNNING_IF_FLAGGED:
        if tl.load(flag) == 0:
            return
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < n_anchors
    used = inside & (tl.load(low + rows, mask=inside, other=-1) >= 0)
    columns = tl.arange(0, BD)
    block = rows[:, None] * D + columns[None, :]
    whole = used[:, None] & (columns < D)[None, :]
    shift = tl.full([BR], float("-inf"), tl.float32)
    for split in range(splits):
        at = split * n_anchors + rows
        shift = tl.maximum(shift, tl.load(top + at, mask=used, other=float("-inf")))
    safe = tl.where(shift == float("-inf"), 0.0, shift)
    sums = tl.zeros([BR], tl.float32)
    products = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BD], tl.float32)
    for split in range(splits):
        at = split * n_anchors + rows
        fade = tl.exp2(tl.load(top + at, mask=used, other=float("-inf")) - safe)
        sums += tl.load(total + at, mask=used, other=0.0) * fade
        products += tl.load(away + at, mask=used, other=0.0)
        if WANT_MEAN:
            part = mean + (split * n_anchors).to(tl.int64) * D
            acc += tl.load(part + block, mask=whole, other=0.0) * fade[:, None]
    if not RUNNING:
        trusted = (sums > TRUSTED_LOW) & (sums < TRUSTED_HIGH)
        n = tl.load(negatives + rows, mask=used, other=0)
        lost = used & (n > 0) & (trusted == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            tl.store(flag, 1)
    # not "sums > 0": a key of nan must show
    z = tl.where(sums == 0, float("-inf"), (tl.log2(sums) + safe) * LN2)
    acc = acc / tl.where(sums > 0, sums, 1.0)[:, None]
    if MIXED:
        row = tl.load(order + rows, mask=used, other=0)
        more = tl.load(mix_lse + row, mask=used, other=float("-inf"))
        highest = tl.maximum(z, more)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        left, right = tl.exp(z - base), tl.exp(more - base)
        both = tl.where(highest == float("-inf"), float("-inf"), base + tl.log(left + right))
        if WANT_MEAN:
            at = mix_mean + row[:, None] * D + columns[None, :]
            extra = tl.load(at, mask=whole, other=0.0)
            share = 1.0 / tl.where(highest == float("-inf"), 1.0, left + right)
            acc = (acc * left[:, None] + extra * right[:, None]) * share[:, None]
        z = both
    tl.store(lse + rows, z, mask=inside)
    tl.store(dissimilar + rows, products, mask=inside)
    if WANT_MEAN:
        tl.store(centre + block, acc, mask=whole)


@triton.jit
def finish_kernel(
    order,  # [A] int64
    low,  # [A] int32 in class order, -1: an empty slot
    lse,  # [A] float32 in class order, and so are the next four
    positives,  # [A] int32
    negatives,  # [A] int32
    dissimilar,  # [A] float32
    centre,  # [A, D] float32
    loss_parts,  # [splits, A] float32
    weight_parts,  # [splits, A] float32
    similar_parts,  # [splits, A] float32
    pull_parts,  # [splits, A, D] float32
    loss,  # [A] float32 in the anchors' own order, out, and so are the rest
    out_lse,  # [A] float32
    positive_count,  # [A] int64
    similar,  # [A] float32, mean inner product with the positives
    away,  # [A] float32, mean inner product with the negatives
    weight,  # [A] float32, sum of w
    gradient,  # [A, D] float32
    n_anchors,
    splits,
    scale,  # 1 / temperature
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < n_anchors
    used = inside & (tl.load(low + rows, mask=inside, other=-1) >= 0)
    row = tl.load(order + rows, mask=inside, other=0)
    columns = tl.arange(0, BD)
    block = rows[:, None] * D + columns[None, :]
    whole = used[:, None] & (columns < D)[None, :]
    losses = tl.zeros([BR], tl.float32)
    weights = tl.zeros([BR], tl.float32)
    products = tl.zeros([BR], tl.float32)
    n = tl.load(positives + rows, mask=used, other=0)
    acc = tl.zeros([BR, BD], tl.float32)
    for split in range(splits):
        at = split * n_anchors + rows
        losses += tl.load(loss_parts + at, mask=used, other=0.0)
        weights += tl.load(weight_parts + at, mask=used, other=0.0)
        products += tl.load(similar_parts + at, mask=used, other=0.0)
        if WANT_GRADIENT:
            part = pull_parts + (split * n_anchors).to(tl.int64) * D
            acc += tl.load(part + block, mask=whole, other=0.0)
    n_away = tl.load(negatives + rows, mask=used, other=0)
    counted = used & (n > 0) & (n_away > 0)
    share = tl.where(counted, 1.0 / tl.maximum(n, 1), 0.0)
    z = tl.load(lse + rows, mask=used, other=float("-inf"))
    dissimilarity = tl.load(dissimilar + rows, mask=used, other=0.0)
    tl.store(loss + row, losses * share, mask=inside)
    tl.store(out_lse + row, z, mask=inside)
    tl.store(positive_count + row, n.to(tl.int64), mask=inside)
    tl.store(similar + row, products / tl.maximum(n, 1), mask=inside)
    tl.store(away + row, dissimilarity / tl.maximum(n_away, 1), mask=inside)
    tl.store(weight + row, weights, mask=inside)
    if WANT_GRADIENT:
        mean = tl.load(centre + block, mask=whole, other=0.0)
        out = (weights[:, None] * mean - acc) * (share * scale)[:, None]
        at = gradient + row[:, None] * D + columns[None, :]
        tl.store(at, out, mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def keys_grad_kernel(
    queries,  # [A, D] in the product's type, class by class, and so are the next five
    low,  # [A] int32, -1: an empty slot
    high,  # [A] int32
    lse,  # [A] float32
    factor,  # [A] float32, gradient of the loss times 1 / positives; 0 where an anchor takes no part
    weight,  # [A] float32, sum of w
    keys,  # [K, D]
    key_order,  # [K] int64, row of each position
    used_keys,  # [1] int32, positions in use
    out,  # [K, D] float32, zeroed, out: gradient of the keys
    n_anchors,
    key_stride,
    scale,  # 1 / temperature
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IN_BATCH: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    there = at < tl.load(used_keys)
    key = tl.load(key_order + at, mask=there, other=0)
    k = load_rows(keys, key, there, key_stride, D, BD).to(PRODUCT)
    acc = tl.zeros([BN, BD], tl.float32)
    for start in range(0, n_anchors, BM):
        rows = start + tl.arange(0, BM)
        inside = rows < n_anchors
        mine = tl.load(low + rows, mask=inside, other=-1)
        behind = tl.load(high + rows, mask=inside, other=-1)
        used = mine >= 0
        q = load_rows(queries, rows, inside, D, D, BD)
        part = tl.load(factor + rows, mask=used, other=0.0)
        used = used & (part != 0.0)
        z = tl.load(lse + rows, mask=used, other=0.0)
        push = part * tl.load(weight + rows, mask=used, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="tf32") * scale
        own = (at[:, None] >= mine[None, :]) & (at[:, None] < behind[None, :])
        far = z[None, :] - s
        pair = there[:, None] & used[None, :]
        if IN_BATCH:
            pair = pair & (at[:, None] != rows[None, :])
        p = tl.exp2(tl.where(own, 0.0, -far) * LOG2E) * push[None, :]
        w = part[None, :] / (1.0 + tl.exp2(-far * LOG2E))
        c = tl.where(pair, tl.where(own, -w, p), 0.0)
        acc = tl.dot(c.to(WEIGHTS), q.to(WEIGHTS), acc, input_precision="tf32")
    columns = tl.arange(0, BD)
    place = out + key.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(place, acc * scale, mask=there[:, None] & (columns < D)[None, :])
