#!/usr/bin/env bash
# Style and all tests, in an environment of their own. Arguments go to pytest instead: bash launch/test.sh tests/pure -k rules
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment demo,data,vision,topologies,trackers,test
"$VENV/bin/ruff" check .
export HF_HUB_OFFLINE=1
if [ $# -gt 0 ]; then
    exec "$VENV/bin/python" -m pytest "$@"
fi
# pure tests side by side, a file to a worker and the longest first; those that start processes of their own one after the other, but for
# the waiting ones of Slurm beside them
"$VENV/bin/python" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests/pure tests/topologies
exec "$VENV/bin/python" -m pytest -q -n 2 --dist loadgroup --durations=15 tests/distributed tests/real tests/launch
