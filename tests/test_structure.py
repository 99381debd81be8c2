"""What the sources must look like: who imports whom, how long a file is, who is tested."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pico_fast"

# the tree as it reads from the outside: a module imports from its own row and from those below it, never
# from above, and never in a circle; "folder: modules" stand in a folder
TREE = """
info
__init__
loss dropin attach projection presets visualize
on_gpu
contrast: function select_keys flow shares picks
contrast: ops eager cpu gpu weights
bank: memory_bank entries state share
selection: sample ops eager cpu gpu bounds launch layout
anchors regions pixels grid finite reference
selection: options synthesis
checks draws collectives
"""


def rows_of_the_tree() -> dict[str, int]:
    """The row of each module, from the top; a module in a folder as "folder.module"."""
    found = {}
    for row, line in enumerate(TREE.split("\n")):
        folder, _, names = line.rpartition(": ")
        for name in names.split():
            module = f"{folder}.{name}" if folder else name
            assert module not in found, f"{module} stands twice"
            found[module] = row
    return found


def module_of(path: Path) -> str:
    """The name of a file of the package, from the package on: "checks", "bank.state"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


ROW = rows_of_the_tree()
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
PATHS = {
    module_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}


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
            # what is imported from a module may be a module itself
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package != "pico_fast":
                continue
            if rest.partition(".")[0] == "kernels":
                found.add("kernels")
                continue
            while rest and rest not in PATHS:
                rest = rest.rpartition(".")[0]
            found.add(rest or "__init__")
    return found


def test_the_tree_lists_every_module():
    assert set(PATHS) == set(ROW)
    for folder in FOLDERS:
        # what is imported from a folder is a module of it
        body = ast.parse((PACKAGE / folder / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), folder


@pytest.mark.parametrize("module", PATHS)
def test_imports_go_one_way(module):
    for other in imported_modules(PATHS[module]) - {"kernels"}:
        assert ROW[other] >= ROW[module], f"{module} imports {other}"


def test_no_import_circle():
    waiting = {module: imported_modules(path) - {"kernels"} for module, path in PATHS.items()}
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


def test_samplings_are_listed_once():
    listed = re.compile(r'(?:"(?:all|random|hardest|semi_hard|bounded)",?\s*){5}')
    for path in sources("pico_fast/**/*.py", "tests/*.py", "bench/**/*.py", "examples/*.py"):
        if path != PACKAGE / "selection" / "options.py":
            # a sentence of a docstring may name them all
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
            assert not listed.search(code), path


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
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "pico_fast.kernels" in run.stderr


def test_what_kernels_call_reads_no_constant_of_its_page():
    """Triton's key of a kernel would depend on what else was launched before: it would compile twice."""
    for path in sources("kernels/*.py"):
        for function in ast.parse(path.read_text()).body:
            is_called = isinstance(function, ast.FunctionDef) and not function.name.endswith("_kernel")
            if is_called and function.decorator_list:
                nodes = [node for part in function.body for node in ast.walk(part)]
                names = [node for node in nodes if isinstance(node, ast.Name) and node.id.isupper()]
                own = {argument.arg for argument in function.args.args}
                own |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
                assert own >= {name.id for name in names}, f"{path.name}, {function.name}"


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
