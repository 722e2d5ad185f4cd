#!/bin/bash
# Measures on a machine with an NVIDIA GPU, in one call of at most nine minutes:
#     bench/on_gpu.sh OUT [PART ...]
# Parts, the most useful ones first; if none is named, all that need no call of their own:
#   verify    every Triton kernel except the convolutions against float64, in parallel processes
#   step      the training step at 15 and at 256 videos: the GLANN-VIDEO step, bf16, kernels, CUDA graph
#   kernels   the kernels beside their PyTorch references (bench/kernel_groups.py)
#   counters  hardware counters of the two losses, with ncu
#   nearest   the search in 1,000,000 rows
#   twin      trainings that differ in how they compute: as good to 0.3 dB (vglann_fast/experiments/parity.py)
#   layers    a second call: every transposed convolution and BatchNorm by itself, what cuDNN can fuse, an epoch of IMLE
#   tune      a third call: what `vglann tune` chooses for preset modern, and by how much
#   convolutions  a fourth call: the convolution kernels against float64, and the step with them and without them
# The seconds that each part may take are estimates. How long the convolution kernels compile is not known at all, so
# they have a call of their own.
#
# OUT holds NAME.txt, what was said; *.jsonl, each result synced as soon as it is known; summary.txt, one line as each
# command ends; tables.md, the tables. Killed at any moment it leaves what was measured. Then, anywhere,
# `python bench/report.py OUT/*.jsonl --fill` writes the figures into the READMEs.
# Exit code 1 when anything failed or was left out for lack of time; the rest runs anyway.
#
# Needs torch, triton, numpy, safetensors, pytest, pytest-benchmark; no network. PYTHON names the interpreter, TOTAL the
# seconds (510), CLIPS a folder of `vglann clips pack` for steps and trainings, which take moving squares without it.
# TINY=1 runs everything at tiny size on a CPU, to test this script.
set -u -o pipefail
: "${1:?usage: bench/on_gpu.sh OUT [PART ...]}"
out=$(realpath -m "$1") && mkdir -p "$out" || exit 1
shift
[ $# -gt 0 ] || set -- verify step kernels counters nearest twin
for part in "$@"; do
    case $part in
        verify | step | kernels | counters | nearest | twin | layers | tune | convolutions) ;;
        *) echo "no part $part; choose from verify, step, kernels, counters, nearest, twin, layers, tune," \
            "convolutions" >&2 && exit 1 ;;
    esac
done
clips=()
[ -z "${CLIPS:-}" ] || clips=(--clips "$(realpath -m "$CLIPS")")
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" VGLANN_KERNELS=auto PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
end=$((SECONDS + ${TOTAL:-510}))

# Sizes: of verify, of the two steps and their rows, of the search, of the trainings.
verify=(--batch 2 --frames 4)
step_15=(--batch 15 --steps 30)
step_256=(--batch 256 --steps 10)
rows_15=(author bf16 "bf16 kernels" "bf16 kernels graph")
rows_256=("bf16 kernels graph" "bf16 kernels" bf16 author)
convolutions=("bf16 kernels graph" "bf16 kernels convolutions graph")
search=(--m 1000000 --d 100 --rounds 3 --checked 256 --data "unit sphere" "clusters of 0.01")
twin=(--steps 150)
epoch=(--preset paper)
tune=(--minutes 5)
if [ -n "${TINY:-}" ]; then
    verify=(--impl reference --device cpu --batch 1 --frames 1 --size 32)
    step_15=(--batch 2 --steps 1 --width 4 --device cpu)
    step_256=(--batch 3 --steps 1 --width 4 --device cpu)
    rows_15=(author fp32)
    rows_256=(fp32)
    convolutions=(fp32)
    search=(--n 20 --m 500 --d 8 --rounds 1 --data "unit sphere" --device cpu)
    twin=(--steps 2 --width 4 --batch 2 --device cpu)
    epoch=(--preset paper --n 200 --rounds 1 --device cpu)
    tune=(--minutes 1 --width 2 --batch-size 2 --device cpu)
else
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "PyTorch of $python sees no NVIDIA GPU, so nothing was measured" >&2
        exit 1
    }
fi
: > "$out/summary.txt"

