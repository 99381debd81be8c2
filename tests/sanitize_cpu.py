"""Every compiled CPU op at its edges, for AddressSanitizer and UndefinedBehaviorSanitizer.

    make sanitize         small runs of every op
    make sanitize FULL=1  also the tests that reach C++, and the emulated GPU kernels among them

A run first shows that it could fail: wrong accesses have to end the process that makes them.
"""

import ctypes
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import emulation
import numpy as np
import pytest
import torch

from pico_fast import info

HERE = Path(__file__).parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = torch.tensor(2**63 - 1)
# tests that reach C++ in their own process
TESTS = "anchors bank bank_state budget contrast cpu_ops exact finite invariance loss misuse"
TESTS += " op_guards ops regions selection synthesis attach"


def check_library() -> None:
    """Raise unless the one `_C` in this process is instrumented; tests of another would say nothing."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (library,) = (path for path in mapped if "/pico_fast/_C." in path)
    symbols = Path(library).read_bytes()
    for call in (b"__asan_report_load4", b"__ubsan_handle_add_overflow_abort"):
        assert call in symbols, f"{library}: compiled without sanitizers"
    print(f"under sanitizers: {library}")


def pool(labels: torch.Tensor, emulated: bool) -> None:
    op = emulation.load()["region_pool"] if emulated else torch.ops.pico_fast.region_pool.default
    op(torch.randn(1, 1, *labels.shape[1:]), labels, 2)


def read_behind_the_end(emulated: bool) -> None:
    heap = ctypes.CDLL(None).malloc
    heap.restype, heap.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    block = ctypes.cast(heap(8 * 16), ctypes.POINTER(ctypes.c_int64))
    pool(torch.from_numpy(np.ctypeslib.as_array(block, (1, 1, 17))), emulated)


def read_misaligned(emulated: bool) -> None:
    labels = torch.frombuffer(bytearray(3 + 8 * 17), dtype=torch.int64, offset=3)
    pool(labels[None, None], emulated)


REPORTS = {
    read_behind_the_end: "AddressSanitizer: heap-buffer-overflow",
    read_misaligned: "runtime error: load of misaligned address",
}


def check_that_it_ends(access, emulated: bool) -> None:
    """Raise unless a process that makes this access ends with the report of it."""
    script = f"import sanitize_cpu; sanitize_cpu.{access.__name__}({emulated})"
    # -P: not the package of the folder that it runs in
    command = [sys.executable, "-P", "-c", script]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{HERE}"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode and REPORTS[access] in run.stderr, f"no end: {script}\n{run.stderr}"
    assert "csrc/" in run.stderr or emulated, f"not in the extension: {script}\n{run.stderr}"


def extreme(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values, and among them the ends of the dtype and what is no number."""
    x = torch.randn(size).to(dtype)
    ends = torch.finfo(dtype)
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, ends.max, ends.min]
    special.append(ends.smallest_normal / 2)
    special = torch.tensor(special, dtype=torch.float64).to(dtype)
    few = torch.rand(size) < 0.2
    x[few] = special[torch.randint(len(special), (int(few.sum()),))]
    return x


