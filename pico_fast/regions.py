"""Region pooling: the mean feature of each class in each image; ops, gradient, public function.

The compiled kernels live in csrc/regions.cpp; where there are none, the functions `pool_torch` and
`pool_backward_torch` below serve any device.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from pico_fast import checks, reference
from pico_fast.grid import clean_labels

torch.library.define(
    "pico_fast::region_pool",
    "(Tensor features, Tensor labels, int num_classes) -> (Tensor means, Tensor counts)",
)
torch.library.define(
    "pico_fast::region_pool_backward",
    "(Tensor grad_means, Tensor labels, Tensor counts, ScalarType dtype, bool channels_last) -> Tensor",
)


def _load_compiled() -> str | None:
    """Load the compiled kernels; the reason if there are none."""
    built = sorted(Path(__file__).parent.glob("_C.*"))
    if not built:
        return "not built"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return f"{built[0].name} does not load: {error}"
    return None


# None if the compiled kernels are there, otherwise why they are not; `pico_fast.info` tells it
why_not_compiled = _load_compiled()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(labels: Tensor, num_classes: int) -> Tensor:
    """The row [B, H*W] int64 that each pixel is added to: its class, or num_classes to leave it out."""
    labels = labels.long().flatten(1)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def pool_torch(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64, int32 or uint8
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """The op `region_pool` in PyTorch: nothing read back to the host, the same bits on every run."""
    images, channels = features.shape[:2]
    rows = _rows(labels, num_classes)
    counts = rows.new_zeros(images, num_classes + 1)
    counts = counts.scatter_add_(1, rows, torch.ones_like(rows))[:, :num_classes].contiguous()
    values = features.flatten(2).to(_sum_dtype(features.dtype))  # [B, D, H*W]
    if features.is_cuda:
        # scatter_add_ would be a race of float atomics; index_put_ sorts and then adds in order
        sums = values.new_zeros(images, num_classes + 1, channels)
        image = torch.arange(images, device=rows.device)[:, None]
        sums.index_put_((image, rows), values.transpose(1, 2), accumulate=True)
    else:
        sums = values.new_zeros(images, channels, num_classes + 1)
        sums.scatter_add_(2, rows[:, None].expand_as(values), values)
        sums = sums.transpose(1, 2)
    means = sums[:, :num_classes] / counts.clamp(min=1)[..., None]
    return means.contiguous(), counts


def pool_backward_torch(
    grad_means: Tensor,  # [B, C, D]
    labels: Tensor,  # [B, H, W] int64, int32 or uint8
    counts: Tensor,  # [B, C] int64
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The op `region_pool_backward` in PyTorch: each pixel looks up its class's share."""
    channels, size = grad_means.shape[2], labels.shape[1:]
    rows = _rows(labels, counts.shape[1])
    share = (grad_means / counts.clamp(min=1)[..., None]).to(dtype)
    share = pad(share, (0, 0, 0, 1))  # [B, C + 1, D], nothing for the pixels left out
    if channels_last:
        grad = share.gather(1, rows[..., None].expand(-1, -1, channels))
        return grad.unflatten(1, size).permute(0, 3, 1, 2)
    grad = share.transpose(1, 2).gather(2, rows[:, None].expand(-1, channels, -1))
    return grad.unflatten(2, size)


torch.library.impl("pico_fast::region_pool", "CompositeExplicitAutograd", pool_torch)
torch.library.impl("pico_fast::region_pool_backward", "CompositeExplicitAutograd", pool_backward_torch)


@torch.library.register_fake("pico_fast::region_pool")
def _(features, labels, num_classes):
    images, channels = features.shape[:2]
    means = features.new_empty((images, num_classes, channels), dtype=_sum_dtype(features.dtype))
    return means, features.new_empty((images, num_classes), dtype=torch.int64)


@torch.library.register_fake("pico_fast::region_pool_backward")
def _(grad_means, labels, counts, dtype, channels_last):
    size = (grad_means.shape[0], grad_means.shape[2], *labels.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=grad_means.device, memory_format=layout)


def _setup_context(ctx, inputs, output):
    features, labels, _ = inputs
    _, counts = output
    ctx.save_for_backward(labels, counts)
    ctx.dtype = features.dtype
    ctx.channels_last = not features.is_contiguous() and features.is_contiguous(
        memory_format=torch.channels_last
    )


def _backward(ctx, grad_means, _):
    labels, counts = ctx.saved_tensors
    grad = torch.ops.pico_fast.region_pool_backward.default(
        grad_means, labels, counts, ctx.dtype, ctx.channels_last
    )
    return grad, None, None


torch.library.register_autograd("pico_fast::region_pool", _backward, setup_context=_setup_context)


def _setup_second(ctx, inputs, output):
    _, labels, counts, *_ = inputs
    ctx.save_for_backward(labels)
    ctx.num_classes = counts.shape[1]


def _second(ctx, grad):
    # the gradient of a mean is linear in what comes back, and its transpose is the mean again
    (labels,) = ctx.saved_tensors
    means, _ = torch.ops.pico_fast.region_pool.default(grad, labels, ctx.num_classes)
    return means, None, None, None, None


torch.library.register_autograd("pico_fast::region_pool_backward", _second, setup_context=_setup_second)


def pool_regions(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64, values outside [0, num_classes) left out
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """`region_pool` behind its checks, its means [B, C, D] in float32 (float64 for float64)."""
    return torch.ops.pico_fast.region_pool.default(features, labels, num_classes)


def region_pool(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] any integer dtype
    num_classes: int,
    ignore_index: int = 255,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean feature of each class in each image, in one pass over the features.

    Args:
        features: [B, D, H, W] float32, bfloat16, float16 or float64; NCHW and channels_last memory
            are read as they are, any other order is copied first.
        labels: [B, H, W] integers; pixels that are negative or `ignore_index` are left out.
        num_classes: C.
        ignore_index: a label outside the classes.
        impl: None for the fast implementation of the device, "reference" for the specification.

    Returns:
        means [B, C, D] in the features' dtype, summed in float32 (float64 for float64), 0 where a
        class has no pixel; differentiable, any number of times. counts [B, C] int64, pixels of each class.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or, on a CPU,
            a label of num_classes or more (elsewhere such pixels are left out).
    """
    checks.tensor("features", features, "[B, D, H, W]", "floating")
    checks.tensor("labels", labels, "[B, H, W]", "integer")
    checks.size("labels", labels, 0, features.shape[0], "images of features")
    checks.size("labels", labels, 1, features.shape[2], "height of features")
    checks.size("labels", labels, 2, features.shape[3], "width of features")
    checks.same_device("labels", labels, "features", features)
    pool = reference.region_pool if checks.implementation(impl) else pool_regions
    labels = clean_labels(labels, num_classes, ignore_index)
    means, counts = pool(features, labels, num_classes)
    return means.to(features.dtype), counts
