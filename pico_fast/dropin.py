"""Drop-in for the authors' loss and its ports: same constructor words, same call."""

import torch
from torch import Tensor, nn

from pico_fast import checks, draws
from pico_fast.anchors import draw_anchors
from pico_fast.contrast.function import Settings, contrast_rows
from pico_fast.finite import check_keys
from pico_fast.grid import labels_on_grid, predictions_on_grid
from pico_fast.loss import check_batch
from pico_fast.pixels import gather_pixels
from pico_fast.selection.options import EVERYTHING


class PixelContrastLoss(nn.Module):
    """In-batch pixel contrast, or against a queue of keys.

    Args:
        temperature: divides inner products.
        base_temperature: the loss is multiplied by temperature / base_temperature.
        ignore_index: label of pixels to leave out.
        max_samples: anchors of a batch at most.
        max_views: anchors of one class of one image at most; a class takes part in an image with more
            than max_views pixels at embedding resolution.
        seed: with `step` it decides which pixels are drawn.
        num_classes: labels lie below it; only the room for counting grows with it.

    Attributes:
        step: [] int64 buffer, training steps so far.

    `loss(feats, labels, predict, queue)` takes feats [B, D, H, W], labels [B, h, w] of any integer dtype,
    predict [B, h', w'] integer or [B, C, h', w'] scores or None, and queue [C, T, D] or None, every row
    of which is a key of its class. It returns a float32 scalar (float64 for float64 feats). In batch the
    value is that of the authors' formula on the same anchors; the differences are listed in the README.

    Source: Wang et al., ICCV 2021, equation 3, as released.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        ignore_index: int = 255,
        max_samples: int = 1024,
        max_views: int = 100,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = checks.number("temperature", temperature, above=0.0)
        base_temperature = checks.number("base_temperature", base_temperature, above=0.0)
        self.scale = self.temperature / base_temperature
        self.max_samples = checks.integer("max_samples", max_samples, 1)
        self.max_views = checks.integer("max_views", max_views, 1)
        self.seed = checks.integer("seed", seed, -(2**63), 2**63 - 1)
        checks.integer("ignore_index", ignore_index)
        if num_classes is None:
            num_classes = max(1, ignore_index) if 0 <= ignore_index < 1024 else 1024
        checks.classes(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        feats: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, h, w] integer
        predict: Tensor | None = None,  # [B, h', w'] integer or [B, C, h', w'] scores
        queue: Tensor | None = None,  # [C, T, D]
    ) -> Tensor:
        """The loss of the batch, a scalar; see the class."""
        check_batch(feats, labels, predict, None, names=("feats", "predict"))
        if queue is not None:
            checks.tensor("queue", queue, "[C, T, D]", "floating")
            checks.size("queue", queue, 2, feats.shape[1], "channels of feats")
            checks.same_device("queue", queue, "feats", feats)
        height, width = feats.shape[2:]
        labels = labels_on_grid(labels, height, width, self.num_classes, self.ignore_index)
        predictions = predictions_on_grid(predict, height, width)
        seed = draws.step_seed(self.seed, self.step)
        sizes = (self.max_samples, self.max_views, self.max_views + 1)
        pixel, anchor_labels = draw_anchors(labels, predictions, *sizes, self.num_classes, seed)
        keys = key_labels = None
        if queue is not None:
            keys = queue.flatten(0, 1)
            classes = torch.arange(queue.shape[0], device=queue.device)
            key_labels = classes.repeat_interleave(queue.shape[1])
            check_keys("queue", keys, key_labels)
        pairs = (gather_pixels(feats, pixel), anchor_labels, keys, key_labels)
        settings = Settings(EVERYTHING, self.temperature, None, False)
        rows = contrast_rows(*pairs, None, settings, seed)
        loss = rows.loss.sum() / rows.counted.sum().clamp(min=1)
        if self.training:
            self.step.add_(1)
        return loss * self.scale
