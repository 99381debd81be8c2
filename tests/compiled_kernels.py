"""Every kernel with every row of its settings, compiled for GPUs that are not there; prints JSON lines.

    python tests/compiled_kernels.py 80 90 100     generations to compile for

A process of its own: kernels that the tests interpret cannot be compiled beside it.
"""

import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor

import offline
import torch
import triton.language as tl
from pico_fast.kernels import (
    all_keys,
    candidates,
    configs,
    contrast,
    cut,
    hardest,
    merge,
    sample,
    synthesis,
)
from triton.experimental.gluon import language as gl

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# each row of the tables, and for bfloat16 sizes that are no power of two
CHANNELS = {
    torch.bfloat16: (64, 128, 256, 512, 48, 192),
    torch.float16: (256,),
    torch.float32: (64, 128, 256, 512),
}
# launched with Triton's own number of warps
ONE = configs.Launch(1, 0, 4, 1)


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def absent(names: str) -> dict[str, None]:
    """Tensors that a launch leaves out."""
    return dict.fromkeys(names.split())


def width(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def of_layout(generation, dtype, channels, launch, gather) -> tuple[dict, dict]:
    """Arguments and constants that kernels with anchors as rows share: `launch.options`."""
    kind = TYPES[dtype]
    arguments = {
        **pointers("queries keys", f"*{kind}"),
        **pointers("anchor_class ranges", "*i64"),
        **pointers("n_anchors key_stride", "i32"),
    }
    constants = {
        "PARTS": 2,
        "D": channels,
        "BD": width(channels),
        "BM": launch.BM,
        "BN": launch.BN,
        "STAGES": launch.stages,
    }
    copy_engine = generation >= 90
    for name, n, used in (
        ("query_blocks", launch.BM, copy_engine),
        ("key_blocks", launch.BN, copy_engine and not gather),
    ):
        if used:
            arguments[name] = f"tensordesc<{kind}[{n}, {width(channels)}]>"
        else:
            constants[name] = None
    if gather:
        arguments["key_order"] = "*i64"
    else:
        constants["key_order"] = None
    return arguments, constants


def negatives(generation, dtype, channels, running, by_rows, kind=None) -> tuple:
    """The negatives of all keys, or between their bounds: kind "cut" or "bounded"."""
    launch = configs.negatives(generation, dtype, channels, running, by_rows)
    if kind is not None:
        launch = configs.cut(generation, dtype, channels)
    arguments, constants = of_layout(generation, dtype, channels, launch, by_rows)
    for found in (arguments, constants):
        found.pop("key_order", None)
    arguments |= {"splits": "i32", "scale": "fp32"}
    arguments |= pointers("bound top total away mean", "*fp32")
    if kind is None:
        arguments |= pointers("firsts n_tiles", "*i64")
    else:
        arguments |= {"least": "*fp16", "last": "*i32"}
    if kind is not None or "key_blocks" not in arguments:
        arguments["ends"] = "*i64"
    if kind == "bounded":
        arguments["ceiling"] = "*fp32"
    if running and dtype != torch.float16:
        arguments["flag"] = "*i32"
    for name in ("firsts", "n_tiles", "ends", "least", "last", "ceiling", "flag"):
        if name not in arguments:
            constants[name] = None
    return contrast.negatives_kernel, arguments, constants | {"RUNNING": running}, launch


def similarity(generation, dtype, channels, own, gather) -> tuple:
    launch = configs.positives(generation, dtype, channels, True)
    if not own:
        launch = configs.cut(generation, dtype, channels)
    arguments, constants = of_layout(generation, dtype, channels, launch, gather)
    arguments |= {"ends": "*i64", "halves": "*fp16", "hardest": "*fp32"} | pointers(
        "half_stride splits", "i32"
    )
    constants |= {"OWN": own, "PARTS": 1, "own_key": None}
    if own:
        constants["ceiling"] = None
    else:
        arguments["ceiling"] = "*fp32"
    return cut.similarity_kernel, arguments, constants, launch


def cuts(own, chunks) -> tuple:
    arguments = {
        **pointers("anchor_class ranges ends pairs", "*i64"),
        **pointers("hardest shift", "*fp32"),
        **pointers("halves least", "*fp16"),
        **pointers("n_anchors half_stride splits", "i32"),
        "last": "*i32",
        "fraction": "fp64",
        "most": "i32",
        "scale": "fp32",
    }
    launch = configs.Launch(1, 0, configs.cut_warps(chunks * cut.LANES.value), 1)
    return cut.cut_kernel, arguments, {"CHUNKS": chunks, "SPLITS": 64, "OWN": own}, launch


def hopper() -> tuple:
    """The negatives of a bank in Gluon."""
    launch = configs.ALL_KEYS
    form = gl.NVMMASharedLayout.get_default_for([64, 256], gl.bfloat16)
    arguments = {
        **pointers("query_blocks key_blocks", f"tensordesc<bf16[64, 256],{form!r}>"),
        **pointers("bound top total away mean", "*fp32"),
        **pointers("anchor_class ranges firsts n_tiles", "*i64"),
        **pointers("n_anchors splits", "i32"),
        "scale": "fp32",
    }
    sizes = {"PARTS": 2, "D": 256, "BM": launch.BM // 2, "BN": launch.BN, "STAGES": launch.stages}
    return all_keys.all_keys_kernel, arguments, sizes, launch


def positives(generation, dtype, channels, gather, in_batch, is_cut=False) -> tuple:
    launch = configs.positives(generation, dtype, channels, is_cut)
    arguments, constants = of_layout(generation, dtype, channels, launch, gather)
    constants.pop("key_blocks", None)
    arguments.pop("key_blocks", None)
    arguments |= pointers("lse loss weight similar pull", "*fp32")
    if is_cut:
        arguments |= {"least": "*fp16", "last": "*i32"}
        constants["PARTS"] = 1
    else:
        constants |= absent("least last")
    arguments |= {"splits": "i32", "scale": "fp32"}
    if in_batch:
        arguments["own_key"] = "*i64"
    else:
        constants["own_key"] = None
    return contrast.positives_kernel, arguments, constants, launch


def keys_grad(dtype, channels, own) -> tuple:
    launch = configs.keys_grad(dtype, channels)
    arguments = {
        **pointers("queries keys", f"*{TYPES[dtype]}"),
        **pointers("anchor_class key_order key_class", "*i64"),
        **pointers("lse factor out", "*fp32"),
        **pointers("n_anchors n_positions key_stride", "i32"),
        "scale": "fp32",
    }
    constants = {
        "D": channels,
        "BD": width(channels),
        "BM": launch.BM,
        "BN": launch.BN,
        "WEIGHTS": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
    }
    if own:
        arguments |= pointers("own_begin own_end own_key", "*i64")
    else:
        constants |= absent("own_begin own_end own_key")
    return contrast.keys_grad_kernel, arguments, constants, launch


def merges(channels) -> tuple:
    launch = configs.MERGE
    arguments = {
        **pointers("top_parts total_parts away_parts mean_parts lse away mean", "*fp32"),
        **pointers("n_anchors splits", "i32"),
        "anchor_class": "*i64",
        "flag": "*i32",
    }
    constants = {"D": channels, "BD": width(channels), "BR": launch.BM, "RUNNING": False}
    return merge.merge_kernel, arguments, constants, launch


def walks(generation, dtype, channels) -> list[tuple[str, tuple]]:
    """The walks of `hardest`: bits of hits and counts of digits, both sides, in a bank and in batch."""
    found = []
    for own, what in itertools.product((False, True), ("hits", "exact hits", "digits")):
        launch = configs.hardest(dtype, channels)
        if what != "digits":
            launch = configs.hits(generation, dtype, channels, own)
        for gather in (False, True):
            arguments, constants = of_layout(generation, dtype, channels, launch, gather)
            arguments |= pointers("threshold firsts ends n_tiles", "*i64")
            arguments |= {"active": "*i32", "splits": "i32"}
            constants["OWN"] = own
            if own and gather:
                arguments["own_key"] = "*i64"
            else:
                constants["own_key"] = None
            if what != "digits":
                kernel, constants["EXACT"] = hardest.hits_kernel, what != "hits"
                arguments |= {"bits": "*i32", "n_words": "i32"}
            else:
                kernel = hardest.digits_kernel
                arguments["counts"], constants["SHIFT"] = "*i32", 53 if own else 32
            side, way = "own" if own else "other", "gather" if gather else "bank"
            name = f"{what} {TYPES[dtype]} {channels} {side} {way}"
            found.append((name, (kernel, arguments, constants, launch)))
    return found


def compaction() -> list[tuple[str, tuple]]:
    """What makes candidates of bits, each for its dearest case."""
    arguments = pointers("bits active found", "*i32") | pointers("n_anchors n_words capacity", "i32")
    arguments |= pointers("anchor_class ranges key_order firsts ends n_tiles candidates", "*i64")
    constants = {"PARTS": 2, "BN": 64, "WORDS": 1024, "OWN": True}
    found = [("collect_kernel", (candidates.collect_kernel, arguments, constants, ONE))]
    arguments = pointers("active found", "*i32") | pointers("capacity key_stride", "i32")
    arguments |= {"candidates": "*i64"} | pointers("queries keys", "*bf16")
    for channels in (64, 512):
        constants = {"D": channels, "BD": channels, "ROWS": 8192 // channels, "OWN": False}
        found.append((f"score_kernel {channels}", (candidates.score_kernel, arguments, constants, ONE)))
    return found


def draws() -> list[tuple[str, tuple]]:
    """What draws and gathers a sample."""
    arguments = pointers("ranges until", "*i64") | pointers("n_classes need", "i32")
    constants = {"PARTS": 2, "BC": 512, "OWN": False}
    found = [("share_kernel", (sample.share_kernel, arguments, constants, ONE))]
    arguments = pointers("ranges names key_order until seed drawn new_ranges", "*i64")
    arguments |= pointers("capacity n_classes purpose", "i32")
    constants = {"PARTS": 2, "STEPS": 8, "BN": 128}
    found.append(("draw_kernel", (sample.draw_kernel, arguments, constants, ONE)))
    arguments = pointers("keys out", "*bf16") | pointers("width key_stride", "i32")
    arguments |= pointers("key_order ends", "*i64")
    constants = {"D": 512, "BD": 512, "BN": 16}
    return [*found, ("gather_kernel 512", (sample.gather_kernel, arguments, constants, ONE))]


def by_row(generation) -> list[tuple[str, tuple]]:
    """Kernels of which a program has one anchor: for the smallest shared memory and for Hopper."""
    found = []
    if generation not in (86, 90):
        return found
    for shift in (53, 32):
        arguments = pointers("active counts", "*i32") | pointers("threshold rank", "*i64")
        found.append(("narrow_kernel", (hardest.narrow_kernel, arguments, {"SHIFT": shift}, ONE)))
    for capacity in (8192, 16384):
        arguments = pointers("candidates anchor_class index", "*i64")
        arguments |= {"found": "*i32", "similarity": "*fp32", "N": "i32"}
        launch = configs.Launch(1, 0, configs.pick_warps(capacity), 1)
        constants = {"OWN": False, "CAPACITY": capacity, "PIECE": 1024}
        what = (candidates.pick_kernel, arguments, constants, launch)
        found.append((f"pick_kernel {capacity}", what))
    if generation == 90:
        found.append(("all_keys bf16 256", hopper()))
    found += compaction() + draws()
    found += [(f"cut_kernel {chunks}", cuts(chunks < 16, chunks)) for chunks in (1, 10, 21, 32, 64)]
    for channels in (256, 1024):
        sizes = {"D": channels, "BD": channels, "ROWS": max(4, min(64, 8192 // channels))}
        of_all = {"keys": "*bf16", "key_stride": "i32", "n": "i32"}
        arguments = of_all | {"index": "*i64", "weight": "*fp32", "out": "*fp32"}
        what = (synthesis.weighted_kernel, arguments, sizes, ONE)
        found.append((f"weighted_kernel {channels}", what))
        arguments = of_all | pointers("first second", "*i64") | {"anchor_stride": "i32"}
        arguments |= pointers("anchors share lse mean", "*fp32")
        arguments |= pointers("scale shortest", "fp32")
        sizes = sizes | {"ROWS": max(4, sizes["ROWS"] // 2)}
        found.append((f"mix_kernel {channels}", (synthesis.mix_kernel, arguments, sizes, ONE)))
    return found


def jobs(generation: int) -> list[tuple[str, tuple]]:
    """(name, what to compile) for one generation."""
    found = [(f"merge_kernel {channels}", merges(channels)) for channels in (64, 512, 192)]
    for dtype, of_type in TYPES.items():
        for channels in CHANNELS[dtype]:
            name = f"{of_type} {channels}"
            for gather in (False, True):
                way = "rows" if gather else "bank"
                for running in (True,) if dtype == torch.float16 else (False, True):
                    mode = "running" if running else "fixed"
                    what = negatives(generation, dtype, channels, running, gather)
                    found.append((f"negatives {name} {way} {mode}", what))
                way = "gather" if gather else "bank"
                what = positives(generation, dtype, channels, gather, gather)
                found.append((f"positives {name} {way}", what))
            for kind in ("cut", "bounded"):
                what = negatives(generation, dtype, channels, False, False, kind)
                found.append((f"negatives {name} {kind}", what))
            what = positives(generation, dtype, channels, True, False, is_cut=True)
            found.append((f"positives {name} cut", what))
            for own in (False, True):
                side = "own" if own else "other"
                what = similarity(generation, dtype, channels, own, own)
                found.append((f"similarity {name} {side}", what))
                found.append((f"keys_grad {name} {side}", keys_grad(dtype, channels, own)))
            if channels in (64, 128, 256, 512) and (channels < 512 or dtype.itemsize == 2):
                found += walks(generation, dtype, channels)
                what = similarity(generation, dtype, channels, True, False)
                found.append((f"similarity {name} own bank", what))
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
