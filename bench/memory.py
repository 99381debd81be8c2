"""Peak memory of one loss + gradient in this process: memory.py RUN SAMPLING ANCHORS SHARE -> bytes."""

import sys

import cases
import measure
from peers import contrast, selection
from runs import with_gradient

import pico_fast


def call_of(name: str, sampling: str, n_anchors: int, share: float):
    """The run of this name on COCO-Stuff's bank, or a share of it."""
    pairs = cases.pairs(cases.COCO_STUFF, n_anchors, share)
    if name == "pico_fast":
        return with_gradient(pico_fast.contrast, *pairs, cases.TEMPERATURE, sampling)
    if name == "analytic":
        return lambda: contrast.analytic(*pairs, cases.TEMPERATURE)
    if name == "eager":
        return with_gradient(contrast.eager, *pairs, cases.TEMPERATURE)
    peer = {"matmul + topk": selection.matmul_topk, "full matrix": selection.semi_hard}[name]
    return with_gradient(peer, *pairs, *cases.COUNTS, cases.TEMPERATURE)


if __name__ == "__main__":
    name, sampling, n_anchors, share = sys.argv[1:]
    print(measure.peak_on_cpu(call_of(name, sampling, int(n_anchors), float(share))))
