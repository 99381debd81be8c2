"""The specification: PiCo in plain PyTorch, short and obvious, float64 kept, differentiated by autograd.

Zhou & Wang, "Cross-Image Pixel Contrasting for Semantic Segmentation", TPAMI 2024 (first version:
Wang et al., ICCV 2021). Every fast path of the package is tested against this file.

For anchor i, with similarities s_ij = <a_i, k_j> / temperature, its selected positives P_i and its
selected or synthesised negatives N_i:

    Z_i    = log sum_{n in N_i} exp(s_in)
    loss_i = mean_{p in P_i} softplus(Z_i - s_ip)

Every positive has a denominator of its own: itself plus all negatives. Without a positive the loss
is 0 and the anchor is not counted; without a negative it is 0 and counted. Loss and gradient of an
anchor that is not finite are nan; it is no key of others. The bank carries no gradient and unit rows
bound |s| by 1/temperature, so a fast path needs one pass over the negatives: with
w_ip = sigmoid(Z_i - s_ip) and q_i = mean_p w_ip,

    temperature dL_i/da_i = q_i sum_n softmax_n(s_in) k_n - mean_p w_ip k_p

Shapes: A anchors, K keys, D channels, C classes, B images of H x W pixels, P positives and N
negatives asked for. Label -1 is an empty slot or a pixel to leave out, everywhere.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

# what is drawn; the number is part of every draw's counter
ANCHOR_PAIR, ANCHOR_PIXEL, ANCHOR_EASY, BANK_PIXEL = 1, 2, 3, 4
POSITIVE, NEGATIVE, STEP, SAMPLE = 5, 6, 12, 13
MIX_FIRST, MIX_SECOND, MIX_SHARE, MIX_WITH_ANCHOR, MIX_ANCHOR_SHARE = 7, 8, 9, 10, 11

WORD = 0xFFFFFFFF
# a sum of two opposite rows has no direction: mixes shorter than this share of the longer, or than what
# `normalize` divides by at least, are left out
SHORTEST_MIX, SHORTEST_NORM = 1e-2, 1e-12


def lowbias32(x):
    """The integer hash lowbias32 with the multipliers 0x21f0aaad and 0x735a2d97: a bijection of 32 bits.

    For Python integers and int64 tensors; both multipliers are below 2^31: no product leaves int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & WORD
    return x ^ (x >> 15)


def fold(state, word):
    """One more 32-bit word into a hash state; for a given state a bijection of the word."""
    return lowbias32(((state ^ (word & WORD)) + 0x9E3779B9) & WORD)


def hash32(seed, stream, *counters):
    """Uniform 32-bit word for (seed, what is drawn, counters): integers or int64 tensors, broadcast."""
    state = fold(fold(fold(0, seed), seed >> 32), stream)
    for counter in counters:
        state = fold(state, counter)
    return state


def step_seed(seed, step):
    """The seed of one step, 63 bits: what modules pass to functions that take a seed."""
    low, high = (hash32(seed, STEP, step, step >> 32, half) for half in (0, 1))
    return low | ((high & 0x7FFFFFFF) << 32)


def below(word, n):
    """Uniform integer in [0, n) from a 32-bit word, n < 2^31."""
    return (word * n) >> 32


def uniform(word: Tensor) -> Tensor:
    """Uniform float32 in [0, 1) from a 32-bit word: its upper 24 bits, exact."""
    return (word >> 8).float() * 2.0**-24


