"""A small DeepLabV3+ for training from random weights: residual encoder, ASPP, decoder at 1/4.

`forward` returns the logits and the features they are computed from: the features before the
classifier are where a projection head for PiCo belongs, in this network as in any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, if wanted, ReLU; keeps H and W at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        activation: bool = True,
    ):
        padding = dilation * (kernel // 2)
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if activation else []))


class ResidualBlock(nn.Module):
    """The two 3x3 convolutions of a ResNet's basic block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(in_channels, out_channels, stride=stride, dilation=dilation),
            ConvNorm(out_channels, out_channels, dilation=dilation, activation=False),
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity()
            if same
            else ConvNorm(in_channels, out_channels, kernel=1, stride=stride, activation=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, H/stride, W/stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


class ASPP(nn.Module):
    """Atrous spatial pyramid: one 1x1, three dilated 3x3 and the mean over the image, mixed."""

    def __init__(self, in_channels: int, out_channels: int, rates: tuple[int, ...] = (3, 6, 9)):
        super().__init__()
        self.branches = nn.ModuleList([ConvNorm(in_channels, out_channels, kernel=1)])
        self.branches.extend(ConvNorm(in_channels, out_channels, dilation=r) for r in rates)
        # one value per image and channel: too few for BatchNorm
        self.image_mean = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU())
        self.mix = nn.Sequential(
            ConvNorm((len(rates) + 2) * out_channels, out_channels, kernel=1), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, H, W]."""
        pooled = self.image_mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.mix(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class SegmentationNetwork(nn.Module):
    """Logits and features of images.

    `width` scales all channels: 64 gives ResNet-18's, 16 trains on a CPU. With `stem_stride=2`
    features and logits are at 1/4 of the image as usual; 1 keeps them at 1/2, for small images.
    """

    def __init__(self, num_classes: int, width: int = 64, stem_stride: int = 2, blocks: int = 2):
        super().__init__()
        # with fewer channels than a vector register holds, oneDNN's backward of a strided 1x1
        # convolution in channels_last writes past its memory (uxlfoundation/oneDNN issue 6035)
        if width < 16:
            raise ValueError(f"width: expected 16 or more, got {width}")
        self.stem = ConvNorm(3, width, stride=stem_stride)
        self.quarter = self._stage(width, width, blocks, stride=2)
        self.eighth = self._stage(width, 2 * width, blocks, stride=2)
        self.sixteenth = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.aspp = ASPP(4 * width, 2 * width)
        self.skip = ConvNorm(width, width, kernel=1)
        self.decoder = nn.Sequential(ConvNorm(3 * width, 2 * width), ConvNorm(2 * width, 2 * width))
        self.classifier = nn.Conv2d(2 * width, num_classes, 1)
        self.feature_channels = 2 * width

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(in_channels, out_channels, stride)
        rest = (ResidualBlock(out_channels, out_channels) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes, H/4, W/4] and features [B, 2 width, H/4, W/4] of [B, 3, H, W]."""
        fine = self.quarter(self.stem(images))
        coarse = self.aspp(self.sixteenth(self.eighth(fine)))
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        features = self.decoder(torch.cat([coarse, self.skip(fine)], dim=1))
        return self.classifier(features), features
