"""The compiled ops called directly and wrongly: what would read outside of a tensor raises."""

import pytest
import torch

import pico_fast  # noqa: F401  (the ops)
from pico_fast.regions import why_not_compiled

pytestmark = pytest.mark.skipif(why_not_compiled is not None, reason="no compiled kernels")


def zeros(*size):
    return torch.zeros(size)


def index(*size):
    return torch.zeros(size, dtype=torch.int64)


def many(*size):
    """A tensor of any size that takes no memory."""
    return torch.zeros(1).expand(size)


# of each op a call that is right; 3 anchors or rows, 5 keys, 4 channels, 2 picks
CALLS = {
    "region_pool": {"features": zeros(2, 4, 3, 5), "labels": index(2, 3, 5), "num_classes": 6},
    "region_pool_backward": {
        "grad_means": zeros(2, 6, 4),
        "labels": index(2, 3, 5),
        "counts": index(2, 6),
        "dtype": torch.float32,
        "channels_last": False,
    },
    "gather_pixels": {"features": zeros(2, 4, 3, 5), "pixel": index(7)},
    "sample_keys": {
        "ranges": torch.tensor([[[0, 3], [5, 1]], [[3, 2], [6, 0]]]),
        "names": index(2),
        "key_order": index(6),
        "need": 2,
        "own": True,
        "seed": index(),
        "capacity": 5,
    },
    "multiply_few": {
        "rows": zeros(3, 4),
        "keys": zeros(5, 4),
        "which": index(2),
        "products": zeros(3, 2),
    },
    "cut_rows": {
        "similarity": zeros(3, 2),
        "ceiling": zeros(3),
        "count": 4,
        "fraction": 0.5,
        "own": False,
        "below": index(3),
    },
    "add_negatives": {
        "similarity": zeros(3, 2),
        "keys": zeros(5, 4),
        "which": index(2),
        "temperature": 0.1,
        "top": zeros(3),
        "total": zeros(3),
        "away": zeros(3),
        "mean": zeros(3, 4),
    },
    "add_positives": {
        "similarity": zeros(3, 2),
        "keys": zeros(5, 4),
        "which": index(2),
        "lse": zeros(3),
        "temperature": 0.1,
        "loss": zeros(3),
        "weight": zeros(3),
        "similar": zeros(3),
        "pull": zeros(3, 4),
    },
    "keep_hardest": {
        "similarity": zeros(3, 2),
        "name": index(2),
        "first": 0,
        "ceiling": zeros(3),
        "own": False,
        "count": 4,
        "kept": index(3, 100),
        "tally": index(3, 3),
    },
    "list_kept": {
        "kept": index(3, 100),
        "tally": index(3, 3),
        "own": False,
        "index": index(3, 2),
        "similarity": zeros(3, 2),
    },
    "weighted_rows": {"keys": zeros(5, 4), "index": index(3, 2), "weight": zeros(3, 2)},
    "mix_negatives": {
        "anchors": zeros(3, 4),
        "keys": zeros(5, 4),
        "pool_index": index(3, 2),
        "row": index(3),
        "negative_negative": 2,
        "negative_anchor": 2,
        "temperature": 0.1,
        "seed": index(),
    },
}

