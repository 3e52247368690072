#!/usr/bin/env bash
# From nothing to fine-tuned adapters: eight peers on a changing graph, over a process for each core, in about five minutes on two
# CPU cores. Model and data come with the installed packages. Further arguments override the recipe: --train.rounds 5
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment demo
HF_HUB_OFFLINE=1 exec "$VENV/bin/python" -m dfl train launch/recipes/quickstart.yaml --overwrite "$@"