def labels_of(*size: int, classes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Labels inside, at both ends of and outside the classes."""
    ends = torch.iinfo(dtype)
    known = [0, classes - 1, classes, -1, ends.min, ends.max]
    known = torch.tensor([label for label in known if ends.min <= label <= ends.max], dtype=dtype)
    return known[torch.randint(len(known), size)]


def placed(*tensors: torch.Tensor):
    """The tensors as they are; starting a value later in their memory; with gaps; transposed."""
    yield tensors
    late = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape) for x in tensors]
    yield [to.copy_(x) for to, x in zip(late, tensors, strict=True)]
    yield [torch.stack([x, x], -1)[..., 1] for x in tensors]
    yield [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]


def region_pool() -> None:
    # nothing, one of each, planes and stretches that end within a block, every class there is
    shapes = [(2, 9, 37, 31, 3), (1, 1, 1, 1, 1), (1, 3, 5, 5, 65_535), (2, 17, 40, 61, 171)]
    shapes += [(0, 3, 4, 4, 2), (2, 0, 4, 4, 2), (2, 3, 0, 4, 2), (2, 3, 4, 0, 2)]
    types = list(zip(FLOATS, itertools.cycle((torch.int64, torch.int32, torch.uint8))))
    ops = torch.ops.pico_fast
    for shape, (dtype, kind) in itertools.product(shapes, types):
        *size, classes = shape
        labels = labels_of(size[0], *size[2:], classes=classes, dtype=kind)
        values = extreme(*size, dtype=dtype)
        layouts = list(placed(values, labels))
        layouts.append((values.contiguous(memory_format=torch.channels_last), labels))
        layouts.append((values[:, :, :1].expand(size) if size[2] else values, labels))
        for features, where in layouts:
            means, counts = ops.region_pool(features, where, classes)
            for share, of in placed(means, counts):
                ops.region_pool_backward(share, where, of, dtype, False)
                ops.region_pool_backward(share, where, of, dtype, True)


def gather_pixels() -> None:
    sizes = [(2, 17, 7, 5), (1, 1, 1, 1), (3, 16, 9, 1), (2, 0, 3, 3)]
    for size, dtype in itertools.product(sizes, FLOATS):
        pixels = size[0] * size[2] * size[3]
        pixel = torch.cat([torch.randint(pixels, (1030,)), torch.tensor([0, pixels - 1])])
        for features, where in placed(extreme(*size, dtype=dtype), pixel):
            torch.ops.pico_fast.gather_pixels(features, where)
            torch.ops.pico_fast.gather_pixels(features[:0], where[:0])


def layout_of(sizes: list[int], dtype: torch.dtype, channels: int, in_batch: bool):
    """A layout of classes of two parts with positions that are in no range; its anchors hold extremes."""
    ranges, at = [], 1
    for size in sizes:
        ranges.append([[at, size - size // 3], [at + size + 2, size // 3]])
        at += size + size // 3 + 5
    keys, key_order = extreme(at, channels, dtype=dtype), torch.arange(at).flip(0)
    ranges = torch.tensor(ranges, dtype=torch.int64).view(-1, 2, 2)
    if not in_batch:
        classes = torch.arange(9) % max(1, len(sizes)) if sizes else torch.full((9,), -1)
        anchors = extreme(9, channels, dtype=dtype)
        classes = classes.sort()[0]
        classes[-1:] = -1
        return anchors, classes, keys, None, ranges, None
    of = [torch.full((int(part[:, 1].sum()),), c) for c, part in enumerate(ranges)]
    classes = torch.cat([*of, torch.tensor([-1])])
    own = torch.cat([torch.arange(f, f + n) for f, n in ranges.flatten(0, 1).tolist()] + [torch.zeros(1)])
    own = key_order[own.long()]
    return keys[own], classes, keys, key_order, ranges, own


def layouts() -> None:
    # nothing, one key, few anchors of many keys, several tiles, one class alone; by row and by place
    cases = [([], 4), ([1], 1), ([0, 3], 17), ([40, 0, 7, 9000], 8), ([70], 33), ([5, 6], 0)]
    counts = ((1, 1.0), (20, 0.3), (10_000, 1.0))
    ops = torch.ops.pico_fast
    for (sizes, channels), dtype, in_batch in itertools.product(cases, FLOATS, (False, True)):
        work = layout_of(sizes, dtype, channels, in_batch and sum(sizes) < 1000)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ceiling, lse = (extreme(len(work[0]), dtype=wide) for _ in range(2))
        for own, (count, fraction) in itertools.product((False, True), counts):
            top = None if own else ceiling
            for by_place in (False, True):
                ops.hardest(*work, own, top, count, by_place)
            for cut in ((None, 2**63 - 1, 1.0), (top, count, fraction)):
                if own:
                    ops.positives(*work, *cut, lse, 0.1, True)
                else:
                    ops.negatives(*work, *cut, 0.1, True)
                ops.keys_grad(*work, *cut, own, lse, lse, 0.1)


def sample_keys() -> None:
    draw = torch.ops.pico_fast.sample_keys
    sizes = torch.tensor([[0, 0], [1, 0], [0, 3], [40, 2], [20_000, 7]])
    first = sizes.flatten().cumsum(0).view(5, 2) - sizes
    ranges = torch.stack([first, sizes], 2)
    names, total = torch.arange(5) * 2**60, int(sizes.sum())
    for own, need in itertools.product((True, False), (0, 1, 3, 10_001, 2**31 - 2)):
        drawn = draw(ranges, names, None, need, own, SEED, total)[1].select(2, 1)
        for room, order in ((int(drawn.sum()), None), (total + 9, torch.arange(total).flip(0))):
            for of, called in placed(ranges, names):
                draw(of, called, order, need, own, SEED, room)
    draw(ranges[:0], names[:0], None, 3, False, SEED, 0)


def picked(n: int, k: int, n_keys: int) -> torch.Tensor:
    """Indices with both ends, and with none."""
    index = torch.randint(-1, n_keys, (n, k))
    index[::3] = -1
    if k and n > 1:
        index[1, 0], index[1, -1] = n_keys - 1, min(0, n_keys - 1)
    return index


DTYPES = [(rows, keys) for rows in FLOATS[::3] for keys in FLOATS]
DTYPES.remove((torch.float32, torch.float64))


def weighted_rows() -> None:
    # 600 rows: several blocks; 9000 keys: several tiles; no channels, no keys, no picks
    sizes = [(600, 5, 50, 3), (2, 40, 9000, 65), (3, 4, 7, 0), (3, 4, 0, 8), (3, 0, 7, 8)]
    sizes += [(0, 4, 7, 8), (1, 1, 1, 1)]
    for (n, k, n_keys, channels), (wide, narrow) in itertools.product(sizes, DTYPES):
        keys = extreme(n_keys, channels, dtype=narrow)
        index, weight = picked(n, k, n_keys), extreme(n, k, dtype=wide)
        for of, picks, weights in placed(keys, index, weight):
            torch.ops.pico_fast.weighted_rows(of, picks, weights)


def mix_negatives() -> None:
    sizes = [(5, 9, 33), (2, 1, 1), (2, 2, 16), (3, 0, 8), (0, 4, 8), (2, 3, 0)]
    counts = ((0, 0), (1, 0), (0, 1), (9, 7))
    for (n, k, channels), dtype, mixes in itertools.product(sizes, FLOATS, counts):
        for n_keys, temperature in ((0, 0.1), (13, 0.1), (13, 1e-300)):
            keys = extreme(n_keys, channels, dtype=dtype)
            index, row = picked(n, k, n_keys), 2**62 - torch.arange(n)
            for queries in placed(extreme(n, channels), keys, index, row):
                torch.ops.pico_fast.mix_negatives(*queries, *mixes, temperature, SEED)


# what ops of layouts are made of
PARTS = "multiply_few cut_rows add_negatives add_positives keep_hardest list_kept"
RUNS = {
    "region_pool": region_pool,
    "region_pool_backward": region_pool,
    "gather_pixels": gather_pixels,
    "sample_keys": sample_keys,
    **dict.fromkeys(PARTS.split(), layouts),
    "weighted_rows": weighted_rows,
    "mix_negatives": mix_negatives,
}


class Passed:
    """Counts tests that passed."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call" and report.passed


def tests(figures: Path | None = None) -> int:
    """Runs the tests in this process and notes how many passed; their exit status."""
    passed = Passed()
    files = [(HERE / f"test_{name}.py").as_posix() for name in TESTS.split()]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[passed])
    if figures is not None and status == 0:
        known = json.loads(figures.read_text()) if figures.is_file() else {}
        known["sanitizers"] = {"tests under ASan and UBSan": passed.count, "findings": 0}
        figures.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return status


if __name__ == "__main__":
    full, *figures = sys.argv[1:] or [None]  # --full, FIGURES.json
    check_library()
    for access in REPORTS:
        check_that_it_ends(access, False)
    if full:
        check_that_it_ends(read_behind_the_end, True)
    # not info.ops(), which leaves out the parts that an op of a layout is made of
    names = (name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names())
    ours = {name for name in names if name.startswith("pico_fast::")}
    compiled = {op for op in ours if info.implementation(op, "CPU") == "compiled"}
    assert compiled == {f"pico_fast::{name}" for name in RUNS}, "an op without a run"
    torch.manual_seed(0)
    for run in dict.fromkeys(RUNS.values()):
        run()
        print(f"{run.__name__}: no finding")
    sys.exit(tests(*map(Path, figures)) if full else 0)
