"""Which implementation an op takes on a GPU: the choice itself, with the kernels interpreted."""

import contextlib

import pytest
import torch
from torch.nn.functional import normalize

from pico_fast import on_gpu, selection

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the dispatcher chooses"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
OPS = torch.ops.pico_fast


@pytest.fixture(autouse=True)
def a_gpu_of_sorts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(on_gpu, "_is_new", lambda _: True)


def calls(dtype):
    """Arguments of every op that may run in Triton, from one scene."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    anchors = normalize(torch.randn(9, 16, dtype=wide), dim=1)
    keys = normalize(torch.randn(40, 16), dim=1).to(dtype)
    labels, key_labels = torch.randint(0, 3, (9,)), torch.randint(-1, 3, (40,))
    pairs, seed = (anchors, labels, keys, key_labels), torch.tensor(1)
    of_all = (*pairs, None, None, 0.1, True)
    _, lse, count, *_ = OPS.contrast_all(*of_all)
    index = OPS.select_keys(*pairs, "hardest", 3, 5, 0.5, seed)[1]
    segments = torch.tensor([[[0, 9], [10, 3]], [[13, 7], [20, 0]], [[21, 5], [30, 10]]])
    half = (anchors, labels, keys, segments)
    return {
        "contrast_negatives": (*half, 0.1, True),
        "contrast_positives": (*half, torch.rand(9, dtype=wide) + 3, 0.1, True),
        "contrast_all": of_all,
        "contrast_all_keys_grad": (torch.ones(9, dtype=wide), *pairs, lse, count, 0.1),
        "select_keys": (*pairs, "semi_hard", 3, 5, 0.5, seed),
        "rank_keys": (anchors, keys, index, False),
        "weighted_rows": (keys, index, torch.rand(9, 5, dtype=wide)),
        "mix_negatives": (anchors, keys, index, 3, 2, 0.1, seed),
    }


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("op", on_gpu._OPS)
def test_whatever_runs_gives_the_same(op, dtype, monkeypatch):
    args = calls(dtype)[op]
    taken = []
    original = on_gpu.importlib.import_module

    def watched(name):
        taken.append(name)
        return original(name)

    monkeypatch.setattr(on_gpu.importlib, "import_module", watched)
    found, expected = on_gpu._in_triton(op)(*args), getattr(OPS, op)(*args)
    assert len(taken) == 1
    for mine, theirs in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_old_gpus_and_other_samplings_run_pytorch(monkeypatch):
    args = calls(torch.float16)
    random = (*args["select_keys"][:4], "random", *args["select_keys"][5:])
    found = on_gpu._in_triton("select_keys")(*random)
    assert all(torch.equal(a, b) for a, b in zip(found, selection.select_any(*random), strict=True))
    monkeypatch.setattr(on_gpu, "_is_new", lambda _: False)
    monkeypatch.setattr(on_gpu.importlib, "import_module", lambda name: pytest.fail(name))
    on_gpu._in_triton("contrast_all")(*args["contrast_all"])
