"""Every variant of a kernel that the scenes for a GPU launch, found without one: a JSON line each.

    python bench/gpu_variants.py FILE

The project's own launchers run on CPU tensors of the same sizes, strides and alignment, under a driver that
says it has an H100. Kernels are neither compiled nor run: what they would write stays 0.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import torch
import triton
from gpu_cache import NoGPU, rest_of_key
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction, get_full_name, serialize_specialization_data

# the Triton of the machine with a GPU
TRITON = "3.6.0"


def as_on_a_gpu() -> None:
    """Ops choose as they do on an H100; fresh memory is 0, and so a valid index."""
    from pico_fast import on_gpu
    from pico_fast.selection import launch

    torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros
    torch.cuda.device = lambda _: contextlib.nullcontext()
    torch.compiler.is_compiling = lambda: True  # so that the host does not look at the data
    on_gpu._is_new = lambda _: True
    launch.gpu = lambda _: (90, 132)
    pages = [module for name, module in list(sys.modules.items()) if name.startswith("pico_fast")]
    for page, name, takes in on_gpu._OPS:
        op, chosen = getattr(page, name), on_gpu._in_triton(page, name, takes)
        for module in pages:
            if vars(module).get(name) is op:
                setattr(module, name, chosen)


def record(found: dict[str, str]) -> None:
    """Instead of compiling a variant, note it: by its key, a line."""
    driver.set_active(NoGPU())

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        _, _, _, backend, _ = self.device_caches[device]
        rest = rest_of_key(ASTSource(self, signature, constexprs, attrs), backend, options, {})
        data = serialize_specialization_data(
            get_full_name(self.fn), signature, constexprs, attrs, options, key
        )
        found[rest] = json.dumps({"key": rest, "data": data})

    JITFunction._do_compile = note


def main(path: Path) -> int:
    if triton.__version__ != TRITON:
        sys.exit(f"expected Triton {TRITON}, got {triton.__version__}")
    if torch.cuda.is_available():
        sys.exit("expected a machine without a GPU: on one with a GPU kernels are compiled as they run")
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import gpu_scenes as scenes
    import gpu_tiles
    import sanitize

    scenes.has_values = False
    found: dict[str, str] = {}
    record(found)
    as_on_a_gpu()
    before = 0
    makers = {f"first light: {name}": make for name, make in scenes.CHECKS.items()}
    makers |= {f"times: {name}, {n}": make for (name, n), make in scenes.times().items()}
    makers |= {"tiles": gpu_tiles.with_every_row}
    for what in (sanitize.contrast, sanitize.selection):
        makers[f"sanitize: {what.__name__}"] = functools.partial(functools.partial, what)
    for name, make in makers.items():
        call = make("cpu")
        (call.call if isinstance(call, scenes.Check) else call)()
        print(f"{name}: {len(found) - before} new variants", flush=True)
        before = len(found)
    path.write_text("".join(line + "\n" for line in found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
