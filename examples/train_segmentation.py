"""Train a segmentation network from random weights, with or without PiCo.

    python examples/train_segmentation.py --data camvid --root PATH --loss pico
    python examples/train_segmentation.py --data folder --root PATH --num-classes 19 --loss ce

PATH holds images/{train,val}/NAME.* and labels/{train,val}/NAME.png, 8-bit class numbers.
What PiCo adds to a training script are the lines with `head` and `joint`. The IoU is counted
on all of val at the labels' own resolution.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint import load_checkpoint, save_checkpoint
from metrics import class_iou, confusion_matrix, mean_iou
from network import SegmentationNetwork
from segmentation_data import CAMVID_CLASSES, Augmentation, Evaluation, Folder, TrainingStream
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import pico_fast
from pico_fast.selection.options import SAMPLINGS

# where a run happens and what it writes, as opposed to what it computes
PLACES = ("root", "device", "threads", "workers", "checkpoint", "save_every", "resume", "output")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=("camvid", "folder"), required=True)
    data.add_argument("--root", type=Path, required=True, help="folder with images/ and labels/")
    data.add_argument("--num-classes", type=int, help="needed for --data folder")
    data.add_argument("--ignore-index", type=int, default=255)
    data.add_argument(
        "--hold-out",
        metavar="PREFIX",
        help="no training on these images of train; evaluated at the end",
    )
    data.add_argument("--size", type=int, nargs=2, default=(360, 480), metavar=("H", "W"))
    data.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"))
    data.add_argument("--workers", type=int, default=0, help="loader processes")

    model = parser.add_argument_group("network and schedule")
    model.add_argument("--width", type=int, default=64, help="channels of the first stage")
    model.add_argument("--stem-stride", type=int, choices=(1, 2), default=2)
    model.add_argument("--batch-size", type=int, default=8)
    length = model.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--epochs", type=int, help="default: 200")
    model.add_argument("--lr", type=float, default=1e-3)
    model.add_argument("--weight-decay", type=float, default=1e-2)
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--amp", nargs="?", const="bf16", default="off", choices=("off", "bf16", "fp16"))
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--threads", type=int, help="CPU threads; runs agree bit for bit at one count")

    pico = parser.add_argument_group("PiCo")
    pico.add_argument("--loss", choices=("ce", "pico"), default="pico")
    pico.add_argument("--weight", type=float, default=0.1, help="of the contrast in the sum")
    pico.add_argument("--warmup-steps", type=int, default=0, help="steps with contrast weight 0")
    pico.add_argument("--temperature", type=float, default=0.1)
    pico.add_argument("--sampling", choices=SAMPLINGS, default="semi_hard")
    pico.add_argument("--hard-fraction", type=float, default=0.1, help="pool of semi_hard")
    pico.add_argument("--num-positives", type=int, default=1024)
    pico.add_argument("--num-negatives", type=int, default=2048)
    pico.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=True)
    pico.add_argument("--synthesis-count", type=int, default=256, help="of each of the two kinds")
    pico.add_argument("--hard-anchors", action=argparse.BooleanOptionalAction, default=True)
    pico.add_argument("--max-samples", type=int, default=1024, help="anchors of a step")
    pico.add_argument("--pixel-queue-size", type=int, help="of each class; default: 10 per image")
    pico.add_argument("--region-queue-size", type=int, help="of each class; default: 1 per image")
    pico.add_argument("--embedding-dim", type=int, default=256)

    run = parser.add_argument_group("run")
    run.add_argument("--checkpoint", type=Path, help="file to save to and to resume from")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    run.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    run.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    run.add_argument("--output", type=Path, help="JSON file for the curve and the final IoU")
    options = parser.parse_args(arguments)

    if options.data == "camvid":
        options.num_classes = len(CAMVID_CLASSES)
    elif options.num_classes is None:
        parser.error("--data folder needs --num-classes")
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if options.amp == "fp16" and torch.device(options.device).type != "cuda":
        parser.error("--amp fp16 needs a CUDA device; use bf16")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result, as plain values."""
    values = {name: value for name, value in vars(options).items() if name not in PLACES}
    return {n: list(v) if isinstance(v, (tuple, list)) else v for n, v in values.items()}


