#!/usr/bin/env bash
# What needs a GPU, in one command of at most 8 minutes; everything is printed as it comes.
#
#   bench/gpu.sh [FOLDER]     gpu.log, with what every step said, and headlines.jsonl go to FOLDER
#   GPU_SECONDS=1800 ...      another limit than 480 seconds, each step's with it
#   GPU_RUN=COMMAND ...       runs COMMAND STEP instead of each step, to try this script
#
# Each step has to be done by a second of its own. What it leaves unused goes to those after it, what it would take
# beyond is cut off and counts as failed. gpu-kit/ (`make gpu-kit`) has the wheel and the compiled kernels;
# without it both are compiled here.
#
# python3 has to have torch, triton, numpy, pytest and hypothesis; pytest-xdist and ncu are used where they are.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
kit=$root/gpu-kit
out=$(realpath -m "${1:-$root/build/gpu}")
mkdir -p "$out"
log=$out/gpu.log
: >"$log"
export root kit out PYTHONUNBUFFERED=1
# without the kit's cache one that is empty: what is compiled here shows
export TRITON_CACHE_DIR=$root/build/triton
[ ! -d "$kit/triton" ] || TRITON_CACHE_DIR=$kit/triton
total=${GPU_SECONDS:-480}
began=${EPOCHREALTIME/[.,]/}
summary=""
failed=0

passed() {  # milliseconds since the start
  echo $(((${EPOCHREALTIME/[.,]/} - began) / 1000))
}

kernels() {
  find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l
}

step() {  # step NAME UNTIL COMMAND...: run it until this second of 480 at most, say how it went
  local name=$1 start left status size
  start=$(passed)
  left=$((total * 1000 * $2 / 480 - start))
  left=$((left > 100 ? left : 100))
  shift 2
  [ -z "${GPU_RUN:-}" ] || set -- "$GPU_RUN" "$name"
  echo "== $name, $((left / 1000)) s at most" | tee -a "$log"
  size=$(stat -c %s "$log")
  # not through a pipe, which what a killed step leaves behind could hold open; pytest, when it is interrupted,
  # says what it knows
  timeout -s INT -k "$((total / 96 + 1))" "$((left / 1000)).$(printf %03d $((left % 1000)))" "$@" >>"$log" 2>&1 </dev/null &
  tail -c "+$((size + 1))" -f -s 0.1 --pid=$! "$log" | sed -u 's/^\(.\{180\}\).*/\1.../'
  wait $!
  status=$?
  summary+="$name: exit $status after $((($(passed) - start) / 1000)) s, $(kernels) kernels compiled by now"$'\n'
  echo "== $name: exit $status" | tee -a "$log"
  [ $status -eq 0 ] || failed=1
}

install() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  local what=("$root") status=0
  ls "$root"/dist/*.whl >/dev/null 2>&1 && what=("$root"/dist/*.whl)
  ls "$kit"/*.whl >/dev/null 2>&1 && what=("$kit"/*.whl)
  PICO_FAST_BUILD=cuda python3 -m pip install -q --no-deps --no-build-isolation --force-reinstall \
    "${what[@]}" || return 1
  [ ! -d "$kit/triton" ] || python3 "$root/bench/gpu_cache.py" ready "$kit" 14 || status=1
  python3 -m pico_fast.info && return $status
}

counters() {
  if ! command -v ncu; then return 0; fi
  local sections=(SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis SchedulerStats LaunchStats)
  ncu --clock-control none --print-details all "${sections[@]/#/--section=}" --launch-count 30 --kernel-name \
    "regex:^(negatives|positives|similarity|cut|hits|collect|score|pool|planes)_kernel" \
    python3 "$root/bench/gpu_times.py" --once
}

tests() {
  local workers=()
  ! python3 -c 'import xdist' 2>/dev/null || workers=(-n 8)
  python3 -m pytest -q -rf --tb=short -p no:cacheprovider "${workers[@]}" "$root/tests" \
    -k "(gpu or kernels_contrast or kernels_hardest or kernels_cut) and not gpu_script"
}

sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 1 python3 "$root/tests/sanitize.py"
}

export -f install counters tests sanitize
cd "$out"  # not the root: its pico_fast/ would stand before the installed one
step install 30 bash -c install
step first-light 90 python3 "$root/bench/first_light.py"
step headlines 150 python3 "$root/bench/gpu_times.py" "$out"
step ncu 190 bash -c counters
step tiles 235 python3 "$root/bench/gpu_tiles.py"
step tests 385 bash -c tests
step memcheck 425 bash -c "sanitize memcheck"
step synccheck 450 bash -c "sanitize synccheck"
step racecheck 480 bash -c "sanitize racecheck"
echo "$summary" | tee -a "$log"
exit $failed
