"""Contrast on an NVIDIA GPU: launching `pico_fast.kernels.contrast` and `.merge`."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from pico_fast.contrast.weights import Negatives, Positives
from pico_fast.kernels import all_keys, configs, contrast, merge
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


class _Walk(NamedTuple):
    """A launch of negatives_kernel: some tiles, and into how many parts they are cut."""

    tiles: dict[str, Tensor | None]  # firsts, ends, n_tiles
    launch: configs.Launch
    key_blocks: TensorDescriptor | None
    splits: int


def _whole_walk(layout: Layout, ends: Tensor, launch: configs.Launch) -> _Walk:
    """Over keys one after the other, `ends` of them."""
    splits = launches.splits(layout, launch, triton.cdiv(len(layout.keys), launch.BN))
    tiles = {"firsts": None, "ends": ends, "n_tiles": None}
    return _Walk(tiles, launch, launches.key_blocks(layout, launch), splits)


def _walks(layout: Layout, ends: Tensor | None, want_mean: bool, running: bool) -> list[_Walk]:
    """Over all keys in use.

    A bank takes a walk over whole tiles of the copy engine and one over what is left: a tile of it brings
    rows behind the end of a part along, and in a bank these may hold anything: multiplied by 0 as well, nan
    stays nan.
    """
    keys, n = layout.keys, len(layout.keys)
    generation = launches.gpu(keys.device)[0]
    launch, by_rows = (
        configs.negatives(generation, keys.dtype, keys.shape[1], running, way) for way in (False, True)
    )
    if ends is not None:
        return [_whole_walk(layout, ends, launch)]
    first, length = launches.parts(layout)
    key_blocks = launches.key_blocks(layout, launch)
    is_usual = generation == 90 and keys.dtype == torch.bfloat16 and keys.shape[1] == 256
    if configs.USE_ALL_KEYS and is_usual and want_mean and not running and key_blocks is not None:
        launch = configs.ALL_KEYS
    whole = torch.zeros_like(length) if key_blocks is None else length // launch.BN * launch.BN
    few = n if key_blocks is None else by_rows.BN * min(len(first), 16)
    splits = launches.splits(layout, by_rows, triton.cdiv(few, by_rows.BN))
    left = launches.tile_list(first + whole, length - whole, n, by_rows.BN)
    walks = [_Walk(left, by_rows, None, splits)]
    if key_blocks is not None:
        tiles = launches.tile_list(first, whole, n, launch.BN) | {"ends": None}
        splits = launches.splits(layout, launch, triton.cdiv(n, launch.BN))
        walks.append(_Walk(tiles, launch, key_blocks, splits))
    return walks


def negatives(layout: Layout, cut: Cut, temperature: float, want_mean: bool) -> Negatives:
    """The op `negatives`: log-sum [A], softmax mean [A, D] and sum of the inner products [A]."""
    layout, ends = launches.dense(layout), None
    if layout.key_order is not None:
        layout, ends = bounding.gathered(layout)
    anchors, scale = layout.anchors, math.log2(math.e) / temperature
    new = functools.partial(torch.empty, device=anchors.device)
    out = {"lse": new(len(anchors)), "away": new(len(anchors))}
    out["mean"] = new(anchors.shape) if want_mean else None
    below = new(0, dtype=torch.int64)
    if not cut.is_none:
        launch = configs.cut(launches.gpu(anchors.device)[0], layout.keys.dtype, anchors.shape[1])
        bounds = bounding.bounds(layout, cut, False, ends, len(layout.keys), launch, scale)
        walks = [_whole_walk(layout, ends, launch)]
        # the greatest exponent is known
        _sum(layout, walks, False, bounds.shift, None, scale, out, bounds, cut.ceiling)
        below = below if cut.ceiling is None else bounds.pairs
    else:
        # inner products with unit keys are at most this; longer ones raise the flag
        bound = torch.linalg.vector_norm(anchors, dim=1, dtype=torch.float32) * scale
        # at first with a fixed shift; again with the running maximum, which does nothing unless flagged;
        # float16 has too few exponents for a fixed one
        fixed = layout.keys.dtype != torch.float16
        flag = torch.zeros(1, dtype=torch.int32, device=anchors.device) if fixed else None
        for running in (False, True) if fixed else (True,):
            _sum(layout, _walks(layout, ends, want_mean, running), running, bound, flag, scale, out)
    return Negatives(out["lse"], new(0) if out["mean"] is None else out["mean"], out["away"], below)


def _sum(
    layout: Layout,
    walks: list[_Walk],
    running: bool,
    bound: Tensor,  # [A], exponents are shifted by it
    flag: Tensor | None,  # [1] int32, raised where sums are not to be trusted
    scale: float,
    out: dict[str, Tensor | None],
    bounds: bounding.Bounds | None = None,
    ceiling: Tensor | None = None,  # [A]
) -> None:
    """Sums over the negatives, by splits, which are then added up."""
    n_anchors, every = len(layout.anchors), sum(walk.splits for walk in walks)
    parts = {name: torch.empty(every, n_anchors, device=bound.device) for name in ("top", "total", "away")}
    mean = out["mean"]
    parts["mean"] = mean if mean is None else mean.new_empty(every, *mean.shape)
    first = 0
    for walk in walks:
        tiles, launch, key_blocks, splits = walk
        here = slice(first, first + splits)
        first += splits
        if launch is configs.ALL_KEYS:
            _sum_all_keys(layout, walk, bound, scale, {name: x[here] for name, x in parts.items()})
            continue
        contrast.negatives_kernel[(triton.cdiv(n_anchors, launch.BM) * splits,)](
            key_blocks=key_blocks,
            bound=bound,
            least=None if bounds is None else bounds.least,
            last=None if bounds is None else bounds.last,
            ceiling=ceiling,
            flag=flag if running else None,
            splits=splits,
            scale=scale,
            RUNNING=running,
            **tiles,
            **{name: x if x is None else x[here] for name, x in parts.items()},
            **_without(launches.options(layout, launch), "key_order"),
        )
    merge.merge_kernel[(triton.cdiv(n_anchors, configs.MERGE.BM),)](
        anchor_class=layout.anchor_class,
        flag=flag,
        n_anchors=n_anchors,
        splits=every,
        BR=configs.MERGE.BM,
        RUNNING=running or flag is None,
        num_warps=configs.MERGE.num_warps,
        **{f"{name}_parts": x for name, x in parts.items()},
        **out,
        **launches.sizes(layout.anchors),
    )


def _sum_all_keys(
    layout: Layout,
    walk: _Walk,
    bound: Tensor,  # [A]
    scale: float,
    parts: dict[str, Tensor],  # [splits, A] and [splits, A, D], out
) -> None:
    """Sums over whole tiles of a bank on Hopper."""
    n_anchors, channels = layout.anchors.shape
    BM, BN = walk.launch.BM // 2, walk.launch.BN

    def blocks(x: Tensor, rows: int) -> gluon_hopper.TensorDescriptor:
        """Rows [*, D] for the copy engine, as Gluon wants them."""
        form = gl.NVMMASharedLayout.get_default_for([rows, channels], gl.bfloat16)
        return gluon_hopper.TensorDescriptor.from_tensor(x, [rows, channels], form)

    all_keys.all_keys_kernel[(triton.cdiv(n_anchors, 2 * BM) * walk.splits,)](
        query_blocks=blocks(layout.anchors, BM),
        key_blocks=blocks(layout.keys, BN),
        bound=bound,
        anchor_class=layout.anchor_class,
        ranges=layout.ranges,
        firsts=walk.tiles["firsts"],
        n_tiles=walk.tiles["n_tiles"],
        n_anchors=n_anchors,
        splits=walk.splits,
        scale=scale,
        PARTS=layout.ranges.shape[1],
        D=channels,
        BM=BM,
        BN=BN,
        STAGES=walk.launch.stages,
        num_warps=walk.launch.num_warps,
        **parts,
    )


def _without(options: dict, *names: str) -> dict:
    """Keyword arguments that a kernel takes, of those that most take."""
    return {name: x for name, x in options.items() if name not in names}


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
    generation = launches.gpu(keys.device)[0]
    launch = configs.positives(generation, keys.dtype, channels, not cut.is_none)
    # a class is a small part of the keys: no more parts than can be busy
    tiles = triton.cdiv(launches.n_positions(layout), launch.BN)
    splits = launches.splits(layout, launch, min(8, tiles))
    least = last = None
    if not cut.is_none:
        ends, width = layout.ranges[-1, 0].sum(), bounding.width(layout, cut, True)
        least, last, *_ = bounding.bounds(layout, cut, True, ends, width, launch, 1.0)
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
    n_positions = launches.n_positions(layout)
    options = _without(launches.options(layout, launch), "query_blocks", "ranges", "PARTS", "STAGES")
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
