# Each target makes what it needs: the environment .venv, the build, then the work itself.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# what `make check` compiles with warnings as errors; cpu where there is no CUDA toolkit
CHECK_BUILD ?= cuda
# every generation that the package has code for, and PTX for those to come
WHEELS := dist
RELEASE_ARCHS := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
# writes requirements-*.lock
UV := uv==0.13.9
# tests that run side by side, with one thread each
JOBS ?= 2
# of the machine that gpu-kit/ is for; bench/gpu_variants.py holds to the same Triton
GPU_PYTHON ?= python3.12
GPU_TRITON := triton==3.6.0
# what a kit may weigh with the checkout, MiB
GPU_LIMIT := 64
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: help demo test test-integrations stress bench bench-report gate check sanitize format build wheel \
	gpu-kit lock clean

help:
	@echo "make demo    train a small network with and without the contrast, and draw a picture"
	@echo "make test    run the tests"
	@echo "make stress  the full tables of what docs/trust.md promises, within the hour; writes it anew"
	@echo "make test-integrations  train models and trainers of other libraries; installs these first"
	@echo "make bench   run the benchmarks beside their peers; results go to bench/results/"
	@echo "make bench-report  draw docs/benchmarks.md and the README's figures from bench/results/"
	@echo "make gate    the small benchmarks that CI holds on to"
	@echo "make check   lint, formatting, a build with warnings as errors, sanitizers, and the gate"
	@echo "make sanitize  run C++ under sanitizers at its edges; with FULL=1 also the tests that reach it"
	@echo "make format  format Python and C++"
	@echo "make build   make the environment and build the package into it"
	@echo "make wheel   build the wheel for every GPU generation into dist/"
	@echo "make gpu-kit  prepare what a machine with an H100 and no network needs for bench/gpu.sh"
	@echo "make lock    write requirements-*.lock anew from requirements-*.txt"
	@echo "make clean   remove what was built, not the environment"

# first what has hashes: of all that torch asks for, pip then finds it there
$(VENV)/.requirements: requirements-dev.lock requirements-torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"the development environment needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements-dev.lock
	$(PY) -m pip install --quiet -r requirements-torch.txt
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
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) tests

# the soak alone, for its times; everything else side by side
stress: $(VENV)/.built
	rm -f build/stress.json
	mkdir -p build
	date +%s > build/stress.start
	$(PY) -m pytest -q --full --figures build/stress.json tests/test_soak.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --full --figures build/stress.json tests \
	--deselect tests/test_soak.py --deselect tests/test_trust.py
	$(MAKE) sanitize FULL=1 FIGURES=build/stress.json
	$(PY) tests/trust.py build/stress.json $$(cat build/stress.start)
	$(PY) -m pytest -q tests/test_trust.py

# libraries of two groups in folders of their own, and without their dependencies: nothing here may
# exchange the torch that is there
.integrations/hub/.installed: requirements-integrations.lock | $(VENV)/.requirements
.integrations/mmseg/.installed: requirements-mmseg.lock | $(VENV)/.requirements
.integrations/%/.installed:
	rm -rf $(@D)
	$(PY) -m pip install --quiet --no-deps --require-hashes --target $(@D) -r $<
	touch $@

test-integrations: $(VENV)/.built .integrations/hub/.installed .integrations/mmseg/.installed
	for group in hub mmseg; do \
	PYTHONPATH=$(CURDIR)/.integrations/$$group:$(CURDIR)/tests/integrations/shims \
	$(PY) -m pytest -q tests/integrations/test_$${group}_*.py || exit 1; done

# peers from elsewhere; scikit-learn and SciPy come with them, torch stays as it is
$(VENV)/.peers: requirements-bench.lock $(VENV)/.requirements
	$(PY) -m pip install --quiet --no-deps --require-hashes -r requirements-bench.lock
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
	$(MAKE) sanitize

# A copy of the package, its C++ compiled with sanitizers: gcc's, whose runtimes must come before Python
# (which leaks by itself, so leaks are none of theirs). FIGURES=FILE.json is given what FULL=1 reached.
SANITIZERS := address,undefined,float-cast-overflow
sanitize: $(VENV)/.requirements
	rm -rf build/sanitize/lib
	PICO_FAST_BUILD=cpu PICO_FAST_SANITIZE=$(SANITIZERS) CXX=$(CXX) $(PY) setup.py --quiet build \
	--build-temp build/sanitize/temp --build-lib build/sanitize/lib
	PICO_FAST_SANITIZE=$(SANITIZERS) PYTHONPATH=$(CURDIR)/build/sanitize/lib CXX=$(CXX) \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(PY) tests/sanitize_cpu.py $(if $(FULL),--full $(FIGURES))

# the same file, bit for bit, from the same commit, compilers and torch. build/ first: what an earlier build
# left there would go into the wheel
wheel: $(VENV)/.requirements
	rm -rf build/lib* build/temp.* build/bdist.*
	chmod 644 LICENSE NOTICE  # git does not keep all of a mode, a wheel does
	umask 022; SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} \
	PICO_FAST_BUILD=cuda TORCH_CUDA_ARCH_LIST="$(RELEASE_ARCHS)" $(PY) -m pip wheel --quiet \
	--no-build-isolation --no-deps -w $(WHEELS) .

# The kernels of bench/gpu.sh, compiled without a GPU: their variants under this Python, which has PyTorch,
# the code under that of the other machine, which needs none. Found a second time, all of them are there.
gpu-kit: $(VENV)/.built
	@$(GPU_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	{ echo "the machine with a GPU has Python 3.12: make GPU_PYTHON=/path/to/python3.12 gpu-kit" >&2; exit 1; }
	rm -rf gpu-kit build/gpu-kit
	$(MAKE) wheel RELEASE_ARCHS=9.0 WHEELS=gpu-kit
	$(PY) -m pip install --quiet --no-deps --target build/gpu-kit/here $(GPU_TRITON)
	$(GPU_PYTHON) -m pip install --quiet --no-deps --target build/gpu-kit/there $(GPU_TRITON)
	PYTHONPATH=build/gpu-kit/here $(PY) bench/gpu_variants.py gpu-kit/variants.jsonl
	PYTHONPATH=build/gpu-kit/there $(GPU_PYTHON) bench/gpu_cache.py fill gpu-kit $(JOBS)
	PYTHONPATH=build/gpu-kit/here $(PY) bench/gpu_variants.py build/gpu-kit/again.jsonl
	PYTHONPATH=build/gpu-kit/there $(GPU_PYTHON) bench/gpu_cache.py check gpu-kit build/gpu-kit/again.jsonl
	size=$$( (git ls-files -coz --exclude-standard; find gpu-kit -type f -print0) | du -cm --files0-from=- | \
	tail -n 1 | cut -f 1); echo "gpu-kit and the checkout: $$size MiB"; test $$size -lt $(GPU_LIMIT) || \
	{ echo "expected less than $(GPU_LIMIT) MiB, got $$size" >&2; exit 1; }

# with LOCK=--upgrade also what only others ask for takes its newest version
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet $(UV)
	for list in dev bench integrations mmseg; do \
	build/lock/bin/uv --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	$$(test $$list = dev || echo --no-deps) $(LOCK) --custom-compile-command "make lock" \
	-o requirements-$$list.lock requirements-$$list.txt || exit 1; done

format: $(VENV)/.requirements
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CSRC) tests/emulation/device.cuh

clean:
	rm -rf build dist gpu-kit *.egg-info pico_fast/_C.* pico_fast/_build.json $(VENV)/.built
