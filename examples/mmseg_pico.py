"""PiCo for mmsegmentation: decode heads with the contrast in their loss, and the loss in the registry.

A configuration imports this file and puts "PiCo" before the name of its decode head, as
mmseg_pico_config.py does:

    custom_imports = dict(imports=["mmseg_pico"])
    decode_head = dict(type="PiCoASPPHead", contrast=dict(type="PiCoLoss", sampling="random"), ...)

The bank is part of the model: it moves, is saved and resumed with it. On several GPUs all share one.
"""

from typing import Any

from mmseg.models.decode_heads import (
    ASPPHead,
    DepthwiseSeparableASPPHead,
    FCNHead,
    OCRHead,
    SegformerHead,
    UPerHead,
)
from mmseg.registry import MODELS
from torch import Tensor

import pico_fast

MODELS.register_module(module=pico_fast.PiCoLoss)


class ContrastMixin:
    """A decode head whose losses have the contrast among them.

    Args:
        contrast: config of the criterion; number of classes and ignore_index are the head's.
        contrast_weight: of the contrast in the sum.
    """

    def __init__(self, contrast: dict, contrast_weight: float = 0.1, **kwargs: Any):
        super().__init__(**kwargs)
        own = {"num_classes": self.num_classes, "ignore_index": self.ignore_index}
        self.contrast = MODELS.build({**own, **contrast})
        self.contrast_weight = contrast_weight
        # the tap is self.pico_fast_tap from here on
        pico_fast.attach(self, "conv_seg", self.contrast.bank.embedding_dim)

    def loss_by_feat(
        self,
        seg_logits: Tensor,  # [B, C, h, w]
        batch_data_samples: list,
    ) -> dict[str, Tensor]:
        """The head's own losses, the contrast, and the similarities for the log."""
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        value = self.contrast(self.pico_fast_tap.embeddings(), labels, seg_logits)
        # mmengine adds up what is called a loss, and logs the rest
        losses["loss_contrast"] = self.contrast_weight * value
        for name in ("positive_similarity", "negative_similarity"):
            losses[name] = self.contrast.stats[name]
        return losses


for head in (ASPPHead, DepthwiseSeparableASPPHead, FCNHead, OCRHead, SegformerHead, UPerHead):
    name = f"PiCo{head.__name__}"
    MODELS.register_module(module=type(name, (ContrastMixin, head), {}))
