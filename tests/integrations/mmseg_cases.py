"""Models of mmsegmentation from small configurations and random weights."""

from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from model_case import CLASSES, SIZE, Case
from torch import nn

register_all_modules()

NORM = {"type": "BN", "requires_grad": True}
# what every decode head takes
HEAD = {"num_classes": CLASSES, "norm_cfg": NORM, "align_corners": False}


def _stage(branches: int, block: str = "BASIC", first: int = 8) -> dict:
    return {
        "num_modules": 1,
        "num_branches": branches,
        "block": block,
        "num_blocks": (1,) * branches,
        "num_channels": tuple(first * 2**i for i in range(branches)),
    }


HRNET = {
    "type": "HRNet",
    "norm_cfg": NORM,
    "extra": {
        "stage1": _stage(1, "BOTTLENECK", 16),
        "stage2": _stage(2),
        "stage3": _stage(3),
        "stage4": _stage(4),
    },
}
BRANCHES = {
    "in_channels": [8, 16, 32, 64],
    "in_index": (0, 1, 2, 3),
    "input_transform": "resize_concat",
    "dropout_ratio": -1,
}
FCN = {
    "type": "FCNHead",
    "channels": 120,
    "kernel_size": 1,
    "num_convs": 1,
    "concat_input": False,
    **BRANCHES,
    **HEAD,
}
OCR = {"type": "OCRHead", "channels": 64, "ocr_channels": 32, **BRANCHES, **HEAD}
RESNET = {
    "type": "ResNetV1c",
    "depth": 18,
    "base_channels": 16,
    "stem_channels": 16,
    "out_indices": (0, 1, 2, 3),
    "dilations": (1, 1, 2, 4),
    "strides": (1, 2, 1, 1),
    "norm_cfg": NORM,
    "contract_dilation": True,
}
ASPP = {
    "in_channels": 128,
    "in_index": 3,
    "channels": 32,
    "dilations": (1, 3, 6),
    "dropout_ratio": 0.1,
    **HEAD,
}
MIT = {
    "type": "MixVisionTransformer",
    "embed_dims": 16,
    "num_layers": [1, 1, 1, 1],
    "num_heads": [1, 2, 3, 4],
    "patch_sizes": [7, 3, 3, 3],
    "sr_ratios": [8, 4, 2, 1],
    "out_indices": (0, 1, 2, 3),
}
VIT = {
    "type": "VisionTransformer",
    "img_size": (SIZE, SIZE),
    "patch_size": 8,
    "embed_dims": 48,
    "num_layers": 3,
    "num_heads": 3,
    "out_indices": (2,),
    "mlp_ratio": 2,
    "final_norm": True,
}
SWIN = {
    "type": "SwinTransformer",
    "pretrain_img_size": SIZE,
    "embed_dims": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "window_size": 4,
}


# as they are given to the registry, by name
CONFIGS: dict[str, dict] = {}


def _case(name: str, stride: int, backbone: dict, *heads: dict, **more: str) -> Case:
    config = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": heads[0]}
    if len(heads) > 1:
        config |= {
            "type": "CascadeEncoderDecoder",
            "decode_head": list(heads),
            "num_stages": len(heads),
        }
    CONFIGS[name] = config
    tap = more.get("tap", "decode_head.conv_seg")

    def build() -> nn.Module:
        return MODELS.build(config)

    return Case(name, "mmsegmentation", build, tap, stride)


CASES = (
    _case("HRNet", 4, HRNET, FCN),
    _case("OCRNet, HRNet", 4, HRNET, FCN, OCR, tap="decode_head.1.conv_seg"),
    _case(
        "Segmenter, ViT",
        8,
        VIT,
        {
            "type": "SegmenterMaskTransformerHead",
            "in_channels": 48,
            "channels": 48,
            "num_classes": CLASSES,
            "num_layers": 2,
            "num_heads": 3,
            "embed_dims": 48,
            "dropout_ratio": 0.0,
        },
        tap="decode_head.decoder_norm:output",
    ),
    _case("DeepLabV3, ResNet", 8, RESNET, {"type": "ASPPHead", **ASPP}),
    _case(
        "DeepLabV3+, ResNet",
        4,
        RESNET,
        {
            "type": "DepthwiseSeparableASPPHead",
            "c1_in_channels": 16,
            "c1_channels": 16,
            **ASPP,
        },
    ),
    _case(
        "SegFormer, MiT",
        4,
        MIT,
        {
            "type": "SegformerHead",
            "in_channels": [16, 32, 48, 64],
            "in_index": [0, 1, 2, 3],
            "channels": 64,
            **HEAD,
        },
    ),
    _case(
        "UPerNet, Swin",
        4,
        SWIN,
        {
            "type": "UPerHead",
            "in_channels": [16, 32, 64, 128],
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": 32,
            **HEAD,
        },
    ),
)