# what is wrong about a call, and a word of the message; first of a tile and its keys
WRONG_TILE = [
    ({"similarity": zeros(6)}, "similarity"),
    ({"similarity": zeros(3, 3)}, "which"),
    ({"similarity": zeros(2, 3).T}, "similarity"),
    ({"similarity": index(3, 2)}, "rows"),
    ({"keys": zeros(20)}, "keys"),
    ({"keys": zeros(4, 5).T}, "keys"),
    ({"keys": zeros(5, 4).double()}, "keys"),
    ({"keys": index(5, 4)}, "keys"),
    ({"which": None}, "keys"),
    ({"which": index(2) + 5}, "index"),
    ({"which": index(2) - 1}, "index"),
    ({"which": index(2).int()}, "which"),
]
WRONG = {
    "region_pool": [
        ({"features": zeros(2, 4, 15)}, "expected"),
        ({"labels": index(2, 15)}, "expected"),
        ({"labels": index(1, 3, 5)}, "batch, height and width"),
        ({"labels": index(2, 2, 5)}, "batch, height and width"),
        ({"labels": index(2, 3, 4)}, "batch, height and width"),
        ({"labels": zeros(2, 3, 5)}, "labels"),
        ({"labels": index(2, 3, 5).short()}, "labels"),
        ({"features": index(2, 4, 3, 5)}, "features"),
        ({"features": zeros(2, 4, 3, 5).to(torch.complex64)}, "features"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 65_536}, "num_classes"),
        ({"num_classes": 2**62}, "num_classes"),
    ],
    "region_pool_backward": [
        ({"grad_means": zeros(12, 4)}, "expected"),
        ({"labels": index(2, 15)}, "expected"),
        ({"counts": index(12)}, "expected"),
        ({"labels": index(1, 3, 5)}, "batch"),
        ({"labels": index(3, 3, 5)}, "batch"),
        ({"counts": index(1, 6)}, "batch"),
        ({"counts": index(2, 5)}, "classes"),
        ({"counts": index(2, 6).int()}, "counts"),
        ({"labels": zeros(2, 3, 5)}, "labels"),
        ({"grad_means": zeros(2, 6, 4).double()}, "grad_means"),
        ({"grad_means": zeros(2, 6, 4).half()}, "grad_means"),
        ({"dtype": torch.float64}, "grad_means"),
        ({"dtype": torch.int32}, "features"),
        ({"grad_means": zeros(2, 0, 4), "counts": index(2, 0)}, "num_classes"),
        ({"grad_means": zeros(2, 65_536, 1), "counts": index(2, 65_536)}, "num_classes"),
    ],
    "gather_pixels": [
        ({"features": zeros(8, 3, 5)}, "expected"),
        ({"pixel": index(7, 1)}, "expected"),
        ({"pixel": index(7).int()}, "pixel"),
        ({"pixel": index(7) - 1}, "pixel"),
        ({"pixel": index(7) + 30}, "pixel"),
        ({"features": zeros(2, 4, 0, 5)}, "pixel"),
        ({"features": zeros(2, 4, 3, 5).bool()}, "features"),
        ({"features": zeros(2, 4, 3, 5).to(torch.complex128)}, "features"),
    ],
    "sample_keys": [
        ({"ranges": index(4, 2)}, "expected"),
        ({"ranges": index(2, 2, 3)}, "expected"),
        ({"names": index(3)}, "expected"),
        ({"ranges": index(2, 2, 2).int()}, "ranges"),
        ({"names": index(2).int()}, "names"),
        ({"key_order": index(6).int()}, "key_order"),
        ({"key_order": index(5)}, "ranges"),
        ({"ranges": torch.tensor([[[0, 3]], [[3, -1]]])}, "ranges"),
        ({"ranges": torch.tensor([[[0, 3]], [[-1, 2]]])}, "ranges"),
        ({"ranges": torch.tensor([[[0, 3]], [[3, 2**62]]])}, "ranges"),
        ({"ranges": torch.tensor([[[0, 3]], [[2**63 - 1, 2]]])}, "ranges"),
        ({"need": -1}, "need"),
        ({"need": 2**31}, "need"),
        ({"capacity": 3}, "capacity"),
        ({"capacity": -1}, "capacity"),
        ({"ranges": index(2, 2, 2), "capacity": -1}, "capacity"),
        ({"seed": index(2)}, "seed"),
        ({"seed": zeros()}, "seed"),
    ],
    "multiply_few": [
        ({"rows": zeros(12)}, "expected"),
        ({"products": zeros(6)}, "expected"),
        ({"products": zeros(3, 3)}, "which"),
        ({"products": zeros(2, 2)}, "products"),
        ({"products": zeros(3, 2).double()}, "products"),
        ({"products": zeros(2, 3).T}, "products"),
        ({"rows": zeros(3, 4).half()}, "rows"),
        ({"rows": zeros(4, 3).T}, "rows"),
        ({"keys": zeros(5, 3)}, "keys"),
        ({"keys": zeros(4, 5).T}, "keys"),
        ({"keys": zeros(5, 4).double()}, "keys"),
        ({"keys": index(5, 4)}, "keys"),
        ({"which": None}, "keys"),
        ({"which": index(2) + 5}, "index"),
        ({"which": index(2) - 1}, "index"),
        ({"which": index(2).int()}, "which"),
    ],
    "cut_rows": [
        ({"similarity": zeros(6)}, "similarity"),
        ({"similarity": zeros(3, 2).half()}, "similarity"),
        ({"similarity": zeros(2, 3).T}, "similarity"),
        ({"similarity": zeros(3, 2).double()}, "ceiling"),
        ({"ceiling": zeros(2)}, "ceiling"),
        ({"count": 0}, "count"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.01}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"below": index(2)}, "below"),
        ({"below": index(3).int()}, "below"),
    ],
    "add_negatives": [
        *WRONG_TILE,
        ({"top": zeros(2)}, "top"),
        ({"total": zeros(3).double()}, "total"),
        ({"away": zeros(4)}, "away"),
        ({"mean": zeros(3)}, "mean"),
        ({"mean": zeros(2, 4)}, "mean"),
        ({"mean": zeros(3, 3)}, "mean"),
    ],
    "add_positives": [
        *WRONG_TILE,
        ({"lse": zeros(2)}, "lse"),
        ({"loss": zeros(3).double()}, "loss"),
        ({"weight": zeros(4)}, "weight"),
        ({"similar": zeros(3, 1)}, "similar"),
        ({"pull": zeros(4, 3).T}, "pull"),
        ({"pull": zeros(3, 5)}, "pull"),
    ],
    "keep_hardest": [
        ({"similarity": zeros(6)}, "expected"),
        ({"similarity": zeros(3, 2).half()}, "similarity"),
        ({"similarity": zeros(3, 2).double(), "ceiling": None}, "kept"),
        ({"name": index(3)}, "name"),
        ({"name": index(2).int()}, "name"),
        ({"first": -1}, "columns"),
        ({"first": 2**31}, "columns"),
        ({"ceiling": zeros(2)}, "ceiling"),
        ({"count": 0}, "kept"),
        ({"count": 2**62}, "kept"),
        ({"count": 2**63 - 1}, "kept"),
        ({"kept": index(3, 8)}, "kept"),
        ({"kept": index(2, 100)}, "kept"),
        ({"kept": index(300)}, "expected"),
        ({"kept": index(3, 100).int()}, "kept"),
        ({"tally": zeros(3, 3)}, "tally"),
        ({"tally": index(3, 2)}, "tally"),
        ({"tally": index(3, 3) + 100}, "tally"),
        ({"tally": index(3, 3) - 1}, "tally"),
    ],
    "list_kept": [
        ({"kept": index(300)}, "expected"),
        ({"kept": index(2, 100)}, "tally"),
        ({"index": index(6)}, "expected"),
        ({"index": index(2, 2)}, "index"),
        ({"similarity": zeros(3, 3)}, "similarity"),
        ({"similarity": zeros(3, 2).half()}, "similarity"),
        ({"tally": index(3, 3) + 100}, "tally"),
    ],
    "weighted_rows": [
        ({"keys": zeros(20)}, "expected"),
        ({"weight": zeros(3, 1)}, "expected"),
        ({"weight": zeros(2, 2)}, "expected"),
        ({"index": index(6)}, "expected"),
        ({"index": index(3, 2).int()}, "index"),
        ({"index": index(3, 2) + 5}, "index"),
        ({"index": index(3, 2) - 2}, "index"),
        ({"weight": zeros(3, 2).half()}, "weights"),
        ({"keys": zeros(5, 4).double()}, "keys"),
        ({"keys": zeros(5, 4).bool()}, "keys"),
    ],
    "mix_negatives": [
        ({"anchors": zeros(12)}, "expected"),
        ({"keys": zeros(5, 3)}, "expected"),
        ({"pool_index": index(2, 2)}, "expected"),
        ({"pool_index": index(6)}, "expected"),
        ({"pool_index": index(3, 2).int()}, "index"),
        ({"pool_index": index(3, 2) + 5}, "index"),
        ({"row": index(2)}, "row"),
        ({"row": index(3).int()}, "row"),
        ({"keys": index(5, 4)}, "keys"),
        ({"seed": index(2)}, "seed"),
        ({"seed": zeros()}, "seed"),
        ({"negative_negative": -1}, "mixes"),
        ({"negative_anchor": 2**32}, "mixes"),
    ],
}
CASES = [(op, wrong, message) for op, cases in WRONG.items() for wrong, message in cases]


def call(op, arguments):
    return getattr(torch.ops.pico_fast, op).default(**arguments)


@pytest.mark.parametrize("op", CALLS)
def test_the_right_call_is_right(op):
    call(op, CALLS[op])


@pytest.mark.parametrize(
    ("op", "wrong", "message"), CASES, ids=[f"{op}-{'-'.join(wrong)}" for op, wrong, _ in CASES]
)
def test_a_wrong_call_raises(op, wrong, message):
    with pytest.raises(RuntimeError, match=message):
        call(op, CALLS[op] | wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", ["region_pool", "region_pool_backward"])
def test_tensors_of_two_devices_raise(op):
    tensors = [name for name, value in CALLS[op].items() if torch.is_tensor(value)]
    for name in tensors:
        with pytest.raises(RuntimeError, match="device"):
            call(op, CALLS[op] | {name: CALLS[op][name].cuda()})
