"""Build pico_fast: Python everywhere, and where there is a compiler one stable-ABI extension, `_C`.

PICO_FAST_BUILD says what to build. "auto", the default, builds what it can and is never an error;
"cuda" (CPU and CUDA kernels) and "cpu" build that or fail; "none" builds no extension. What was built,
and why the rest was not, stands in pico_fast/_build.json, which `python -m pico_fast.info` prints.

PICO_FAST_WERROR=1 makes warnings errors. PICO_FAST_SANITIZE=address,undefined compiles the CPU kernels
for these sanitizers, whose runtimes Python then has to preload: see `make sanitize`. CUDA_HOME,
TORCH_CUDA_ARCH_LIST, CXX and MAX_JOBS mean what they mean to PyTorch; without an arch list, the visible
GPUs decide.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build

try:
    import torch
    from torch.utils import cpp_extension
except (ImportError, OSError) as error:
    torch, no_torch = None, f"PyTorch cannot be imported in the build environment: {error}"

MODES = ("auto", "cuda", "cpu", "none")
MODE = os.environ.get("PICO_FAST_BUILD", "auto")
if MODE not in MODES:
    sys.exit(f"PICO_FAST_BUILD: expected one of {MODES}, got {MODE!r}")

# where no GPU is visible: one architecture per generation, and PTX for what comes after
ARCHS = "8.0;9.0+PTX"
CPU_SOURCES = [path.as_posix() for path in sorted(Path("csrc").glob("*.cpp"))]
CUDA_SOURCES = [path.as_posix() for path in sorted(Path("csrc/cuda").glob("*.cu"))]
# torch 2.10 and later load what is built against this target, whatever torch builds it
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
WERROR = os.environ.get("PICO_FAST_WERROR") == "1"
SANITIZE = os.environ.get("PICO_FAST_SANITIZE")

record = {"asked": MODE, "built": [], "left_out": {}}


def find_cuda_home() -> str | None:
    """The toolkit's folder: the one with the headers, since an `nvcc` on PATH may be a wrapper."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates.append(nvcc and str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, candidates):
        if all((Path(home) / part).is_file() for part in ("bin/nvcc", "include/cuda_runtime.h")):
            return home
    return None


def no_cpu_reason() -> str | None:
    """Why the extension cannot be built at all, as far as one can tell before trying."""
    if torch is None:
        return no_torch
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10, the first with this stable ABI"
    if sys.platform == "win32":
        return "the extension is not built on Windows"
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not found (set CXX)"
    return None


def no_cuda_reason(cuda_home: str | None) -> str | None:
    """Why CUDA kernels cannot be built, as far as one can tell before trying."""
    if not CUDA_SOURCES:
        return "there are no CUDA sources in csrc/cuda"
    if torch.version.hip:
        return "PyTorch is a ROCm build"
    if cuda_home is None:
        return "no CUDA toolkit found (set CUDA_HOME)"
    return None


