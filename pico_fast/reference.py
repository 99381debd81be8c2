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

from pico_fast import draws
from pico_fast.selection.options import Selection

# a sum of two opposite rows has no direction: mixes shorter than this share of the longer, or than what
# `normalize` divides by at least, are left out
SHORTEST_MIX, SHORTEST_NORM = 1e-2, 1e-12


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
        pairs = pairs[draws.hash32(seed, draws.ANCHOR_PAIR, pairs).argsort()][:max_samples]
    n_view = max(1, min(max_samples // max(1, len(pairs)), max_views))
    chosen = [flat[:0]]
    for pair in sorted(pairs.tolist(), key=lambda pair: (pair % num_classes, pair)):
        pixels = (pair_of_pixel == pair).nonzero()[:, 0]
        pixels = pixels[draws.hash32(seed, draws.ANCHOR_PIXEL, pixels).argsort()]
        wrong = torch.zeros_like(pixels, dtype=torch.bool)
        if predictions is not None:
            wrong = predictions.flatten()[pixels] != pair % num_classes
        hard, rest = pixels[wrong], pixels[~wrong]
        n_hard = n_view // 2
        if easy == "random":
            rest = torch.cat([rest, hard[n_hard:]])
            rest = rest[draws.hash32(seed, draws.ANCHOR_EASY, rest).argsort()]
        else:
            n_hard = max(n_hard, n_view - len(rest))
        hard = hard[:n_hard]
        chosen += [hard, rest[: n_view - len(hard)]]
    taken = torch.cat(chosen)
    pixel = flat.new_full((max_samples,), -1)
    pixel[: len(taken)] = taken
    return pixel, torch.where(pixel >= 0, flat[pixel] if len(flat) else pixel, -1)


def sample_keys(
    key_labels: Tensor,  # [K]
    need: int,
    own: bool,
    seed,
) -> Tensor:
    """The sample of one side, drawn once for all anchors: rows of keys [W], class by class.

    Of a class with n keys k are drawn. Positives (`own`): as many as an anchor needs. Negatives: the same
    share of every class, so large that an anchor of the largest class meets `need` of the others. Stretch t
    of k covers places floor(t n / k) to floor((t + 1) n / k) of the class's keys; a place within each is
    drawn, and all are turned by a drawn offset: uniform, and none twice.
    """
    classes, sizes = key_labels[key_labels >= 0].unique(return_counts=True)
    others = int(sizes.sum() - sizes.max()) if len(sizes) else 0
    stream, rows = draws.POSITIVE if own else draws.NEGATIVE, [classes[:0]]
    for c, n in zip(classes.tolist(), sizes.tolist(), strict=True):
        share = n if others <= need else -(-need * n // others)  # rounded up
        k = min(n, need) if own else share
        state, t = draws.hash32(seed, stream, c), torch.arange(k, device=classes.device)
        begin, end = t * n // k, (t + 1) * n // k
        place = begin + draws.below(draws.fold(state, t), end - begin) + draws.below(state, n)
        rows.append((key_labels == c).nonzero()[place % n, 0])
    return torch.cat(rows)


def select_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K]
    selection: Selection,
    seed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positive_index [A, P], negative_index [A, N] and their inner products, hardest first.

    -1 and 0 stand behind the last. Equal similarities go by place in the sample, or where all keys take
    part by lower index. "all" has P, N = K; "random" as many as the anchor has that meets most.
    """
    in_batch = keys is None
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    rows, columns = _precise(anchors.detach(), keys.detach())
    similarity = rows @ columns.T
    every = torch.arange(len(keys), device=keys.device)
    needs = {own: selection.needed(own) for own in (True, False)}
    offered = {
        own: every if need is None else sample_keys(key_labels, need, own, seed)
        for own, need in needs.items()
    }
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for i in range(len(anchors)):
        ceiling = math.inf
        for own in (True, False):
            strategy, count = selection.strategy(own), selection.count(own)
            key = offered[own]
            used = (key_labels[key] >= 0) & (anchor_labels[i] >= 0)
            key = key[used & ((key_labels[key] == anchor_labels[i]) == own)]
            key = key[key != i] if in_batch else key
            s = similarity[i, key]
            if own and len(key):
                ceiling = s.mean()
            if strategy == "bounded":
                key = key[s < ceiling]
            n = len(key)
            if strategy in ("semi_hard", "bounded"):
                n = min(count, math.ceil(selection.hard_fraction * n))
            elif strategy == "hardest":
                n = min(count, n)
            hardness = (-1 if own else 1) * similarity[i, key]
            found[own].append(key[hardness.argsort(descending=True, stable=True)[:n]])
    index, products = {}, {}
    for own, lists in found.items():
        width = {"all": len(keys), "random": max(map(len, lists), default=0)}
        shape = (len(anchors), width.get(selection.strategy(own), selection.count(own)))
        index[own] = key_labels.new_full(shape, -1, dtype=torch.int64)
        products[own] = rows.new_zeros(shape)
        for i, chosen in enumerate(lists):
            index[own][i, : len(chosen)] = chosen
            products[own][i, : len(chosen)] = similarity[i, chosen]
    return index[True], index[False], products[True], products[False]


def draw_mixes(
    pool_index: Tensor,  # [A, pool] int64 into keys, -1 behind the last
    row: Tensor,  # [A] number of each anchor in its draws
    negative_negative: int,
    negative_anchor: int,
    seed,
) -> tuple[Tensor, Tensor, Tensor]:
    """First and second key of each mix and the first one's share: [A, M] each, one kind after the other.

    The first is -1 where it is the anchor, the second where there is no mix. Picks are places in the pool
    in the order of key indices, so that a swap of two ranks by rounding changes nothing.
    """
    size = (pool_index >= 0).sum(1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    in_order = pool_index.masked_fill(pool_index < 0, last).sort(1)[0]

    def member(place: Tensor, exists: Tensor) -> Tensor:
        found = in_order.gather(1, place.clamp(min=0, max=in_order.shape[1] - 1))
        return torch.where(exists, found, -1)

    def draw(stream: int, n: int) -> Tensor:
        return draws.hash32(seed, stream, row[:, None], torch.arange(n, device=row.device))

    first = draws.below(draw(draws.MIX_FIRST, negative_negative), size)
    second = draws.below(draw(draws.MIX_SECOND, negative_negative), size - 1).clamp(min=0)
    second = second + (second >= first)
    of_two = draws.uniform(draw(draws.MIX_SHARE, negative_negative))
    place = draws.below(draw(draws.MIX_WITH_ANCHOR, negative_anchor), size)
    of_anchor = draws.uniform(draw(draws.MIX_ANCHOR_SHARE, negative_anchor)) * 0.5
    return (
        torch.cat([member(first, size >= 2), torch.full_like(place, -1)], 1),
        torch.cat([member(second, size >= 2), member(place, size >= 1)], 1),
        torch.cat([of_two, of_anchor], 1),
    )


def synthesise(
    anchors: Tensor,  # [A, D]
    keys: Tensor,  # [K, D], K >= 1
    pool_index: Tensor,  # [A, pool] most similar selected negatives, -1 behind the last
    row: Tensor,  # [A] number of each anchor in its draws
    negative_negative: int,
    negative_anchor: int,
    seed,
) -> tuple[Tensor, Tensor]:
    """Mixed negatives [A, M, D], constants, and which of them exist [A, M]; M counts both kinds.

    negative-negative: unit(g n_a + (1 - g) n_b), g ~ U(0, 1), two different ones of the pool;
    negative-anchor: unit(alpha a + (1 - alpha) n), alpha ~ U(0, 0.5). After MoCHi (Kalantidis et al.,
    2020): PiCo's own formulas were never published as code.
    """
    anchors, _ = _precise(anchors.detach(), keys[:0])
    first, second, share = draw_mixes(pool_index, row, negative_negative, negative_anchor, seed)
    x, y = (keys.detach()[place.clamp(min=0)].to(anchors.dtype) for place in (first, second))
    x = torch.where(first.unsqueeze(2) < 0, anchors.unsqueeze(1), x)
    share = share.to(x.dtype).unsqueeze(2)
    mixed = share * x + (1 - share) * y
    shortest = SHORTEST_MIX * torch.maximum(x.norm(dim=-1), y.norm(dim=-1))
    exists = (second >= 0) & (mixed.norm(dim=-1) > shortest.clamp(min=SHORTEST_NORM))
    return normalize(mixed, dim=-1), exists


def contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor | None,  # [K, D]; None: the anchors with one another, a row never with itself
    key_labels: Tensor | None,  # [K]
    temperature: float,
    selection: Selection,
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
    pairs = (anchors, anchor_labels, None if in_batch else keys, key_labels)
    positive_index, negative_index, _, _ = select_keys(*pairs, selection, seed)
    positive, negative = (
        index.new_zeros((len(anchors), len(keys) + 1), dtype=torch.bool).scatter_(
            1, index.masked_fill(index < 0, len(keys)), True
        )[:, :-1]
        for index in (positive_index, negative_index)
    )
    s = anchors @ keys.T / temperature
    terms = s.masked_fill(~negative, -math.inf)
    if mixes is not None and negative_index.shape[1]:
        row = torch.arange(len(anchors), device=anchors.device)
        pool_index = negative_index[:, : mixes[2]]
        mixed, exists = synthesise(anchors, keys, pool_index, row, *mixes[:2], seed)
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
            order = draws.hash32(seed, draws.BANK_PIXEL, b * image.numel() + pixels).argsort()
            for pixel in pixels[order][:pixels_per_image]:
                row = embeddings[b].flatten(1)[:, pixel]
                push(row, c, 0, pixel_queue_size, pixel_count, pixel_next)
            region = normalize(means[b, c], dim=0)
            push(region, c, pixel_queue_size, region_queue_size, region_count, region_next)
    return refused
