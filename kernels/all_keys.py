"""All negatives on Hopper in Gluon: while a tile's weights are made, the next product is under way.

The same sums as `contrast.negatives_kernel` with a fixed shift, over whole tiles of a bank of bfloat16. A
program has 128 anchors: two groups of four warps with 64 each, and one group that keeps the copy engine
busy. A group's registers hold its similarities twice, this tile's and the next one's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def load_tiles(q_blocks, k_blocks, firsts, q_s, k_s, q_ready, ready, free, row, begin, end):
    """Bring the anchors, then tile after tile, each as soon as its place is free."""
    BM: gl.constexpr = q_s.shape[1]
    STAGES: gl.constexpr = k_s.shape[0]
    mbarrier.expect(q_ready, 2 * BM * q_s.shape[2] * 2)
    for group in gl.static_range(2):
        tma.async_copy_global_to_shared(q_blocks, [row + group * BM, 0], q_ready, q_s.index(group))
    for j in range(begin, end):
        place, turn = (j - begin) % STAGES, (j - begin) // STAGES
        mbarrier.wait(free.index(place), (turn & 1) ^ 1)
        mbarrier.expect(ready.index(place), k_s.shape[1] * k_s.shape[2] * 2)
        first = gl.load(firsts + j).to(gl.int32)
        tma.async_copy_global_to_shared(k_blocks, [first, 0], ready.index(place), k_s.index(place))


@gluon.jit
def own_range(anchor_class, ranges, rows, n_anchors, PARTS: gl.constexpr):
    """Where the own class of anchors begins and ends [BM] int32; both 0 in empty slots."""
    of = gl.load(anchor_class + rows, mask=rows < n_anchors, other=-1)
    at = ranges + of * (2 * PARTS)
    begin = gl.load(at, mask=of >= 0, other=0)
    end = gl.load(at + 2 * PARTS - 2, mask=of >= 0, other=0)
    end += gl.load(at + 2 * PARTS - 1, mask=of >= 0, other=0)
    return begin.to(gl.int32), end.to(gl.int32)


@gluon.jit
def without_own(s, first, anchor_class, ranges, rows, n_anchors, PARTS: gl.constexpr, S: gl.constexpr):
    """Similarities [BM, BN], -inf in the own class, whose range is read again: it holds no register."""
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    position = first + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S))
    other = (position[None, :] < own_begin[:, None]) | (position[None, :] >= own_end[:, None])
    return gl.where(other, s, float("-inf"))


@gluon.jit
def sum_tiles(
    group: gl.constexpr,
    bound,
    anchor_class,
    ranges,
    firsts,
    top,
    total,
    away,
    mean,
    q_s,
    k_s,
    q_ready,
    ready,
    free,
    row,
    begin,
    end,
    split,
    n_anchors,
    scale,
    PARTS: gl.constexpr,
):
    """The sums of one group's anchors over the tiles of a split."""
    BM: gl.constexpr = q_s.shape[1]
    D: gl.constexpr = q_s.shape[2]
    STAGES: gl.constexpr = k_s.shape[0]
    BN: gl.constexpr = k_s.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    rows = row + group * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, S))
    inside = rows < n_anchors
    shift = gl.load(bound + rows, mask=inside, other=0.0)
    own_begin, own_end = own_range(anchor_class, ranges, rows, n_anchors, PARTS)
    # where no anchor is, no tile touches
    block_begin = gl.min(gl.where(own_end > 0, own_begin, 2147483647), 0)
    block_end = gl.max(own_end, 0)
    sums = gl.full([BM], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    products = gl.full([BM], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    acc = gl.full([BM, D], 0.0, gl.float32, layout=OUT)
    zero = gl.full([BM, BN], 0.0, gl.float32, layout=S)
    if end > begin:
        mbarrier.wait(q_ready, 0)
        q = q_s.index(group)
        mbarrier.wait(ready.index(0), 0)
        s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        for j in range(begin, end - 1):
            place, next_place = (j - begin) % STAGES, (j + 1 - begin) % STAGES
            mbarrier.wait(ready.index(next_place), ((j + 1 - begin) // STAGES) & 1)
            following = k_s.index(next_place).permute((1, 0))
            ahead = warpgroup_mma(q, following, zero, use_acc=False, is_async=True)
            first = gl.load(firsts + j).to(gl.int32)
            if (first < block_end) & (first + BN > block_begin):
                s = without_own(s, first, anchor_class, ranges, rows, n_anchors, PARTS, S)
                products += gl.sum(gl.where(s == float("-inf"), 0.0, s), 1)
            else:
                products += gl.sum(s, 1)
            p = gl.exp2(s * scale - shift[:, None])
            sums += gl.sum(p, 1)
            weight = gl.convert_layout(p.to(gl.bfloat16), P)
            acc = warpgroup_mma(weight, k_s.index(place), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[ahead])
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(place), count=1)
        first = gl.load(firsts + end - 1).to(gl.int32)
        if (first < block_end) & (first + BN > block_begin):
            s = without_own(s, first, anchor_class, ranges, rows, n_anchors, PARTS, S)
        products += gl.sum(gl.where(s == float("-inf"), 0.0, s), 1)
        p = gl.exp2(s * scale - shift[:, None])
        sums += gl.sum(p, 1)
        weight = gl.convert_layout(p.to(gl.bfloat16), P)
        acc = warpgroup_mma(weight, k_s.index((end - 1 - begin) % STAGES), acc)
    out = split.to(gl.int64) * n_anchors + rows
    gl.store(top + out, shift, mask=inside)
    gl.store(total + out, sums, mask=inside)
    gl.store(away + out, products, mask=inside)
    rows = row + group * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    out = (split.to(gl.int64) * n_anchors + rows)[:, None] * D + columns[None, :]
    gl.store(mean + out, acc, mask=(rows < n_anchors)[:, None])


@gluon.jit
def all_keys_kernel(
    query_blocks,  # a descriptor of blocks [BM, D] of the anchors, bfloat16
    key_blocks,  # a descriptor of blocks [BN, D] of the keys, bfloat16
    bound,  # [A] float32, |q| / temperature to base 2
    anchor_class,  # [A] int64, empty slots last and -1
    ranges,  # [C, PARTS, 2] int64
    firsts,  # [n] int64, first position of each tile of BN
    n_tiles,  # [1] int64, how many there are
    top,  # [splits, A] float32, out: what exponents are shifted by
    total,  # [splits, A] float32, out: sum of exp2(s - top)
    away,  # [splits, A] float32, out: sum of the inner products
    mean,  # [splits, A, D] float32, out: sum of exp2(s - top) k
    n_anchors,
    splits,
    scale,  # log2(e) / temperature
    PARTS: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], query_blocks.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], key_blocks.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    n_blocks = gl.cdiv(n_anchors, 2 * BM)
    block, split = gl.program_id(0) % n_blocks, gl.program_id(0) // n_blocks
    row, n = block * 2 * BM, gl.load(n_tiles).to(gl.int32)
    begin, end = split * n // splits, (split + 1) * n // splits
    found = (bound, anchor_class, ranges, firsts, top, total, away, mean)
    held = (q_s, k_s, q_ready, ready, free, row, begin, end)
    rest = found + held + (split, n_anchors, scale, PARTS)
    gl.warp_specialize(
        [
            (sum_tiles, (0,) + rest),  # noqa: RUF005 (Triton knows no star)
            (sum_tiles, (1,) + rest),  # noqa: RUF005
            (load_tiles, (query_blocks, key_blocks, firsts) + held),  # noqa: RUF005
        ],
        [4, 4],
        [240, 24],
    )
