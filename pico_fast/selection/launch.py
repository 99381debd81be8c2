"""What launches over a layout share on an NVIDIA GPU: queries, keys, their spans, and how to read them.

Nothing is read back to the host: sizes that depend on the data stay on the device, in `ranges` and in what
is made of them here.
"""

import functools
from typing import NamedTuple

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
def _device(index: int) -> tuple[int, int]:
    """Generation (major * 10 + minor) and number of multiprocessors of a GPU."""
    if rows.INTERPRETED:
        return 90, 4
    found = torch.cuda.get_device_properties(index)
    return found.major * 10 + found.minor, found.multi_processor_count


def device_of(x: Tensor) -> tuple[int, int]:
    """Generation and number of multiprocessors of the GPU that holds x."""
    return _device(x.device.index or 0)


def choose_splits(blocks: int, processors: int, most: int) -> int:
    """Into how many parts to cut the keys so that `blocks` of anchors fill whole waves of processors."""

    def idle(splits: int) -> float:
        programs = blocks * splits
        return 1 - programs / (-(-programs // processors) * processors)

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


def _blocks(x: Tensor, n: int, generation: int) -> TensorDescriptor | None:
    """Rows [*, D] for the copy engine, n at a time; None where there is none for them."""
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if generation < 90 or not aligned or x.stride(0) < x.shape[1]:
        return None
    return TensorDescriptor.from_tensor(x, [n, padded(x.shape[1])])


def spread(
    spans: Tensor,  # [n, 2] int64
    tile: int,
    splits: int,
) -> dict[str, Tensor]:
    """Spans, and of which tiles each split of them consists: arguments of the kernels."""
    tiles = ((spans[:, 1] + tile - 1) // tile).cumsum(0)
    part = torch.arange(splits + 1, device=spans.device)
    split_tiles = part * tiles[-1] // splits
    split_span = torch.searchsorted(tiles, split_tiles[:-1], right=True)
    return {"spans": spans, "tiles": tiles, "split_tiles": split_tiles, "split_span": split_span}


class Pass(NamedTuple):
    """A layout as the launches of one call take it; see `pico_fast.selection.layout`."""

    queries: Tensor  # [A, D] anchors in the dtype of products
    anchor_class: Tensor  # [A] int64
    keys: Tensor  # [K, D]
    key_order: Tensor | None  # [W] int64
    ranges: Tensor  # [C, G, 2] int64
    own_key: Tensor | None  # [A] int64
    generation: int
    processors: int

    @property
    def n_positions(self) -> int:
        """Positions there are, in use or not."""
        return (self.keys if self.key_order is None else self.key_order).shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """How wide rows are, as the kernels want to know it."""
        channels = self.queries.shape[1]
        return {"D": channels, "BD": padded(channels)}

    def splits(self, launch: configs.Launch, tiles: int) -> int:
        """How many parts to cut the keys into: full waves of blocks, and not too much memory."""
        n_anchors, channels = self.queries.shape
        most = max(1, min(tiles, _PARTIAL_BYTES // (4 * n_anchors * channels)))
        blocks = triton.cdiv(n_anchors, launch.BM)
        per_processor = 8 // launch.num_warps
        return choose_splits(blocks, self.processors * per_processor, most)

    def spans(self) -> Tensor:
        """First position and length of what is in use: [n, 2] int64, one after the other."""
        spans = self.ranges.flatten(0, 1)
        if self.key_order is None:
            return spans
        # mostly one stretch from 0 on, for which a tile need not end where a class does
        first, length = spans.unbind(1)
        behind = length.cumsum(0)
        stretch = torch.zeros_like(spans)
        stretch[0, 1] = behind[-1]
        return torch.where((behind - length == first).all(), stretch, spans)

    def key_blocks(self, launch: configs.Launch) -> TensorDescriptor | None:
        """The keys for the copy engine, where positions are rows."""
        if self.key_order is not None:
            return None
        return _blocks(self.keys, launch.BN, self.generation)

    def options(self, launch: configs.Launch) -> dict:
        """Keyword arguments that all kernels with anchors as rows take."""
        return {
            "queries": self.queries,
            "query_blocks": _blocks(self.queries, launch.BM, self.generation),
            "anchor_class": self.anchor_class,
            "ranges": self.ranges,
            "keys": self.keys,
            "key_order": self.key_order,
            "n_anchors": self.queries.shape[0],
            "key_stride": self.keys.stride(0),
            "PARTS": self.ranges.shape[1],
            "BM": launch.BM,
            "BN": launch.BN,
            "STAGES": launch.stages,
            "num_warps": launch.num_warps,
            **self.sizes,
        }


def make_pass(layout: Layout) -> Pass:
    """A layout as launches take it, from tensors with any strides."""
    anchors, anchor_class, keys, key_order, ranges, own_key = layout.tensors
    keys = with_rows(keys)
    queries = anchors.to(tile_dtype(keys.dtype)).contiguous()
    order, own = (x if x is None else x.contiguous() for x in (key_order, own_key))
    generation, processors = device_of(anchors)
    dense = (anchor_class.contiguous(), keys, order, ranges.contiguous(), own)
    return Pass(queries, *dense, generation, processors)
