"""What one contrast launches on a GPU: counted on its own page, with the kernels interpreted."""

import collections

import kernel_scenes as scenes
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from pico_fast import MemoryBank
from pico_fast.contrast import flow
from pico_fast.selection.options import check_selection

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu.sh counts"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# ops that launch nothing, and what is done here alone: fresh memory is poisoned, tensors go to the host
NOTHING = {
    *("alias", "as_strided", "copy_", "detach", "empty", "empty_like", "empty_strided", "expand", "fill_"),
    *("flatten", "lift_fresh", "narrow", "new_empty", "permute", "reshape", "resize_", "scalar_tensor"),
    *("select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
    *("unsqueeze", "_unsafe_view", "view"),
}
# kernels of the contrast with its samples; ops of PyTorch
SAMPLE = {"share_kernel": 2, "draw_kernel": 2, "gather_kernel": 1}
SUMS = SAMPLE | {"negatives_kernel": 1, "merge_kernel": 1, "positives_kernel": 1}
CUT = {"similarity_kernel": 1, "cut_kernel": 1}
EXPECTED = {
    ("random", "random"): (SUMS | {"negatives_kernel": 2, "merge_kernel": 2}, 38),
    ("semi_hard", "random"): (SUMS | CUT, 40),
    ("semi_hard", "semi_hard"): (SUMS | {"similarity_kernel": 2, "cut_kernel": 2}, 46),
    ("bounded", "random"): (SUMS | CUT | {"positives_kernel": 2}, 41),
}


class Ops(TorchDispatchMode):
    """Counts what PyTorch would launch."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace != "pico_fast" and name not in NOTHING:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sampling", "positives"), EXPECTED)
def test_a_contrast_is_few_launches(sampling, positives, monkeypatch):
    launches, run = collections.Counter(), interpreter.InterpretedFunction.run

    def counted(kernel, *args, **how):
        launches[kernel.fn.__name__] += 1
        return run(kernel, *args, **how)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    g = torch.Generator().manual_seed(0)
    bank = MemoryBank(5, 16, 30, 6)
    embeddings = normalize(torch.randn(2, 16, 20, 20, generator=g), dim=1)
    bank.enqueue(embeddings, torch.randint(0, 5, (2, 20, 20), generator=g))
    anchors, labels = scenes.vectors(20, 16, g), torch.randint(0, 5, (20,), generator=g)
    chosen = check_selection(sampling, positives, 6, 12, 0.3)
    with scenes.in_triton(), Ops() as ops:
        share = bank.share()
        layout = flow.lay_out(anchors, labels, None, None, share)
        flow.contrast(layout, share, flow.Options(chosen, 0.1, None, torch.tensor(3), 0, True))
    kernels, others = EXPECTED[sampling, positives]
    assert launches == kernels
    assert ops.counts.total() == others, sorted(ops.counts.items())
