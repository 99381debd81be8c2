"""What the build leaves behind, what `python -m pico_fast.info` says, and life without `_C`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pico_fast
from pico_fast import info, regions

PACKAGE = Path(pico_fast.__file__).parent
ROOT = Path(__file__).parents[1]

# a step with every part of the method, forward and backward
STEP = """
import torch, pico_fast
from pico_fast import regions
criterion = pico_fast.PiCoLoss(num_classes=3, embedding_dim=8, pixel_queue_size=9, region_queue_size=4)
embeddings = torch.nn.functional.normalize(torch.randn(2, 8, 6, 5), dim=1).requires_grad_()
labels = torch.randint(3, (2, 6, 5))
for _ in range(2):
    criterion(embeddings, labels, labels.flip(0)).backward()
means, _ = pico_fast.region_pool(embeddings, labels, 3)
means.sum().backward()
assert embeddings.grad.isfinite().all() and criterion.bank.region_count.sum() > 0
print(regions.why_not_compiled)
"""


def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh Python with these arguments, away from the checkout."""
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env={**os.environ, **environment},
    )


@pytest.fixture
def package_without_compiled(tmp_path):
    """A copy of the package that has no `_C`, as a build without a compiler leaves it."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__", "_build.json")
    shutil.copytree(PACKAGE, tmp_path / "pico_fast", ignore=ignore)
    return tmp_path


def test_everything_runs_without_compiled_kernels(package_without_compiled):
    result = run("-c", STEP, PYTHONPATH=str(package_without_compiled))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "not built"
    report = run("-m", "pico_fast.info", PYTHONPATH=str(package_without_compiled))
    assert "built: nothing (asked for: never built)" in report.stdout
    assert "no compiled kernels: not built" in report.stdout
    assert re.search(r"region_pool +CPU: PyTorch, any device", report.stdout)


def test_a_library_that_does_not_load_is_told_not_raised(package_without_compiled):
    (package_without_compiled / "pico_fast" / "_C.abi3.so").write_bytes(b"no library")
    result = run("-c", STEP, PYTHONPATH=str(package_without_compiled))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("_C.abi3.so does not load: ")
    report = run("-m", "pico_fast.info", PYTHONPATH=str(package_without_compiled))
    assert "loaded: _C.abi3.so does not load: " in report.stdout


def test_import_is_silent():
    result = run("-W", "error::UserWarning", "-c", "import pico_fast")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_info():
    report = info.report()
    for line in (
        rf"^pico_fast {re.escape(pico_fast.__version__)}, in ",
        rf"^torch {re.escape(torch.__version__)}$",
        r"^triton (\d|not installed)",
        r"^numpy \d",
        r"^built: ",
        r"^loaded: ",
        r"^  CPU: \d+ threads",
        r"ROCm, MPS and Windows",
    ):
        assert re.search(line, report, re.MULTILINE), line
    for op in info.ops():
        assert op in report
        assert "none" not in (info.implementation(op, "CPU"), info.implementation(op, "CUDA"))


def test_info_tells_what_the_dispatcher_does():
    expected = "region_pool region_pool_backward sample_keys hardest negatives positives"
    expected += " keys_grad weighted_rows mix_negatives labels_on_grid gather_pixels"
    assert {f"pico_fast::{op}" for op in expected.split()} <= set(info.ops())
    expected = "PyTorch, any device" if regions.why_not_compiled else "compiled"
    assert info.implementation("pico_fast::region_pool", "CPU") == expected
    assert info.implementation("pico_fast::labels_on_grid", "CPU") == "PyTorch, made for CPU"


def test_the_record_agrees_with_what_loads():
    record = PACKAGE / "_build.json"
    if not record.is_file():
        pytest.skip("the package was never built")
    built = json.loads(record.read_text())
    assert ("cpu" in built["built"]) == (regions.why_not_compiled is None)
    assert set(built["built"]) | set(built["left_out"]) == {"cpu", "cuda"}
    assert all(built["left_out"].values()), "a part is left out without a reason"


@pytest.mark.skipif(regions.why_not_compiled is not None, reason="no compiled kernels")
def test_the_library_is_bound_to_no_python_and_no_torch_version():
    (library,) = PACKAGE.glob("_C.*")
    assert library.name in ("_C.abi3.so", "_C.pyd")
    if shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    symbols = [line.split()[-1] for line in listing.splitlines()]
    unstable = [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)|Py", s)]
    assert not unstable


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no checkout")
@pytest.mark.parametrize(
    ("mode", "environment", "reason"),
    [
        ("none", {}, "PICO_FAST_BUILD=none"),
        ("auto", {"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler"),
        ("auto", {"CXX": "false", "CC": "false"}, "the build failed: "),
    ],
)
def test_building_without_an_extension_is_no_error(tmp_path, mode, environment, reason):
    # setup.py writes beside itself: build a copy
    parts = ("csrc", "kernels", "pico_fast", "setup.py", "pyproject.toml", "LICENSE", "NOTICE")
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    (tmp_path / "README.md").touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "lib"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PICO_FAST_BUILD": mode, **environment},
    )
    assert result.returncode == 0, result.stderr
    assert "pico_fast: built without cpu kernels" in result.stderr
    record = json.loads((tmp_path / "lib" / "pico_fast" / "_build.json").read_text())
    assert record["built"] == [] and reason in record["left_out"]["cpu"]
    assert not list((tmp_path / "lib" / "pico_fast").glob("_C.*"))


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no checkout")
def test_an_unknown_mode_is_an_error():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PICO_FAST_BUILD": "gpu"},
    )
    assert result.returncode != 0 and "PICO_FAST_BUILD: expected one of" in result.stderr
