"""Train SegFormer with PiCo in transformers' Trainer, on generated scenes.

    python examples/hf_trainer.py --steps 60

On several GPUs the processes have one bank in common without more ado, here as under Accelerate.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from scenes import CLASSES, IGNORE, draw_scenes
from torch import Tensor, nn

import pico_fast


class PiCoTrainer(transformers.Trainer):
    """A Trainer whose loss is a joint loss in training, and cross-entropy in evaluation."""

    # the loss is a mean: the Trainer is to divide it by the steps that it accumulates
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, tap: pico_fast.Tap, joint: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tap, self.joint = tap, joint.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs=False, **_: Any) -> Any:
        """The loss, and what the model returned if that is asked for."""
        outputs, labels = model(pixel_values=inputs["pixel_values"]), inputs["labels"]
        if model.training:
            loss = self.joint(outputs.logits, self.tap.embeddings(), labels)
        else:
            logits = nn.functional.interpolate(outputs.logits, labels.shape[1:], mode="bilinear")
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the similarities as well in training."""
        if "loss" in logs:
            stats = self.joint.criterion.stats.items()
            logs |= {name: value.item() for name, value in stats if name.endswith("similarity")}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        """Saves the bank beside the model, in every checkpoint; the tap is in the model's file."""
        super().save_model(output_dir, **kwargs)
        if self.args.should_save:
            torch.save(self.joint.state_dict(), Path(output_dir or self.args.output_dir, "pico.pt"))


def scenes(count: int, first: int = 0) -> list[dict[str, Tensor]]:
    images, labels = draw_scenes(0, count, size=64, first=first)
    return [{"pixel_values": i, "labels": y} for i, y in zip(images, labels, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default="runs/hf_trainer")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
    config = transformers.SegformerConfig(num_labels=len(CLASSES), **sizes)
    model = transformers.SegformerForSemanticSegmentation(config)
    tap = pico_fast.attach(model, embedding_dim=64)
    criterion = pico_fast.PiCoLoss(len(CLASSES), 64, sampling="random", pixel_queue_size=200)
    pico = {"tap": tap, "joint": pico_fast.JointLoss(criterion, weight=0.1)}
    length = {"max_steps": options.steps, "logging_steps": 10}
    settings = transformers.TrainingArguments(options.output, learning_rate=1e-3, **length)
    trainer = PiCoTrainer(model, settings, None, scenes(32), scenes(8, 32), **pico)
    trainer.train()
    print(trainer.evaluate())
    tap.detach().save_pretrained(options.output / "final")


if __name__ == "__main__":
    main()
