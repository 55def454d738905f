#!/usr/bin/env bash
# Everything to learn from one GPU in 8 minutes: tests, then times in order of worth, then counters of two kernels.
#
#     tests/benchmarks/gpu_day.sh [--dry-run] [FOLDER]
#
# FOLDER (out/gpu-day) gets one log a step, written line by line, so that a run cut short keeps what it learned.
# --dry-run needs no GPU: the same steps, tests collected only, tables at tiny shapes in Triton's interpreter.
# PYTHON names the interpreter (.venv/bin/python). Tried with torch 2.13 + triton 3.7 and torch 2.11 + triton 3.6; the
# interpreter of triton 3.6 needs numpy < 2.4.
set -uo pipefail
cd "$(dirname "$0")/../.."

dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
out=${1:-out/gpu-day}
python=${PYTHON:-.venv/bin/python}
end=$((SECONDS + 480))
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out"

# step NAME SECONDS COMMAND...: run it for so long at most, less what is left of the 8 minutes; a failure stops nothing.
step() {
    local name=$1 limit=$2 left=$((end - SECONDS)) started=$SECONDS status
    shift 2
    if [ "$left" -lt 5 ]; then echo "$name: no time left" | tee -a "$out/steps.log"; return; fi
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "$name: exit $status after $((SECONDS - started)) s" | tee -a "$out/steps.log"
}

scan() { step "$1" "$2" "$python" -m tests.benchmarks.gpu_scan "${@:3}" "${size[@]}"; }

: > "$out/steps.log"
tests=(-m gpu --maxfail=20 --tb=long -rfE -p no:cacheprovider tests/hooked_mamba/ops_triton tests/saes/test_triton_bag.py)
if [ "$dry" = 1 ]; then
    export TRITON_INTERPRET=1
    size=(--smoke)
    step tests 100 "$python" -m pytest --collect-only -q "${tests[@]}"
else
    size=()
    step versions 20 nvidia-smi
    step tests 180 "$python" -m pytest "${tests[@]}"
fi
scan scan 120 --only scan
scan ssd 70 --only ssd
scan model 90 --only model

if command -v ncu > /dev/null && [ "$dry" = 0 ]; then
    for kernel in mamba1_forward mamba1_backward; do
        step "ncu-$kernel" 40 ncu --set basic --kernel-name "$kernel" --launch-count 1 \
            "$python" -m tests.benchmarks.gpu_scan --only scan
    done
fi
cat "$out/steps.log"
! grep -qv "exit 0 after" "$out/steps.log"
