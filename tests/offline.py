"""Compiling Triton kernels for GPUs that are not there, and reading what came out.

Run without TRITON_INTERPRET: an interpreted kernel cannot be compiled. `report()` gives, for a kernel and
its settings, registers, spilled bytes, shared memory and the counts of some instructions.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# shared memory that one block can have, and the names of the matrix instructions
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MATRIX = {"HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "OMMA"}


def report(kernel, arguments: dict[str, str], constants: dict, generation: int, **options) -> dict:
    """Compile `kernel` for one GPU generation (80, 86, 89, 90, 100, 120).

    arguments: Triton's type of each argument that is no constant: "*fp32", "i32", "fp32" or
        "tensordesc<bf16[64, 256]>"; pointers, and integers called *_stride, count as multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    even = [n for n, kind in arguments.items() if kind[0] == "*" or n.endswith("_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options or None)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        listing = _run("nvdisasm", cubin)
        arch = f"sm_{generation}a" if generation >= 90 else f"sm_{generation}"
        spilled = None
        for tool in ("ptxas", "ptxas-blackwell"):  # each knows only some of the architectures
            if (TOOLS / tool).exists() and spilled is None:
                said = _run(tool, "-v", f"-arch={arch}", ptx, "-o", Path(folder, "out"))
                spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    opcode = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)"
    counts = collections.Counter(re.findall(opcode, listing, re.MULTILINE))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": sum(map(int, spilled.groups())) if spilled else None,
        "shared": compiled.metadata.shared,
        "matrix": sum(counts[name] for name in MATRIX),
        "copies": counts["UTMALDG"] + counts["LDGSTS"],
        "instructions": sum(counts.values()),
    }


def _run(tool: str, *args) -> str:
    done = subprocess.run([TOOLS / tool, *map(str, args)], capture_output=True, text=True)
    return done.stdout + done.stderr
