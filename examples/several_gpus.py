"""Train on several GPUs (or CPU processes) with one memory for all of them, and go on after a crash.

    torchrun --nproc-per-node 2 examples/several_gpus.py --steps 60 --checkpoints runs/several
    torchrun --nproc-per-node 2 examples/several_gpus.py --steps 60 --placement sharded

Started again with the same folder, on as many ranks or others, it continues from the last checkpoint
that is whole. What several ranks ask for: DDP around the model, the usual SyncBatchNorm, a different
batch on each rank, and torch.distributed.checkpoint, because a sharded bank lies on all ranks.
"""

import argparse
import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from network import SegmentationNetwork
from scenes import CLASSES, draw_scenes
from torch import nn

import pico_fast


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is whole; one that was being written has another name."""
    found = sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    return found[-1] if found else None


def save(state: dict, folder: Path, step: int) -> None:
    """All ranks write; the name is given when all have."""
    path = folder / f"step-{step}"
    partial = path.with_suffix(".partial")
    if dist.get_rank() == 0:
        # a killed run, of more ranks, may have left files
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--placement", choices=("replicated", "sharded"), default="replicated")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--every", type=int, default=20)
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # a rank that dies ends the others after so long at the latest
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=2))
    torch.manual_seed(0)

    network = SegmentationNetwork(len(CLASSES), width=16, stem_stride=1)
    tap = pico_fast.attach(network, "classifier", embedding_dim=64)
    if on_gpu:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    model = nn.parallel.DistributedDataParallel(network.to(device).train())
    criterion = pico_fast.PiCoLoss(
        num_classes=len(CLASSES),
        embedding_dim=64,
        num_positives=64,
        num_negatives=256,
        max_samples=256,
        pixel_queue_size=200,
        region_queue_size=50,
        placement=options.placement,
        max_images=4,
    )
    joint = pico_fast.JointLoss(criterion, weight=0.1, warmup_steps=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    progress = torch.zeros((), dtype=torch.int64)
    state = {"model": network.state_dict(), "loss": joint.state_dict(), "progress": progress}
    last = newest(options.checkpoints) if options.checkpoints else None
    if last is not None:
        dcp.load(state, checkpoint_id=str(last))  # into the very tensors that train

    images, labels = (data.to(device) for data in draw_scenes(seed=0, count=32, size=64))
    for step in range(int(progress) + 1, options.steps + 1):
        # one order for all ranks, of which each takes its part
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))
        chosen = order[dist.get_rank() :: dist.get_world_size()][:4].to(device)
        logits, _ = model(images[chosen])
        loss = joint(logits, tap.embeddings(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if options.checkpoints and step % options.every == 0:
            progress.fill_(step)
            save(state, options.checkpoints, step)
        if dist.get_rank() == 0 and (step % 10 == 0 or step == options.steps):
            stats = {name: float(value) for name, value in criterion.stats.items()}
            print(
                f"step {step}: loss {loss:.3f}, similarity {stats['positive_similarity']:.2f}, to"
                f" others {stats['negative_similarity']:.2f}, bank {stats['pixel_fill']:.0%}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
