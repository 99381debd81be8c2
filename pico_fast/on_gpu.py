"""Which ops run in Triton on an NVIDIA GPU, and for which tensors; for others they run in PyTorch there.

Triton is imported when one of them first runs. Where it is not installed, on GPUs before sm_80 and on ROCm
the PyTorch implementations stay; `python -m pico_fast.info` tells which run.
"""

import functools
import importlib
import importlib.util

import torch

from pico_fast import contrast_any, picked, selection, synthesis


def _contrast(page, anchors, anchor_labels, keys, *_):
    return page.takes(anchors, keys)


def _keys_grad(page, grad_loss, anchors, anchor_labels, keys, *_):
    return page.takes(anchors, keys)


def _select(page, anchors, anchor_labels, keys, key_labels, sampling, positives, negatives, *_):
    return page.takes(anchors, keys, sampling, positives, negatives)


def _rank(page, rows, keys, index, positive):
    return page.takes(rows, keys, picks=index.shape[1])


def _sum(page, keys, index, weight):
    return index.shape[1] > 0 and weight.dtype == torch.float32 and page.takes(keys)


def _mix(page, anchors, keys, pool_index, *_):
    some = pool_index.shape[1] > 0
    return some and page.takes(anchors, anchors if keys is None else keys)


# op: the page with its kernel of the same name, whom that is for, and what runs otherwise
_OPS = {
    "contrast_all": ("contrast_gpu", _contrast, contrast_any.contrast_all),
    "contrast_all_keys_grad": ("contrast_gpu", _keys_grad, contrast_any.contrast_all_keys_grad),
    "contrast_negatives": ("contrast_gpu", _contrast, contrast_any.contrast_negatives),
    "contrast_positives": ("contrast_gpu", _contrast, contrast_any.contrast_positives),
    "select_keys": ("selection_gpu", _select, selection.select_any),
    "rank_keys": ("picked_gpu", _rank, picked.rank_torch),
    "weighted_rows": ("picked_gpu", _sum, picked.rows_torch),
    "mix_negatives": ("picked_gpu", _mix, synthesis.mix_any),
}


@functools.cache
def _is_new(device: torch.device) -> bool:
    """Whether a GPU has what the kernels are compiled for: bfloat16 products, asynchronous copies."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_triton(op: str):
    name, is_for, otherwise = _OPS[op]

    def run(*args):
        mine = otherwise
        if _is_new(args[0].device):
            page = importlib.import_module(f"pico_fast.{name}")
            mine = getattr(page, op) if is_for(page, *args) else otherwise
        # autocast would reach into the products, and Triton launches on the current device
        with torch.cuda.device(args[0].device), torch.autocast("cuda", enabled=False):
            return mine(*args)

    return run


if importlib.util.find_spec("triton") is not None and torch.version.hip is None:
    for _op in _OPS:
        torch.library.impl(f"pico_fast::{_op}", "CUDA", _in_triton(_op))
