"""`python -m pico_fast.info`: versions, what was built and loaded, and which implementation runs where."""

import importlib.metadata
import json
import platform
from pathlib import Path

import torch

import pico_fast
from pico_fast import regions
from pico_fast.presets import PRESETS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> dict:
    """What setup.py recorded; empty where the package was never built."""
    path = Path(__file__).parent / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _devices() -> list[str]:
    found = [f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    kind = "ROCm" if torch.version.hip else "CUDA"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            f"{kind} {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB,"
            f" compute capability {gpu.major}.{gpu.minor}"
        )
    if torch.backends.mps.is_available():
        found.append("MPS")
    return found if len(found) > 1 else [*found, "no GPU visible"]


def ops() -> list[str]:
    """Names of the package's ops, as the dispatcher knows them.

    An op that one device alone has is a part of another op's implementation, and is left out.
    """
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    names = {name for name in names if name.startswith("pico_fast::")}
    return sorted(
        name for name in names if all(implementation(name, device) != "none" for device in ("CPU", "CUDA"))
    )


def implementation(op: str, device: str) -> str:
    """Which implementation of `op` ("pico_fast::region_pool") runs on `device` ("CPU", "CUDA")."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, device):
        table = torch._C._dispatch_dump(op).splitlines()
        origin = next(line for line in table if line.startswith(f"{device}: "))
        if "csrc" in origin:
            return "compiled"
        return f"PyTorch, made for {device}" if device == "CPU" else "Triton"
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd"):
        return "PyTorch, any device"
    return "none"


def _why_not_compiled(build: dict) -> list[str]:
    """Why a device runs no compiled kernels, a sentence for each."""
    if regions.why_not_compiled is not None:
        return [f"no compiled kernels: {regions.why_not_compiled}"]
    left_out = build.get("left_out", {})
    return [f"no compiled kernels for {part.upper()}: {why}" for part, why in left_out.items()]


def report() -> str:
    """Everything at once, as text."""
    build = _build()
    names = ops()
    width = max(map(len, names))
    lines = [
        f"pico_fast {pico_fast.__version__}, in {Path(__file__).parent}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}",
        *(f"{package} {_version(package)}" for package in ("triton", "numpy")),
        "",
        f"built: {' and '.join(build.get('built', [])) or 'nothing'}"
        f" (asked for: {build.get('asked', 'never built')})",
        *(f"  {key}: {build[key]}" for key in ("torch", "compiler", "nvcc", "cuda_archs") if key in build),
        *(f"  without {part}: {reason}" for part, reason in build.get("left_out", {}).items()),
        f"loaded: {'_C' if regions.why_not_compiled is None else regions.why_not_compiled}",
        "",
        "devices:",
        *(f"  {device}" for device in _devices()),
        "",
        "implementations:",
        *(
            f"  {name:{width}}  CPU: {implementation(name, 'CPU'):21}  CUDA: {implementation(name, 'CUDA')}"
            for name in names
        ),
        *(f"  {reason}" for reason in _why_not_compiled(build)),
        "  compiled: C++ or CUDA from csrc/. Triton: kernels/. PyTorch: plain PyTorch operations.",
        "  ROCm, MPS and Windows run the PyTorch implementations; nothing is compiled for them.",
        "",
        "presets, and their banks of 256 channels in bfloat16:",
        *(
            f"  {name:15} {of.num_classes:4} classes x ({of.pixel_queue_size:6} pixels"
            f" + {of.region_queue_size:5} regions)  {of.memory() / 2**20:6.0f} MiB"
            for name, of in PRESETS.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