class AnyAnchors(pico_fast.PiCoLoss):
    """PiCo that samples its anchors without looking at the predictions."""

    def forward(self, embeddings: Tensor, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        return super().forward(embeddings, labels, None)


def build_pico(options: argparse.Namespace, channels: int, images: int) -> tuple[nn.Module, nn.Module]:
    """Projection head and joint loss: all that PiCo adds to a network."""
    synthesis = None
    if options.synthesis:
        count = options.synthesis_count
        synthesis = pico_fast.Synthesis(negative_negative=count, negative_anchor=count)
    sizes = {"pixel_queue_size": 10 * images, "region_queue_size": images}
    sizes |= {n: getattr(options, n) for n in sizes if getattr(options, n) is not None}
    head = pico_fast.ProjectionHead(channels, options.embedding_dim)
    loss = pico_fast.PiCoLoss if options.hard_anchors else AnyAnchors
    criterion = loss(
        num_classes=options.num_classes,
        embedding_dim=options.embedding_dim,
        temperature=options.temperature,
        sampling=options.sampling,
        hard_fraction=options.hard_fraction,
        num_positives=options.num_positives,
        num_negatives=options.num_negatives,
        synthesis=synthesis,
        max_samples=options.max_samples,
        ignore_index=options.ignore_index,
        seed=options.seed,
        **sizes,
    )
    return head, pico_fast.JointLoss(criterion, options.weight, options.warmup_steps)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over labelled pixels of [B, H, W], with logits brought to their resolution."""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    # a batch without a labelled pixel has loss 0 rather than 0/0
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear rise over the first 3 %, then polynomial decay to 0."""
    rise = max(1, round(0.03 * steps))
    return (step + 1) / rise if step < rise else (1 - step / steps) ** 0.9


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader, options: argparse.Namespace) -> Tensor:
    """Confusion matrix [C, C] of all validation images."""
    network.eval()
    total = torch.zeros(options.num_classes, options.num_classes, dtype=torch.int64)
    for image, labels in loader:
        with autocast(options):
            logits, _ = network(image.to(options.device))
        logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
        predictions = logits.argmax(1).cpu()
        total += confusion_matrix(predictions, labels, options.num_classes, options.ignore_index)
    network.train()
    return total


def autocast(options: argparse.Namespace) -> torch.autocast:
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(options.device).type, dtype, enabled=options.amp != "off")


