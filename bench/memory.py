"""Peak memory of one loss + gradient in this process: memory.py RUN SAMPLING ANCHORS SHARE -> bytes."""

import sys

import cases
import measure
import ours
import torch
from peers import contrast, selection
from runs import with_gradient


def call_of(name: str, sampling: str, n_anchors: int, share: float):
    """The run of this name on COCO-Stuff's bank, or a share of it; sampled keys are bfloat16."""
    dtype = torch.bfloat16 if sampling in ours.SAMPLED else torch.float32
    pairs = cases.pairs(cases.COCO_STUFF, n_anchors, share, dtype=dtype)
    if name == "pico_fast":
        return ours.against_a_bank(pairs, sampling)
    if name.startswith("plain PyTorch"):
        from bench_sampled import plain

        return plain(pairs, sampling, 256 if name.endswith("in blocks") else n_anchors).call
    if name == "analytic":
        return lambda: contrast.analytic(*pairs, cases.TEMPERATURE)
    if name == "eager":
        return with_gradient(contrast.eager, *pairs, cases.TEMPERATURE)
    peer = {"matmul + topk": selection.matmul_topk}[name]
    return with_gradient(peer, *pairs, *cases.COUNTS, cases.TEMPERATURE)


if __name__ == "__main__":
    name, sampling, n_anchors, share = sys.argv[1:]
    print(measure.peak_on_cpu(call_of(name, sampling, int(n_anchors), float(share))))
