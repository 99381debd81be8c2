"""A Triton cache for a machine with a GPU, filled on one without: compiled, never run.

    python bench/gpu_cache.py fill KIT [JOBS]      compile KIT/variants.jsonl into KIT/triton
    python bench/gpu_cache.py check KIT FILE       each variant of FILE is in KIT/triton, or it is an error
    python bench/gpu_cache.py ready KIT [JOBS]     on the machine with the GPU: use it, or compile all anew

A kernel's key in the cache holds Triton's own files (`triton_key()`, which differs by the Python that a
wheel of Triton is for), the kernel's source and line, its variant, the backend's options, ptxas's version
and some environment; no path of ours. So `fill` runs under the Python and the Triton of the other machine,
and needs no PyTorch. What a cache says of its own files are absolute paths: `ready` writes them anew.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

# intermediate stages are large, and nobody reads them
os.environ["TRITON_STORE_BINARY_ONLY"] = "1"

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as backend
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.runtime import build, driver
from triton.runtime.cache import get_cache_key, triton_key

ROOT = Path(__file__).parents[1]


class NoGPU:
    """The driver of an H100 that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def key() -> str:
    """What Triton's own files are: equal where a cache can be used."""
    return hashlib.sha256(triton_key().encode()).hexdigest()


def rest_of_key(src, of_backend, options, env_vars) -> str:
    """What else a kernel's key in the cache is made of."""
    return f"{src.hash()}-{of_backend.hash()}-{options.hash()}-{sorted(env_vars.items())}"


def kernel_named(name: str):
    """The kernel of a module of pico_fast.kernels, imported without pico_fast, which needs PyTorch."""
    if "pico_fast" not in sys.modules:
        for package, folder in (("pico_fast", "pico_fast"), ("pico_fast.kernels", "kernels")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(ROOT / folder)]
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


def compiled(line: str) -> None:
    """The kernel of a line of variants, and what launches it, are in the cache after this."""
    variant = json.loads(line)
    data = json.loads(variant["data"])
    data["options"].pop("extern_libs")  # a path of the machine that wrote it; there is one default

    def same_key(*args, **named):
        rest = rest_of_key(*args, **named)
        if rest != variant["key"]:
            raise ValueError(f"{data['name']}: expected the key {variant['key']}, got {rest}")
        return get_cache_key(*args, **named)

    with mock.patch.object(compiler, "get_cache_key", same_key):
        kernel = kernel_named(data["name"]).preload(json.dumps(data))
    nvidia.CudaLauncher(kernel.src, kernel.metadata)


def prepare(folder: Path) -> None:
    """Compile into a folder; what launches a kernel is compiled as well, but not loaded."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub())
    driver.set_active(NoGPU())
    build._load_module_from_path = lambda *_: mock.MagicMock()


def stub() -> Path:
    """A folder with a libcuda.so.1 to link against, which a machine without a GPU does not have."""
    folder = ROOT / "build" / "gpu-kit"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{library.name}", "-o", library]
        subprocess.run(command, check=True)
    return folder


def fill(kit: Path, jobs: int) -> None:
    """Compile every variant that is not there yet."""
    start, lines = time.time(), (kit / "variants.jsonl").read_text().splitlines()
    prepare(kit / "triton")
    nvidia.CudaUtils()
    with ProcessPoolExecutor(jobs, initializer=prepare, initargs=(kit / "triton",)) as pool:
        list(pool.map(compiled, lines))
    for path in (kit / "triton").glob("*/*.source"):
        path.unlink()
    (kit / "key.txt").write_text(key() + "\n")
    report(kit, f"{len(lines)} variants in {time.time() - start:.0f} s")


def report(kit: Path, what: str) -> None:
    files = [path for path in (kit / "triton").rglob("*") if path.is_file()]
    kernels = sum(path.suffix == ".cubin" for path in files)
    launchers = sum(path.suffix == ".so" for path in files)
    size = sum(path.stat().st_size for path in files)
    print(f"{what}: {kernels} kernels, {launchers} launchers, {size:,} bytes", flush=True)


def check(kit: Path, variants: Path) -> int:
    """How many variants are not in the cache; nothing is compiled."""
    prepare(kit / "triton")

    def refuse(*_, **__):
        raise LookupError("not in the cache")

    missing, lines = 0, variants.read_text().splitlines()
    with (
        mock.patch.object(backend.CUDABackend, "add_stages", refuse),
        mock.patch.object(build, "_build", refuse),
    ):
        for line in lines:
            try:
                compiled(line)
            except (LookupError, ValueError) as error:
                missing += 1
                print(f"{json.loads(json.loads(line)['data'])['name']}: {error}")
    report(kit, f"{len(lines)} variants, {missing} of them missing")
    return missing


def put_right(folder: Path) -> None:
    """Groups of files of a cache that came from elsewhere name them by absolute paths."""
    for path in folder.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))


def ready(kit: Path, jobs: int) -> None:
    """Make the cache one that Triton here finds its kernels in."""
    before, now = (kit / "key.txt").read_text().strip(), key()
    if before == now:
        put_right((kit / "triton").resolve())
        report(kit, f"Triton's files are those of the cache ({now[:16]})")
    else:
        print(f"Triton's files are {now[:16]}, the cache is of {before[:16]}: compiling here", flush=True)
        fill(kit, jobs)


def main(what: str, *words: str) -> int:
    if what == "check":
        return 1 if check(*map(Path, words)) else 0
    else:
        jobs = int(words[1]) if len(words) > 1 else 1
        {"fill": fill, "ready": ready}[what](Path(words[0]), jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
