"""Loss and gradient on the anchors with all keys: the formula, what frameworks make of it, attention.

Every peer takes (anchors, anchor_labels, keys, key_labels, temperature), and gives either a scalar
that autograd differentiates or, where it says so, loss and gradient [A, D]. The value is that of
pico_fast.contrast(sampling="all"). All expect what `cases.pairs` makes: no empty slots, and keys of
every anchor's class and of another; some, that keys lie class by class in classes of one size.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from peers.products import bank_of, own_class_product, own_class_sum, product

Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


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


@functools.cache
def _compiled(function: Callable) -> Callable:
    """`function` through torch.compile: whole, and anew for each shape, of which a benchmark has many."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=False)


def eager_compiled(
    anchors: Tensor,  # [A, D] float32, requires grad
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    temperature: float,
) -> Tensor:
    """`eager` through torch.compile: a scalar. A new shape is compiled at its first call."""
    return _compiled(eager)(anchors, anchor_labels, keys, key_labels, temperature)


def eager_checkpointed(
    anchors: Tensor,  # [A, D] float32, requires grad
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    temperature: float,
    block: int = 128,
) -> Tensor:
    """`eager` on blocks of anchors, each computed again in the backward: a scalar."""
    total = anchors.new_zeros(())
    for rows, labels in zip(anchors.split(block), anchor_labels.split(block), strict=True):
        loss = checkpoint(eager, rows, labels, keys, key_labels, temperature, use_reentrant=False)
        total = total + loss * len(rows)
    return total / len(anchors)


