"""Rows of anchors and keys in Triton: reading and writing them, and where an anchor's own class lies."""

import triton
import triton.language as tl

# kernels run as Python, on tensors of any device: TRITON_INTERPRET=1, for tests without a GPU
INTERPRETED = triton.knobs.runtime.interpret
INT32_MAX = tl.constexpr(2147483647)


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
    offset = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if BD == D:
        mask = used[:, None]
    else:
        mask = used[:, None] & (columns < D)[None, :]
    return tl.load(matrix + offset, mask=mask, other=0.0)


@triton.jit
def load_row(
    matrix,  # [n, D]
    row,
    stride,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """One row [BD] as float32, zero behind column D."""
    columns = tl.arange(0, BD)
    at = matrix + row.to(tl.int64) * stride + columns
    return tl.load(at, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_block(
    matrix,  # [n, D] without gaps
    block,  # [R, BD]
    first,  # its first row, int64
    used,  # [R] bool
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Write neighbouring rows."""
    columns = tl.arange(0, BD)
    # from one address on, so that offsets are short
    offset = tl.arange(0, used.shape[0])[:, None] * D + columns[None, :]
    if BD == D:
        mask = used[:, None]
    else:
        mask = used[:, None] & (columns < D)[None, :]
    tl.store(matrix + first * D + offset, block, mask=mask)


@triton.jit
def load_queries(
    queries,  # [A, D] without gaps
    query_blocks,  # a descriptor of its blocks [BM, BD]; or None
    first,  # of them
    BM: tl.constexpr,
    n_anchors,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """A block of queries [BM, BD], zero behind the last and behind column D."""
    if query_blocks is not None:
        q = query_blocks.load([first, 0])
    else:
        rows = first + tl.arange(0, BM)
        q = load_rows(queries, rows, rows < n_anchors, D, D, BD)
    return q


@triton.jit
def load_tile(
    keys,  # [K, D]
    key_blocks,  # a descriptor of its blocks [BN, BD]; or None
    key_order,  # [W] int64, or None
    first,
    position,  # [BN] int32, neighbours from `first` on
    used,  # [BN] bool
    stride,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Keys [BN, BD] of neighbouring positions and their rows [BN]; unused ones 0, by a descriptor any."""
    rows = position
    if key_order is not None:
        rows = tl.load(key_order + position, mask=used, other=0)
    if key_blocks is not None:
        k = key_blocks.load([first, 0])
    else:
        k = load_rows(keys, rows, used, stride, D, BD)
    return k, rows


@triton.jit
def own_range(
    anchor_class,  # [A] int64, -1: an empty slot
    ranges,  # [C, PARTS, 2] int64, first position and length
    rows,  # [BM]
    n_anchors,
    PARTS: tl.constexpr,
):
    """Where the own class of anchors begins and ends [BM] int32; -1 in empty slots."""
    of = tl.load(anchor_class + rows, mask=rows < n_anchors, other=-1)
    first = ranges + of * (2 * PARTS)
    last = first + 2 * PARTS - 2
    begin = tl.load(first, mask=of >= 0, other=-1)
    end = tl.load(last, mask=of >= 0, other=-1) + tl.load(last + 1, mask=of >= 0, other=0)
    return begin.to(tl.int32), end.to(tl.int32)
