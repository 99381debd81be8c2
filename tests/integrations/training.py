"""The same test of every model: it trains with the tap, and detaching leaves nothing behind."""

from dataclasses import dataclass, field

import torch
from model_case import CLASSES, Case, draw_batch, scores_of
from torch import Tensor, nn

import pico_fast

DIM, WEIGHT = 32, 0.3


def make_joint(**options: object) -> pico_fast.JointLoss:
    """A criterion whose bank a few batches fill."""
    small = {
        "sampling": "random",
        "num_positives": 16,
        "num_negatives": 64,
        "max_samples": 128,
        "pixel_queue_size": 40,
        "region_queue_size": 8,
    }
    return pico_fast.JointLoss(pico_fast.PiCoLoss(CLASSES, DIM, **(small | options)), WEIGHT)


@dataclass
class Losses:
    """Of each step."""

    segmentation: list[float] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)

    def fall(self) -> dict[str, tuple[float, float]]:
        """Means of the first two and of the last two steps."""
        ends = {}
        for name, values in vars(self).items():
            ends[name] = (sum(values[:2]) / 2, sum(values[-2:]) / 2)
        return ends


def step_loss(
    case: Case,
    model: nn.Module,
    tap: pico_fast.Tap,
    joint: pico_fast.JointLoss,
    images: Tensor,  # [B, 3, H, W]
    labels: Tensor,  # [B, H, W] int64
) -> Tensor:
    """What a training loop computes: the joint loss, or the model's own and the contrast."""
    scores, own = case.call(model, images, labels)
    if own is None:
        return joint(scores, tap.embeddings(), labels)
    return own + joint.weight * joint.criterion(tap.embeddings(), labels, scores)


def train(
    case: Case, model: nn.Module, tap: pico_fast.Tap, joint: pico_fast.JointLoss, steps: int = 12
) -> Losses:
    """Steps on one batch, with a bank that is full before the first."""
    images, labels = draw_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, contrasts = Losses(), []
    joint.criterion.register_forward_hook(lambda *call: contrasts.append(call[-1].item()))
    for _ in range(8):
        step_loss(case, model, tap, joint, images, labels)
    assert joint.criterion.bank.pixel_count.min() == joint.criterion.bank.pixel_queue_size
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step_loss(case, model, tap, joint, images, labels)
        loss.backward()
        optimizer.step()
        losses.contrast.append(contrasts[-1])
        losses.segmentation.append(loss.item() - joint.weight * contrasts[-1])
    return losses


def traces(model: nn.Module) -> list:
    """All that a tap may touch: state, modules, parameters, and the hooks of every module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")
    modules = [
        (name, type(module), *(len(getattr(module, kind)) for kind in hooks))
        for name, module in model.named_modules()
    ]
    return [*model.state_dict(), *modules, *(name for name, _ in model.named_parameters())]


def check(case: Case) -> Losses:
    """Attach, train, detach; the losses on the way."""
    torch.manual_seed(0)
    plain, model = case.build(), case.build()
    tap = pico_fast.attach(model, embedding_dim=DIM)
    assert tap.path == case.tap

    model.train()
    images, labels = draw_batch()
    case.call(model, images, labels)
    height, width = (size // case.stride for size in images.shape[2:])
    assert tap.embeddings().shape == (len(images), DIM, height, width)

    joint = make_joint()
    losses = train(case, model, tap, joint)
    for name, (first, last) in losses.fall().items():
        assert last < first, f"{name}: {first} to {last}"
    assert all(p.grad is not None for p in tap.parameters())

    assert tap.detach() is model
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = [m.eval()(images) for m in (plain, model)]
    # after the forward: transformers puts hooks of its own into a model that runs
    assert traces(model) == traces(plain)
    for first, second in zip(*map(tensors, outputs), strict=True):
        assert torch.equal(first, second)
    return losses


def tensors(outputs: object) -> list[Tensor]:
    """Everything that a model returns, flat."""
    if hasattr(outputs, "masks_queries_logits"):
        return [outputs.masks_queries_logits, outputs.class_queries_logits]
    return [scores_of(outputs)]