class Curve:
    """What a run has reached so far; saved with it, so that a resumed run writes the same curve."""

    def __init__(self, device: torch.device):
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self._loss_sum = torch.zeros((), device=device)
        self._steps = 0
        self._since = time.perf_counter()

    def count(self, loss: Tensor) -> None:
        """One step more; nothing is read back from the device here."""
        self._loss_sum = self._loss_sum + loss.detach()
        self._steps += 1

    def pause(self) -> float:
        """Stop the clock; the mean loss of the steps since the last point."""
        loss = float(self._loss_sum) / max(1, self._steps)
        self.seconds += time.perf_counter() - self._since
        return loss

    def resume(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def add(self, **point: float) -> None:
        """A point of the curve; the mean loss starts anew."""
        self.points.append(point | {"seconds": self.seconds})
        self._loss_sum, self._steps = torch.zeros_like(self._loss_sum), 0

    def state_dict(self) -> dict[str, Any]:
        names = ("points", "seconds", "_loss_sum", "_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._loss_sum.device
        vars(self).update(state)
        self._loss_sum = self._loss_sum.to(device)


def build(options: argparse.Namespace, images: int, steps: int) -> dict[str, Any]:
    """Network, loss and optimizer, by name: all that a checkpoint holds."""
    device = torch.device(options.device)
    # the network comes first, so that it starts from the same weights with either loss
    torch.manual_seed(options.seed)
    network = SegmentationNetwork(options.num_classes, options.width, options.stem_stride)
    parts: dict[str, Any] = {"network": network.to(device, memory_format=torch.channels_last)}
    if options.loss == "pico":
        head, joint = build_pico(options, network.feature_channels, images)
        parts |= {"head": head.to(device), "joint": joint.to(device)}
    weights = [w for part in parts.values() for w in part.parameters()]
    optimizer = torch.optim.AdamW(weights, options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    parts |= {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    return parts | {"curve": Curve(device)}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say; what `--output` receives."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    train_set = Folder(options.root, "train", without=options.hold_out)
    val_set, held_out = Folder(options.root, "val"), None
    if options.hold_out:
        held_out = Folder(options.root, "train", only=options.hold_out)
    per_epoch = math.ceil(len(train_set) / options.batch_size)
    steps = options.steps or (options.epochs or 200) * per_epoch
    parts, settings = build(options, len(train_set), steps), settings_of(options)
    network, head, joint = (parts.get(name) for name in ("network", "head", "joint"))
    optimizer, scheduler, scaler = (parts[n] for n in ("optimizer", "scheduler", "scaler"))
    curve = parts["curve"]

    # dropout draws alike with either loss, whatever its head has drawn
    torch.manual_seed(options.seed)
    start = load_checkpoint(options.checkpoint, parts, settings, device) if options.resume else 0
    size, scale = tuple(options.size), tuple(options.scale)
    stream = TrainingStream(train_set, size, options.seed, options.ignore_index, Augmentation(scale))
    # a generator of their own keeps the loaders from drawing from the one that is checkpointed
    common = {"num_workers": options.workers, "generator": torch.Generator()}
    draws = range(start * options.batch_size, steps * options.batch_size)
    loader = DataLoader(
        stream, options.batch_size, sampler=draws, pin_memory=device.type == "cuda", **common
    )
    val_loader = DataLoader(Evaluation(val_set, size), batch_size=1, **common)

    if start >= steps:
        confusion = evaluate(network, val_loader, options)
    curve.resume()
    bar = tqdm(loader, initial=start, total=steps, desc=options.loss, unit="step", mininterval=1)
    for step, (images, labels) in enumerate(bar, start + 1):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(options):
            logits, features = network(images)
            embeddings = None if head is None else head(features)
        logits = logits.float()
        if joint is None:
            loss = cross_entropy(logits, labels, options.ignore_index)
        else:
            loss = joint(logits, embeddings, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        curve.count(loss)
        evaluates = step % options.eval_every == 0 or step == steps
        saves = options.checkpoint and (step % options.save_every == 0 or step == steps)
        if evaluates or saves:
            mean_loss = curve.pause()
            if not math.isfinite(mean_loss):
                raise SystemExit(f"the loss is no longer finite at step {step}")
            if evaluates:
                confusion = evaluate(network, val_loader, options)
                miou = mean_iou(confusion)
                curve.add(step=step, loss=mean_loss, miou=miou, **last_step(joint))
                bar.set_postfix(loss=f"{mean_loss:.3f}", mIoU=f"{100 * miou:.1f}")
            if saves:
                save_checkpoint(options.checkpoint, parts, step, settings, device)
            curve.resume()
    found = summary(options, steps, len(train_set), curve, confusion)
    if held_out:
        held_loader = DataLoader(Evaluation(held_out, size), batch_size=1, **common)
        of_held_out = evaluate(network, held_loader, options)
        scores = {"iou": named_iou(options, of_held_out), "miou": mean_iou(of_held_out)}
        found["held_out"] = {"images": len(held_out), **scores}
    return found


def last_step(joint: nn.Module | None) -> dict[str, float]:
    """What the criterion saw in its last step, as numbers."""
    if joint is None:
        return {}
    return {name: float(value.float().mean()) for name, value in joint.criterion.stats.items()}


def named_iou(options: argparse.Namespace, confusion: Tensor) -> dict[str, float | None]:
    """IoU by class name; a class that occurs nowhere has none."""
    names = CAMVID_CLASSES if options.data == "camvid" else range(options.num_classes)
    values = class_iou(confusion).tolist()
    return {
        str(name): None if math.isnan(value) else value for name, value in zip(names, values, strict=True)
    }


def summary(
    options: argparse.Namespace, steps: int, images: int, curve: Curve, confusion: Tensor
) -> dict[str, Any]:
    """The run as `--output` keeps it: settings, machine, curve and the final IoU of each class."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    return {
        "settings": settings_of(options),
        "steps": steps,
        "train_images": images,
        "machine": {
            "device": torch.cuda.get_device_name(device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "pico_fast": pico_fast.__version__ if options.loss == "pico" else None,
        },
        "seconds": curve.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "curve": curve.points,
        "iou": named_iou(options, confusion),
        "miou": mean_iou(confusion),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    result = train(options)
    print(f"{'class':<16} IoU %")
    for name, value in result["iou"].items():
        print(f"{name:<16} {'-' if value is None else f'{100 * value:5.1f}'}")
    print(f"{'mean':<16} {100 * result['miou']:5.1f}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
