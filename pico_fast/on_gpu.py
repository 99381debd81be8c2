"""Which ops run in Triton on an NVIDIA GPU, and for which tensors; for others they run in PyTorch there.

Triton is imported when one of them first runs. Where it is not installed, on GPUs before sm_80 and on ROCm
the PyTorch implementations stay; `python -m pico_fast.info` tells which run.
"""

import functools
import importlib
import importlib.util

import torch

from pico_fast.contrast import ops as contrast
from pico_fast.selection import ops as selection

# ops with launches in the `gpu` of their folder, and who there says whom they are for
_OPS = (
    (contrast, "negatives", "takes_negatives"),
    (contrast, "positives", "takes_positives"),
    (contrast, "keys_grad", "takes_keys_grad"),
    (selection, "sample_keys", "takes_sample"),
    (selection, "hardest", "takes_hardest"),
    (selection, "weighted_rows", "takes_weighted"),
    (selection, "mix_negatives", "takes_mixes"),
)


@functools.cache
def _is_new(index: int) -> bool:
    """Whether a GPU has what the kernels are compiled for: bfloat16 products, asynchronous copies."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _in_triton(ops, op: str, takes: str):
    def run(first, *rest):
        device = (first.keys if isinstance(first, selection.Layout) else first).device
        chosen = getattr(ops.eager, op)
        if _is_new(device.index):
            page = importlib.import_module(f"{ops.__package__}.gpu")
            chosen = getattr(page, op) if getattr(page, takes)(first, *rest) else chosen
        with torch.cuda.device(device):  # Triton launches on the current one
            return chosen(first, *rest)

    return run


if importlib.util.find_spec("triton") is not None and torch.version.hip is None:
    for _ops, _op, _takes in _OPS:
        _ops.implement(_op, "CUDA", _in_triton(_ops, _op, _takes))
