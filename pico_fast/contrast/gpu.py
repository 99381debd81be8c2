"""Contrast on an NVIDIA GPU, with all keys or a cut: launching `pico_fast.kernels.contrast` and `.merge`."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pico_fast.contrast.weights import Negatives, Positives
from pico_fast.kernels import configs, contrast, merge
from pico_fast.selection import bounds as bounding
from pico_fast.selection import launch as launches
from pico_fast.selection.eager import class_of_positions
from pico_fast.selection.layout import Cut, Layout


def takes_negatives(layout: Layout, cut: Cut, *_) -> bool:
    """Whether the kernels are for these: all keys, or the cut of a sample."""
    return launches.takes(layout) and (cut.is_none or bounding.takes(layout, cut, False))


def takes_positives(layout: Layout, cut: Cut, *_) -> bool:
    """Whether the kernels are for these: all keys, or the cut of a sample."""
    return launches.takes(layout) and (cut.is_none or bounding.takes(layout, cut, True))


def takes_keys_grad(layout: Layout, cut: Cut, *_) -> bool:
    """Whether the kernel is for these: all keys."""
    return launches.takes(layout) and cut.is_none


def _stretches(layout: Layout, running: bool) -> list[tuple]:
    """All positions in use: one stretch, or for the copy engine whole tiles and what is left.

    A stretch is spans [n, 2], their launch, keys for the copy engine, and into how many parts it is cut.
    A tile of the copy engine brings rows behind the end of a span along, and those may hold anything:
    multiplied by 0 as well, nan stays nan.
    """
    keys, spans = layout.keys, launches.spans(layout)
    found = (launches.gpu(keys.device)[0], keys.dtype, keys.shape[1], running)
    gathered = configs.negatives(*found, True)
    launch = gathered if layout.key_order is not None else configs.negatives(*found, False)
    splits = launches.splits(layout, launch, triton.cdiv(launches.n_positions(layout), launch.BN))
    key_blocks = launches.key_blocks(layout, launch)
    if key_blocks is None:
        return [(spans, launch, None, splits)]
    first, length = spans.unbind(1)
    whole = length // launch.BN * launch.BN
    tiles, left = torch.stack([first, whole], 1), torch.stack([first + whole, length - whole], 1)
    few = launches.splits(layout, gathered, min(len(spans), 16))
    return [(tiles, launch, key_blocks, splits), (left, gathered, None, few)]


def negatives(layout: Layout, cut: Cut, temperature: float, want_mean: bool) -> Negatives:
    """The op `negatives`: log-sum [A], softmax mean [A, D] and sum of the inner products [A]."""
    layout = launches.dense(layout)
    n_anchors, channels = layout.anchors.shape
    new = functools.partial(torch.empty, device=layout.anchors.device)
    out = {"lse": new(n_anchors), "away": new(n_anchors)}
    out["mean"] = new(n_anchors, channels) if want_mean else None
    below = new(0, dtype=torch.int64)
    scale = math.log2(math.e) / temperature
    if cut.is_none:
        _sum_all(layout, scale, out)
    else:
        pairs = _sum_cut(layout, cut, scale, out)
        below = below if cut.ceiling is None else pairs
    return Negatives(out["lse"], new(0) if out["mean"] is None else out["mean"], out["away"], below)


def _sum_all(layout: Layout, scale: float, out: dict[str, Tensor | None]) -> None:
    """Sums over all negatives."""
    anchors, fixed = layout.anchors, layout.keys.dtype != torch.float16
    # inner products with unit keys are at most this; longer ones raise the flag
    bound = torch.linalg.vector_norm(anchors, dim=1, dtype=torch.float32) * scale
    # float16 has too few exponents for a fixed shift
    flag = torch.zeros(1, dtype=torch.int32, device=anchors.device) if fixed else None
    # at first with a fixed shift; again with the running maximum, which does nothing unless flagged
    for running in (False, True) if fixed else (True,):
        stretches = _stretches(layout, running)
        parts, first = _parts(layout, sum(count for *_, count in stretches), out), 0
        for spans, launch, key_blocks, count in stretches:
            n = launches.n_positions(layout) // launch.BN + len(spans)
            here = slice(first, first + count)
            first += count
            contrast.negatives_kernel[(triton.cdiv(len(anchors), launch.BM) * count,)](
                key_blocks=key_blocks,
                bound=bound,
                least=None,
                last=None,
                ceiling=None,
                flag=flag if running else None,
                splits=count,
                scale=scale,
                RUNNING=running,
                **{name: x if x is None else x[here] for name, x in parts.items()},
                **launches.tile_list(spans, launch.BN, n, count),
                **launches.options(layout, launch),
            )
        _merge(layout, parts, flag, running, out)


def _sum_cut(layout: Layout, cut: Cut, scale: float, out: dict[str, Tensor | None]) -> Tensor:
    """Sums over the negatives of a sample that count; how many lie below the ceiling [A] int64."""
    ends, layout = bounding.size(layout), bounding.gathered(layout)
    generation = launches.gpu(ends.device)[0]
    launch = configs.negatives(generation, layout.keys.dtype, layout.keys.shape[1], False, False)
    least, last, shift, pairs = bounding.bounds(layout, ends, cut, False, launch, scale)
    tiles = triton.cdiv(launches.n_positions(layout), launch.BN)
    splits = launches.splits(layout, launch, tiles)
    parts = _parts(layout, splits, out)
    contrast.negatives_kernel[(triton.cdiv(len(layout.anchors), launch.BM) * splits,)](
        key_blocks=launches.key_blocks(layout, launch),
        bound=shift,
        firsts=None,
        ends=ends,
        split_tiles=None,
        least=least,
        last=last,
        ceiling=cut.ceiling,
        flag=None,
        splits=splits,
        scale=scale,
        RUNNING=False,
        **parts,
        **launches.options(layout, launch),
    )
    _merge(layout, parts, None, True, out)
    return pairs


def _parts(layout: Layout, splits: int, out: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """What the splits of the negatives add up to: top, total and away [splits, A], mean [splits, A, D]."""
    n_anchors, channels = layout.anchors.shape
    device = layout.anchors.device
    parts = {name: torch.empty(splits, n_anchors, device=device) for name in ("top", "total", "away")}
    mean = None if out["mean"] is None else torch.empty(splits, n_anchors, channels, device=device)
    return parts | {"mean": mean}


def _merge(
    layout: Layout,
    parts: dict[str, Tensor | None],
    flag: Tensor | None,  # [1] int32
    running: bool,
    out: dict[str, Tensor | None],
) -> None:
    """Add up the splits of the negatives."""
    splits, n_anchors = parts["top"].shape
    merge.merge_kernel[(triton.cdiv(n_anchors, configs.MERGE.BM),)](
        anchor_class=layout.anchor_class,
        flag=flag,
        n_anchors=n_anchors,
        splits=splits,
        BR=configs.MERGE.BM,
        RUNNING=running,
        num_warps=configs.MERGE.num_warps,
        **{f"{name}_parts": x for name, x in parts.items()},
        **out,
        **launches.sizes(layout.anchors),
    )


def positives(
    layout: Layout,
    cut: Cut,
    lse: Tensor,  # [A]
    temperature: float,
    want_pull: bool,
) -> Positives:
    """The op `positives`: sums of the loss, of w and of the inner products [A], and of w k [A, D]."""
    layout = launches.dense(layout)
    anchors, keys = layout.anchors, layout.keys
    n_anchors, channels = anchors.shape
    launch = configs.positives(keys.dtype, channels)
    # a class is a small part of the keys: no more parts than can be busy
    tiles = triton.cdiv(launches.n_positions(layout), launch.BN)
    splits = launches.splits(layout, launch, min(8, tiles))
    least = last = None
    if not cut.is_none:
        least, last, *_ = bounding.bounds(layout, bounding.size(layout), cut, True, launch, 1.0)
    parts = torch.empty(3, splits, n_anchors, device=anchors.device)
    pull = parts.new_empty(splits, n_anchors, channels) if want_pull else None
    contrast.positives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
        own_key=layout.own_key,
        least=least,
        last=last,
        lse=lse.float().contiguous(),
        loss=parts[0],
        weight=parts[1],
        similar=parts[2],
        pull=pull,
        splits=splits,
        scale=1 / temperature,
        **launches.options(layout, launch),
    )
    pull = parts.new_empty(0) if pull is None else pull.sum(0)
    return Positives(*parts.sum(1).unbind(0), pull)


def keys_grad(
    layout: Layout,
    cut: Cut,
    own: bool,
    lse: Tensor,  # [A]
    factor: Tensor,  # [A]
    temperature: float,
) -> Tensor:
    """The op `keys_grad`: what one side of the anchors' pairs gives to each key [K, D]."""
    layout = launches.dense(layout)
    anchors, keys, ranges = layout.anchors, layout.keys, layout.ranges
    n_classes = ranges.shape[0]
    own_begin = own_end = None
    if own:
        classes = torch.arange(n_classes, device=ranges.device)
        in_order = torch.where(layout.anchor_class < 0, n_classes, layout.anchor_class)
        own_begin = torch.searchsorted(in_order, classes)
        own_end = torch.searchsorted(in_order, classes, right=True)
    launch = configs.keys_grad(keys.dtype, anchors.shape[1])
    out = torch.zeros(keys.shape, device=keys.device)
    # float16 has too few exponents for weights of any size; TF32 has its 10 bits and float32's
    narrow = launches.tile_dtype(keys.dtype) == torch.bfloat16
    options, n_positions = launches.options(layout, launch), launches.n_positions(layout)
    for name in ("query_blocks", "ranges", "PARTS", "STAGES"):
        del options[name]
    contrast.keys_grad_kernel[(triton.cdiv(n_positions, launch.BN),)](
        key_class=class_of_positions(ranges, n_positions),
        own_begin=own_begin,
        own_end=own_end,
        own_key=layout.own_key,
        lse=lse.float().contiguous(),
        factor=factor.float().contiguous(),
        out=out,
        n_positions=n_positions,
        scale=1 / temperature,
        WEIGHTS=tl.bfloat16 if narrow else tl.float32,
        **options,
    )
    return out
