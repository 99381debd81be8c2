"""The door for label maps: any integer dtype and size in, int64 on the embedding grid out.

Behind this door -1 is the only sentinel: negative values, `ignore_index` and (where a check would
synchronise the device) values of num_classes or more have all become -1.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pico_fast import checks

torch.library.define(
    "pico_fast::labels_on_grid",
    "(Tensor labels, int height, int width, int num_classes, int ignore_index) -> Tensor",
)


def to_grid(
    x: Tensor,  # [..., h, w]
    height: int,
    width: int,
) -> Tensor:
    """`x` at [..., height, width] by "nearest", whatever its dtype; `x` itself if the size fits."""
    for dim, size in ((-2, height), (-1, width)):
        if size == 0:
            x = x.narrow(dim, 0, 0)
        elif x.shape[dim] != size:
            # interpolating the row numbers themselves takes torch's own rounding, bit for bit
            rows = torch.arange(x.shape[dim], dtype=torch.float32, device=x.device)
            rows = interpolate(rows.view(1, 1, -1), size=size, mode="nearest")
            x = x.index_select(dim, rows.flatten().long())
    return x


def _on_grid(labels: Tensor, height: int, width: int, num_classes: int, ignore_index: int) -> Tensor:
    labels = to_grid(labels, height, width).long()
    used = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    return torch.where(used, labels, -1)


def _on_grid_cpu(labels: Tensor, height: int, width: int, num_classes: int, ignore_index: int) -> Tensor:
    wide = labels.long()
    outside = (wide >= num_classes) & (wide != ignore_index)
    if outside.any():
        raise ValueError(
            f"labels: expected values below num_classes = {num_classes}, negative ones or"
            f" ignore_index = {ignore_index}, got {wide[outside][0].item()}"
        )
    return _on_grid(wide, height, width, num_classes, ignore_index)


torch.library.impl("pico_fast::labels_on_grid", "CPU", _on_grid_cpu)
torch.library.impl("pico_fast::labels_on_grid", "CompositeExplicitAutograd", _on_grid)


@torch.library.register_fake("pico_fast::labels_on_grid")
def _(labels, height, width, num_classes, ignore_index):
    return labels.new_empty((labels.shape[0], height, width), dtype=torch.int64)


def labels_on_grid(
    labels: Tensor,  # [B, h, w] any integer dtype
    height: int,
    width: int,
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """Labels [B, height, width] int64 with -1 for every pixel to leave out, by "nearest".

    Raises ValueError on a CPU for a label of num_classes or more that is not ignore_index; on other
    devices, where the check would synchronise, such pixels are left out.
    """
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = labels.long()  # torch has few kernels for these
        # what int64 cannot hold is a label beyond all classes, not a negative one
        labels = torch.where(wide < 0, torch.iinfo(torch.int64).max, wide)
    return torch.ops.pico_fast.labels_on_grid.default(labels, height, width, num_classes, ignore_index)


def clean_labels(
    labels: Tensor,  # [B, H, W] any integer dtype
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """Checked labels [B, H, W] int64 at their own size; TypeError or ValueError if they are none."""
    checks.classes(num_classes, ignore_index)
    checks.tensor("labels", labels, "[B, H, W]", "integer")
    return labels_on_grid(labels, labels.shape[1], labels.shape[2], num_classes, ignore_index)


def predictions_on_grid(
    logits: Tensor | None,  # [B, C, h, w] scores or [B, h, w] integer predictions
    height: int,
    width: int,
) -> Tensor | None:
    """Predicted classes [B, height, width] int64: argmax first, then "nearest"; None stays None."""
    if logits is None:
        return None
    if not logits.dtype.is_floating_point:
        return to_grid(logits, height, width).long()
    # both operations work pixel by pixel, so the cheaper order gives the same predictions
    if logits.shape[-2] * logits.shape[-1] <= height * width:
        return to_grid(logits.argmax(1), height, width)
    return to_grid(logits, height, width).argmax(1)


def check_predictions(name: str, value: object, num_classes: int | None, labels: Tensor) -> None:
    """Raise unless `value` is None, scores [B, C, h, w] or integer predictions [B, h, w]."""
    if value is None:
        return
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        checks.tensor(name, value, "[B, C, h, w]", "floating")
        if num_classes is not None:
            checks.size(name, value, 1, num_classes, "num_classes")
    else:
        checks.tensor(name, value, "[B, C, h, w] floating or [B, h, w]", "integer")
    checks.size(name, value, 0, labels.shape[0], "images of labels")
    checks.same_device(name, value, "labels", labels)
    if labels.numel() and 0 in value.shape:
        raise ValueError(f"{name}: expected at least one pixel, got {checks.describe(value)}")