say() { # NAME WHAT: a line of the summary; all but "ok" and "left out" make the exit code 1
    printf '%s: %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

run() { # SECONDS NAME COMMAND...: output to OUT/NAME.txt; interrupted after SECONDS, killed 5 s later
    local limit=$1 name=$2 left=$((end - SECONDS)) started=$SECONDS code=0
    shift 2
    if [ "$left" -lt 8 ]; then
        say "$name" "no time"
        return
    fi
    timeout --signal INT --kill-after 5 $((limit < left ? limit : left)) "$@" > "$out/$name.txt" 2>&1 || code=$?
    case $code in
        0) say "$name" "ok, $((SECONDS - started)) s" ;;
        124 | 137) say "$name" "not finished after $((SECONDS - started)) s" ;;
        *) say "$name" "failed with exit code $code after $((SECONDS - started)) s" ;;
    esac
}

run_verify() { # SECONDS NAME OPTION...: at the same time as what follows, up to `wait`
    local limit=$1 name=$2
    shift 2
    run "$limit" "verify-$name" "$python" -m vglann_kernels.verify "${verify[@]}" "$@" &
}

verify() { # what takes the time is compiling, so it is spread over the cores
    local op dtype
    for op in laplacian composite_laplacian; do
        for dtype in bfloat16 float16 float32; do
            run_verify 75 "$op-$dtype" --op $op --dtype $dtype
        done
        run_verify 75 "$op-paper" --op $op --dtype bfloat16 --blur paper
    done
    for op in composite latent_adam nearest batchnorm_relu step_guard; do
        run_verify 75 $op --op $op
    done
    wait
}

step() {
    local step=("$python" bench/bench_glo_step.py --same-process --json "$out/step.jsonl" "${clips[@]}")
    rm -f "$out/step.jsonl"
    run 75 step-15 "${step[@]}" "${step_15[@]}" --rows "${rows_15[@]}"
    run 60 step-256 "${step[@]}" "${step_256[@]}" --rows "${rows_256[@]}"
}

kernels() {
    rm -f "$out/kernels.jsonl"
    run 110 kernels "$python" bench/kernel_groups.py "$out/kernels.jsonl"
}

counters() { # the two losses of one group, called once each: three launches; some virtual machines refuse
    if ! command -v ncu > "$out/counters.txt" || [ -n "${TINY:-}" ]; then
        say counters "left out, no ncu here"
        return
    fi
    run 45 counters ncu --clock-control none --kernel-name 'regex:laplacian|^_sums_' --launch-count 3 \
        --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis --section Occupancy \
        "$python" bench/kernel_groups.py --once "$out/once.jsonl" "composite_laplacian full 256"
}

nearest() {
    rm -f "$out/nearest.jsonl"
    run 45 nearest "$python" bench/bench_nearest.py "${search[@]}" --json "$out/nearest.jsonl"
}

twin() {
    run 100 twin "$python" -m vglann_fast.experiments.parity "${twin[@]}" "${clips[@]}"
}

layers() {
    rm -f "$out/layers.jsonl"
    run 30 cudnn "$python" bench/cudnn_probe.py
    run 40 epoch "$python" bench/bench_imle_epoch.py "${epoch[@]}"
    VGLANN_BENCH_JSONL="$out/layers.jsonl" run 430 layers "$python" -m pytest -q -p no:cacheprovider \
        --benchmark-only --benchmark-quiet bench/bench_conv_layers.py bench/bench_batchnorm_relu.py \
        bench/bench_upsample_conv.py
}

tune() { # the table is in tune.txt, the measurements are in vglann-fast/tune.json
    XDG_CACHE_HOME="$out" run 420 tune "$python" -m vglann_fast tune "${tune[@]}"
}

convolutions() {
    local dtype step=("$python" bench/bench_glo_step.py --same-process --json "$out/convolutions.jsonl" "${clips[@]}")
    rm -f "$out/convolutions.jsonl"
    for dtype in bfloat16 float16 float32; do
        run_verify 120 "upsample_conv-$dtype" --op upsample_conv --dtype $dtype
    done
    wait
    run 220 convolutions-15 "${step[@]}" "${step_15[@]}" --rows "${convolutions[@]}"
    run 170 convolutions-256 "${step[@]}" "${step_256[@]}" --rows "${convolutions[@]}"
}

for part in "$@"; do
    "$part"
done
# A moment's work, done even when the time is up: the figures are on disk.
shopt -s nullglob
results=("$out"/*.jsonl)
if [ ${#results[@]} -gt 0 ]; then
    "$python" bench/report.py "${results[@]}" > "$out/tables.md" 2> "$out/tables.txt" || say tables "failed"
fi
! grep -qvE ': (ok|left out)' "$out/summary.txt"
