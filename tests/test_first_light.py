"""bench/first_light.py without a GPU: its checks with a CPU's ops at a small size, right and wrong ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cases
import first_light
import gpu_scenes as scenes

# ops of a CPU have no error of bfloat16 products, but all else is as on a GPU
OPS = [name for name in scenes.CHECKS if not name.startswith("graph")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few anchors and keys; what is kept of other sizes is made anew."""
    monkeypatch.setattr(scenes, "FULL", cases.DataSet("small", 5, 40, 20))
    monkeypatch.setattr(scenes, "SMALL", cases.DataSet("small", 5, 30, 10))
    monkeypatch.setattr(scenes, "FEW", 32)
    monkeypatch.setattr(scenes, "COUNTS", (9, 17))
    monkeypatch.setattr(scenes.ours, "COUNTS", {"num_positives": 9, "num_negatives": 17})
    monkeypatch.setattr(scenes, "pictures", lambda batch, *_: cases.images(scenes.FULL, 2, 12, 9))
    for kept in (scenes.bank, scenes.centres):
        kept.cache_clear()
    yield
    for kept in (scenes.bank, scenes.centres):
        kept.cache_clear()


def spoiled(check: scenes.Check, place: int) -> scenes.Check:
    """The check, one result of whose call is off."""

    def call():
        found = [x.clone() for x in check.call()]
        x = found[place]
        found[place] = x * 1.1 + 0.1 if x.dtype.is_floating_point else x + (x >= 0)
        return tuple(found)

    return check._replace(call=call)


@pytest.mark.parametrize("name", OPS)
def test_a_check_is_ok_with_right_ops_and_fails_with_wrong_ones(name):
    check = scenes.CHECKS[name]("cpu")
    assert first_light.checked(check).startswith("ok"), name
    for place in range(len(check.call())):
        said = first_light.checked(spoiled(check, place))
        assert said.startswith("FAILED, error"), (name, place, said)


def test_other_bits_the_second_time_fail():
    turns = iter(range(9))
    check = scenes.Check(lambda: (torch.tensor(next(turns)),), lambda found: [(0.0, 0.0)])
    assert first_light.checked(check) == "FAILED: other bits the second time"


def test_nan_fails():
    check = scenes.Check(lambda: (torch.zeros(1),), lambda found: [(0.0, 0.0), (float("nan"), 1.0)])
    assert first_light.checked(check).startswith("FAILED")


def test_a_step_of_every_sampling_can_be_made():
    for name in scenes.CHECKS:
        if name.startswith("graph"):
            loss, gradient = scenes.CHECKS[name]("cpu")()
            assert loss.isfinite() and gradient.abs().sum() > 0, name