def feistel(x: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """Six Feistel rounds keyed by a hash state: a bijection of [0, a·b), a and b at most 2^16."""
    left, right = x // b, x % b
    for turn in range(0, 6, 2):
        left = (left + below(fold(state, (turn << 16) + right), a)) % a
        right = (right + below(fold(state, ((turn + 1) << 16) + left), b)) % b
    return left * b + right


def rectangle(n: Tensor) -> tuple[Tensor, Tensor]:
    """Sides a = ceil(sqrt n) and b of the rectangle that holds [0, n), n < 2^31, nearly exactly."""
    a = n.clamp(min=1).double().sqrt().ceil().long()
    return a, (n.clamp(min=1) + a - 1) // a


def permute(index: Tensor, n: Tensor, seed, stream, row) -> Tensor:
    """A keyed permutation of [0, n), applied to `index` < n; all arguments broadcast.

    The Feistel network on `rectangle(n)`, walked until it lands inside [0, n): no list of n is made.
    """
    index, n, state = torch.broadcast_tensors(
        index, n, torch.as_tensor(hash32(seed, stream, row), device=n.device)
    )
    a, b = rectangle(n)
    out = feistel(index, a, b, state)
    while (away := out >= n).any():
        out = out.masked_scatter(away, feistel(out[away], a[away], b[away], state[away]))
    return out


def _precise(*tensors: Tensor) -> list[Tensor]:
    """All in float64 if one is, else in float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def sample_anchors(
    labels: Tensor,  # [B, H, W] int64, -1 left out
    predictions: Tensor | None,  # [B, H, W] int64
    max_samples: int,
    max_views: int,
    min_pixels: int,
    num_classes: int,
    seed,
    easy: str = "correct",
) -> tuple[Tensor, Tensor]:
    """Anchors by segmentation-aware sampling: pixel [A] into B·H·W and label [A]; -1 in empty slots.

    Slots are filled from the front in the order (class, image, hard before easy, hash).
    """
    flat = labels.flatten()
    image = torch.arange(len(flat), device=flat.device) // max(1, labels[:1].numel())
    pair_of_pixel = torch.where(flat >= 0, image * num_classes + flat, -1)
    pairs, counts = pair_of_pixel[flat >= 0].unique(return_counts=True)
    pairs = pairs[counts >= min_pixels]
    if len(pairs) > max_samples:
        pairs = pairs[hash32(seed, ANCHOR_PAIR, pairs).argsort()][:max_samples]
    n_view = max(1, min(max_samples // max(1, len(pairs)), max_views))
    chosen = [flat[:0]]
    for pair in sorted(pairs.tolist(), key=lambda pair: (pair % num_classes, pair)):
        pixels = (pair_of_pixel == pair).nonzero()[:, 0]
        pixels = pixels[hash32(seed, ANCHOR_PIXEL, pixels).argsort()]
        wrong = torch.zeros_like(pixels, dtype=torch.bool)
        if predictions is not None:
            wrong = predictions.flatten()[pixels] != pair % num_classes
        hard, rest = pixels[wrong], pixels[~wrong]
        n_hard = n_view // 2
        if easy == "random":
            rest = torch.cat([rest, hard[n_hard:]])
            rest = rest[hash32(seed, ANCHOR_EASY, rest).argsort()]
        else:
            n_hard = max(n_hard, n_view - len(rest))
        hard = hard[:n_hard]
        chosen += [hard, rest[: n_view - len(hard)]]
    taken = torch.cat(chosen)
    pixel = flat.new_full((max_samples,), -1)
    pixel[: len(taken)] = taken
    return pixel, torch.where(pixel >= 0, flat[pixel] if len(flat) else pixel, -1)


def _pair_masks(
    anchor_labels: Tensor,  # [A]
    key_labels: Tensor,  # [K]
    in_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Which pairs are positive and which negative: [A, K] each."""
    used = (anchor_labels[:, None] >= 0) & (key_labels >= 0)
    same = anchor_labels[:, None] == key_labels
    positive = used & same
    if in_batch:
        positive.fill_diagonal_(False)
    return positive, used & ~same


def _select_row(
    hardness: Tensor,  # [n] similarity of negatives, its negative for positives
    candidates: Tensor,  # [n] key indices, ascending
    count: int,
    sampling: str,
    hard_fraction: float,
    seed,
    stream: int,
    row: int,
) -> Tensor:
    """Keys that one anchor is compared with, hardest first, equal ones by lower index."""
    n = len(candidates)
    picked = torch.arange(n, device=candidates.device)
    if sampling == "random" and n > count:
        picked = permute(picked[:count], picked.new_tensor(n), seed, stream, row).sort()[0]
    if sampling == "hardest":
        picked = hardness.argsort(descending=True, stable=True)[:count].sort()[0]
    if sampling == "semi_hard":
        pool_size = max(1, math.ceil(hard_fraction * n))
        pool = hardness.argsort(descending=True, stable=True)[:pool_size]
        lot = hash32(seed, stream, row, candidates[pool])
        picked = pool[lot.argsort()[:count]].sort()[0]
    return candidates[picked[hardness[picked].argsort(descending=True, stable=True)]]


def select_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K]
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    seed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positive_index [A, P], negative_index [A, N] and their inner products; -1 and 0 behind the last.

    `random` draws from the valid keys in the order (class, index), without the anchor's own row.
    "all" takes every key: P = N = K.
    """
    in_batch = keys is None
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    rows, columns = _precise(anchors.detach(), keys.detach())
    similarity = rows @ columns.T
    if sampling == "all":
        num_positives = num_negatives = len(keys)
    masks = _pair_masks(anchor_labels, key_labels, in_batch)
    found = []
    for mask, count, sign, stream in zip(
        masks, (num_positives, num_negatives), (-1, 1), (POSITIVE, NEGATIVE), strict=True
    ):
        index = key_labels.new_full((len(anchors), count), -1, dtype=torch.int64)
        for i in range(len(anchors)):
            candidates = mask[i].nonzero()[:, 0]
            if sampling == "random":
                candidates = candidates[key_labels[candidates].argsort(stable=True)]
            hardness = sign * similarity[i, candidates]
            picked = _select_row(
                hardness, candidates, count, sampling, hard_fraction, seed, stream, i
            )
            index[i, : len(picked)] = picked
        products = similarity.gather(1, index.clamp(min=0)) if len(keys) else index.to(rows.dtype)
        found.append((index, products.masked_fill(index < 0, 0.0)))
    (positive_index, positive), (negative_index, negative) = found
    return positive_index, negative_index, positive, negative


def synthesise(
    anchors: Tensor,  # [A, D]
    keys: Tensor,  # [K, D]
    pool_index: Tensor,  # [A, pool] most similar selected negatives, -1 behind the last
    negative_negative: int,
    negative_anchor: int,
    seed,
    first_row: int = 0,  # number of the first of these anchors, where they are a part of more
) -> tuple[Tensor, Tensor]:
    """Mixed negatives [A, M, D], constants, and which of them exist [A, M]; M counts both kinds.

    negative-negative: unit(g n_a + (1 - g) n_b), g ~ U(0, 1), two different ones of the pool;
    negative-anchor: unit(alpha a + (1 - alpha) n), alpha ~ U(0, 0.5). After MoCHi (Kalantidis et al.,
    2020): PiCo's own formulas were never published as code. Picks are places in the pool in the order
    of key indices, so that a swap of two ranks by rounding changes nothing.
    """
    keys = keys.detach()
    anchors, _ = _precise(anchors.detach(), keys[:0])
    size = (pool_index >= 0).sum(1, keepdim=True)
    in_order = pool_index.masked_fill(pool_index < 0, torch.iinfo(torch.int64).max).sort(1)[0]
    in_order = in_order.masked_fill(in_order >= len(keys), 0)
    row = first_row + torch.arange(len(anchors), device=keys.device)[:, None]

    def member(place: Tensor) -> Tensor:
        return keys[in_order.gather(1, place.clamp(max=in_order.shape[1] - 1))].to(anchors.dtype)

    def mix(share: Tensor, x: Tensor, y: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        share = share.to(x.dtype)[..., None]
        mixed = share * x + (1 - share) * y
        shortest = SHORTEST_MIX * torch.maximum(x.norm(dim=-1), y.norm(dim=-1))
        exists = exists & (mixed.norm(dim=-1) > shortest.clamp(min=SHORTEST_NORM))
        return normalize(mixed, dim=-1), exists

    draw = torch.arange(negative_negative, device=keys.device)
    first = below(hash32(seed, MIX_FIRST, row, draw), size)
    second = below(hash32(seed, MIX_SECOND, row, draw), size - 1).clamp(min=0)
    second = second + (second >= first)
    share = uniform(hash32(seed, MIX_SHARE, row, draw))
    of_two = mix(share, member(first), member(second), (size >= 2).expand_as(first))

    draw = torch.arange(negative_anchor, device=keys.device)
    place = below(hash32(seed, MIX_WITH_ANCHOR, row, draw), size)
    share = uniform(hash32(seed, MIX_ANCHOR_SHARE, row, draw)) * 0.5
    of_anchor = mix(share, anchors[:, None], member(place), (size >= 1).expand_as(place))
    return torch.cat([of_two[0], of_anchor[0]], 1), torch.cat([of_two[1], of_anchor[1]], 1)


def contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor | None,  # [K, D]; None: the anchors with one another, a row never with itself
    key_labels: Tensor | None,  # [K]
    temperature: float,
    sampling: str = "all",
    num_positives: int = 1024,
    num_negatives: int = 2048,
    hard_fraction: float = 0.1,
    mixes: tuple[int, int, int] | None = None,  # negative-negative, negative-anchor, pool
    seed=0,
) -> tuple[Tensor, Tensor]:
    """Loss [A] of each anchor and whether it counts in the mean [A]: it has a positive."""
    in_batch = keys is None
    spoiled = (anchor_labels >= 0) & ~anchors.isfinite().all(1)
    factor = torch.where(spoiled, math.nan, 0.0)[:, None]
    lost = (anchors.masked_fill(~spoiled[:, None], 0.0) * factor).sum(1)
    anchor_labels = anchor_labels.masked_fill(spoiled, -1)
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    anchors, keys = _precise(anchors, keys)
    # an empty slot may hold anything; 0 x nan would still be nan in the gradient
    anchors = anchors.masked_fill(anchor_labels[:, None] < 0, 0.0)
    keys = keys.masked_fill(key_labels[:, None] < 0, 0.0)
    positive, negative = _pair_masks(anchor_labels, key_labels, in_batch)
    choice = (anchors, anchor_labels, None if in_batch else keys, key_labels)
    if sampling != "all":
        found = select_keys(*choice, sampling, num_positives, num_negatives, hard_fraction, seed)
        positive, negative = (
            positive.new_zeros(len(anchors), len(keys) + 1).scatter_(
                1, index.masked_fill(index < 0, len(keys)), True
            )[:, :-1]
            for index in found[:2]
        )
    s = anchors @ keys.T / temperature
    terms = s.masked_fill(~negative, -math.inf)
    if mixes is not None:
        if sampling == "all":
            found = select_keys(*choice, "hardest", 1, mixes[2], hard_fraction, seed)
        pool_index = found[1][:, : mixes[2]]
        if len(keys):
            mixed, exists = synthesise(anchors, keys, pool_index, *mixes[:2], seed)
            of_mixes = (mixed @ anchors[..., None])[..., 0] / temperature
            terms = torch.cat([terms, of_mixes.masked_fill(~exists, -math.inf)], 1)
    has_negative = (terms > -math.inf).any(1)
    # rows without a negative are computed from zeros and then dropped, which keeps nan out
    z = terms.masked_fill(~has_negative[:, None], 0.0).logsumexp(1)
    usable = positive & has_negative[:, None]
    each = softplus(z[:, None] - s, threshold=40.0).masked_fill(~usable, 0.0)
    n_positive = positive.sum(1)
    return each.sum(1) / n_positive.clamp(min=1) + lost, n_positive > 0


def region_pool(
    features: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64, -1 left out
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Mean embedding of each class in each image [B, C, D], 0 where empty, and pixel counts [B, C]."""
    (features,) = _precise(features)
    member = labels.flatten(1)[:, None] == torch.arange(num_classes, device=labels.device)[:, None]
    sums = features.new_zeros(len(labels), num_classes, features.shape[1])
    for b, image in enumerate(features.flatten(2)):
        for c in range(num_classes):
            # only the class's own pixels are added: 0 x nan of another would be nan
            sums[b, c] = image[:, member[b, c]].sum(1)
    counts = member.sum(2)
    return sums / counts.clamp(min=1)[..., None], counts


