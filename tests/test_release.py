"""What is passed on and taken in: wheels, licences, requirements; and that a step asks no network."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_build import STEP
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
LISTS = sorted(ROOT.glob("requirements-*.txt"))
LOCKS = sorted(ROOT.glob("requirements-*.lock"))

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no checkout")


def build_wheel(folder: Path, mode: str) -> Path:
    """A wheel from a copy of the sources in `folder`, with what `make wheel` sets."""
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json")
    for part in ("csrc", "kernels", "pico_fast"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in")
    for part in files:
        shutil.copy(ROOT / part, folder / part)
        (folder / part).chmod(0o644)
    environment = {
        "PICO_FAST_BUILD": mode,
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "SOURCE_DATE_EPOCH": "1700000000",
        "MAX_JOBS": "2",
    }
    command = "-m pip wheel --quiet --no-build-isolation --no-deps -w dist ."
    result = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        umask=0o022,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def read_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_the_same_sources_make_the_same_wheel(tmp_path, mode, full, figures):
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not found")
    if mode == "cuda" and not full:
        pytest.skip("CUDA kernels take their time to compile: with --full")
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    if mode == "cuda" and not ((home / "bin" / "nvcc").is_file() or shutil.which("nvcc")):
        pytest.skip("no CUDA toolkit")
    # another path of another length, with a character that shells do not like
    folders = [tmp_path / "one", tmp_path / "another place"]
    wheels = [build_wheel(folder, mode) for folder in folders]
    contents = [read_wheel(wheel) for wheel in wheels]
    assert contents[0].keys() == contents[1].keys()
    assert not [name for name in contents[0] if contents[0][name] != contents[1][name]]
    first, second = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert first == second
    figures.add("reproducible", "wheels built twice")

    library = contents[0]["pico_fast/_C.abi3.so"]
    assert b"csrc/" in library, "the library names no file at all"
    for path in (tmp_path, Path(torch.__file__).parents[1]):
        assert str(path).encode() not in library, "where it was built stands in the library"


def test_a_wheel_holds_the_package_and_its_licences(tmp_path):
    contents = read_wheel(build_wheel(tmp_path / "copy", "none"))
    (about,) = {name.split("/")[0] for name in contents} - {"pico_fast"}
    assert re.fullmatch(r"pico_fast-[\d.]+\.dist-info", about)
    pages = {page.relative_to(ROOT).as_posix() for page in ROOT.glob("pico_fast/**/*.py")}
    pages |= {f"pico_fast/kernels/{page.name}" for page in ROOT.glob("kernels/*.py")}
    inside = {name for name in contents if name.startswith("pico_fast/")}
    assert inside == pages | {"pico_fast/_build.json"}
    for name in ("LICENSE", "NOTICE"):
        assert contents[f"{about}/licenses/{name}"] == (ROOT / name).read_bytes()
    header = contents[f"{about}/METADATA"].decode().split("\n\n")[0].splitlines()
    assert "License-Expression: MIT" in header
    assert {"License-File: LICENSE", "License-File: NOTICE"} <= set(header)


def read_requirements(page: Path) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a file, and its hashes."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    parts = [line.split("#")[0].split("--hash=") for line in lines]
    return [(Requirement(part[0].strip()), part[1:]) for part in parts if part[0].strip()]


def pins(page: Path) -> set[tuple[str, str]]:
    return {(canonicalize_name(r.name), str(r.specifier)) for r, _ in read_requirements(page)}


@pytest.mark.parametrize("page", LISTS + LOCKS, ids=lambda page: page.name)
def test_every_requirement_is_pinned(page):
    for requirement, hashes in read_requirements(page):
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", value) for value in hashes)
        assert bool(hashes) == (page.suffix == ".lock"), requirement


def test_a_lock_has_what_its_list_asks_for():
    for lock in LOCKS:
        asked, locked = pins(lock.with_suffix(".txt")), pins(lock)
        assert asked <= locked
        # the others are installed without dependencies
        assert lock.name == "requirements-dev.lock" or asked == locked
    # no index has all of its builds, so no lock can: see requirements-torch.txt
    assert {lock.stem for lock in LOCKS} == {page.stem for page in LISTS} - {"requirements-torch"}


def test_the_environment_is_the_locked_one():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment that the Makefile makes")
    (asked,) = read_requirements(ROOT / "requirements-torch.txt")
    assert asked[0].specifier.contains(torch.__version__)
    # the newest torch that an isolated build takes is the one that is tested
    assert f'"torch>=2.10,<={str(asked[0].specifier)[2:]}"' in (ROOT / "pyproject.toml").read_text()
    for requirement, _ in read_requirements(ROOT / "requirements-dev.lock"):
        if requirement.marker is None or requirement.marker.evaluate():
            found = metadata.version(requirement.name)
            assert requirement.specifier.contains(found), f"{requirement}: {found} is installed"


# Python tells a hook what it is about to do. What is refused is noted too, should somebody catch the error;
# what C++ does without Python does not come by
WATCH = """
import os, sys
HERE, refused = os.path.realpath(sys.argv[1]), []
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def watch(event, arguments):
    wrong = event in NETWORK + PROCESSES
    if event in CHANGES or (event == "open" and arguments[2] & WRITING):
        paths = arguments[: 1 if event == "open" else 2]
        paths = [os.path.realpath(os.fsdecode(p)) for p in paths if not isinstance(p, int)]
        wrong = not all(path.startswith(HERE + os.sep) for path in paths)
    if wrong:
        refused.append(event)
        raise PermissionError(f"refused: {event} {arguments}")

sys.addaudithook(watch)
"""
SAVED = """
import os
criterion.bank.reset()
path = os.path.join(sys.argv[1], "state.pt")
torch.save(criterion.state_dict(), path)
criterion.load_state_dict(torch.load(path, weights_only=True))
assert not refused, refused
"""


def watched(code: str, folder: Path) -> subprocess.CompletedProcess:
    # -B: without Python's own caches
    command = [sys.executable, "-B", "-c", WATCH + code, folder]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_step_asks_nothing_of_network_processes_or_disk(tmp_path):
    result = watched(STEP + SAVED, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "state.pt").is_file()


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("socket.connect", "import socket; socket.socket().connect(('127.0.0.1', 9))"),
        ("socket.getaddrinfo", "import socket; socket.create_connection(('localhost', 9))"),
        ("socket.bind", "import socket; socket.socket().bind(('127.0.0.1', 0))"),
        ("urllib.Request", "import urllib.request as r; r.urlopen('http://127.0.0.1:9')"),
        ("subprocess.Popen", "import subprocess; subprocess.run(['true'])"),
        ("open", "open(os.path.join(HERE, '..', 'outside'), 'w')"),
        ("os.rename", "open('a', 'w'); os.rename('a', '../outside')"),
    ],
)
def test_what_is_watched_for_is_refused(tmp_path, event, code):
    (tmp_path / "inside").mkdir()
    result = watched(code, tmp_path / "inside")
    assert result.returncode != 0 and f"PermissionError: refused: {event} " in result.stderr
    assert not (tmp_path / "outside").exists()
