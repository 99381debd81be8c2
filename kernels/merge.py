"""Adding up the splits of the negatives, in Triton."""

import triton
import triton.language as tl
from pico_fast.kernels.rows import store_block

LN2 = tl.constexpr(0.6931471805599453)
# sums of exp2(s - top) outside lost terms, or soon will: then the running maximum decides
TRUSTED_LOW = tl.constexpr(2.0**-90)
TRUSTED_HIGH = tl.constexpr(2.0**90)


@triton.jit
def merge_kernel(
    anchor_class,  # [A] int64, -1: an empty slot
    top_parts,  # [splits, A] float32, what exponents of a split are shifted by
    total_parts,  # [splits, A] float32
    away_parts,  # [splits, A] float32
    mean_parts,  # [splits, A, D] float32, or None
    lse,  # [A] float32, out: Z, -inf without a negative
    away,  # [A] float32, out: sum of the inner products with the negatives
    mean,  # [A, D] float32, out: their softmax mean; or None
    flag,  # [1] int32, set where sums are not to be trusted; RUNNING: nothing happens unless it is set
    n_anchors,
    splits,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    RUNNING: tl.constexpr,
):
    if RUNNING:
        if flag is not None:
            if tl.load(flag) == 0:
                return
    first = tl.program_id(0).to(tl.int64) * BR
    rows = first + tl.arange(0, BR)
    inside = rows < n_anchors
    # of empty slots no split has written anything
    used = tl.load(anchor_class + rows, mask=inside, other=-1) >= 0
    columns = tl.arange(0, BD)
    whole = used[:, None] & (columns < D)[None, :]
    shift = tl.full([BR], float("-inf"), tl.float32)
    part = rows
    for _ in range(splits):
        shift = tl.maximum(shift, tl.load(top_parts + part, mask=used, other=float("-inf")))
        part += n_anchors
    safe = tl.where(shift == float("-inf"), 0.0, shift)
    sums = tl.zeros([BR], tl.float32)
    products = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BD], tl.float32)
    part = rows
    for _ in range(splits):
        fade = tl.exp2(tl.load(top_parts + part, mask=used, other=float("-inf")) - safe)
        sums += tl.load(total_parts + part, mask=used, other=0.0) * fade
        products += tl.load(away_parts + part, mask=used, other=0.0)
        if mean_parts is not None:
            offset = part[:, None] * D + columns[None, :]
            acc += tl.load(mean_parts + offset, mask=whole, other=0.0) * fade[:, None]
        part += n_anchors
    if not RUNNING:
        # also where there is no negative at all, which the second launch finds again
        lost = used & (((sums > TRUSTED_LOW) & (sums < TRUSTED_HIGH)) == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            tl.store(flag, 1)
    # not "sums > 0": a key of nan must show
    z = tl.where(sums == 0, float("-inf"), (tl.log2(sums) + safe) * LN2)
    tl.store(lse + rows, z, mask=inside)
    tl.store(away + rows, products, mask=inside)
    if mean is not None:
        acc = acc / tl.where(sums == 0, 1.0, sums)[:, None]
        store_block(mean, acc, first, inside, D, BD)
