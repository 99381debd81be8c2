"""What stands beside pico_fast in a measurement: the textbook forms, written plainly."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def eager(
    anchors: Tensor,  # [A, D] float32, requires grad
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    temperature: float,
) -> Tensor:
    """The loss as the formula stands, five A x K matrices and autograd: a scalar."""
    s = anchors @ keys.T.to(anchors.dtype) / temperature
    positive = anchor_labels[:, None] == key_labels
    s = s - s.max(1, keepdim=True).values.detach()
    exponential = torch.exp(s)
    negative_sum = (exponential * ~positive).sum(1, keepdim=True)
    log_probability = s - torch.log(exponential + negative_sum)
    return -((positive * log_probability).sum(1) / positive.sum(1)).mean()


def two_products(
    anchors: Tensor,  # [A, D] float32
    keys: Tensor,  # [K, D] float32
) -> Tensor:
    """The two bare matrix products of loss and gradient, nothing else: [A, D]."""
    out = torch.zeros_like(anchors)
    for tile in keys.split(1024):
        out.addmm_(anchors @ tile.T, tile)
    return out


def matmul_topk(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D] float32
    key_labels: Tensor,  # [K] int64
    num_positives: int,
    num_negatives: int,
    temperature: float,
) -> Tensor:
    """Loss on the hardest keys: the full similarity, a mask and two topk: a scalar."""
    s = anchors @ keys.T
    positive = anchor_labels[:, None] == key_labels
    hard = s.masked_fill(positive, -torch.inf).topk(num_negatives).values / temperature
    easy = s.masked_fill(~positive, torch.inf).topk(num_positives, largest=False).values
    chosen = easy < torch.inf
    above = hard.logsumexp(1, keepdim=True) - easy.masked_fill(~chosen, 0.0) / temperature
    return (softplus(above).masked_fill(~chosen, 0.0).sum(1) / chosen.sum(1)).mean()


def semi_hard(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D] float32, classes of one size
    key_labels: Tensor,  # [K] int64
    num_positives: int,
    num_negatives: int,
    temperature: float,
    hard_fraction: float = 0.1,
) -> Tensor:
    """Loss on a draw from the hardest pools: the full similarity, two topk and random lots: a scalar."""
    s = anchors @ keys.T
    positive = anchor_labels[:, None] == key_labels

    def draw(hardness: Tensor, candidates: int, count: int) -> Tensor:
        pool = hardness.topk(max(1, math.ceil(hard_fraction * candidates))).indices
        lots = torch.rand(pool.shape)
        return s.gather(1, pool.gather(1, lots.topk(min(count, pool.shape[1])).indices))

    of_class = int(positive[0].sum())
    hard = draw(s.detach().masked_fill(positive, -torch.inf), len(keys) - of_class, num_negatives)
    easy = draw((-s.detach()).masked_fill(~positive, -torch.inf), of_class, num_positives)
    above = (hard / temperature).logsumexp(1, keepdim=True) - easy / temperature
    return softplus(above).mean()


def index_add(
    features: Tensor,  # [B, D, H, W] float32
    labels: Tensor,  # [B, H, W] int64, all in [0, C)
    num_classes: int,
) -> Tensor:
    """Region means by a transposed copy and index_add_: [B, C, D]."""
    images, channels = features.shape[:2]
    image = torch.arange(images, device=labels.device)[:, None]
    region = (image * num_classes + labels.flatten(1)).flatten()
    rows = features.flatten(2).transpose(1, 2).reshape(-1, channels)
    sums = rows.new_zeros(images * num_classes, channels).index_add_(0, region, rows)
    counts = torch.bincount(region, minlength=images * num_classes).clamp(min=1)
    return (sums / counts[:, None]).view(images, num_classes, channels)


def class_attention(
    queries: Tensor,  # [A, D] anchors in the keys' dtype
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
    temperature: float,
    attention,
) -> tuple[Tensor, Tensor]:
    """Z [A] and the softmax mean [A, D] of the negatives by attention with the class as batch.

    `attention(q, k, v, scale)` gives out [C, 1, A, D] and its log-sum-exp [C, 1, A]. Exact, no mask, no
    kernel of one's own: the strongest thing that stock parts make of this.
    """
    q = queries.expand(bank.shape[0], 1, *queries.shape)
    keys = bank.unsqueeze(1)
    out, lse = attention(q, keys, keys, 1 / temperature)
    out, lse = out[:, 0], lse.reshape(bank.shape[0], -1).clone()
    lse[labels, torch.arange(len(labels), device=labels.device)] = -torch.inf
    total = lse.logsumexp(0)
    return total, torch.einsum("ca,cad->ad", torch.exp(lse - total).to(out.dtype), out)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as PyTorch ships it."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
    return found[0], found[1]


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; not every version takes 256 channels."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return found[0], found[1]
