"""Every kernel with every row of its settings, compiled for GPUs that are not there; prints JSON lines.

    python tests/compiled_kernels.py 80 90 100     generations to compile for

A process of its own: kernels that the tests interpret cannot be compiled beside it.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor

import offline
import torch
import triton.language as tl
from pico_fast.kernels import configs, contrast, contrast_ends, picked, sampling, selection

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PRODUCTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# each row of the tables, and for bfloat16 sizes that are no power of two
CHANNELS = {
    torch.bfloat16: (64, 128, 256, 512, 48, 192),
    torch.float16: (256,),
    torch.float32: (64, 128, 256, 512),
}


# launched with Triton's own number of warps
ONE = configs.Launch(1, 0, 4, 1)
TWO = configs.Launch(1, 0, configs.DRAW_WARPS, 1)


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def of_both_passes(generation, dtype, channels, launch, gather) -> tuple[dict, dict]:
    """Arguments and constants that the two passes over the keys share."""
    width = max(16, 1 << (channels - 1).bit_length())
    kind = TYPES[dtype]
    copy_engine = generation >= 90

    def rows(n: int, tma: bool) -> str:
        return f"tensordesc<{kind}[{n}, {width}]>" if tma else f"*{kind}"

    arguments = {
        "queries": rows(launch.BM, copy_engine),
        "keys": rows(launch.BN, copy_engine and not gather),
        **pointers("key_order", "*i64"),
        **pointers("low high spans", "*i32"),
        **pointers("n_anchors key_stride", "i32"),
        "scale": "fp32",
    }
    constants = {
        "D": channels,
        "BD": width,
        "BM": launch.BM,
        "BN": launch.BN,
        "STAGES": launch.stages,
        "GATHER": gather,
        "TMA": copy_engine and not gather,
        "TMA_QUERIES": copy_engine,
        "PRODUCT": PRODUCTS[dtype],
        "LIFT": 14.0 if dtype == torch.float16 else 0.0,
        "PRECISION": "tf32" if dtype == torch.float32 else "ieee",
    }
    return arguments, constants


def negatives(generation, dtype, channels, running, gather) -> tuple:
    launch = configs.negatives(generation, dtype, channels, running, gather)
    arguments, constants = of_both_passes(generation, dtype, channels, launch, gather)
    arguments |= pointers("tiles bounds first_span flag", "*i32")
    arguments |= pointers("bound top total away mean", "*fp32")
    conditional = running and dtype != torch.float16
    constants |= {"RUNNING": running, "RUNNING_IF_FLAGGED": conditional, "WANT_MEAN": True}
    return contrast.negatives_kernel, arguments, constants, launch


def positives(generation, dtype, channels, gather, in_batch) -> tuple:
    launch = configs.positives(dtype, channels)
    arguments, constants = of_both_passes(generation, dtype, channels, launch, gather)
    arguments |= pointers("low_span high_span", "*i32") | {"splits": "i32"}
    arguments |= pointers("lse loss weight similar pull", "*fp32")
    constants |= {"IN_BATCH": in_batch, "WANT_PULL": True}
    return contrast.positives_kernel, arguments, constants, launch


def keys_grad(dtype, channels) -> tuple:
    launch = configs.keys_grad(dtype, channels)
    kind = TYPES[dtype]
    arguments = {
        **pointers("queries keys", f"*{kind}"),
        **pointers("low high used_keys", "*i32"),
        **pointers("lse factor weight out", "*fp32"),
        **pointers("n_anchors key_stride", "i32"),
        "key_order": "*i64",
        "scale": "fp32",
    }
    constants = {
        "D": channels,
        "BD": max(16, 1 << (channels - 1).bit_length()),
        "BM": launch.BM,
        "BN": launch.BN,
        "IN_BATCH": True,
        "PRODUCT": PRODUCTS[dtype],
        "WEIGHTS": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
    }
    return contrast_ends.keys_grad_kernel, arguments, constants, launch


def ends(channels) -> list[tuple]:
    launch = configs.ENDS
    sizes = {"D": channels, "BD": max(16, 1 << (channels - 1).bit_length()), "BR": launch.BM}
    of_both = pointers("n_anchors splits", "i32") | pointers("low negatives", "*i32")
    of_both |= {"order": "*i64", **pointers("lse dissimilar centre", "*fp32")}
    merge = pointers("top total away mean mix_lse mix_mean", "*fp32") | {"flag": "*i32"}
    modes = {"RUNNING": False, "RUNNING_IF_FLAGGED": False, "WANT_MEAN": True, "MIXED": True}
    parts = pointers("loss_parts weight_parts similar_parts pull_parts", "*fp32")
    out = pointers("loss out_lse similar away weight gradient", "*fp32")
    finish = parts | out | {"positives": "*i32", "positive_count": "*i64", "scale": "fp32"}
    return [
        (contrast_ends.merge_kernel, of_both | merge, sizes | modes, launch),
        (contrast_ends.finish_kernel, of_both | finish, sizes | {"WANT_GRADIENT": True}, launch),
    ]


def walks(generation, dtype, channels) -> list[tuple[str, tuple]]:
    """The walks of selection: appending, counting digits of words and of lots, both sides."""
    launch = configs.selection(dtype, channels)
    found = []
    for own, draw, count, shift in (
        (False, False, False, 0),
        (True, False, True, 53),
        (False, True, True, 10),
        (True, True, False, 0),
    ):
        for gather in (False, True):
            arguments, constants = of_both_passes(generation, dtype, channels, launch, gather)
            del arguments["scale"], constants["LIFT"]
            arguments |= pointers("active found tiles bounds first_span", "*i32")
            arguments |= pointers("threshold states lots candidates", "*i64")
            constants |= {"OWN": own, "IN_BATCH": gather, "SIGN": -1 if own else 1, "COUNT": count}
            constants |= {"DRAW": draw, "SHIFT": shift, "CAPACITY": 4096}
            what = f"{'count' if count else 'append'}{' draw' if draw else ''}"
            side, way = "own" if own else "other", "gather" if gather else "bank"
            name = f"{what} {TYPES[dtype]} {channels} {side} {way}"
            found.append((name, (selection.walk_kernel, arguments, constants, launch)))
    return found


def by_row(generation) -> list[tuple[str, tuple]]:
    """Kernels of which a program has one anchor: for the smallest shared memory and for Hopper."""
    found = []
    if generation not in (86, 90):
        return found
    for shift in (53, 32):
        arguments = pointers("active counts", "*i32") | pointers("threshold rank", "*i64")
        constants = {"LOWEST": False, "SHIFT": shift}
        found.append(("narrow_kernel", (selection.narrow_kernel, arguments, constants, ONE)))
    # the consumer cards have no room for more than 8192
    for capacity in (8192,) if generation == 86 else (4096, 16384):
        arguments = pointers("candidates order index", "*i64") | pointers("found low", "*i32")
        arguments |= {"similarity": "*fp32", "N": "i32"}
        launch = configs.Launch(1, 0, configs.order_warps(capacity), 1)
        constants = {"SIGN": 1, "CAPACITY": capacity}
        found.append(
            (f"order_kernel {capacity}", (selection.order_kernel, arguments, constants, launch))
        )
    arguments = {"sample": "*fp32", "rank": "*i32", "threshold": "*i64", "W": "i32"}
    found.append(("estimate_kernel", (sampling.estimate_kernel, arguments, {"BLOCK": 2048}, ONE)))
    arguments = pointers("key_rows states candidates", "*i64") | {"sample": "*fp32"}
    arguments |= pointers("places low high pool found", "*i32") | pointers("count W", "i32")
    constants = {"BLOCK": 2048, "CAPACITY": 4096}
    found.append(("draw_kernel", (sampling.draw_kernel, arguments, constants, TWO)))
    for channels in (256, 1024):
        sizes = {"D": channels, "BD": channels, "ROWS": max(4, min(64, 8192 // channels))}
        of_all = {"keys": "*bf16", "key_stride": "i32", "n": "i32"}
        arguments = of_all | {"anchors": "*fp32", "anchor_stride": "i32"}
        arguments |= pointers("index words", "*i64")
        constants = sizes | {"CAPACITY": 4096, "SIGN": 1}
        found.append((f"words_kernel {channels}", (picked.words_kernel, arguments, constants, ONE)))
        arguments = of_all | {"index": "*i64", "weight": "*fp32", "out": "*fp32"}
        found.append(
            (f"weighted_kernel {channels}", (picked.weighted_kernel, arguments, sizes, ONE))
        )
        arguments = of_all | pointers("first second", "*i64") | {"anchor_stride": "i32"}
        arguments |= pointers("anchors share lse mean", "*fp32") | pointers(
            "scale shortest", "fp32"
        )
        sizes = sizes | {"ROWS": max(4, sizes["ROWS"] // 2)}
        found.append((f"mix_kernel {channels}", (picked.mix_kernel, arguments, sizes, ONE)))
    return found


def jobs(generation: int) -> list[tuple[str, tuple]]:
    """(name, what to compile) for one generation."""
    found = [(f"{what[0].__name__} {d}", what) for d in (64, 512, 192) for what in ends(d)]
    for dtype, kind in TYPES.items():
        for channels in CHANNELS[dtype]:
            name = f"{kind} {channels}"
            for gather in (False, True):
                way = "gather" if gather else "bank"
                for running in (True,) if dtype == torch.float16 else (False, True):
                    mode = "running" if running else "fixed"
                    what = negatives(generation, dtype, channels, running, gather)
                    found.append((f"negatives {name} {way} {mode}", what))
                what = positives(generation, dtype, channels, gather, gather)
                found.append((f"positives {name} {way}", what))
            found.append((f"keys_grad {name}", keys_grad(dtype, channels)))
            if channels in (64, 128, 256, 512) and (channels < 512 or dtype.itemsize == 2):
                found += walks(generation, dtype, channels)
    return found + by_row(generation)


def compile_one(generation: int, index: int) -> dict:
    name, (kernel, arguments, constants, launch) = jobs(generation)[index]
    row = offline.report(kernel, arguments, constants, generation, num_warps=launch.num_warps)
    return {"generation": generation, "kernel": name, "launch": launch, **row}


def is_representative(name: str) -> bool:
    """Whether this kernel stands for its kind: a bank of 256 channels in bfloat16, or a kernel by row."""
    return "bf16 256" in name or "_kernel" in name


if __name__ == "__main__":
    generations = [int(word) for word in sys.argv[1:] if word.isdigit()]
    full = "--full" in sys.argv
    todo = [
        (g, i)
        for g in generations
        for i, (name, _) in enumerate(jobs(g))
        if full or is_representative(name)
    ]
    with ProcessPoolExecutor() as pool:
        for row in pool.map(compile_one, *zip(*todo, strict=True), chunksize=4):
            print(json.dumps(row), flush=True)
