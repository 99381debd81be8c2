"""The GPU's C++ kernels on a CPU: csrc/cuda compiled by the C++ compiler against device.cuh beside this.

`load()` gives the ops of the library `pico_fast_emulated`, with the schemas of the package's own.
PICO_FAST_SANITIZE names sanitizers to compile with, as it does for setup.py.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

import pico_fast  # noqa: F401  (the ops' schemas)

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
OPS = ("region_pool", "region_pool_backward")


def compile_kernels(folder: Path) -> Path:
    """Build the library into `folder`; the product's device.cuh gives way to the emulating one."""
    (folder / "cuda").mkdir()
    for header in CSRC.glob("*.h"):
        shutil.copy(header, folder)
    for source in CSRC.glob("cuda/*.cu*"):
        name = source.stem + ".cpp" if source.suffix == ".cu" else source.name
        shutil.copy(source, folder / "cuda" / name)
    shutil.copy(HERE / "device.cuh", folder / "cuda")
    library = folder / "emulated.so"
    torch_home = Path(torch.__file__).parent
    command = [cpp_extension.get_cxx_compiler(), "-std=c++20", "-O2", "-fPIC", "-shared"]
    if sanitizers := os.environ.get("PICO_FAST_SANITIZE"):
        command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
        command += ["-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [path.as_posix() for path in sorted(folder.glob("cuda/*.cpp"))]
    command += [
        "-o",
        library.as_posix(),
        f"-L{torch_home / 'lib'}",
        "-ltorch_cpu",
        "-ltorch",
        "-lc10",
    ]
    subprocess.run(command, check=True)
    return library


@functools.cache
def load() -> dict[str, torch._ops.OpOverload]:
    """The emulated ops by name, built on the first call."""
    for name in OPS:
        schema = str(getattr(torch.ops.pico_fast, name).default._schema)
        torch.library.define(f"pico_fast_emulated::{name}", schema[schema.index("(") :])
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(compile_kernels(Path(folder)))
    return {name: getattr(torch.ops.pico_fast_emulated, name).default for name in OPS}