def eager_chunked(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    temperature: float,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """`eager`, forward and backward on one block of anchors after the other: loss and gradient [A, D]."""
    total, gradients = anchors.new_zeros(()), []
    for rows, labels in zip(anchors.split(block), anchor_labels.split(block), strict=True):
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            loss = eager(leaf, labels, keys, key_labels, temperature) * (len(rows) / len(anchors))
        gradients += torch.autograd.grad(loss, leaf)
        total += loss.detach()
    return total, torch.cat(gradients)


def _finished(
    anchors: Tensor,  # [A, D] float32
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
    temperature: float,
    lse: Tensor,  # [A] Z, the log-sum-exp of the negatives
    negative_mean: Tensor,  # [A, D] their mean, weighted by the softmax
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [A, D] from the negatives' part, with the positives in one batched product."""
    above = lse[:, None] - own_class_product(anchors, labels, bank) / temperature
    weights = torch.sigmoid(above)
    push = weights.mean(1, keepdim=True) * negative_mean
    pull = own_class_sum(weights, labels, bank) / bank.shape[1]
    return softplus(above).mean(), (push - pull) / (temperature * len(anchors))


def _weigh(
    s: Tensor,  # [A, n] similarities, overwritten if in_place
    top: Tensor,  # [A] largest so far
    dtype: torch.dtype,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new largest [A], exp(s - largest) [A, n] in `dtype`, and its sum [A]."""
    top = torch.maximum(top, s.amax(1))
    weights = s.sub_(top[:, None]).exp_() if in_place else torch.exp(s - top[:, None])
    return top, weights.to(dtype), weights.sum(1)


@torch.no_grad()
def analytic(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D], sorted by class, classes of one size
    key_labels: Tensor,  # [K] int64
    temperature: float,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [A, D] by hand: two products for each chunk of keys, and no autograd.

    One sweep with a running maximum gives Z and the weighted mean of the negatives. A chunk's
    similarities become its weights in place, or, on a GPU, in one compiled kernel; the anchors' own
    class is taken out by index, without a mask. The positives follow, when Z is known.
    """
    bank = bank_of(keys, key_labels)
    classes, slots, _ = bank.shape
    chunk = chunk or (16384 if keys.is_cuda else 2048)
    compiled = keys.is_cuda if compiled is None else compiled
    weigh = _compiled(_weigh) if compiled else _weigh
    step, group = min(slots, chunk), max(1, chunk // slots)
    order = anchor_labels.argsort()
    bounds = torch.arange(classes + 1, device=keys.device)
    first_anchor = torch.searchsorted(anchor_labels[order], bounds).tolist()
    rows = anchors / temperature
    top = anchors.new_full((len(anchors),), torch.finfo(anchors.dtype).min)
    total, out = torch.zeros_like(top), torch.zeros_like(anchors)
    buffer = anchors.new_empty(len(anchors) * group * step)
    for c in range(0, classes, group):
        own = order[first_anchor[c] : first_anchor[min(c + group, classes)]]
        for slot in range(0, slots, step):
            part = bank[c : c + group, slot : slot + step]
            tile = part.flatten(0, 1)
            s = product(rows, tile.T, buffer[: len(rows) * len(tile)].view(len(rows), -1))
            s.view(len(rows), len(part), -1)[own, anchor_labels[own] - c] = -torch.inf
            new_top, weights, sums = weigh(s, top, keys.dtype if keys.is_cuda else s.dtype, not compiled)
            shrink = torch.exp(top - new_top)
            total.mul_(shrink).add_(sums)
            out.mul_(shrink[:, None]).add_(product(weights, tile))
            top = new_top
    lse = top + total.log()
    return _finished(anchors, anchor_labels, bank, temperature, lse, out / total[:, None])


def two_products(
    anchors: Tensor,  # [A, D] float32
    keys: Tensor,  # [K, D] float32
) -> Tensor:
    """The two bare matrix products of loss and gradient, nothing else: [A, D]."""
    out = torch.zeros_like(anchors)
    for tile in keys.split(1024):
        out.addmm_(anchors @ tile.T, tile)
    return out


def class_attention(
    queries: Tensor,  # [A, D] anchors in the keys' dtype
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
    temperature: float,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Z [A] and the softmax mean [A, D] of the negatives by attention with the class as batch.

    `attention(q, k, v, scale)` gives out [C, 1, A, D] and its log-sum-exp [C, 1, A]. Exact, no mask, no
    kernel of one's own: the strongest thing that stock parts make of this. The queries are expanded
    without a copy; what it needs is the output of all classes, C·A·D values.
    """
    q = queries.expand(bank.shape[0], 1, *queries.shape)
    keys = bank.unsqueeze(1)
    out, lse = attention(q, keys, keys, 1 / temperature)
    out, lse = out[:, 0], lse.reshape(bank.shape[0], -1).clone()
    lse[labels, torch.arange(len(labels), device=labels.device)] = -torch.inf
    total = lse.logsumexp(0)
    return total, torch.einsum("ca,cad->ad", torch.exp(lse - total).to(out.dtype), out)


@torch.no_grad()
def attention_loss(
    anchors: Tensor,  # [A, D] float32
    labels: Tensor,  # [A] int64
    bank: Tensor,  # [C, T, D]
    temperature: float,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [A, D] out of class attention and a batched product with the own class.

    Attention gives C·A·D values in the bank's dtype, of which only a weighted sum over C is used.
    """
    queries = anchors.to(bank.dtype)
    lse, negative_mean = class_attention(queries, labels, bank, temperature, attention)
    return _finished(anchors, labels, bank, temperature, lse, negative_mean)


def flash_attention(
    q: Tensor,  # [C, 1, A, D]
    k: Tensor,  # [C, 1, T, D]
    v: Tensor,  # [C, 1, T, D]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as PyTorch ships it, on a GPU."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
    return found[0], found[1]


def flash_attention_on_cpu(
    q: Tensor,  # [C, 1, A, D]
    k: Tensor,  # [C, 1, T, D]
    v: Tensor,  # [C, 1, T, D]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash attention for CPUs."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, k, v, 0.0, False, scale=scale)


def cudnn_attention(
    q: Tensor,  # [C, 1, A, D]
    k: Tensor,  # [C, 1, T, D]
    v: Tensor,  # [C, 1, T, D]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; not every version takes 256 channels."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return found[0], found[1]


def flex_attention(
    q: Tensor,  # [C, 1, A, D]
    k: Tensor,  # [C, 1, T, D]
    v: Tensor,  # [C, 1, T, D]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """FlexAttention, compiled on a GPU.

    Its kernel for CPUs gives no log-sum-exp: there it runs uncompiled and makes all C·A·T similarities.
    """
    from torch.nn.attention import flex_attention as flex

    attention = _compiled(flex.flex_attention) if q.is_cuda else flex.flex_attention
    out, rest = attention(q, k, v, scale=scale, return_aux=flex.AuxRequest(lse=True))
    return out, rest.lse


def metric_learning(
    anchors: Tensor,  # [A, D] float32, requires grad
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D] float32
    key_labels: Tensor,  # [K] int64
    temperature: float,
) -> Tensor:
    """NTXentLoss of pytorch-metric-learning with the keys as reference embeddings: a scalar.

    It has a matrix of all positive pairs by all negative pairs, A²·T·(K - T) values: for tiny sizes.
    Its mean is over positive pairs, not over anchors: the same where all anchors have as many positives.
    Its default distance would bring the rows to unit length first, and so change the gradient.
    """
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NTXentLoss

    distance = DotProductSimilarity(normalize_embeddings=False)
    loss = NTXentLoss(temperature, distance=distance)
    return loss(anchors, anchor_labels, ref_emb=keys, ref_labels=key_labels)


def cut_cross_entropy(
    anchors: Tensor,  # [A, D] float32
    keys: Tensor,  # [K, D] 16 bits on a GPU
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cut cross-entropy's part of the work: the log-sum-exp over all keys [A] and its gradient [A, D].

    It knows no classes. The cross-entropy of any target t is log-sum-exp - s_t, so s_t is added again.
    Its filter of small gradients is off: with so many keys it would drop nearly all of them. On a GPU
    it adds up the gradient in 16 bits; on a CPU, where its kernels do not run, it is plain PyTorch.
    """
    from cut_cross_entropy import linear_cross_entropy

    leaf = (anchors / temperature).to(keys.dtype).detach().requires_grad_()
    target = torch.zeros(len(anchors), dtype=torch.int64, device=keys.device)
    options = {"impl": "cce"} if keys.is_cuda else {"impl": "torch_compile"}
    with torch.enable_grad():
        loss = linear_cross_entropy(leaf, keys, target, reduction="none", filter_eps=None, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    lse = loss.detach() + (leaf.detach() @ keys[0]).to(loss.dtype)
    return lse, (gradient + keys[0]).to(anchors.dtype) / temperature


def bytes_needed(name: str, anchors: int, keys: int, channels: int, classes: int = 171) -> int:
    """Bytes that a peer allocates beyond its inputs: rather too many, to refuse what cannot fit.

    `name` is a function's, or "attention" for `attention_loss`. Counted as float32, for anchors spread
    over classes of one size; blocks and chunks as by default.
    """
    pairs, rows, slots = anchors * keys, anchors * channels, -(-keys // classes)
    block = min(anchors, 128) * keys
    own_class = 8 * anchors * slots + 16 * keys + 16 * rows
    values = {
        # keys in 16 bits are copied in float32
        "eager": 7 * pairs + keys * channels,
        "eager_compiled": 5 * pairs + keys * channels,
        "eager_checkpointed": 7 * block + keys * channels + 8 * rows,
        "eager_chunked": 7 * block + keys * channels + 8 * rows,
        "analytic": 2 * anchors * 16384 + own_class,
        "two_products": 2 * anchors * 1024 + 2 * rows,
        "attention": (classes + 8) * rows + own_class,
        # uncompiled, on a CPU
        "flex_attention": (2 * classes + 8) * rows + 6 * pairs + own_class,
        "metric_learning": 18 * anchors * slots * anchors * (keys - slots),
        "cut_cross_entropy": 2 * pairs + 8 * rows,
    }
    return 4 * values[name]
