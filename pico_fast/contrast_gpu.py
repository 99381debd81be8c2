"""Contrast with all keys on an NVIDIA GPU: launching `pico_fast.kernels.contrast`.

Nothing is read back to the host: sizes that depend on the data (how many keys of a class, which classes
have anchors) stay on the device, in the order and the ranges that `class_order` makes.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pico_fast.class_order import ClassOrder, class_order, spread_tiles
from pico_fast.kernels import configs, contrast, contrast_ends

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


def _dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tiles of such keys are multiplied: their own, but the interpreter has no bfloat16."""
    return torch.float32 if contrast.INTERPRETED and dtype == torch.bfloat16 else dtype


def _products(dtype: torch.dtype) -> dict:
    """The arithmetic of tiles of such keys, as the kernels want to know it."""
    types = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    lift = _LIFT if dtype == torch.float16 else 0.0
    precision = "tf32" if dtype == torch.float32 else "ieee"
    return {"PRODUCT": types[_dtype(dtype)], "PRECISION": precision, "LIFT": lift}


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
            **_products(self.keys.dtype),
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
    dtype = _dtype(keys.dtype)
    queries = anchors.index_select(0, arranged.order).masked_fill_(empty, 0.0).to(dtype)
    return Pass(queries, keys, arranged, temperature, generation, processors)


class _Negatives(NamedTuple):
    """What the negatives add up to, anchors in class order."""

    lse: Tensor  # [A] float32
    dissimilar: Tensor  # [A] float32, sum of the inner products
    centre: Tensor  # [A, D] float32, softmax mean; [0] where none is wanted


def _negatives(
    work: Pass,
    mix_lse: Tensor | None,  # [A]
    mix_mean: Tensor | None,  # [A, D]
    want_mean: bool,
) -> _Negatives:
    n_anchors, channels = work.queries.shape
    arranged = work.arranged
    fixed = work.keys.dtype != torch.float16  # which has too few exponents for a fixed shift
    new = functools.partial(torch.empty, device=work.queries.device)
    scale = math.log2(math.e) / work.temperature
    # inner products with unit keys are at most this; longer ones raise the flag
    bound = torch.linalg.vector_norm(work.queries, dim=1, dtype=torch.float32) * scale
    flag = torch.zeros(1, dtype=torch.int32, device=work.queries.device)
    found = _Negatives(
        new(n_anchors),
        new(n_anchors),
        new((n_anchors, channels) if want_mean else 0),
    )
    gather = arranged.key_order is not None
    # at first with a fixed shift; again with the running maximum, which does nothing unless flagged
    for running in (False, True) if fixed else (True,):
        launch = configs.negatives(work.generation, work.keys.dtype, channels, running, gather)
        splits = work.splits(launch, triton.cdiv(work.keys.shape[0], launch.BN))
        top, total, away = (new(splits, n_anchors) for _ in range(3))
        mean = new((splits, n_anchors, channels) if want_mean else 0)
        tiles, bounds, first_span = spread_tiles(arranged.spans, launch.BN, splits)
        modes = {
            "RUNNING": running,
            "RUNNING_IF_FLAGGED": running and fixed,
            "WANT_MEAN": want_mean,
        }
        contrast.negatives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
            bound=bound,
            tiles=tiles,
            bounds=bounds,
            first_span=first_span,
            top=top,
            total=total,
            away=away,
            mean=mean,
            flag=flag,
            scale=scale,
            **modes,
            **work.options(launch),
        )
        contrast_ends.merge_kernel[(triton.cdiv(n_anchors, configs.ENDS.BM),)](
            order=arranged.order,
            low=arranged.low,
            top=top,
            total=total,
            away=away,
            negatives=arranged.negatives,
            mean=mean,
            mix_lse=top if mix_lse is None else mix_lse,
            mix_mean=mean if mix_mean is None else mix_mean,
            lse=found.lse,
            dissimilar=found.dissimilar,
            centre=found.centre,
            flag=flag,
            n_anchors=n_anchors,
            splits=splits,
            BR=configs.ENDS.BM,
            MIXED=mix_lse is not None,
            num_warps=configs.ENDS.num_warps,
            **modes,
            **work.sizes,
        )
    return found


class _Rows(NamedTuple):
    """The op's outputs and the weight that the keys' gradient needs, anchors in their own order."""

    loss: Tensor  # [A] float32
    lse: Tensor  # [A] float32
    positive_count: Tensor  # [A] int64
    positive_similarity: Tensor  # [A] float32
    negative_similarity: Tensor  # [A] float32
    gradient: Tensor  # [A, D] float32, or [0]
    weight: Tensor  # [A] float32


