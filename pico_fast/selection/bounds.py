"""The bounds of a cut on an NVIDIA GPU: launching `pico_fast.kernels.cut`.

Similarities of all anchors with a sample are there once, as halves: 42 MB for 1024 anchors at the default.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pico_fast.kernels import configs, sample
from pico_fast.kernels import cut as kernels
from pico_fast.selection import launch as launches
from pico_fast.selection.layout import Cut, Layout

# most places of a row, which cut_kernel holds in registers
MOST_WIDTH = 2**16
# halves that may be there at a time; parts of a row that similarity_kernel is cut into
_BLOCK, _SPLITS = 2**27, 64
# rows of a program that gathers them; a row of halves has a multiple of that, whole tiles and vectors
_ROWS, _ALIGNED = 16, 128


class Bounds(NamedTuple):
    """Which keys of a sample count for each anchor, as the kernels take it."""

    least: Tensor  # [A] float16, hardness of the last key that counts
    last: Tensor  # [A] int32, of those as hard the last place that counts
    shift: Tensor  # [A] float32, what exponents are shifted by
    pairs: Tensor  # [A] int64, how many keys lie below the ceiling


def width(layout: Layout, cut: Cut, own: bool) -> int:
    """Places of a row of a drawn sample: a class of the positives' has ⌈count / fraction⌉ keys at most."""
    n = launches.n_positions(layout)
    return min(n, math.ceil(cut.count / cut.fraction)) if own else n


def takes(layout: Layout, cut: Cut, own: bool) -> bool:
    """Whether the kernels are for these: the cut of a sample; of positives below no ceiling."""
    is_sample = layout.key_order is not None and layout.ranges.shape[1] == 1
    return is_sample and width(layout, cut, own) <= MOST_WIDTH and not (own and cut.ceiling is not None)


def gathered(layout: Layout) -> tuple[Layout, Tensor]:
    """Keys in any order one after the other, zeros behind the last; and how many are in use [] int64."""
    keys = layout.keys.new_empty(launches.n_positions(layout), layout.keys.shape[1])
    ends = layout.ranges[-1, 0].sum()
    sample.gather_kernel[(triton.cdiv(len(keys), _ROWS),)](
        keys=layout.keys,
        key_order=layout.key_order,
        ends=ends,
        out=keys,
        width=len(keys),
        key_stride=layout.keys.stride(0),
        BN=_ROWS,
        **launches.sizes(keys),
    )
    return layout._replace(keys=keys, key_order=None), ends


def bounds(
    layout: Layout, cut: Cut, own: bool, ends: Tensor, width: int, launch: configs.Launch, scale: float
) -> Bounds:
    """The bounds of every anchor, from the tiles that its sums will be made of."""
    n_anchors = len(layout.anchors)
    new = functools.partial(torch.empty, n_anchors, device=ends.device)
    found = Bounds(new(dtype=torch.float16), new(dtype=torch.int32), new(), new(dtype=torch.int64))
    # whole tiles, so that they are those of the sums
    at_a_time = max(1, _BLOCK // width // launch.BM) * launch.BM
    for first in range(0, n_anchors, at_a_time):
        rows = slice(first, first + at_a_time)
        anchors, anchor_class, *rest, own_key = layout.tensors
        part = Layout(
            anchors[rows], anchor_class[rows], *rest, own_key if own_key is None else own_key[rows]
        )
        _bounds_of(part, ends, cut.of(rows), own, launch, scale, width, Bounds(*(x[rows] for x in found)))
    return found


def _bounds_of(
    layout: Layout,
    ends: Tensor,  # [] int64
    cut: Cut,
    own: bool,
    launch: configs.Launch,
    scale: float,
    width: int,
    out: Bounds,
) -> None:
    """The bounds of a block of anchors."""
    n_anchors, device = len(layout.anchors), ends.device
    blocks = triton.cdiv(n_anchors, launch.BM)
    tiles = triton.cdiv(launches.n_positions(layout), launch.BN)
    processors = launches.gpu(device)[1] * 8 // launch.num_warps
    splits = launches.choose_splits(blocks, processors, min(tiles, _SPLITS))
    stride = triton.cdiv(width, _ALIGNED) * _ALIGNED
    shared = {
        "ends": ends,
        "halves": torch.empty(n_anchors, stride, device=device, dtype=torch.float16),
        "hardest": torch.empty(splits, n_anchors, device=device),
        "half_stride": stride,
        "splits": splits,
        "OWN": own,
    }
    kernels.similarity_kernel[(blocks * splits,)](
        key_blocks=launches.key_blocks(layout, launch),
        own_key=layout.own_key if own else None,
        ceiling=cut.ceiling,
        **shared,
        **launches.options(layout, launch),
    )
    kernels.cut_kernel[(n_anchors,)](
        anchor_class=layout.anchor_class,
        ranges=layout.ranges,
        fraction=cut.fraction,
        most=cut.count,
        n_anchors=n_anchors,
        scale=scale,
        CHUNKS=triton.cdiv(stride, kernels.LANES.value),
        SPLITS=_SPLITS,
        num_warps=configs.cut_warps(stride),
        **shared,
        **out._asdict(),
    )
