"""Cross-entropy against cross-entropy + PiCo on generated street scenes, in a few minutes.

    python examples/demo.py

Both trainings start from the same weights and see the same batches. Printed: IoU of each class
on scenes that neither has seen, what the contrast costs, how full the bank is. Drawn: predictions
and a map of the features of both networks. Exits with an error if a loss is not finite or if the
bank stays empty.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_picture import draw_picture
from metrics import class_iou, confusion_matrix, mean_iou
from network import SegmentationNetwork
from scenes import CLASSES, IGNORE, draw_scenes
from torch import Tensor, nn
from tqdm import tqdm

import pico_fast

# test scenes are numbered from here, training scenes from 0
TEST_FROM = 1_000_000


@dataclass
class Run:
    """What one training leaves behind."""

    network: nn.Module
    head: nn.Module | None  # None, like `joint`, after plain cross-entropy
    joint: nn.Module | None
    step_seconds: float  # median of the training steps
    predictions: Tensor | None = None  # [N, H, W] int64, of the test scenes
    features: Tensor | None = None  # [N, D, H/2, W/2], of the test scenes
    confusion: Tensor | None = None  # [C, C] int64


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of each of the two trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-scenes", type=int, default=48)
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--weight", type=float, default=0.1, help="of the contrast in the sum")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder")
    return parser.parse_args(arguments)


def build_pico(channels: int, options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Projection head and joint loss with the whole method: memory, semi-hard, synthesis."""
    head = pico_fast.ProjectionHead(channels, 64)
    criterion = pico_fast.PiCoLoss(
        num_classes=len(CLASSES),
        embedding_dim=64,
        sampling="semi_hard",
        num_positives=128,
        num_negatives=256,
        # the paper's sizes: ten pixels and one region for each image and class
        pixel_queue_size=10 * options.train_scenes,
        region_queue_size=options.train_scenes,
        max_samples=512,
        synthesis=pico_fast.Synthesis(negative_negative=32, negative_anchor=32, pool=64),
        ignore_index=IGNORE,
        seed=options.seed,
    )
    return head, pico_fast.JointLoss(criterion, options.weight, warmup_steps=options.steps // 10)


def batch_of(step: int, images: Tensor, labels: Tensor, options: argparse.Namespace):
    """Images and labels of a step, some mirrored: a function of seed and step alone."""
    random = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    chosen = torch.randperm(len(images), generator=random)[: options.batch_size]
    x, y = images[chosen], labels[chosen]
    mirrored = torch.rand(len(chosen), generator=random) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last), torch.where(
        mirrored[:, None, None], y.flip(2), y
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled pixels of [B, H, W], with logits brought to their resolution."""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def train(name: str, use_pico: bool, images: Tensor, labels: Tensor, options: argparse.Namespace) -> Run:
    """A network trained on images [N, 3, H, W] with labels [N, H, W]."""
    torch.manual_seed(options.seed)
    network = SegmentationNetwork(len(CLASSES), width=16, stem_stride=1)
    network = network.to(memory_format=torch.channels_last)
    head, joint = build_pico(network.feature_channels, options) if use_pico else (None, None)
    modules = nn.ModuleList(m for m in (network, head, joint) if m is not None)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)

    # dropout draws alike in both trainings, whatever the head's weights have drawn
    torch.manual_seed(options.seed)
    seconds = []
    bar = tqdm(range(options.steps), desc=f"{name:<20}", unit="step")
    for step in bar:
        x, y = batch_of(step, images, labels, options)
        begin = time.perf_counter()
        logits, features = network(x)
        if joint is None:
            loss = cross_entropy(logits, y)
        else:
            embeddings = head(features)
            loss = joint(logits, embeddings, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seconds.append(time.perf_counter() - begin)
        if not torch.isfinite(loss):
            raise SystemExit(f"demo failed: {name}: the loss is {loss.item()} at step {step}")
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return Run(network, head, joint, statistics.median(seconds))


@torch.no_grad()
def test(run: Run, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Fill in the run's predictions, features and confusion matrix on images it has not seen."""
    run.network.eval()
    predictions, features = [], []
    for x in images.split(options.batch_size):
        logits, tapped = run.network(x.contiguous(memory_format=torch.channels_last))
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
        predictions.append(logits.argmax(1))
        features.append(tapped)
    run.predictions, run.features = torch.cat(predictions), torch.cat(features)
    run.confusion = confusion_matrix(run.predictions, labels, len(CLASSES), IGNORE)
    if not torch.isfinite(run.features).all():
        raise SystemExit("demo failed: the features of the test scenes are not finite")


def contrast_seconds(run: Run, images: Tensor, labels: Tensor, options: argparse.Namespace) -> float:
    """Median time of the criterion alone: its forward with the bank's update, and its backward
    down to the embeddings, in the state that training has left."""
    run.network.train()
    seconds = []
    for step in range(10):
        x, y = batch_of(step, images, labels, options)
        with torch.no_grad():
            logits, features = run.network(x)
            embeddings = run.head(features)
        embeddings.requires_grad_()
        begin = time.perf_counter()
        run.joint.criterion(embeddings, y, logits).backward()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def report(plain: Run, pico: Run, contrast: float) -> None:
    """Print the table of classes, the cost and the bank's fill."""
    bank = pico.joint.criterion.bank
    columns = [100 * class_iou(run.confusion) for run in (plain, pico)]
    print("\nIoU in % on test scenes, and filled slots of the bank")
    print(f"{'':<10}{'CE':>7}{'CE+PiCo':>9}{'change':>8}{'pixels':>9}{'regions':>9}")
    rows = zip(CLASSES, *columns, bank.pixel_count.tolist(), bank.region_count.tolist(), strict=True)
    for name, before, after, pixels, regions in rows:
        change = after - before
        print(f"{name:<10}{before:7.1f}{after:9.1f}{change:+8.1f}{pixels:9d}{regions:9d}")
    before, after = (100 * mean_iou(run.confusion) for run in (plain, pico))
    print(f"{'mean':<10}{before:7.1f}{after:9.1f}{after - before:+8.1f}")
    print(
        f"\nOne training step: {1e3 * plain.step_seconds:.0f} ms with cross-entropy,"
        f" {1e3 * pico.step_seconds:.0f} ms with PiCo."
        f"\nThe contrast takes {1e3 * contrast:.0f} ms of it,"
        f" {100 * contrast / pico.step_seconds:.0f} %: the criterion's forward, its bank update and"
        "\nits backward to the embeddings, timed alone; the projection head is not in it."
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    images, labels = draw_scenes(options.seed, options.train_scenes)
    unseen, truth = draw_scenes(options.seed, options.test_scenes, first=TEST_FROM)
    runs = {}
    for name, use_pico in (("cross-entropy", False), ("cross-entropy + PiCo", True)):
        runs[name] = train(name, use_pico, images, labels, options)
        test(runs[name], unseen, truth, options)
    plain, pico = runs.values()

    bank = pico.joint.criterion.bank
    if int(bank.pixel_count.sum()) == 0 or int(bank.region_count.sum()) == 0:
        raise SystemExit("demo failed: the bank is still empty after training")
    report(plain, pico, contrast_seconds(pico, images, labels, options))
    picture = options.output / "demo.png"
    draw_picture(
        picture,
        unseen,
        truth,
        {name: run.predictions for name, run in runs.items()},
        {name: run.features for name, run in runs.items()},
        {name: mean_iou(run.confusion) for name, run in runs.items()},
    )
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
