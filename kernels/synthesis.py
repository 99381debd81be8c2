"""What is made of keys that each anchor has listed, in Triton: sums by weight, and mixes.

A program owns an anchor and reads the rows of its keys, some at a time: nothing of size keys x channels
is written.
"""

import triton
import triton.language as tl
from pico_fast.kernels.rows import load_row, load_rows


@triton.jit
def weighted_kernel(
    keys,  # [K, D]
    index,  # [A, n] int64, -1 where there is none
    weight,  # [A, n] float32
    out,  # [A, D] float32, out: sum of the indexed keys by weight
    n,
    key_stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    anchor = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BD], tl.float32)
    for start in range(0, n, ROWS):
        at = start + tl.arange(0, ROWS)
        key = tl.load(index + anchor * n + at, mask=at < n, other=-1)
        used = key >= 0
        w = tl.load(weight + anchor * n + at, mask=used, other=0.0)
        k = load_rows(keys, tl.where(used, key, 0), used, key_stride, D, BD).to(tl.float32)
        acc += tl.sum(k * w[:, None], 0)
    columns = tl.arange(0, BD)
    tl.store(out + anchor * D + columns, acc, mask=columns < D)


@triton.jit
def mix_kernel(
    anchors,  # [A, D]
    keys,  # [K, D]
    first,  # [A, n] int64 into keys; -1: the anchor itself
    second,  # [A, n] int64 into keys; -1: no such mix
    share,  # [A, n] float32, of the first
    lse,  # [A] float32, out: log-sum of exp(<a, h> / temperature) over the mixes h
    mean,  # [A, D] float32, out: their softmax mean
    n,
    anchor_stride,
    key_stride,
    scale,  # 1 / temperature
    shortest,  # mixes shorter than this share of the longer part are left out
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    anchor = tl.program_id(0).to(tl.int64)
    a = load_row(anchors, anchor, anchor_stride, D, BD)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BD], tl.float32)
    for start in range(0, n, ROWS):
        at = start + tl.arange(0, ROWS)
        inside = at < n
        one = tl.load(first + anchor * n + at, mask=inside, other=0)
        other = tl.load(second + anchor * n + at, mask=inside, other=-1)
        g = tl.load(share + anchor * n + at, mask=inside, other=0.0)
        there = other >= 0
        of_key = there & (one >= 0)
        x = load_rows(keys, tl.where(of_key, one, 0), of_key, key_stride, D, BD).to(tl.float32)
        x = tl.where((there & (one < 0))[:, None], a[None, :], x)
        y = load_rows(keys, tl.where(there, other, 0), there, key_stride, D, BD).to(tl.float32)
        mixed = g[:, None] * x + (1.0 - g)[:, None] * y
        norm = tl.sqrt(tl.sum(mixed * mixed, 1))
        longer = tl.sqrt(tl.maximum(tl.sum(x * x, 1), tl.sum(y * y, 1)))
        # 1e-12: what torch.nn.functional.normalize divides by at least
        there = there & (norm > tl.maximum(shortest * longer, 1e-12))
        norm = tl.where(there, norm, 1.0)
        s = tl.where(there, tl.sum(mixed * a[None, :], 1) / norm * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe)
        fade = tl.exp(top - safe)
        total = total * fade + tl.sum(p, 0)
        part = tl.where(there[:, None], mixed * (p / norm)[:, None], 0.0)
        acc = acc * fade + tl.sum(part, 0)
        top = new
    some = total > 0
    tl.store(lse + anchor, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), top))
    columns = tl.arange(0, BD)
    tl.store(mean + anchor * D + columns, acc / tl.where(some, total, 1.0), mask=columns < D)