def _positives(
    work: Pass,
    negatives: _Negatives,
    in_batch: bool,
    want_gradient: bool,
) -> _Rows:
    n_anchors, channels = work.queries.shape
    arranged = work.arranged
    launch = configs.positives(work.keys.dtype, channels)
    # a class is a small part of the keys: no more parts than can be busy
    splits = work.splits(launch, min(8, triton.cdiv(work.keys.shape[0], launch.BN)))
    new = functools.partial(torch.empty, device=work.queries.device)
    loss, weight, similar = (new(splits, n_anchors) for _ in range(3))
    pull = new((splits, n_anchors, channels) if want_gradient else 0)
    contrast.positives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
        low_span=arranged.low_span,
        high_span=arranged.high_span,
        lse=negatives.lse,
        loss=loss,
        weight=weight,
        similar=similar,
        pull=pull,
        splits=splits,
        scale=1 / work.temperature,
        IN_BATCH=in_batch,
        WANT_PULL=want_gradient,
        **work.options(launch),
    )
    out = _Rows(
        new(n_anchors),
        new(n_anchors),
        new(n_anchors, dtype=torch.int64),
        new(n_anchors),
        new(n_anchors),
        new((n_anchors, channels) if want_gradient else 0),
        new(n_anchors),
    )
    contrast_ends.finish_kernel[(triton.cdiv(n_anchors, configs.ENDS.BM),)](
        order=arranged.order,
        low=arranged.low,
        lse=negatives.lse,
        positives=arranged.positives,
        negatives=arranged.negatives,
        dissimilar=negatives.dissimilar,
        centre=negatives.centre,
        loss_parts=loss,
        weight_parts=weight,
        similar_parts=similar,
        pull_parts=pull,
        loss=out.loss,
        out_lse=out.lse,
        positive_count=out.positive_count,
        similar=out.positive_similarity,
        away=out.negative_similarity,
        weight=out.weight,
        gradient=out.gradient,
        n_anchors=n_anchors,
        splits=splits,
        scale=1 / work.temperature,
        BR=configs.ENDS.BM,
        WANT_GRADIENT=want_gradient,
        num_warps=configs.ENDS.num_warps,
        **work.sizes,
    )
    return out


def contrast_all(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    mix_lse: Tensor | None,  # [A] log-sum of the synthesised negatives
    mix_mean: Tensor | None,  # [A, D] their softmax mean
    temperature: float,
    want_gradient: bool,
    segments: Tensor | None = None,  # [C, G, 2] int64, instead of key_labels
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `pico_fast::contrast_all`; see `pico_fast.contrast`."""
    arranged = class_order(anchor_labels, key_labels, segments)
    work = make_pass(anchors, keys, arranged, temperature)
    negatives = _negatives(work, mix_lse, mix_mean, want_gradient)
    return tuple(_positives(work, negatives, keys is None, want_gradient))[:6]


def contrast_all_keys_grad(
    grad_loss: Tensor,  # [A]
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]
    key_labels: Tensor | None,  # [K] int64
    lse: Tensor,  # [A] of the forward
    positive_count: Tensor,  # [A] int64 of the forward
    temperature: float,
) -> Tensor:
    """Gradient of the keys [K, D] (of the anchors in their part as keys, where keys is None)."""
    arranged = class_order(anchor_labels, key_labels, None)
    work = make_pass(anchors, keys, arranged, temperature)
    n_anchors, n_keys = work.queries.shape[0], work.keys.shape[0]
    # the weights again, from the own class alone
    nothing = lse.new_empty(0)
    ordered = _Negatives(lse[arranged.order], lse, nothing)
    weight = _positives(work, ordered, keys is None, False).weight
    usable = (positive_count > 0) & (lse > -math.inf)
    factor = torch.where(usable, grad_loss.float() / positive_count.clamp(min=1), 0.0)
    launch = configs.keys_grad(work.keys.dtype, anchors.shape[1])
    out = torch.zeros(work.keys.shape, device=anchors.device)
    contrast_ends.keys_grad_kernel[(triton.cdiv(n_keys, launch.BN),)](
        queries=work.queries,
        low=arranged.low,
        high=arranged.high,
        lse=ordered.lse,
        factor=factor[arranged.order],
        weight=weight[arranged.order],
        keys=work.keys,
        key_order=arranged.key_order,
        used_keys=arranged.spans[0, 1:],
        out=out,
        n_anchors=n_anchors,
        key_stride=work.keys.stride(0),
        scale=1 / temperature,
        BM=launch.BM,
        BN=launch.BN,
        IN_BATCH=keys is None,
        PRODUCT=_products(work.keys.dtype)["PRODUCT"],
        # float16 has too few exponents for weights of any size; TF32 has its 10 bits and float32's
        WEIGHTS=tl.bfloat16 if _dtype(work.keys.dtype) == torch.bfloat16 else tl.float32,
        num_warps=launch.num_warps,
        **work.sizes,
    )
    return out
