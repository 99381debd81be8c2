# Each target makes what it needs: the environment .venv, the build, then the work itself.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# what `make check` compiles with warnings as errors; cpu where there is no CUDA toolkit
CHECK_BUILD ?= cuda
# every generation that the package has code for, and PTX for those to come
RELEASE_ARCHS := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: help demo test bench check format build wheel clean

help:
	@echo "make demo    train a small network with and without the contrast, and draw a picture"
	@echo "make test    run the tests"
	@echo "make bench   run the benchmarks"
	@echo "make check   lint, formatting, and a build with warnings as errors"
	@echo "make format  format Python and C++"
	@echo "make build   make the environment and build the package into it"
	@echo "make wheel   build the wheel for every GPU generation into dist/"
	@echo "make clean   remove what was built, not the environment"

$(VENV)/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"the development environment needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml kernels/__init__.py $(CSRC)
	rm -rf build/temp.*  # what nvcc compiled knows nothing of its headers
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/.built
	$(PY) -m pico_fast.info

demo: $(VENV)/.built
	$(PY) examples/demo.py

test: $(VENV)/.built
	$(PY) -m pytest -q tests

bench: $(VENV)/.built
	$(PY) -m pytest bench --benchmark-only --benchmark-sort=name

check: $(VENV)/.requirements
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) tests/emulation/device.cuh
	rm -rf build/check
	PICO_FAST_BUILD=$(CHECK_BUILD) PICO_FAST_WERROR=1 TORCH_CUDA_ARCH_LIST=9.0 $(PY) setup.py --quiet build_ext \
	--build-temp build/check --build-lib build/check
	test -f build/check/pico_fast/_C.abi3.so

wheel: $(VENV)/.requirements
	PICO_FAST_BUILD=cuda TORCH_CUDA_ARCH_LIST="$(RELEASE_ARCHS)" $(PY) -m pip wheel --quiet \
	--no-build-isolation --no-deps -w dist .

format: $(VENV)/.requirements
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CSRC) tests/emulation/device.cuh

clean:
	rm -rf build dist *.egg-info pico_fast/_C.* pico_fast/_build.json $(VENV)/.built
