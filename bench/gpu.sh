#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 8 minutes: tests, sanitizers, benchmarks.
#
#   bench/gpu.sh [FOLDER]     logs and a results file named after the device go to FOLDER
#   GPU_SECONDS=1800 ...      another limit than 480 seconds, for a slower GPU
#
# Each step has to be done when its share of the time is gone. What a step leaves goes to those after it, what it
# would take beyond is cut off and counts as failed: the benchmark, which is last, always has its turn.
#
# python3 has to have torch, triton, numpy, pytest, pytest-benchmark, hypothesis and tqdm. A wheel in dist/ is
# installed as it is; without one the extension is compiled for the GPU at hand.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:-$root/bench/results}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1
total=${GPU_SECONDS:-480}
failed=0

step() {  # step NAME SHARE COMMAND...: run until SHARE % of the time are gone, keep the log, say how it went
  local name=$1 start=$SECONDS left=$((total * $2 / 100 - SECONDS))
  shift 2
  # timeout takes 0 for no limit
  timeout -k 5 $((left > 1 ? left : 1)) "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "== $name: exit $status after $((SECONDS - start)) s"
  tail -n 30 "$out/$name.log" | cut -c1-160
  [ $status -eq 0 ] || failed=1
}

if ls "$root"/dist/*.whl >/dev/null 2>&1; then
  what=("$root"/dist/*.whl)
else
  what=("$root")
  export PICO_FAST_BUILD=cuda
fi
step install 25 python3 -m pip install --no-deps --no-build-isolation --force-reinstall "${what[@]}"

cd "$out"  # not the root: its pico_fast/ would stand before the installed one
step info 28 python3 -m pico_fast.info
step tests 52 python3 -m pytest -q -rf -p no:cacheprovider "$root/tests" \
  -k "gpu or kernels_contrast or kernels_hardest or peers or budget or large"
share=52
for tool in memcheck racecheck synccheck; do
  share=$((share + 7))
  step $tool $share compute-sanitizer --tool $tool --error-exitcode 1 python3 "$root/tests/sanitize.py"
done
step bench 100 python3 -m pytest -q -p no:cacheprovider "$root/bench" -m "not gate" --benchmark-only \
  --rounds 15 --budget 1.5 --record "$out"
exit $failed
