# Each target makes what it needs: the environment .venv, the build, then the work itself.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# what `make check` compiles with warnings as errors; cpu where there is no CUDA toolkit
CHECK_BUILD ?= cuda
# every generation that the package has code for, and PTX for those to come
RELEASE_ARCHS := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: help demo test test-integrations bench bench-report gate check format build wheel clean

help:
	@echo "make demo    train a small network with and without the contrast, and draw a picture"
	@echo "make test    run the tests"
	@echo "make test-integrations  train models and trainers of other libraries; installs these first"
	@echo "make bench   run the benchmarks beside their peers; results go to bench/results/"
	@echo "make bench-report  draw docs/benchmarks.md and the README's figures from bench/results/"
	@echo "make gate    the small benchmarks that CI holds on to"
	@echo "make check   lint, formatting, a build with warnings as errors, and the gate"
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

# libraries of two groups in folders of their own, and without their dependencies: nothing here may
# exchange the torch that is there
.integrations/hub/.installed: requirements-integrations.txt | $(VENV)/.requirements
.integrations/mmseg/.installed: requirements-mmseg.txt | $(VENV)/.requirements
.integrations/%/.installed:
	rm -rf $(@D)
	$(PY) -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

test-integrations: $(VENV)/.built .integrations/hub/.installed .integrations/mmseg/.installed
	for group in hub mmseg; do \
	PYTHONPATH=$(CURDIR)/.integrations/$$group:$(CURDIR)/tests/integrations/shims \
	$(PY) -m pytest -q tests/integrations/test_$${group}_*.py || exit 1; done

# peers from elsewhere; scikit-learn and SciPy come with them, torch stays as it is
$(VENV)/.peers: requirements-bench.txt $(VENV)/.requirements
	$(PY) -m pip install --quiet -r requirements-bench.txt
	touch $@

bench: $(VENV)/.built $(VENV)/.peers
	$(PY) -m pytest -q bench -m "not gate" --benchmark-only --benchmark-columns=median --record bench/results

bench-report: $(VENV)/.built
	$(PY) bench/report.py

gate: $(VENV)/.built
	$(PY) -m pytest -q bench -m gate --benchmark-only --benchmark-columns=median --budget 10 --margin 0.5

check: $(VENV)/.requirements gate
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