def extension(cuda_home: str | None) -> Extension:
    """`_C` with CPU kernels, and with CUDA kernels if there is a toolkit."""
    # torch's own headers as system headers: they do not stand up to -Wextra
    system = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    # messages of the extension name csrc/... and torch/..., not where these happened to lie
    hidden = (Path.cwd(), Path(torch.__file__).parents[1])
    prefixes = [f"-ffile-prefix-map={folder}/=" for folder in hidden]
    cxx = [
        "-O3",
        "-fopenmp-simd",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        *prefixes,
        *system,
        *STABLE_ABI,
    ]
    link = ["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else []
    if SANITIZE:
        # the last -O counts; where Python's flags say -fwrapv, no overflow would be an error
        cxx += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        cxx += ["-g", "-O1", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
        link = [f"-fsanitize={SANITIZE}"]  # and not stripped: a report names lines
    options = {}
    nvcc = []
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home  # a CPU build of torch leaves it None
        nvcc = ["-O3", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden", *system, *STABLE_ABI]
        # quoted: nvcc hands it to a shell
        nvcc += [word for prefix in prefixes for word in ("-Xcompiler", shlex.quote(prefix))]
        # a spill is a warning: registers that do not fit are a slow kernel that looks like a good one
        nvcc += ["-Xptxas", "-warn-spills"]
        nvcc += ["-Werror", "all-warnings", "-Xptxas", "-Werror"] if WERROR else []
        lib = next(path for path in ("lib64", "lib") if (Path(cuda_home) / path).is_dir())
        options = {
            "include_dirs": [f"{cuda_home}/include"],
            "library_dirs": [f"{cuda_home}/{lib}"],
            # the static runtime: the wheel must not ask for one CUDA version's library
            "libraries": ["cudart_static", "rt", "dl", "pthread"],
        }
    return cpp_extension.CppExtension(
        "pico_fast._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda_home else []),
        py_limited_api=True,
        extra_compile_args={"cxx": cxx + (["-Werror"] if WERROR else []), "nvcc": nvcc},
        extra_link_args=link,
        **options,
    )


def set_archs() -> str:
    """The architectures to compile for, set where torch's build looks for them."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        names = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{names}+PTX" if names else ARCHS
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def same_names() -> list[str]:
    """What makes nvcc's symbols the same in every build, if this nvcc has it.

    It puts its process and the source's folder into the names of what is internal to a file.
    """
    seed, folder = "-frandom-seed=pico_fast", "--orig_src_path_name"
    command = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", seed, "--dryrun", "-c", CUDA_SOURCES[0]]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode or folder not in told.stderr:
        return []
    return [seed, "-Xcudafe", f"{folder}=csrc/cuda"]


def leave_out(part: str, reason: str) -> None:
    """Note that `part` is not built, aloud; an error if it was asked for by name."""
    if MODE in ("cuda", part):
        sys.exit(f"pico_fast: PICO_FAST_BUILD={MODE}, but {reason}")
    record["left_out"][part] = reason
    print(f"pico_fast: built without {part} kernels: {reason}", file=sys.stderr)


def plan() -> list[Extension]:
    """What to build here: one extension, or none."""
    reason = "PICO_FAST_BUILD=none" if MODE == "none" else no_cpu_reason()
    if reason:
        leave_out("cpu", reason)
        leave_out("cuda", reason)
        return []
    cuda_home = find_cuda_home()
    reason = "PICO_FAST_BUILD=cpu" if MODE == "cpu" else no_cuda_reason(cuda_home)
    if reason:
        leave_out("cuda", reason)
        return [extension(None)]
    return [extension(cuda_home)]


class BuildRecord(Command):
    """Writes _build.json into the package, and removes an extension that an earlier build left."""

    description = "record what was built"
    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        package = Path("pico_fast" if self.editable_mode else f"{self.build_lib}/pico_fast")
        if not record["built"]:
            for stale in package.glob("_C.*"):
                stale.unlink()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [f"{self.build_lib}/pico_fast/_build.json"]

    def get_output_mapping(self):
        return {}


commands = {"build_record": BuildRecord}
build.sub_commands.append(("build_record", None))
extensions = plan()

if extensions:

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's build, less at every failure: CPU and CUDA kernels, CPU kernels alone, nothing."""

        def build_extensions(self):
            while self.extensions:
                with_cuda = any(source.endswith(".cu") for source in self.extensions[0].sources)
                try:
                    archs = set_archs() if with_cuda else None
                    if with_cuda:
                        self.extensions[0].extra_compile_args["nvcc"] += same_names()
                    super().build_extensions()
                    break
                except Exception as error:
                    if MODE != "auto":
                        raise
                    reason = f"the build failed: {type(error).__name__}: {error}"
                    leave_out("cuda" if with_cuda else "cpu", reason)
                    if with_cuda:
                        vars(self.extensions[0]).update(vars(extension(None)))
                    else:
                        self.extensions = []
                        record["left_out"].setdefault("cuda", reason)
            else:
                return
            compiler = [*shlex.split(cpp_extension.get_cxx_compiler()), "--version"]
            record["built"] = ["cpu", "cuda"] if with_cuda else ["cpu"]
            record["torch"] = torch.__version__
            record["compiler"] = subprocess.check_output(compiler, text=True).splitlines()[0]
            if with_cuda:
                nvcc = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", "--version"]
                record["nvcc"] = subprocess.check_output(nvcc, text=True).splitlines()[-2]
                record["cuda_archs"] = archs

    commands["build_ext"] = BuildExtension

setup(
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
