#!/usr/bin/env bash
# All that a GPU has to show, in under nine minutes: `bash benchmarks/gpu.sh`. Whoever has one runs this first and commits the figures.
# `--device cpu` rehearses it with small sizes; `--only NAME ...` runs some parts; --help says more. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
# torch counts GPUs without a context of its own: parts are forks, which could not use a GPU that their parent has asked for
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchmarks.gpu "$@"
