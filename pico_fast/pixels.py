"""Drawing pixels by segment, with fixed capacities and nothing read back to the host.

A segment is any group of pixels that shares a quota: one class of one image, or its wrongly
predicted pixels. The pixels of a segment that come first in the order of a hash are a uniform draw
without replacement.
"""

import torch
from torch import Tensor

torch.library.define("pico_fast::gather_pixels", "(Tensor features, Tensor pixel) -> Tensor")


def segment_counts(
    segment: Tensor,  # [N] int64 in [0, n_segments]; n_segments: left out
    n_segments: int,
) -> Tensor:
    """Pixels of each segment: [n_segments] int64."""
    counts = segment.new_zeros(n_segments + 1)
    return counts.scatter_add_(0, segment, torch.ones_like(segment)).narrow(0, 0, n_segments)


def draw_pixels(
    segment: Tensor,  # [N] int64 in [0, n_segments]; n_segments: left out
    lot: Tensor,  # [N] int64, a different 32-bit hash for each pixel
    counts: Tensor,  # [n_segments] int64, what segment_counts says
    quota: Tensor,  # [n_segments] int64, at most counts
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The `quota` pixels with the lowest lots of every segment, segment after segment.

    Returns pixel [capacity] and segment [capacity], int64, -1 behind the last.
    """
    slot = torch.arange(capacity, device=segment.device)
    if segment.numel() == 0 or quota.numel() == 0:
        return torch.full_like(slot, -1), torch.full_like(slot, -1)
    # lots are 32 bits wide and differ, so one sort of one word per pixel orders segment and lot
    order = ((segment << 32) | lot).argsort()
    until = quota.cumsum(0)
    of_slot = torch.searchsorted(until, slot, right=True)
    filled = of_slot < quota.numel()
    of_slot = of_slot.clamp(max=quota.numel() - 1)
    first = counts.cumsum(0) - counts
    place = slot + (first - until + quota).gather(0, of_slot)
    pixel = order.gather(0, torch.where(filled, place, 0))
    return torch.where(filled, pixel, -1), torch.where(filled, of_slot, -1)


def _locate(
    features: Tensor,  # [B, D, H, W]
    pixel: Tensor,  # [n] int64 into B·H·W
) -> list[Tensor | None]:
    """The index of rows [n, D] in features: image, row and column of each pixel."""
    height, width = features.shape[2:]
    return [pixel // (height * width), None, pixel // width % height, pixel % width]


def gather_torch(
    features: Tensor,  # [B, D, H, W]
    pixel: Tensor,  # [n] int64 into B·H·W
) -> Tensor:
    """The op `gather_pixels` in PyTorch: rows [n, D]; csrc/pixels.cpp has it for a CPU."""
    # as an op: Python's indexing asks for a CUDA runtime even where tensors are only traced
    return torch.ops.aten.index.Tensor(features, _locate(features, pixel))


torch.library.impl("pico_fast::gather_pixels", "CompositeExplicitAutograd", gather_torch)


@torch.library.register_fake("pico_fast::gather_pixels")
def _(features, pixel):
    return features.new_empty((pixel.shape[0], features.shape[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, pixel):
        filled = pixel >= 0
        # an empty slot stands where slot 0 stands
        pixel = torch.where(filled, pixel, pixel.narrow(0, 0, 1).clamp(min=0))
        ctx.save_for_backward(pixel, filled)
        # the layout alone is kept: the gradient takes it, the features may go
        ctx.like = torch.zeros_like(features, device="meta")
        return torch.ops.pico_fast.gather_pixels.default(features, pixel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        pixel, filled = ctx.saved_tensors
        out = torch.zeros_like(ctx.like, device=grad.device)
        # no pixel is drawn twice, and empty slots repeat slot 0: plain writes, no sums, no atomics
        grad = torch.where(filled.unsqueeze(1), grad, grad.narrow(0, 0, 1))
        return torch.ops.aten.index_put_.default(out, _locate(out, pixel), grad), None


def gather_pixels(
    features: Tensor,  # [B, D, H, W], any strides
    pixel: Tensor,  # [n] int64 into B·H·W, all different, -1 only behind the last
) -> Tensor:
    """Rows [n, D] of the drawn pixels, differentiable; empty slots hold a copy of slot 0 or anything.

    The features are never permuted or copied whole, and the backward writes each gradient once.
    """
    if features.shape[0] * features.shape[2] * features.shape[3] == 0 or pixel.numel() == 0:
        # nothing to take from, yet still on the graph
        return features.sum() * 0 + features.new_zeros(pixel.numel(), features.shape[1])
    return _Gather.apply(features, pixel)
