"""What launches over a layout share on an NVIDIA GPU: queries, keys, their tiles, and how to read them.

Nothing is read back to the host: sizes that depend on the data stay on the device, in `ranges` and in what
is made of them here.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pico_fast.kernels import configs, rows
from pico_fast.selection.layout import Layout

# most channels that a kernel holds; wider embeddings run the PyTorch ops
MAX_CHANNELS = 512
# memory that partial sums of several splits of the keys may take
_PARTIAL_BYTES = 2**26


def takes(layout: Layout) -> bool:
    """Whether the kernels are for these.

    Keys of bfloat16 or float16, or of float32 where PyTorch may use TF32: exact float32 products are
    better left to the library that PyTorch calls. Not float64, and at most MAX_CHANNELS channels.
    """
    anchors, _, keys, key_order, ranges, _ = layout.tensors
    exact = keys.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    wide = torch.float64 in (anchors.dtype, keys.dtype)
    some = all(0 not in t.shape for t in (anchors, keys, ranges, key_order) if t is not None)
    return some and not (exact or wide) and anchors.shape[1] <= MAX_CHANNELS


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """Generation (major * 10 + minor) and number of multiprocessors of a GPU."""
    if rows.INTERPRETED:
        return 90, 4
    found = torch.cuda.get_device_properties(device)
    return found.major * 10 + found.minor, found.multi_processor_count


def choose_splits(blocks: int, processors: int, most: int) -> int:
    """Into how many parts to cut the keys so that `blocks` of anchors fill whole waves of processors."""

    def idle(splits: int) -> float:
        return 1 - blocks * splits / (triton.cdiv(blocks * splits, processors) * processors)

    return min(range(1, max(most, 1) + 1), key=lambda splits: (round(idle(splits), 2), splits))


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tiles of such keys are multiplied: their own, but the interpreter has no bfloat16."""
    return torch.float32 if rows.INTERPRETED and dtype == torch.bfloat16 else dtype


def padded(channels: int) -> int:
    """Columns of a tile that holds so many channels."""
    return max(16, triton.next_power_of_2(channels))


def with_rows(x: Tensor) -> Tensor:
    """x [n, D] with neighbouring channels."""
    return x if x.stride(1) == 1 else x.contiguous()


def dense(layout: Layout) -> Layout:
    """A layout, with any strides, as launches take it: its anchors in the dtype of products."""
    anchors, anchor_class, keys, key_order, ranges, own_key = layout.tensors
    keys = with_rows(keys)
    queries = anchors.to(tile_dtype(keys.dtype)).contiguous()
    order, own = (x if x is None else x.contiguous() for x in (key_order, own_key))
    return Layout(queries, anchor_class.contiguous(), keys, order, ranges.contiguous(), own)


def n_positions(layout: Layout) -> int:
    """Positions there are, in use or not."""
    return (layout.keys if layout.key_order is None else layout.key_order).shape[0]


def sizes(x: Tensor) -> dict[str, int]:
    """How wide rows x [n, D] are, as the kernels want to know it."""
    return {"D": x.shape[1], "BD": padded(x.shape[1])}


def splits(layout: Layout, launch: configs.Launch, tiles: int) -> int:
    """How many parts to cut the keys into: full waves of blocks, and not too much memory."""
    n_anchors, channels = layout.anchors.shape
    most = max(1, min(tiles, _PARTIAL_BYTES // (4 * n_anchors * channels)))
    blocks = triton.cdiv(n_anchors, launch.BM)
    processors = gpu(layout.keys.device)[1] * 8 // launch.num_warps
    return choose_splits(blocks, processors, most)


def parts(layout: Layout) -> tuple[Tensor, Tensor]:
    """First position and length of what is in use: [n] int64 each, one after the other."""
    first, length = layout.ranges.flatten(0, 1).unbind(1)
    if layout.key_order is None:
        return first, length
    # one stretch from 0 on, in which a tile need not end where a class does
    return torch.zeros_like(first[:1]), length.sum(0, keepdim=True)


def tile_list(
    first: Tensor,  # [n] int64, first position of each part in use
    length: Tensor,  # [n] int64
    n_positions: int,
    tile: int,
) -> dict[str, Tensor]:
    """The tiles of all parts, and how many these are: arguments of the kernels."""
    tiles = (length + tile - 1) // tile
    behind = tiles.cumsum(0)
    number = torch.arange(n_positions // tile + len(first), device=first.device)
    part = torch.searchsorted(behind, number, right=True).clamp_(max=len(first) - 1)
    firsts = first.take(part) + (number - (behind - tiles).take(part)) * tile
    ends = torch.minimum(firsts + tile, (first + length).take(part))
    return {"firsts": firsts, "ends": ends, "n_tiles": behind[-1:]}


def _blocks(x: Tensor, n: int) -> TensorDescriptor | None:
    """Rows [*, D] for the copy engine, n at a time; None where there is none for them."""
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if gpu(x.device)[0] < 90 or not aligned or x.stride(0) < x.shape[1]:
        return None
    return TensorDescriptor.from_tensor(x, [n, padded(x.shape[1])])


def key_blocks(layout: Layout, launch: configs.Launch) -> TensorDescriptor | None:
    """The keys for the copy engine, where positions are rows."""
    return None if layout.key_order is not None else _blocks(layout.keys, launch.BN)


def options(layout: Layout, launch: configs.Launch) -> dict:
    """Keyword arguments that all kernels with anchors as rows take."""
    return {
        "queries": layout.anchors,
        "query_blocks": _blocks(layout.anchors, launch.BM),
        "anchor_class": layout.anchor_class,
        "ranges": layout.ranges,
        "keys": layout.keys,
        "key_order": layout.key_order,
        "n_anchors": layout.anchors.shape[0],
        "key_stride": layout.keys.stride(0),
        "PARTS": layout.ranges.shape[1],
        "BM": launch.BM,
        "BN": launch.BN,
        "STAGES": launch.stages,
        "num_warps": launch.num_warps,
        **sizes(layout.anchors),
    }
