#!/bin/bash
# Everything that needs a GPU, on a machine with torch, triton, numpy, pytest and pytest-benchmark only:
#     bench/on_gpu.sh OUT
# The kernels are compared with float64 first; every benchmark compares its contenders again before it times them.
# Ends within 8 minutes: each part has a limit, and a part that reaches it writes what it has. Exit code 1 when a
# part failed; the others run all the same. PYTHON names the interpreter, SECONDS_IN_ALL the time (470).
set -u -o pipefail
: "${1:?usage: bench/on_gpu.sh OUT}"
out=$(realpath -m "$1") && mkdir -p "$out" || exit 1
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/kernels:$PWD" VGLANN_KERNELS=auto
python=${PYTHON:-python3}
end=$((SECONDS + ${SECONDS_IN_ALL:-470}))
failed=()

part() { # NAME SECONDS COMMAND...: its output to OUT/NAME.txt; interrupted after SECONDS, killed 5 s later
    local name=$1 limit=$2 left=$((end - SECONDS - 5)) started=$SECONDS
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: no time left"
        failed+=("$name")
        return
    fi
    timeout --signal INT --kill-after 5 $((limit < left ? limit : left)) "$@" > "$out/$name.txt" 2>&1 ||
        failed+=("$name ($?)")
    echo "$name: $((SECONDS - started)) s; $(tail -n 1 "$out/$name.txt")"
}

benchmark() { # OP SECONDS
    part "$1" "$2" "$python" -m pytest -q -p no:cacheprovider --benchmark-only --benchmark-json "$out/$1.json" \
        "bench/bench_$1.py"
}

part verify 80 "$python" -m vglann_kernels.verify
benchmark laplacian 110
benchmark composite_laplacian 110
benchmark composite 80
benchmark latent_adam 40
part verify-seed 60 "$python" -m vglann_kernels.verify --blur seed
benchmark nearest 60
tables=()
for op in laplacian composite_laplacian composite latent_adam; do
    [ -s "$out/$op.json" ] && tables+=("$out/$op.json")
done
[ ${#tables[@]} -eq 0 ] || "$python" bench/report.py "${tables[@]}" > "$out/report.md"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
