"""Loss on the hardest keys by stock operations: scalars with a gradient.

Every peer takes (anchors, anchor_labels, keys, key_labels, num_positives, num_negatives, temperature).
Where it says "class by class", keys are sorted by class and all classes have one size.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from peers.products import bank_of, own_class_product, picked, product


def _loss(
    positive: Tensor,  # [A, P] inner products with the picked positives
    negative: Tensor,  # [A, N] and with the picked negatives
    temperature: float,
) -> Tensor:
    """Mean over anchors and positives of softplus(Z - s_p): a scalar."""
    above = (negative / temperature).logsumexp(1, keepdim=True) - positive / temperature
    return softplus(above).mean()


def matmul_topk(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    num_positives: int,
    num_negatives: int,
    temperature: float,
) -> Tensor:
    """Loss on the hardest keys: the full similarity in the keys' dtype, a mask and two topk: a scalar."""
    s = anchors.to(keys.dtype) @ keys.T
    positive = anchor_labels[:, None] == key_labels
    hard = s.masked_fill(positive, -torch.inf).topk(num_negatives).values
    easy = s.masked_fill(~positive, torch.inf).topk(num_positives, largest=False).values
    hard, easy = hard.to(anchors.dtype) / temperature, easy.to(anchors.dtype)
    chosen = easy < torch.inf
    above = hard.logsumexp(1, keepdim=True) - easy.masked_fill(~chosen, 0.0) / temperature
    return (softplus(above).masked_fill(~chosen, 0.0).sum(1) / chosen.sum(1)).mean()


def _hardest_negatives(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int64
    count: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Similarity [A, N] and index [A, N] of the most similar negatives, by a running topk over chunks."""
    best, index = None, None
    for start in range(0, len(keys), chunk):
        s = product(anchors, keys[start : start + chunk].T)
        own = anchor_labels[:, None] == key_labels[start : start + chunk]
        values, places = s.masked_fill_(own, -torch.inf).topk(min(count, s.shape[1]), sorted=False)
        places += start
        if best is not None:
            values, places = torch.cat([best, values], 1), torch.cat([index, places], 1)
            values, kept = values.topk(min(count, values.shape[1]), sorted=False)
            places = places.gather(1, kept)
        best, index = values, places
    return best, index


def chunked_topk(
    anchors: Tensor,  # [A, D] float32
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D], class by class
    key_labels: Tensor,  # [K] int64
    num_positives: int,
    num_negatives: int,
    temperature: float,
    chunk: int = 32768,
) -> Tensor:
    """Loss on the hardest keys without an A x K matrix: topk of each chunk, merged with those before.

    The positives come from a batched product with the own class; the gradient reads picked rows alone.
    """
    bank = bank_of(keys, key_labels)
    slots = bank.shape[1]
    with torch.no_grad():
        hard, hard_index = _hardest_negatives(
            anchors, anchor_labels, keys, key_labels, min(num_negatives, len(keys) - slots), chunk
        )
        easy = own_class_product(anchors, anchor_labels, bank)
        easy, easy_index = easy.topk(min(num_positives, slots), largest=False)
        easy_index += anchor_labels[:, None] * slots
    return _loss(
        picked(anchors, keys, easy_index, easy),
        picked(anchors, keys, hard_index, hard),
        temperature,
    )


def faiss_hardest(
    anchors: Tensor,  # [A, D] float32, on a CPU
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor,  # [K, D] float32, class by class
    key_labels: Tensor,  # [K] int64
    num_positives: int,
    num_negatives: int,
    temperature: float,
) -> Tensor:
    """Loss on the hardest keys as FAISS finds them, by exact inner products (what IndexFlatIP computes).

    One search for all anchors asks for as many keys more as a class has, then those of the own class are
    dropped. To search class by class, the own one excluded by an IDSelector, gives the same and takes
    several times as long: the few anchors of a class make no matrix product. The least similar
    positives are the best matches of the opposite vectors, searched class by class.
    """
    import faiss

    slots = bank_of(keys, key_labels).shape[1]
    faiss.omp_set_num_threads(torch.get_num_threads())
    metric = faiss.METRIC_INNER_PRODUCT
    queries, rows = anchors.detach().numpy(), keys.numpy()
    n_hard, n_easy = min(num_negatives, len(keys) - slots), min(num_positives, slots)
    values, places = map(torch.from_numpy, faiss.knn(queries, rows, n_hard + slots, metric))
    others = places // slots != anchor_labels[:, None]
    others &= others.cumsum(1) <= n_hard
    hard, hard_index = (found[others].view(-1, n_hard) for found in (values, places))
    easy = hard.new_empty(len(anchors), n_easy)
    easy_index = hard_index.new_empty(easy.shape)
    for c in anchor_labels.unique().tolist():
        here = anchor_labels == c
        own = rows[c * slots : (c + 1) * slots]
        found = faiss.knn(-queries[here.numpy()], own, n_easy, metric)
        values, places = map(torch.from_numpy, found)
        easy[here], easy_index[here] = -values, places + c * slots
    return _loss(
        picked(anchors, keys, easy_index, easy),
        picked(anchors, keys, hard_index, hard),
        temperature,
    )


def bytes_needed(
    name: str,
    anchors: int,
    keys: int,
    channels: int,
    num_positives: int,
    num_negatives: int,
    classes: int = 171,
) -> int:
    """Bytes that a peer allocates beyond its inputs: rather too many, to refuse what cannot fit.

    Counted as float32, for anchors spread over classes of one size; chunks as by default.
    """
    pairs, slots, picked_keys = anchors * keys, -(-keys // classes), num_positives + num_negatives
    own_class = 8 * anchors * slots + 16 * keys + 16 * anchors * channels
    values = {
        "matmul_topk": 4 * pairs,
        "chunked_topk": 2 * anchors * min(keys, 32768) + 16 * anchors * picked_keys + own_class,
        "faiss_hardest": 8 * anchors * (picked_keys + slots) + own_class,
    }
    return 4 * values[name]
