"""A small network to tap, a loss to train it with, and the gradients that come out."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pico_fast

CLASSES, DIM, CHANNELS = 4, 8, 16
IN_BATCH = {"pixel_queue_size": 0, "region_queue_size": 0}


class Network(nn.Module):
    """Features at half the image's size, and a classifier; or both inside a checkpoint."""

    def __init__(self, checkpointed: str = "no"):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.classifier = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.checkpointed = checkpointed

    def _all(self, images):
        return self.classifier(self.backbone(images))

    def forward(self, images):
        if self.checkpointed == "no":
            return self._all(images)
        return checkpoint(self._all, images, use_reentrant=self.checkpointed == "reentrant")


def seeded(build, *args):
    torch.manual_seed(0)
    return build(*args)


def make(path="classifier", model=None, **options):
    model = seeded(Network) if model is None else model
    torch.manual_seed(0)
    return model, pico_fast.attach(model, path, DIM, **options)


def joint(**options):
    small = {
        "sampling": "random",
        "num_positives": 8,
        "num_negatives": 16,
        "max_samples": 64,
        "pixel_queue_size": 20,
        "region_queue_size": 4,
    }
    return pico_fast.JointLoss(pico_fast.PiCoLoss(CLASSES, DIM, **(small | options)), 0.5)


def batch(seed=0, images=2, size=16):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images, size, size), generator=g)
    return torch.randn(images, 3, size, size, generator=g), labels


def gradients(model, tap, images, labels, wrapper=None, **options):
    """Gradients of a step whose contrast is among the pixels of the batch, by name.

    The step runs through the wrapper, if the model is in one.
    """
    model.zero_grad()
    logits = (model if wrapper is None else wrapper)(images)
    joint(**IN_BATCH, **options)(logits, tap.embeddings(), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(first, second, atol=1e-6):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=atol), name
