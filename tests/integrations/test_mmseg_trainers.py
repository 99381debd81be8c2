"""mmsegmentation's trainer of docs/models.md, run as printed, and each head with the contrast in it."""

import copy
import sys

import pytest
import torch
import trainers
from model_case import draw_batch

sys.path.insert(0, str(trainers.ROOT / "examples"))

import mmseg_pico
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg_cases import CONFIGS

HEADS = [name for name in trainers.PAGE.split("`") if name.startswith("PiCo") and "Head" in name]
CONTRAST = {
    "type": "PiCoLoss",
    "embedding_dim": 32,
    "sampling": "random",
    "pixel_queue_size": 0,
    "region_queue_size": 0,
}


@pytest.mark.parametrize("command", [command for command in trainers.COMMANDS if "mmseg" in command])
def test_command_of_the_page(command, tmp_path):
    printed = trainers.run(command, tmp_path)
    number = r"([\d.-]+)"
    trainers.check(
        printed,
        rf" loss: {number} .*decode.positive_similarity: {number} "
        rf" decode.negative_similarity: {number}",
    )
    assert "decode.loss_contrast" in printed and "mIoU" in printed


def test_the_page_names_every_head():
    heads = {name for name in MODELS.module_dict if name.startswith("PiCo") and "Head" in name}
    assert heads == set(HEADS)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "Segmenter, ViT"])
def test_head_with_the_contrast_among_its_losses(name):
    config = copy.deepcopy(CONFIGS[name])
    heads = config["decode_head"]
    head = heads[-1] if isinstance(heads, list) else heads
    head |= {"type": f"PiCo{head['type']}", "contrast": CONTRAST, "contrast_weight": 0.5}
    assert head["type"] in HEADS
    torch.manual_seed(0)
    model = MODELS.build(config).train()
    images, labels = draw_batch()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=image[None])) for image in labels]

    losses = model(images, samples, mode="loss")
    total, logged = model.parse_losses(losses)
    total.backward()
    parts = sum(value for key, value in logged.items() if "loss_" in key)
    assert torch.allclose(parts, total) and logged["loss"] == total
    (contrast,) = (value for key, value in logged.items() if key.endswith("loss_contrast"))
    assert contrast > 0
    assert sum(key.endswith("_similarity") for key in logged) == 2
    used = model.decode_head[-1] if isinstance(heads, list) else model.decode_head
    assert used.pico_fast_tap.head[0].weight.grad.abs().sum() > 0
    assert isinstance(used, mmseg_pico.ContrastMixin)
