"""The projection head: features of a segmentation network to embeddings of unit length."""

from torch import Tensor, nn
from torch.nn.functional import normalize

from pico_fast import checks


class ProjectionHead(nn.Sequential):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution, unit length along the channels.

    Args:
        in_channels: channels of the features.
        embedding_dim: D, channels of the embeddings.

    Called with features [B, in_channels, H, W] it returns embeddings [B, D, H, W] in the dtype of its
    last convolution; the lengths are computed in float32. It is used in training only.

    Source: Wang et al., ICCV 2021, section 3.3; D = 256.
    """

    def __init__(self, in_channels: int, embedding_dim: int = 256) -> None:
        checks.integer("in_channels", in_channels, 1)
        checks.integer("embedding_dim", embedding_dim, 1)
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, embedding_dim, 1),
        )

    def forward(
        self,
        features: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:
        """Embeddings [B, D, H, W] of unit length."""
        raw = super().forward(features)
        wide = raw if raw.dtype.itemsize >= 4 else raw.float()
        return normalize(wide, dim=1).to(raw.dtype)
