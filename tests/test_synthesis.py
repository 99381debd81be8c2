"""`mix_negatives`: the log-sum and the softmax mean over the mixes that the specification draws."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pico_fast import reference
from pico_fast.selection import eager

OPS = {"op": torch.ops.pico_fast.mix_negatives, "eager": eager.mix_negatives}


def numbers(anchors):
    """Numbers of anchors in their draws, as they come from ranks and in class order."""
    return torch.arange(len(anchors)).flip(0) * 3 + 2**20


def mix(op, anchors, keys, pool_index, *rest):
    *how, seed = rest
    return OPS[op](anchors, keys, pool_index, numbers(anchors), *how, torch.tensor(seed))


def truth(anchors, keys, pool_index, counts, temperature, seed):
    """Log-sum [A] and softmax mean [A, D] in float64, from the mixed rows themselves."""
    anchors, keys, row = anchors.double(), keys.double(), numbers(anchors)
    mixed, exists = reference.synthesise(anchors, keys, pool_index, row, *counts, seed)
    s = (mixed @ anchors[..., None])[..., 0] / temperature
    s = s.masked_fill(~exists, -math.inf)
    lse = s.logsumexp(1)
    weight = torch.exp(s - lse[:, None]).nan_to_num(0.0)
    return lse, (weight[:, None] @ mixed)[:, 0]


def pools(n_anchors, width, n_keys):
    """Pools of every size from 0 to width, in no order."""
    index = torch.rand(n_anchors, n_keys).argsort(1)[:, :width]
    size = torch.arange(n_anchors)[:, None] % (width + 1)
    return index.masked_fill(torch.arange(width) >= size, -1)


def close(found, expected, tolerance):
    lse, mean = found
    there = expected[0] > -math.inf
    assert torch.equal(lse > -math.inf, there) and (mean[~there] == 0).all()
    scale = expected[0][there].abs().clamp(min=1)
    assert ((lse.double() - expected[0])[there].abs() <= tolerance * scale).all()
    error = (mean.double() - expected[1]).norm(dim=1)
    assert (error <= tolerance * expected[1].norm(dim=1).clamp(min=1)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("counts", ((30, 20), (40, 0), (0, 33)))
@pytest.mark.parametrize("in_batch", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("anchor_dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_mixes_are_those_of_the_specification(op, counts, in_batch, dtype, anchor_dtype):
    anchors = normalize(torch.randn(29, 21), dim=1).to(anchor_dtype)
    keys = anchors if in_batch else normalize(torch.randn(300, 21), dim=1).to(dtype)
    pool_index = pools(29, 12, len(keys))
    found = mix(op, anchors, keys, pool_index, *counts, 0.07, 2**41 + 3)
    precise = torch.float64 in (anchor_dtype, keys.dtype)
    assert found[0].dtype == found[1].dtype == (torch.float64 if precise else torch.float32)
    expected = truth(anchors, keys, pool_index, counts, 0.07, 2**41 + 3)
    close(found, expected, 1e-12 if precise else 1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("temperature", (0.01, 1.0))
def test_rows_of_any_length(op, temperature):
    anchors = torch.randn(17, 40) * torch.logspace(-2, 0, 17)[:, None]
    keys = torch.randn(60, 40) * torch.logspace(-3, 3, 60)[:, None]
    pool_index = pools(17, 16, 60)
    found = mix(op, anchors, keys, pool_index, 50, 50, temperature, 1)
    close(found, truth(anchors, keys, pool_index, (50, 50), temperature, 1), 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_mixes_without_a_direction_are_left_out(op):
    """Opposite rows: one mix in a hundred is too short; what is left stays as exact as it can be."""
    row = normalize(torch.randn(1, 32, dtype=torch.float64), dim=1)
    keys, anchors = torch.cat([row, -row]), normalize(torch.randn(3, 32).double(), dim=1)
    pool_index = torch.tensor([[0, 1]]).expand(3, 2)
    expected = truth(anchors, keys, pool_index, (4000, 0), 0.1, 0)
    close(mix(op, anchors, keys, pool_index, 4000, 0, 0.1, 0), expected, 1e-10)
    _, exists = reference.synthesise(anchors, keys, pool_index, numbers(anchors), 4000, 0, 0)
    assert (~exists).sum(1).min() > 10
    # nothing but the two halves of nothing: no mix at all
    still = torch.zeros(3, 32, dtype=torch.float64)
    lse, mean = mix(op, still, torch.zeros_like(keys), pool_index, 9, 9, 0.1, 0)
    assert (lse == -math.inf).all() and (mean == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_blocks_of_anchors_and_empty_inputs(op, monkeypatch):
    anchors, keys = torch.randn(11, 8), torch.randn(40, 8)
    pool_index = pools(11, 10, 40)
    whole = mix(op, anchors, keys, pool_index, 6, 5, 0.1, 4)
    monkeypatch.setattr(eager, "_BLOCK", 3 * 11 * 8)
    in_blocks = mix(op, anchors, keys, pool_index, 6, 5, 0.1, 4)
    for mine, other in zip(in_blocks, whole, strict=True):
        torch.testing.assert_close(mine, other)
    for nothing in (
        (anchors[:0], keys, pool_index[:0]),
        (anchors, keys, pool_index[:, :0]),
        (anchors, keys[:0], torch.full_like(pool_index, -1)),
    ):
        lse, mean = mix(op, *nothing, 6, 5, 0.1, 4)
        assert lse.shape == nothing[0].shape[:1] and (lse == -math.inf).all()
        assert mean.shape == nothing[0].shape and (mean == 0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", (1e-11, 1e-13, 1e-25, 1e-40))
def test_rows_too_short_for_a_direction_are_not_mixed(op, scale):
    """Below 1e-12 float32 could not tell the length of a mix; above, a mix has unit length."""
    anchors = normalize(torch.randn(9, 21), dim=1) * scale
    keys, pool_index = normalize(torch.randn(50, 21), dim=1) * scale, pools(9, 8, 50)
    expected = truth(anchors, keys, pool_index, (30, 0), 0.07, 5)
    assert (expected[0] > -math.inf).any() == (scale > 1e-12)
    close(mix(op, anchors, keys, pool_index, 30, 0, 0.07, 5), expected, 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_weights_of_mixes_add_up_to_one(op):
    """At similarities of 2e6 float32 rounds a log-sum by eighths; weights made of it would not."""
    anchors = normalize(torch.randn(9, 16), dim=1) * 1e4
    keys, pool_index = normalize(torch.randn(50, 16), dim=1) * 1e-40, pools(9, 8, 50)
    lse, mean = mix(op, anchors, keys, pool_index, 0, 30, 0.005, 5)
    there = lse > -math.inf
    # all of them have the direction of the anchor
    torch.testing.assert_close(mean[there], anchors[there] / 1e4, rtol=0, atol=1e-5)
