"""What the sources must look like: who imports whom, how long a file is, who is tested."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pico_fast"

# a module imports from the rows above it, or from its own row; never from below, never in a circle
LAYERS = [
    {"checks", "finite", "labels", "pixels", "presets", "ranks", "reference"},
    {
        "anchors",
        "bank",
        "bank_state",
        "class_order",
        "contrast",
        "contrast_any",
        "contrast_cpu",
        "contrast_gpu",
        "contrast_selected",
        "entries",
        "pass_gpu",
        "picked",
        "picked_gpu",
        "projection",
        "regions",
        "selection",
        "selection_gpu",
        "synthesis",
    },
    {"sharded", "shard_picks", "on_gpu"},
    {"loss"},
    {"dropin", "tap", "testing", "visualize"},
    {"__init__"},
    {"info"},
]
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def sources(*patterns: str) -> list[Path]:
    """The project's own files, as paths from its root."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def imported_modules(path: Path) -> set[str]:
    """Modules of pico_fast that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            module = rest.partition(".")[0]
            if package == "pico_fast" and (module in MODULES or module == "kernels"):
                found.add(module)
            elif name == "pico_fast" and isinstance(node, ast.Import):
                found.add("__init__")
    return found


def test_every_module_has_a_layer():
    assert set(MODULES) <= set(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for other in imported_modules(PACKAGE / f"{module}.py") - {"kernels"}:
        assert LAYER[other] <= LAYER[module], f"{module} imports {other}"


def test_no_import_circle():
    waiting = {
        module: imported_modules(PACKAGE / f"{module}.py") - {"kernels"} for module in MODULES
    }
    while waiting:
        ready = {module for module, needs in waiting.items() if not needs & set(waiting)}
        assert ready, f"import circle among {sorted(waiting)}"
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}


def test_kernels_import_only_kernels():
    for path in sources("kernels/*.py"):
        assert imported_modules(path) <= {"kernels"}, path


def test_files_are_short():
    folders = ("pico_fast", "kernels", "csrc", "tests", "bench", "examples")
    for path in sources(*(f"{folder}/**/*.*" for folder in folders)):
        if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}:
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)}: {lines} lines"


def test_files_are_named_after_concepts():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    for path in sources("*/**/*.py", "csrc/**/*"):
        folder = path.relative_to(ROOT).parts[0]
        if not folder.startswith(".") and folder not in ("build", "dist"):
            assert not vague & set(path.stem.split("_")), path


def test_reference_is_used_by_tests():
    tests = "\n".join(path.read_text() for path in sources("tests/test_*.py"))
    body = ast.parse((PACKAGE / "reference.py").read_text()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    used = {name for name in functions if re.search(rf"\breference\.{name}\b", tests)}
    waiting = list(used)
    while waiting:  # what a used function calls is used as well
        for node in ast.walk(functions[waiting.pop()]):
            if isinstance(node, ast.Name) and node.id in functions and node.id not in used:
                used.add(node.id)
                waiting.append(node.id)
    assert set(functions) <= used, f"no test uses {sorted(set(functions) - used)}"


def test_kernels_have_one_name():
    run = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "pico_fast.kernels" in run.stderr


def test_import_needs_torch_and_numpy_alone():
    script = """
import sys
import torch
import torch._inductor.config  # what torch itself imports of these is its own affair
already = set(sys.modules)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked} and name not in already:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Refuse())
import pico_fast
assert not {blocked} & (set(sys.modules) - already)
"""
    blocked = {"triton", "matplotlib", "PIL", "scipy", "torchvision", "tqdm", "pytest"}
    run = subprocess.run(
        [sys.executable, "-c", script.format(blocked=blocked)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
