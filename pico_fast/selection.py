"""Selection: which keys each anchor is compared with (all, random, hardest, semi_hard)."""

from typing import NamedTuple

import torch
from torch import Tensor

from pico_fast import checks, reference
from pico_fast.class_order import labels_of_segments
from pico_fast.finite import check_keys, finite_anchors
from pico_fast.picked import pick_keys, rank_keys

SAMPLINGS = ("all", "random", "hardest", "semi_hard")

# similarities held at a time: a block of anchors with all keys, never anchors x keys. A CPU reads all
# keys anew for every block; elsewhere a block is followed by words and masks of its size
_BLOCK = 2**24
_BLOCK_ON_CPU = 2**26
_KEY_TILE = 2**13
# from this share of used keys on, empty slots cost less than taking the used rows out of the bank
_MOSTLY_USED = 0.75
# a walk leaves [0, n) with probability below 1/sqrt(n), at most sqrt(n) times in a row: after so many
# steps none is left outside in practice, and nothing has to be read back to know it
_WALKS = 16

torch.library.define(
    "pico_fast::select_keys",
    "(Tensor anchors, Tensor anchor_labels, Tensor? keys, Tensor? key_labels, str sampling,"
    " int num_positives, int num_negatives, float hard_fraction, Tensor seed,"
    " Tensor? segments=None)"
    " -> (Tensor positive_index, Tensor negative_index, Tensor positive_similarity,"
    " Tensor negative_similarity)",
)
torch.library.define(
    "pico_fast::permute_ranks",
    "(Tensor rank, Tensor n, Tensor seed, int stream, Tensor row) -> Tensor",
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
    key_index: Tensor | None,  # [n_keys] int64 into keys; None: all
    out: Tensor,  # [n, n_keys], is written
) -> None:
    """Inner products; keys are taken out and converted tile by tile: no copy of the bank is made."""
    for first in range(0, out.shape[1], _KEY_TILE):
        here = slice(first, first + _KEY_TILE)
        tile = keys[here] if key_index is None else keys[key_index[here]]
        torch.mm(rows, tile.to(rows.dtype).T, out=out[:, here])


def _used(
    key_labels: Tensor,  # [K] int64
) -> Tensor | None:
    """Ascending indices of the used keys; None where most are used, or the device cannot be read."""
    if key_labels.device.type != "cpu":
        return None
    used = key_labels >= 0
    if int(used.sum()) >= _MOSTLY_USED * used.numel():
        return None
    return used.nonzero()[:, 0]


def permute_torch(
    rank: Tensor,  # [n, k] int64 below n
    n: Tensor,  # [n, 1] int64
    seed: Tensor,  # [] int64
    stream: int,
    row: Tensor,  # [n, 1] int64
) -> Tensor:
    """The op `permute_ranks` in PyTorch: `reference.permute`, nothing read back to the host: [n, k].

    Where the device cannot be read it is the same walk with a fixed number of steps.
    """
    if n.device.type == "cpu":
        return reference.permute(rank, n, seed, stream, row)
    a, b = reference.rectangle(n)
    state = reference.hash32(seed, stream, row)
    out = reference.feistel(rank, a, b, state)
    for _ in range(_WALKS):
        out = torch.where(out >= n, reference.feistel(out, a, b, state), out)
    return out


torch.library.impl("pico_fast::permute_ranks", "CompositeExplicitAutograd", permute_torch)


@torch.library.register_fake("pico_fast::permute_ranks")
def _(rank, *_):
    return rank.new_empty(rank.shape)


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
        shuffled = torch.ops.pico_fast.permute_ranks.default(
            torch.where(inside, rank, 0), n.clamp(min=1), seed, stream, row
        )
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


def select_any(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int64
    keys: Tensor | None,  # [K, D]; None: the anchors with one another
    key_labels: Tensor | None,  # [K] int64
    sampling: str,
    num_positives: int,
    num_negatives: int,
    hard_fraction: float,
    seed: Tensor,  # [] int64
    segments: Tensor | None = None,  # [C, G, 2] int64, instead of key_labels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that `select_keys` returns, a block of anchors at a time; a GPU is not read back."""
    if segments is not None:
        key_labels = labels_of_segments(segments, keys.shape[0])
    in_batch = keys is None
    if in_batch:
        keys, key_labels = anchors, anchor_labels
    n_anchors, n_keys = anchors.shape[0], keys.shape[0]
    dtype = product_dtype(anchors, keys)
    counts = (n_keys, n_keys) if sampling == "all" else (num_positives, num_negatives)
    streams = ((-1, reference.POSITIVE), (1, reference.NEGATIVE))
    index = [anchor_labels.new_full((n_anchors, count), -1) for count in counts]
    similarity = [anchors.new_zeros((n_anchors, count), dtype=dtype) for count in counts]
    used = None if in_batch else _used(key_labels)
    if used is not None:
        key_labels, n_keys = key_labels[used], used.numel()
    if n_anchors == 0 or n_keys == 0:
        return *index, *similarity
    if sampling == "random":
        queries = anchors.to(dtype)
        drawn = _random(anchor_labels, key_labels, in_batch, *counts, seed)
        for side, (sign, _) in enumerate(streams):
            choice = _among_all(drawn[side], used)
            choice, products = rank_keys(queries, keys, choice, sign < 0)
            index[side][:, : choice.shape[1]] = choice
            similarity[side][:, : choice.shape[1]] = products
        return *index, *similarity
    block = max(1, (_BLOCK_ON_CPU if anchors.device.type == "cpu" else _BLOCK) // n_keys)
    # one buffer for all blocks: fresh memory would be cleared by the system each time
    buffer = anchors.new_empty(min(block, n_anchors), n_keys, dtype=dtype)
    for first in range(0, n_anchors, block):
        here = slice(first, first + block)
        queries = anchors[here].to(dtype)
        products = buffer[: queries.shape[0]]
        _similarity(queries, keys, used, products)
        for side, (sign, stream) in enumerate(streams):
            if counts[side] == 0:  # the op, unlike the public function, may be asked for one side
                continue
            picked = pick_keys(
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
                used,
            )
            index[side][here] = _among_all(picked, used)
            found = products.gather(1, picked.clamp(min=0)).masked_fill_(picked < 0, 0.0)
            similarity[side][here] = found
    return *index, *similarity


def _among_all(
    picked: Tensor,  # [n, k] int64 into the used keys, -1 where there is none
    used: Tensor | None,  # [n_keys] int64
) -> Tensor:
    """The same picks as indices into all keys: [n, k]."""
    return picked if used is None else torch.where(picked < 0, -1, used[picked.clamp(min=0)])


def _select_without_autocast(*args):
    with torch.autocast(args[0].device.type, enabled=False):
        return select_any(*args)


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
    key_labels = key_labels.long()
    check_keys("keys", keys, key_labels)
    return anchor_labels.long(), key_labels


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
        SelectedKeys: indices into keys, hardest first, -1 behind the last, and inner products. An anchor
        that holds a nan or an infinity selects nothing and, in batch, is selected by none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or, on a CPU, keys in
            use that are not finite.

    Source: PiCo, TPAMI 2024, hard example sampling; Wang et al., ICCV 2021, section 3.2.
    """
    anchor_labels, key_labels = check_pairs(anchors, anchor_labels, keys, key_labels)
    check_sampling(sampling, num_positives, num_negatives, hard_fraction)
    select = torch.ops.pico_fast.select_keys.default
    if checks.implementation(impl):
        select = reference.select_keys
    found = select(
        anchors.detach(),
        finite_anchors(anchors, anchor_labels)[0],
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
