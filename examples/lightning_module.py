"""Train a segmentation model with PiCo in Lightning, on generated scenes.

    python examples/lightning_module.py --steps 60

On several GPUs the processes have one bank in common, which DDP leaves alone. Lightning saves what the
first process holds: keep the default placement="replicated", with which that is the whole bank.
"""

import argparse

import lightning
import torch
from network import SegmentationNetwork
from scenes import CLASSES, IGNORE, draw_scenes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pico_fast


class Segmentation(lightning.LightningModule):
    """A model that returns logits and features, trained with the joint loss.

    The bank is part of the module, so that it moves and is saved with it.
    """

    def __init__(self, model: nn.Module, path: str | None, joint: nn.Module):
        super().__init__()
        self.model = model
        self.joint = joint
        # the model owns the tap; here only its method is kept, or its state would be saved twice
        self.embeddings = pico_fast.attach(model, path, embedding_dim=64).embeddings

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The joint loss of a batch."""
        images, labels = batch
        logits, _ = self.model(images)
        loss = self.joint(logits, self.embeddings(), labels)
        self.log("loss", loss, prog_bar=True)
        for name in ("positive_similarity", "negative_similarity"):
            self.log(name, self.joint.criterion.stats[name], prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """The share of pixels that are right."""
        images, labels = batch
        logits = nn.functional.interpolate(self.model(images)[0], labels.shape[1:])
        right = (logits.argmax(1) == labels)[labels != IGNORE].float().mean()
        self.log("right", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """For the model's parameters, the tap's head among them."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="runs/lightning")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)

    criterion = pico_fast.PiCoLoss(len(CLASSES), 64, sampling="random", pixel_queue_size=200)
    network = SegmentationNetwork(len(CLASSES), width=16, stem_stride=1)
    module = Segmentation(network, "classifier", pico_fast.JointLoss(criterion, weight=0.1))
    train = DataLoader(TensorDataset(*draw_scenes(0, 32, 64)), batch_size=8, shuffle=True)
    val = DataLoader(TensorDataset(*draw_scenes(0, 8, 64, first=32)), batch_size=8)
    trainer = lightning.Trainer(
        max_steps=options.steps, default_root_dir=options.output, enable_model_summary=False
    )
    trainer.fit(module, train, val)
    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {value:.3f}")
    module.embeddings.__self__.detach()


if __name__ == "__main__":
    main()
