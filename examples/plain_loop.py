"""Train a segmentation model with PiCo in a plain loop, on generated scenes.

    python examples/plain_loop.py --steps 60
    python examples/plain_loop.py --steps 30 --model deeplabv3

"deeplabv3" is torchvision's, with a MobileNetV3. What PiCo adds are the lines with `tap` and `joint`.
"""

import argparse
from typing import Any

import torch
from network import SegmentationNetwork
from scenes import CLASSES, IGNORE, draw_scenes
from torch import Tensor, nn

import pico_fast


def build(name: str) -> tuple[nn.Module, str | None]:
    """The model, and the path of its classifier where `attach` does not know it."""
    if name == "network":
        return SegmentationNetwork(len(CLASSES), width=16, stem_stride=1), "classifier"
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=len(CLASSES)), None


def logits_of(outputs: Any) -> Tensor:
    """Logits [B, C, h, w]: torchvision returns them in a dict, the network with its features."""
    return outputs["out"] if isinstance(outputs, dict) else outputs[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("network", "deeplabv3"), default="network")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    model, path = build(options.model)
    tap = pico_fast.attach(model, path, embedding_dim=64)  # before the optimizer is made
    criterion = pico_fast.PiCoLoss(
        num_classes=len(CLASSES),
        embedding_dim=64,
        sampling="random",
        num_positives=64,
        num_negatives=256,
        max_samples=256,
        pixel_queue_size=200,
        region_queue_size=50,
    )
    joint = pico_fast.JointLoss(criterion, weight=0.1).to(options.device)
    model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    images, labels = (data.to(options.device) for data in draw_scenes(seed=0, count=32, size=64))
    for step in range(1, options.steps + 1):
        chosen = torch.randperm(len(images), device=options.device)[:8]
        logits = logits_of(model(images[chosen]))
        loss = joint(logits, tap.embeddings(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps:
            same, other = (criterion.stats[f"{s}_similarity"] for s in ("positive", "negative"))
            print(f"step {step}: loss {loss:.3f}, similarity {same:.2f}, to others {other:.2f}")

    bare = tap.detach().eval()
    with torch.no_grad():
        logits = logits_of(bare(images))
    scores = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
    right = (scores.argmax(1) == labels)[labels != IGNORE].float().mean()
    print(f"without the tap: {right:.0%} of the training pixels are right")


if __name__ == "__main__":
    main()
