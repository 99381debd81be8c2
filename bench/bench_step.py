"""The whole criterion step at every data set's memory, and its share of a training step."""

import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import CHANNELS, COCO_STUFF
from measure import launches, operations
from results import Case
from runs import Run
from torch import nn

import pico_fast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

BATCH = {"cpu": (4, 64, 64), "cuda": (16, 128, 128)}


# the default, and what else is offered
OURS = {
    "pico_fast": {},
    "pico_fast, random positives": {"positives": "random"},
    "pico_fast, bounded": {"sampling": "bounded"},
    "pico_fast, random": {"sampling": "random"},
}


def full(criterion: pico_fast.PiCoLoss) -> pico_fast.PiCoLoss:
    """The criterion with every slot of its bank filled with unit vectors, as after many steps."""
    bank = criterion.bank
    for rows in bank.storage:
        rows.copy_(nn.functional.normalize(torch.randn(rows.shape, device=rows.device), dim=1))
    bank.pixel_count.fill_(bank.pixel_queue_size)
    bank.region_count.fill_(bank.region_queue_size)
    return criterion


def step(criterion: pico_fast.PiCoLoss, batch: cases.Images):
    """A call of forward, bank update and backward to the embeddings."""
    leaf = batch.embeddings.detach().requires_grad_()

    def run():
        loss = criterion(leaf, batch.labels, batch.predictions)
        return torch.autograd.grad(loss, leaf)

    return run


@pytest.mark.parametrize("data_set", cases.DATA_SETS, ids=lambda d: d.name)
def test_criterion_step(compare, device, results, data_set):
    """The memory is full and of the paper's size, in bfloat16; the default beside other samplings."""
    batch = cases.images(data_set, *BATCH[device], device)
    sizes = {
        "pixel_queue_size": data_set.pixels,
        "region_queue_size": data_set.regions or 1_000,
    }
    # one bank for all: it is nearly a gigabyte, and what a step stores changes none of its sizes
    runs, bank = {}, None
    for name, options in OURS.items():
        criterion = pico_fast.PiCoLoss(data_set.classes, **options, **sizes).to(device)
        criterion.bank = bank = bank or full(criterion).bank
        runs[name] = Run(step(criterion, batch))
    detail = " x ".join(map(str, BATCH[device]))
    keys = data_set.classes * sum(sizes.values())
    compare(Case("criterion step", data_set.name, keys, 1024, detail=detail), runs)
    if data_set is COCO_STUFF:
        results.counts["operations of a criterion step"] = operations(runs["pico_fast"].call)
        if device == "cuda":
            results.counts["kernels of a criterion step"] = launches(runs["pico_fast"].call)


def small_network(classes: int) -> tuple[nn.Module, int, int]:
    """The examples' DeepLabV3+ with ResNet-18's width; its feature channels and output stride."""
    from network import SegmentationNetwork

    network = SegmentationNetwork(classes)
    return network, network.feature_channels, 4


class WithFeatures(nn.Module):
    """A torchvision segmentation network that gives logits and the features before its classifier."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.backbone, head = network.backbone, network.classifier
        self.neck, self.classifier = head[:-1], head[-1]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, H, W] to logits [B, C, H/8, W/8] and features [B, 256, H/8, W/8]."""
        features = self.neck(self.backbone(images)["out"])
        return self.classifier(features), features


def deeplab_r101(classes: int) -> tuple[nn.Module, int, int]:
    """torchvision's DeepLabV3 on ResNet-101, random weights; feature channels and output stride."""
    from torchvision.models.segmentation import deeplabv3_resnet101

    plain = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=classes)
    return WithFeatures(plain), 256, 8


# network, data set, images and their size; a CPU keeps CamVid's bank, which it can look through
NETWORKS = {
    "cpu": ((small_network, cases.CAMVID, 8, 256),),
    "cuda": ((deeplab_r101, COCO_STUFF, 16, 512), (small_network, COCO_STUFF, 16, 512)),
}


@pytest.mark.parametrize("place", (0, 1))
def test_training_step(compare, device, place):
    """Forward and backward of a network with cross-entropy, and the same with the criterion."""
    if place >= len(NETWORKS[device]):
        pytest.skip("one network on a CPU")
    make, data_set, batch_size, size = NETWORKS[device][place]
    try:
        network, channels, stride = make(data_set.classes)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{make.__name__} cannot be made here: {error}")
    network = network.to(device, memory_format=torch.channels_last)
    head = pico_fast.ProjectionHead(channels, CHANNELS).to(device)
    images = torch.randn(batch_size, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = cases.images(data_set, batch_size, size // stride, size // stride, device).labels
    sizes = {"pixel_queue_size": data_set.pixels, "region_queue_size": data_set.regions or 1_000}
    joints = {}
    for name, options in OURS.items():
        criterion = pico_fast.PiCoLoss(data_set.classes, **options, **sizes).to(device)
        joints[name] = pico_fast.JointLoss(full(criterion)).to(device)
    parameters = [*network.parameters(), *head.parameters()]

    def train(name: str | None):
        def run():
            # a CPU's convolutions are faster in float32 where it does not multiply bfloat16
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits, features = network(images)
                embeddings = head(features) if name else None
            if name:
                loss = joints[name](logits.float(), embeddings, labels)
            else:
                loss = nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            for parameter in parameters:
                parameter.grad = None

        return run

    detail = f"{make.__name__.replace('_', ' ')}, {batch_size} x {size} x {size}"
    runs = {name: Run(train(name)) for name in joints}
    runs["cross-entropy alone"] = Run(train(None))
    medians = compare(Case("training step", data_set.name, detail=detail), runs)
    if device == "cuda":
        assert medians["pico_fast"] <= 1.1 * medians["cross-entropy alone"]
