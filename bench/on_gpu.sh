#!/bin/sh
# Everything that needs a GPU, on a machine with torch, triton, numpy, pytest and pytest-benchmark only:
#     bench/on_gpu.sh OUT
# Checks the kernels first; times only kernels that are right.
set -eu
out=${1:?usage: bench/on_gpu.sh OUT}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
export PYTHONPATH="$root/kernels:$root" VGLANN_KERNELS=auto
cd "$root"
python -m vglann_kernels.verify --batch 4 --frames 8 | tee "$out/verify.txt"
python -m vglann_kernels.verify --batch 4 --frames 8 --blur seed | tee "$out/verify-seed.txt"
for op in composite laplacian composite_laplacian latent_adam; do
    timeout 100 python -m pytest -q --benchmark-only --benchmark-json "$out/$op.json" "bench/bench_$op.py"
done
