"""What launches over all keys share on an NVIDIA GPU: queries, keys, their order, and how to read them."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pico_fast.class_order import ClassOrder
from pico_fast.kernels import configs, contrast

# most channels that a kernel holds; wider embeddings run the PyTorch ops
MAX_CHANNELS = 512
# memory that partial sums of several splits of the keys may take
_PARTIAL_BYTES = 2**26
# log2 of what weights are multiplied by in float16, which has few exponents
_LIFT = 14.0


def takes(anchors: Tensor, keys: Tensor | None) -> bool:
    """Whether the kernels are for these.

    Keys of bfloat16 or float16, or of float32 where PyTorch may use TF32: exact float32 products are
    better left to the library that PyTorch calls. Not float64, and at most MAX_CHANNELS channels.
    """
    keys = anchors if keys is None else keys
    exact = keys.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    wide = torch.float64 in (anchors.dtype, keys.dtype)
    some = 0 not in anchors.shape and 0 not in keys.shape
    return some and not (exact or wide) and anchors.shape[1] <= MAX_CHANNELS


def device_of(x: Tensor) -> tuple[int, int]:
    """Generation and number of multiprocessors of the GPU that holds x."""
    return _device(x.device.index or 0)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Generation (major * 10 + minor) and number of multiprocessors of a GPU."""
    if contrast.INTERPRETED:
        return 90, 4
    found = torch.cuda.get_device_properties(index)
    return found.major * 10 + found.minor, found.multi_processor_count


def choose_splits(blocks: int, processors: int, most: int) -> int:
    """Into how many parts to cut the keys so that `blocks` of anchors fill whole waves of processors."""

    def idle(splits: int) -> float:
        programs = blocks * splits
        return 1 - programs / (-(-programs // processors) * processors)

    return min(range(1, max(most, 1) + 1), key=lambda splits: (round(idle(splits), 2), splits))


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tiles of such keys are multiplied: their own, but the interpreter has no bfloat16."""
    return torch.float32 if contrast.INTERPRETED and dtype == torch.bfloat16 else dtype


def products(dtype: torch.dtype) -> dict:
    """The arithmetic of tiles of such keys, as the kernels want to know it."""
    types = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    lift = _LIFT if dtype == torch.float16 else 0.0
    precision = "tf32" if dtype == torch.float32 else "ieee"
    return {"PRODUCT": types[tile_dtype(dtype)], "PRECISION": precision, "LIFT": lift}


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _source(rows: Tensor, n: int, generation: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """Rows [*, D] as a kernel takes them, n at a time: by the copy engine where there is one for it."""
    fits = rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    if generation < 90 or not fits:
        return rows, False
    return TensorDescriptor.from_tensor(rows, [n, _padded(rows.shape[1])]), True


class Pass(NamedTuple):
    """What all launches of one call share."""

    queries: Tensor  # [A, D] anchors in class order and in the keys' dtype, 0 in empty slots
    keys: Tensor  # [K, D]
    arranged: ClassOrder
    temperature: float
    generation: int
    processors: int

    @property
    def sizes(self) -> dict:
        channels = self.queries.shape[1]
        return {"D": channels, "BD": _padded(channels)}

    def splits(self, launch: configs.Launch, tiles: int) -> int:
        """How many parts to cut the keys into: full waves of blocks, and not too much memory."""
        n_anchors, channels = self.queries.shape
        most = max(1, min(tiles, _PARTIAL_BYTES // (4 * n_anchors * channels)))
        blocks = triton.cdiv(n_anchors, launch.BM)
        per_processor = 8 // launch.num_warps
        return choose_splits(blocks, self.processors * per_processor, most)

    def options(self, launch: configs.Launch) -> dict:
        """Keyword arguments that both passes over the keys take."""
        gather = self.arranged.key_order is not None
        queries, tma_queries = _source(self.queries, launch.BM, self.generation)
        keys, tma = self.keys, False
        if not gather:
            keys, tma = _source(self.keys, launch.BN, self.generation)
        return {
            "queries": queries,
            "low": self.arranged.low,
            "high": self.arranged.high,
            "keys": keys,
            # a pointer that nobody follows, where positions are rows
            "key_order": self.arranged.key_order if gather else self.arranged.order,
            "spans": self.arranged.spans,
            "n_anchors": self.queries.shape[0],
            "key_stride": self.keys.stride(0),
            "BM": launch.BM,
            "BN": launch.BN,
            "STAGES": launch.stages,
            "num_warps": launch.num_warps,
            "GATHER": gather,
            "TMA": tma,
            "TMA_QUERIES": tma_queries,
            **products(self.keys.dtype),
            **self.sizes,
        }


def _with_rows(x: Tensor) -> Tensor:
    """x [n, D] with neighbouring channels."""
    return x if x.stride(1) == 1 else x.contiguous()


def make_pass(
    anchors: Tensor,  # [A, D]
    keys: Tensor | None,  # [K, D]
    arranged: ClassOrder,
    temperature: float,
) -> Pass:
    """What all launches of one call share, from anchors and keys in any layout."""
    generation, processors = device_of(anchors)
    keys = _with_rows(anchors if keys is None else keys)
    empty = (arranged.low < 0).unsqueeze(1)
    dtype = tile_dtype(keys.dtype)
    queries = anchors.index_select(0, arranged.order).masked_fill_(empty, 0.0).to(dtype)
    return Pass(queries, keys, arranged, temperature, generation, processors)
