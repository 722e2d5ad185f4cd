#!/bin/bash
# Everything that needs a GPU, on a machine with torch, triton, numpy, safetensors, tqdm, pytest, pytest-benchmark:
#     bench/on_gpu.sh OUT [layers] [kernels] [step] [nearest]
# Each of the four parts (all, if none is named) ends within 9 minutes and writes OUT/PART.txt and OUT/PART.json:
#   layers   copy and matrix product of this card; every transposed convolution and BatchNorm by itself
#   kernels  every Triton kernel against float64, then its times
#   step     300 steps of training in float32, in bfloat16, with kernels, with a graph: as good to 0.3 dB; then the
#            waterfall of the training step at 15 and at 256 videos
#   nearest  the search beside the others', and an epoch of IMLE
# Every benchmark compares its contenders before it times them. Exit code 1 when something failed; the rest runs all
# the same. PYTHON names the interpreter, SECONDS_A_PART the time (540), CLIPS a folder of `vglann clips pack` for
# the steps, which take made-up moving squares without: reading it needs no video decoder, so pack it elsewhere.
set -u -o pipefail
: "${1:?usage: bench/on_gpu.sh OUT [layers] [kernels] [step] [nearest]}"
out=$(realpath -m "$1") && mkdir -p "$out" || exit 1
shift
[ -z "${CLIPS:-}" ] || CLIPS=$(realpath -m "$CLIPS")
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/kernels:$PWD" VGLANN_KERNELS=auto PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=()

run() { # SECONDS COMMAND...: output to OUT/PART.txt; interrupted after SECONDS, killed 10 s later
    local limit=$1 left=$((end - SECONDS - 10)) started=$SECONDS code=0
    shift
    if [ "$left" -lt 5 ]; then
        failed+=("$part: no time left for $*")
        return
    fi
    printf '\n$ %s\n' "$*" >> "$out/$part.txt"
    timeout --signal INT --kill-after 10 $((limit < left ? limit : left)) "$@" >> "$out/$part.txt" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed+=("$part: $* ($code)")
    echo "$part: $((SECONDS - started)) s, exit code $code: $*"
}

benchmarks() { # SECONDS FILE...: timed to OUT/PART.json, then tabled
    local limit=$1
    shift
    run "$limit" "$python" -m pytest -q -p no:cacheprovider --benchmark-only --benchmark-quiet \
        --benchmark-json "$out/$part.json" "$@"
    [ ! -s "$out/$part.json" ] || run 30 "$python" bench/report.py "$out/$part.json"
}

layers() {
    benchmarks 500 bench/bench_conv_layers.py bench/bench_batchnorm.py
}

kernels() {
    run 120 "$python" -m vglann_kernels.verify
    run 90 "$python" -m vglann_kernels.verify --blur seed
    benchmarks 320 bench/bench_laplacian.py bench/bench_composite_laplacian.py bench/bench_composite.py \
        bench/bench_latent_adam.py
}

step() {
    local clips=()
    [ -z "${CLIPS:-}" ] || clips=(--clips "$CLIPS")
    run 110 "$python" -m vglann_fast.experiments.parity "${clips[@]}"
    run 210 "$python" bench/bench_glo_step.py --batch 15 --steps 50 "${clips[@]}"
    run 400 "$python" bench/bench_glo_step.py --batch 256 --steps 20 "${clips[@]}"  # what is left of the time
}

nearest() {
    run 60 "$python" bench/bench_imle_epoch.py --preset paper
    run 420 "$python" bench/bench_nearest.py --json "$out/nearest.json"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || { echo "PyTorch of $python sees no NVIDIA GPU, so nothing was measured" >&2; exit 1; }
[ $# -gt 0 ] || set -- layers kernels step nearest
for part in "$@"; do
    case $part in
        layers | kernels | step | nearest) ;;
        *) echo "no part $part; the parts are layers, kernels, step and nearest" >&2 && exit 1 ;;
    esac
done
for part in "$@"; do
    end=$((SECONDS + ${SECONDS_A_PART:-540}))
    : > "$out/$part.txt"
    "$part"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "what the failed ones said: $out/PART.txt"
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
