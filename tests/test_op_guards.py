"""The compiled ops called directly and wrongly: what would read outside of a tensor raises."""

import math

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
    "pick_keys": {
        "similarity": zeros(3, 5),
        "anchor_labels": index(3),
        "key_labels": index(5),
        "positive": True,
        "count": 2,
        "pool_fraction": 0.5,
        "seed": index(),
        "stream": 0,
        "first_row": 0,
        "in_batch": False,
        "key_index": index(5),
    },
    "permute_ranks": {
        "rank": index(3, 2),
        "n": index(3, 1) + 5,
        "seed": index(),
        "stream": 0,
        "row": index(3, 1),
    },
    "rank_keys": {
        "rows": zeros(3, 4),
        "keys": zeros(5, 4),
        "index": index(3, 2),
        "positive": True,
    },
    "weighted_rows": {"keys": zeros(5, 4), "index": index(3, 2), "weight": zeros(3, 2)},
    "mix_negatives": {
        "anchors": zeros(3, 4),
        "keys": zeros(5, 4),
        "pool_index": index(3, 2),
        "negative_negative": 2,
        "negative_anchor": 2,
        "temperature": 0.1,
        "seed": index(),
    },
}

# what is wrong about a call, and a word of the message
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
    "pick_keys": [
        ({"similarity": zeros(15)}, "similarity"),
        ({"anchor_labels": index(2)}, "similarity"),
        ({"key_labels": index(4)}, "similarity"),
        ({"similarity": zeros(3, 5).half()}, "similarity"),
        ({"similarity": index(3, 5)}, "similarity"),
        ({"anchor_labels": index(3).int()}, "labels"),
        ({"key_labels": index(5).int()}, "labels"),
        ({"key_index": index(4)}, "key_index"),
        ({"key_index": index(5).int()}, "indices"),
        ({"seed": index(2)}, "seed"),
        ({"seed": index().int()}, "seed"),
        ({"count": -1}, "new_empty"),
        ({"count": 2**62}, "new_empty"),
        ({"pool_fraction": -0.1}, "pool_fraction"),
        ({"pool_fraction": math.inf}, "pool_fraction"),
        ({"pool_fraction": math.nan}, "pool_fraction"),
        ({"first_row": -1}, "first_row"),
        ({"first_row": 2**63 - 2}, "first_row"),
        ({"similarity": many(3, 2**31), "key_labels": many(2**31)}, "2\\^31"),
        ({"similarity": many(2**31, 5), "anchor_labels": many(2**31)}, "2\\^31"),
    ],
    "permute_ranks": [
        ({"rank": index(6)}, "expected"),
        ({"n": index(2, 1) + 5}, "expected"),
        ({"row": index(2, 1)}, "expected"),
        ({"rank": index(3, 2).int()}, "int64"),
        ({"n": zeros(3, 1) + 5}, "int64"),
        ({"row": index(3, 1).int()}, "int64"),
        ({"seed": zeros()}, "seed"),
        ({"n": index(3, 1)}, "n:"),
        ({"n": index(3, 1) + 2**31}, "n:"),
        ({"rank": index(3, 2) + 5}, "rank"),
        ({"rank": index(3, 2) - 1}, "rank"),
    ],
    "rank_keys": [
        ({"rows": zeros(12)}, "expected"),
        ({"keys": zeros(5, 3)}, "expected"),
        ({"index": index(2, 2)}, "expected"),
        ({"index": index(6)}, "expected"),
        ({"index": index(3, 2).int()}, "index"),
        ({"index": index(3, 2) + 5}, "index"),
        ({"index": index(3, 2) - 2}, "index"),
        ({"keys": zeros(0, 4)}, "index"),
        ({"rows": zeros(3, 4).half()}, "rows"),
        ({"keys": zeros(5, 4).double()}, "keys"),
        ({"keys": index(5, 4)}, "keys"),
        ({"rows": many(2**31, 4), "index": many(2**31, 2)}, "2\\^31"),
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
        ({"index": many(2**31, 2), "weight": many(2**31, 2)}, "2\\^31"),
    ],
    "mix_negatives": [
        ({"anchors": zeros(12)}, "expected"),
        ({"keys": zeros(5, 3)}, "expected"),
        ({"pool_index": index(2, 2)}, "expected"),
        ({"pool_index": index(6)}, "expected"),
        ({"pool_index": index(3, 2).int()}, "index"),
        ({"pool_index": index(3, 2) + 5}, "index"),
        ({"pool_index": index(3, 2) + 3, "keys": None}, "index"),
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
