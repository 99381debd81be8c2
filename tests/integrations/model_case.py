"""What a model of the tests is: how it is built, where its tap belongs, how it is called in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 4
SIZE = 64


def scores_of(outputs: Any) -> Tensor:
    """Scores [B, C, h, w] of what a model returns: a tensor, torchvision's dict, transformers' outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["out"] if "out" in outputs else outputs["logits"]


def call(
    model: nn.Module,
    images: Tensor,  # [B, 3, H, W]
    labels: Tensor,  # [B, H, W] int64
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, C, h, w], and None: the model has no segmentation loss that has to be its own."""
    return scores_of(model(images)), None


@dataclass(frozen=True)
class Case:
    """A model with random weights, small where its library lets it be."""

    name: str  # as docs/models.md has it
    library: str
    build: Callable[[], nn.Module]
    tap: str  # what attach finds
    stride: int  # of the embeddings
    # scores, and the model's own segmentation loss or None
    call: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor | None]] = call

    @property
    def key(self) -> str:
        return f"{self.library}: {self.name}"


def draw_batch(images: int = 4, size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [B, 3, size, size] whose colour tells the class, and labels with pixels to leave out."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, CLASSES, (images, 4, 4), generator=g)
    labels = blocks.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    colours = torch.randn(CLASSES, 3, generator=g)[labels].permute(0, 3, 1, 2)
    pixels = colours + 0.3 * torch.randn(images, 3, size, size, generator=g)
    labels[:, : size // 16] = 255
    return pixels, labels
