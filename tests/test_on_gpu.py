"""Which implementation an op takes on a GPU: the choice itself, with the kernels interpreted."""

import kernel_scenes as scenes
import pytest
import torch

from pico_fast import on_gpu
from pico_fast.selection import eager
from pico_fast.selection.layout import Cut

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the dispatcher chooses"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
OPS = {name: (page, takes) for page, name, takes in on_gpu._OPS}


@pytest.fixture(autouse=True)
def a_gpu_of_sorts():
    with scenes.in_triton():
        yield


def calls(dtype):
    """Arguments of every op that may run in Triton, from one layout."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of = scenes.with_keys(scenes.layout("bank", 9, 16, 3, 20), dtype)
    of = of._replace(keys=of.keys.nan_to_num(0.0), anchors=of.anchors.to(wide))
    none = Cut()
    row = torch.rand(9, dtype=wide) + 12  # no Z is less than its largest term
    index = eager.hardest(of, False, None, 5, False)[0]
    weight = torch.rand(9, 5, dtype=wide).masked_fill(index < 0, 0.0)
    return {
        "negatives": (of, none, 0.1, True),
        "positives": (of, none, row, 0.1, True),
        "keys_grad": (of, none, False, row, row, 0.1),
        "sample_keys": (of.ranges, of.names, None, 7, False, torch.tensor(3), 60),
        "hardest": (of, False, None, 5, False),
        "weighted_rows": (of.keys, index, weight),
        "mix_negatives": (of.anchors, of.keys, index, of.order, 3, 2, 0.1, torch.tensor(1)),
    }


def watch(op, monkeypatch):
    """The op as on a GPU, as it is in PyTorch, and a list of when it ran there."""
    ran, (page, takes) = [], OPS[op]
    otherwise = getattr(page.eager, op)

    def watched(*args):
        ran.append(op)
        return otherwise(*args)

    monkeypatch.setattr(page.eager, op, watched)
    return on_gpu._in_triton(page, op, takes), otherwise, ran


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("op", OPS)
def test_whatever_runs_gives_the_same(op, dtype, monkeypatch):
    args, (run, otherwise, in_pytorch) = calls(dtype)[op], watch(op, monkeypatch)
    found, expected = run(*args), otherwise(*args)
    assert in_pytorch == ([op] if dtype == torch.float64 and op != "sample_keys" else [])
    for mine, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_cuts_and_old_gpus_run_pytorch(monkeypatch):
    args = calls(torch.float16)
    layout, ceiling = args["negatives"][0], torch.full((9,), 0.2)
    for op, some in (
        ("negatives", (layout, Cut(ceiling, 5, 0.5), 0.1, True)),
        ("hardest", (layout, False, ceiling, 5, False)),
        ("hardest", (layout, False, None, 5, True)),
    ):
        run, _, in_pytorch = watch(op, monkeypatch)
        run(*some)
        assert in_pytorch == [op]
    monkeypatch.setattr(on_gpu, "_is_new", lambda _: False)
    monkeypatch.setattr(on_gpu.importlib, "import_module", lambda name: pytest.fail(name))
    run, _, in_pytorch = watch("negatives", monkeypatch)
    run(*args["negatives"])
    assert in_pytorch == ["negatives"]
