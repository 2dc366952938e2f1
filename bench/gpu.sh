#!/usr/bin/env bash
# Checks, tunes and times the Triton kernels on one GPU: `bench/gpu.sh [STAGE ...] [--seconds N] [--smoke]`.
# Nothing is installed: the packages are read from this checkout. Results go to ${OUT:-bench/results}.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
