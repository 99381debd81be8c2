"""Which ops run in Triton on an NVIDIA GPU, and for which tensors; for others they run in PyTorch there.

Triton is imported when one of them first runs. Where it is not installed, on GPUs before sm_80 and on ROCm
the PyTorch implementations stay; `python -m pico_fast.info` tells which run.
"""

import functools
import importlib
import importlib.util

import torch

from pico_fast.contrast import eager as contrast
from pico_fast.contrast import ops as contrast_ops
from pico_fast.selection import eager as selection
from pico_fast.selection import ops as selection_ops

# op: its page with launches, which has a function of that name; who there says whom it is for; what runs
# otherwise
_OPS = {
    contrast_ops.negatives: ("contrast.gpu", "takes", contrast.negatives),
    contrast_ops.positives: ("contrast.gpu", "takes", contrast.positives),
    contrast_ops.keys_grad: ("contrast.gpu", "takes", contrast.keys_grad),
    selection_ops.hardest: ("selection.gpu", "takes_hardest", selection.hardest),
    selection_ops.weighted_rows: ("selection.gpu", "takes_weighted", selection.weighted_rows),
    selection_ops.mix_negatives: ("selection.gpu", "takes_mixes", selection.mix_negatives),
}


@functools.cache
def _is_new(device: torch.device) -> bool:
    """Whether a GPU has what the kernels are compiled for: bfloat16 products, asynchronous copies."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_triton(op: torch._ops.OpOverload):
    name, takes, otherwise = _OPS[op]
    names = [argument.name for argument in op._schema.arguments]

    def run(*args):
        chosen = otherwise
        if _is_new(args[0].device):
            page = importlib.import_module(f"pico_fast.{name}")
            if getattr(page, takes)(**dict(zip(names, args, strict=True))):
                chosen = getattr(page, otherwise.__name__)
        # autocast would reach into the products, and Triton launches on the current device
        with torch.cuda.device(args[0].device), torch.autocast("cuda", enabled=False):
            return chosen(*args)

    return run


if importlib.util.find_spec("triton") is not None and torch.version.hip is None:
    for _op in _OPS:
        torch.library.impl(_op.name(), "CUDA", _in_triton(_op))