def update_bank(
    storage: Tensor,  # [C, P + R, D] the pixel queue, then the region queue of each class
    pixel_count: Tensor,  # [C] int64 filled slots
    pixel_next: Tensor,  # [C] int64 slot that is written next
    region_count: Tensor,  # [C] int64
    region_next: Tensor,  # [C] int64
    pixel_queue_size: int,
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64, -1 left out
    pixels_per_image: int,
    seed,
) -> int:
    """Write a batch into the bank, in place: random pixels and the mean of every class of every image.

    Images in batch order, a class's pixels in the order of their hash; each ring overwrites its
    oldest entry. A vector that is not finite is not stored; returns how many were not.
    """
    region_queue_size, refused = storage.shape[1] - pixel_queue_size, 0

    def push(row: Tensor, c: int, first: int, size: int, count: Tensor, next_: Tensor) -> None:
        nonlocal refused
        row = row.to(storage.dtype)
        if size and row.isfinite().all():
            storage[c, first + next_[c]] = row
            next_[c] = (next_[c] + 1) % size
            count[c] = min(int(count[c]) + 1, size)
        elif size:
            refused += 1

    means, _ = region_pool(embeddings, labels, len(storage))
    for b, image in enumerate(labels.flatten(1)):
        for c in image[image >= 0].unique().tolist():
            pixels = (image == c).nonzero()[:, 0]
            order = hash32(seed, BANK_PIXEL, b * image.numel() + pixels).argsort()
            for pixel in pixels[order][:pixels_per_image]:
                row = embeddings[b].flatten(1)[:, pixel]
                push(row, c, 0, pixel_queue_size, pixel_count, pixel_next)
            region = normalize(means[b, c], dim=0)
            push(region, c, pixel_queue_size, region_queue_size, region_count, region_next)
    return refused
