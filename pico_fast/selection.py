"""Selection: which keys each anchor is compared with (all, random, hardest, semi_hard)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import checks, reference

SAMPLINGS = ("all", "random", "hardest", "semi_hard")

# similarities held at a time: a block of anchors with all keys, never anchors x keys
_BLOCK = 2**24
_KEY_TILE = 2**13
# a walk leaves [0, n) with probability below 1/sqrt(n), at most sqrt(n) times in a row: after so many
# steps none is left outside in practice, and nothing has to be read back to know it
_WALKS = 16

torch.library.define(
    "pico_fast::select_keys",
    "(Tensor anchors, Tensor anchor_labels, Tensor? keys, Tensor? key_labels, str sampling,"
    " int num_positives, int num_negatives, float hard_fraction, Tensor seed)"
    " -> (Tensor positive_index, Tensor negative_index, Tensor positive_similarity,"
    " Tensor negative_similarity)",
)
torch.library.define(
    "pico_fast::pick_keys",
    "(Tensor similarity, Tensor anchor_labels, Tensor key_labels, bool positive, int count,"
    " float pool_fraction, Tensor seed, int stream, int first_row, bool in_batch) -> Tensor",
)


class SelectedKeys(NamedTuple):
    """Keys chosen for each anchor, hardest first; P positives and N negatives were asked for."""

    positive_index: Tensor  # [A, P] int64 into keys, -1 behind the last
    negative_index: Tensor  # [A, N] int64 into keys, -1 behind the last
    positive_similarity: Tensor  # [A, P] float32 inner products, 0 behind the last
    negative_similarity: Tensor  # [A, N] float32 inner products, 0 behind the last


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _similarity(
    rows: Tensor,  # [n, D] in the product's dtype
    keys: Tensor,  # [K, D] any floating dtype
) -> Tensor:
    """Inner products [n, K]; keys are converted tile by tile, so no copy of the bank is made."""
    out = rows.new_empty(rows.shape[0], keys.shape[0])
    for first in range(0, keys.shape[0], _KEY_TILE):
        tile = keys[first : first + _KEY_TILE].to(rows.dtype)
        torch.mm(rows, tile.T, out=out[:, first : first + _KEY_TILE])
    return out


def _ranked(
    hardness: Tensor,  # [n, K]
    candidate: Tensor,  # [n, K] bool
    count: int,
) -> Tensor:
    """The `count` hardest candidates of each row, equal ones by lower index, -1 behind: [n, count]."""
    n_keys = hardness.shape[1]
    if hardness.dtype == torch.float64:
        order = hardness.masked_fill(~candidate, -math.inf).argsort(
            dim=1, descending=True, stable=True
        )
        behind = torch.arange(n_keys, device=order.device) >= candidate.sum(1, keepdim=True)
        return order.masked_fill(behind, -1)[:, :count]
    # one word holds similarity and index: its order is total, so the result does not depend on how
    # topk treats equal values; adding 0 makes -0 and 0 equal
    bits = (hardness + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    column = torch.arange(n_keys, device=bits.device)
    nowhere = torch.iinfo(torch.int64).min
    word = torch.where(candidate, (bits << 32) | (reference.WORD - column), nowhere)
    word = word.topk(count, dim=1)[0]
    return torch.where(word == nowhere, -1, reference.WORD - (word & reference.WORD))


def pick_torch(
    similarity: Tensor,  # [n, K]
    anchor_labels: Tensor,  # [n] int64
    key_labels: Tensor,  # [K] int64
    positive: bool,
    count: int,
    pool_fraction: float,
    seed: Tensor,  # [] int64
    stream: int,
    first_row: int,
    in_batch: bool,
) -> Tensor:
    """The op `pick_keys` in PyTorch, nothing read back to the host: [n, count].

    The hardest keys on one side of a block of anchors whose first is anchor `first_row`, or, with a
    pool_fraction above 0, a draw from the hardest of that share; hardest first, -1 behind the last.
    """
    n_keys = similarity.shape[1]
    own = anchor_labels[:, None]
    row = first_row + torch.arange(own.shape[0], device=own.device)[:, None]
    candidate = (own >= 0) & (key_labels >= 0) & ((own == key_labels) == positive)
    if in_batch:
        candidate &= row != torch.arange(n_keys, device=own.device)
    hardness = -similarity if positive else similarity
    width = min(count, n_keys)
    out = key_labels.new_full((own.shape[0], count), -1)
    if pool_fraction == 0:
        out[:, :width] = _ranked(hardness, candidate, width)
        return out
    largest = max(1, math.ceil(pool_fraction * n_keys))
    pool = _ranked(hardness, candidate, min(largest, n_keys))
    n = candidate.sum(1, keepdim=True)
    pool_size = (n.double() * pool_fraction).ceil().long().clamp(min=1)
    rank = torch.arange(pool.shape[1], device=pool.device)
    member = (rank < pool_size) & (pool >= 0)
    lot = reference.hash32(seed, stream, row, pool)
    lot = torch.where(member, lot, reference.WORD + 1)
    width = min(count, pool.shape[1])
    lot, rank = lot.topk(width, dim=1, largest=False)
    # ranks in ascending order are hardest first again
    rank = torch.where(lot > reference.WORD, pool.shape[1], rank).sort(1)[0]
    picked = pool.gather(1, rank.clamp(max=pool.shape[1] - 1))
    out[:, :width] = torch.where(rank < pool.shape[1], picked, -1)
    return out


torch.library.impl("pico_fast::pick_keys", "CompositeExplicitAutograd", pick_torch)


@torch.library.register_fake("pico_fast::pick_keys")
def _(similarity, anchor_labels, key_labels, positive, count, *_):
    return key_labels.new_empty((similarity.shape[0], count))


def _permute(index: Tensor, n: Tensor, seed: Tensor, stream: int, row: Tensor) -> Tensor:
    """`reference.permute` without reading the device: the same walk with a fixed number of steps."""
    if n.device.type == "cpu":
        return reference.permute(index, n, seed, stream, row)
    a, b = reference.rectangle(n)
    state = reference.hash32(seed, stream, row)
    out = reference.feistel(index, a, b, state)
    for _ in range(_WALKS):
        out = torch.where(out >= n, reference.feistel(out, a, b, state), out)
    return out


def _random(
    anchor_labels: Tensor,  # [A] int64
    key_labels: Tensor,  # [K] int64
    in_batch: bool,
    num_positives: int,
    num_negatives: int,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """Uniform picks without replacement by rank, no pass over the keys: [A, P] and [A, N] indices."""
    # -1 first, then class by class: the ranks of an anchor's negatives are all valid places but its
    # own class, those of its positives its own class
    key_labels = key_labels.clamp(min=-1)
    in_order, order = key_labels.sort(stable=True)
    unused = torch.searchsorted(in_order, torch.zeros_like(in_order[:1]))
    own = anchor_labels.clamp(min=-1)[:, None]
    first = torch.searchsorted(in_order, own)
    n_own = torch.searchsorted(in_order, own, right=True) - first
    row = torch.arange(own.shape[0], device=own.device)[:, None]
    has_slot = own >= 0

    def draw(n: Tensor, count: int, stream: int) -> tuple[Tensor, Tensor]:
        rank = torch.arange(min(count, order.numel()), device=n.device)
        inside = (rank < n) & has_slot
        shuffled = _permute(torch.where(inside, rank, 0), n.clamp(min=1), seed, stream, row)
        return torch.where(n > count, shuffled, rank), inside

    n_positive = n_own - 1 if in_batch else n_own
    rank, inside = draw(n_positive, num_positives, reference.POSITIVE)
    place = first + rank
    if in_batch:
        place = place + (place >= order.argsort()[:, None])
    positive = torch.where(inside, order[torch.where(inside, place, 0)], -1)

    rank, inside = draw(order.numel() - unused - n_own, num_negatives, reference.NEGATIVE)
    place = unused + rank
    place = torch.where(place >= first, place + n_own, place)
    negative = torch.where(inside, order[torch.where(inside, place, 0)], -1)
    return positive, negative


def _by_hardness(
    index: Tensor,  # [n, k] int64, -1 where there is none
    anchors: Tensor,  # [n, D] in the product's dtype
    keys: Tensor,  # [K, D]
    sign: int,
) -> Tensor:
    """The same indices, hardest first, equal ones by lower index, -1 last."""
    behind = torch.where(index < 0, keys.shape[0], index).sort(1)[0]
    rows = keys[behind.clamp(max=keys.shape[0] - 1)].to(anchors.dtype)
    hardness = sign * torch.bmm(rows, anchors[:, :, None])[..., 0]
    hardness = hardness.masked_fill(behind == keys.shape[0], -math.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    behind = behind.gather(1, order)
    return torch.where(behind == keys.shape[0], -1, behind)


def _select(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that `select_keys` returns, a block of anchors at a time, nothing read back to the host."""
    in_batch = keys is None
    if in_batch:
        keys, key_labels = anchors, anchor_labels
    n_anchors, n_keys = anchors.shape[0], keys.shape[0]
    dtype = product_dtype(anchors, keys)
    counts = (n_keys, n_keys) if sampling == "all" else (num_positives, num_negatives)
    streams = ((-1, reference.POSITIVE), (1, reference.NEGATIVE))
    index = [anchor_labels.new_full((n_anchors, count), -1) for count in counts]
    similarity = [anchors.new_zeros((n_anchors, count), dtype=dtype) for count in counts]
    if n_anchors == 0 or n_keys == 0:
        return *index, *similarity
    if sampling == "random":
        drawn = _random(anchor_labels, key_labels, in_batch, *counts, seed)
        width = sum(d.shape[1] for d in drawn) * anchors.shape[1]
    else:
        width = n_keys
    block = max(1, _BLOCK // max(1, width))
    for first in range(0, n_anchors, block):
        here = slice(first, first + block)
        queries = anchors[here].to(dtype)
        if sampling == "random":
            for side, (sign, _) in enumerate(streams):
                picked = _by_hardness(drawn[side][here], queries, keys, sign)
                index[side][here, : picked.shape[1]] = picked
                products = _products(queries, keys, picked)
                similarity[side][here, : picked.shape[1]] = products
            continue
        products = _similarity(queries, keys)
        for side, (sign, stream) in enumerate(streams):
            picked = torch.ops.pico_fast.pick_keys.default(
                products,
                anchor_labels[here],
                key_labels,
                sign < 0,
                counts[side],
                hard_fraction if sampling == "semi_hard" else 0.0,
                seed,
                stream,
                first,
                in_batch,
            )
            index[side][here] = picked
            found = products.gather(1, picked.clamp(min=0)).masked_fill_(picked < 0, 0.0)
            similarity[side][here] = found
    return *index, *similarity


def _products(
    rows: Tensor,  # [n, D] in the product's dtype
    keys: Tensor,  # [K, D]
    index: Tensor,  # [n, k] int64, -1 where there is none
) -> Tensor:
    """Inner products with the indexed keys, 0 where there is none: [n, k]."""
    picked = keys[index.clamp(min=0)].to(rows.dtype)
    return torch.bmm(picked, rows[:, :, None])[..., 0].masked_fill(index < 0, 0.0)


def _select_without_autocast(*args):
    with torch.autocast(args[0].device.type, enabled=False):
        return _select(*args)


torch.library.impl("pico_fast::select_keys", "CompositeExplicitAutograd", _select_without_autocast)


@torch.library.register_fake("pico_fast::select_keys")
def _(anchors, anchor_labels, keys, key_labels, sampling, num_positives, num_negatives, *_):
    n_keys = (anchors if keys is None else keys).shape[0]
    counts = (n_keys, n_keys) if sampling == "all" else (num_positives, num_negatives)
    dtype = product_dtype(anchors, anchors if keys is None else keys)
    shapes = [(anchors.shape[0], count) for count in counts]
    return (
        *(anchors.new_empty(shape, dtype=torch.int64) for shape in shapes),
        *(anchors.new_empty(shape, dtype=dtype) for shape in shapes),
    )


def check_sampling(
    sampling: str, num_positives: int, num_negatives: int, hard_fraction: float
) -> None:
    """Raise unless the options of selection are possible ones."""
    checks.choice("sampling", sampling, SAMPLINGS)
    checks.integer("num_positives", num_positives, 1)
    checks.integer("num_negatives", num_negatives, 1)
    checks.number("hard_fraction", hard_fraction, above=0.0, maximum=1.0)


def check_pairs(
    anchors: Tensor, anchor_labels: Tensor, keys: Tensor | None, key_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Raise unless anchors, keys and labels belong together; the labels as int64."""
    checks.tensor("anchors", anchors, "[A, D]", "floating")
    checks.tensor("anchor_labels", anchor_labels, "[A]", "integer")
    checks.size("anchor_labels", anchor_labels, 0, anchors.shape[0], "that of anchors")
    checks.same_device("anchor_labels", anchor_labels, "anchors", anchors)
    if anchors.shape[1] == 0:
        raise ValueError(f"anchors: expected at least one channel, got {checks.describe(anchors)}")
    if (keys is None) != (key_labels is None):
        raise ValueError("key_labels: expected together with keys, or neither of the two")
    if keys is None:
        return anchor_labels.long(), None
    checks.tensor("keys", keys, "[K, D]", "floating")
    checks.size("keys", keys, 1, anchors.shape[1], "that of anchors")
    checks.same_device("keys", keys, "anchors", anchors)
    checks.tensor("key_labels", key_labels, "[K]", "integer")
    checks.size("key_labels", key_labels, 0, keys.shape[0], "that of keys")
    checks.same_device("key_labels", key_labels, "anchors", anchors)
    return anchor_labels.long(), key_labels.long()


def select_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] integer
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] integer
    sampling: str = "hardest",
    num_positives: int = 1024,
    num_negatives: int = 2048,
    hard_fraction: float = 0.1,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> SelectedKeys:
    """Choose the positives and negatives that each anchor is compared with.

    Args:
        anchors: [A, D] float32, bfloat16, float16 or float64.
        anchor_labels: [A], any integer dtype; a negative label is an empty slot and selects nothing.
        keys: [K, D]; None takes the anchors themselves, a row never with itself.
        key_labels: [K], any integer dtype; a negative label is an empty slot and is never selected.
        sampling: "hardest": the most similar negatives and least similar positives, exact, equal
            similarities by lower index; "semi_hard": uniform without replacement from the hardest
            `hard_fraction` of each side; "random": uniform without replacement from all; "all": every
            key, P = N = K whatever the counts say.
        num_positives: P, most positives of an anchor.
        num_negatives: N, most negatives of an anchor.
        hard_fraction: share of an anchor's negatives (positives) in its hardest pool, (0, 1].
        seed: integer or 0-d int64 tensor; "hardest" and "all" do not depend on it.
        impl: None or "reference".

    Returns:
        SelectedKeys: indices into keys, hardest first, -1 behind the last, and inner products.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Source: PiCo, TPAMI 2024, hard example sampling; Wang et al., ICCV 2021, section 3.2.
    """
    anchor_labels, key_labels = check_pairs(anchors, anchor_labels, keys, key_labels)
    check_sampling(sampling, num_positives, num_negatives, hard_fraction)
    select = torch.ops.pico_fast.select_keys.default
    if checks.implementation(impl):
        select = reference.select_keys
    found = select(
        anchors.detach(),
        anchor_labels,
        None if keys is None else keys.detach(),
        key_labels,
        sampling,
        num_positives,
        num_negatives,
        hard_fraction,
        checks.seed(seed, anchors.device),
    )
    positive_index, negative_index, positive, negative = found
    return SelectedKeys(positive_index, negative_index, positive.float(), negative.float())
