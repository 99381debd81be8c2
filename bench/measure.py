"""Measuring: clocks, ceilings of the same run, peak memory, and counts that no noise touches."""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]


def on_cpu(call: Call) -> float:
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@functools.cache
def _larger_than_the_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def on_gpu(call: Call) -> float:
    """Seconds of one call on the GPU between two events, its L2 cache cold."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host = 0.0
    for _ in range(2):
        # the GPU waits until the host has everything queued: launches are not part of the time
        spin = max(5e-3, 2 * host)
        _larger_than_the_cache().zero_()
        torch.cuda._sleep(int(2e9 * spin))
        start.record()
        host = on_cpu(call)
        end.record()
        end.synchronize()
        # unless the call itself looks at the GPU, the second wait is long enough
        if host < spin:
            break
    return start.elapsed_time(end) / 1e3


def graph_of(call: Call) -> torch.cuda.CUDAGraph:
    """What a call launches, captured once after it ran three times; it may not look at the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.results = call()
    return graph


def of_many(call: Call, seconds: float) -> float:
    """Seconds of one call of as many in a row, between two events, as take about so long."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    once = _between(start, end, call, 1)
    times = rounds_within(once, seconds, 1000)
    return _between(start, end, call, times)


def _between(start: torch.cuda.Event, end: torch.cuda.Event, call: Call, times: int) -> float:
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


CLOCKS = {"cpu": on_cpu, "cuda": on_gpu}


def rounds_within(seconds_of_a_round: float, budget: float, most: int) -> int:
    """Rounds that a budget of seconds pays for: one at least."""
    return max(1, min(most, int(budget / max(seconds_of_a_round, 1e-9))))


def ceilings(device: str) -> dict[str, float]:
    """Rates that this machine reaches now: large products (operations/s) and a large copy (bytes/s)."""
    clock = CLOCKS[device]
    size = 8192 if device == "cuda" else 2048
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        if device == "cpu" and dtype == torch.bfloat16 and not _multiplies_bfloat16():
            continue
        left = torch.randn(size, size, device=device, dtype=dtype)
        out = torch.empty_like(left)
        seconds = _best(clock, functools.partial(torch.mm, left, left, out=out))
        found[f"{str(dtype)[6:]} product"] = 2 * size**3 / seconds
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * 4 * source.numel() / _best(clock, functools.partial(target.copy_, source))
    return {name: float(f"{rate:.4g}") for name, rate in found.items()}


def _best(clock: Callable[[Call], float], call: Call) -> float:
    """The median of five after one that warms up."""
    clock(call)
    return statistics.median(clock(call) for _ in range(5))


def _multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_bytes(device: str) -> int:
    """Memory that a run may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def peak_on_gpu(call: Call) -> int:
    """Bytes beyond what was there before, at the worst moment of a call."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_on_cpu(call: Call) -> int:
    """Growth of the resident set over a call, in a process that does nothing else."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


class _Dispatched(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # views and sizes launch nothing
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(call: Call) -> int:
    """Operations of PyTorch and of ours that a call dispatches, views aside."""
    with _Dispatched() as mode:
        call()
    return mode.count


def allocated(call: Call) -> int:
    """Bytes of tensors that are alive at the worst moment of a call on a CPU, beyond those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def launches(call: Call) -> int:
    """Kernels that a call launches on a GPU; a host synchronisation in it raises."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)
