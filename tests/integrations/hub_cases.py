"""Models of torchvision, segmentation_models_pytorch and transformers, from random weights."""

import segmentation_models_pytorch as smp
import torch
import transformers
from model_case import CLASSES, SIZE, Case
from torch import Tensor, nn
from torchvision.models import segmentation

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _swin() -> transformers.SwinConfig:
    return transformers.SwinConfig(
        image_size=SIZE,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=STAGES,
    )


def _resnet() -> transformers.ResNetConfig:
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=STAGES,
    )


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=64,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _upernet(backbone: transformers.PreTrainedConfig) -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=64, num_labels=CLASSES, use_auxiliary_head=False
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(num_labels=CLASSES, depth_multiplier=0.5, output_stride=8)
    return transformers.MobileNetV2ForSemanticSegmentation(config)


def _maskformer() -> nn.Module:
    decoder = transformers.DetrConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_queries=12,
        backbone_config=_resnet(),
    )
    config = transformers.MaskFormerConfig(
        backbone_config=_swin(),
        decoder_config=decoder,
        fpn_feature_size=64,
        mask_feature_size=64,
        num_labels=CLASSES,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        encoder_feedforward_dim=64,
        decoder_layers=3,
        dim_feedforward=64,
        num_attention_heads=4,
        num_queries=12,
        train_num_points=256,
        num_labels=CLASSES,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def call_masks(
    model: nn.Module,
    images: Tensor,  # [B, 3, H, W]
    labels: Tensor,  # [B, H, W] int64
) -> tuple[Tensor, Tensor | None]:
    """Semantic scores [B, C, h, w] from classes and masks of the queries, and the model's own loss.

    That loss matches queries with the masks of the classes, and has no need of the scores; the contrast
    looks at them to find anchors that are predicted wrongly.
    """
    classes = [image[image < CLASSES].unique() for image in labels]
    masks = [
        (image == present[:, None, None]).float() for image, present in zip(labels, classes, strict=True)
    ]
    outputs = model(images, mask_labels=masks, class_labels=classes)
    shares = outputs.class_queries_logits.softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", shares, outputs.masks_queries_logits.sigmoid())
    return scores, outputs.loss


TORCHVISION = (
    Case(
        "DeepLabV3, ResNet-50",
        "torchvision",
        lambda: segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES),
        "classifier.4",
        8,
    ),
    Case(
        "DeepLabV3, MobileNetV3",
        "torchvision",
        lambda: segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=CLASSES
        ),
        "classifier.4",
        16,
    ),
)


def _smp(name: str, model: type[nn.Module], encoder: str, **options: int) -> Case:
    def build() -> nn.Module:
        return model(encoder, encoder_weights=None, classes=CLASSES, **options)

    stride = 1 if model is smp.Unet else 4
    return Case(name, "segmentation_models_pytorch", build, "segmentation_head.0", stride)


SMP = (
    _smp("DeepLabV3+, ResNet-18", smp.DeepLabV3Plus, "resnet18"),
    _smp("DeepLabV3+, MobileNetV2", smp.DeepLabV3Plus, "mobilenet_v2"),
    _smp("UPerNet, ResNet-18", smp.UPerNet, "resnet18", decoder_channels=64),
    _smp("UPerNet, ConvNeXt of timm", smp.UPerNet, "tu-convnext_atto", decoder_channels=64),
    _smp("SegFormer, MiT-B0", smp.Segformer, "mit_b0", decoder_segmentation_channels=64),
    _smp("FPN, HRNet of timm", smp.FPN, "tu-hrnet_w18_small"),
    _smp("Unet, ResNet-18", smp.Unet, "resnet18"),
)

MASKS = "model.pixel_level_module.decoder.mask_projection:output"
TRANSFORMERS = tuple(
    Case(name, "transformers", build, *more)
    for name, build, *more in (
        ("SegFormer, MiT", _segformer, "decode_head.classifier", 4),
        ("UPerNet, ResNet", lambda: _upernet(_resnet()), "decode_head.classifier", 4),
        ("UPerNet, Swin", lambda: _upernet(_swin()), "decode_head.classifier", 4),
        (
            "DeepLabV3+, MobileNetV2",
            _mobilenet,
            "segmentation_head.classifier.convolution",
            8,
        ),
        ("MaskFormer, Swin", _maskformer, MASKS, 4, call_masks),
        ("Mask2Former, Swin", _mask2former, MASKS, 4, call_masks),
    )
)
CASES = (*TORCHVISION, *SMP, *TRANSFORMERS)
