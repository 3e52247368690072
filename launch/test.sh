#!/usr/bin/env bash
# Style, types and tests, in an environment of their own. Arguments go to pytest instead: bash launch/test.sh tests/pure -k rules
#
# Without arguments: all tests but those for the night and those of launchers, and of these a short core and what a change of
# the last day makes due (tests/README.md). With --all alone, or DFL_TEST_ALL=1: everything.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment demo,data,vision,trl,topologies,trackers,zenoh,test
"$VENV/bin/ruff" check .
"$VENV/bin/mypy"
export HF_HUB_OFFLINE=1
due=(--due)
if [ -n "${DFL_TEST_ALL:-}" ] || [ "$*" = --all ]; then
    due=()
elif [ $# -gt 0 ]; then
    exec "$VENV/bin/python" -m pytest "$@"
fi
# pure tests side by side, a file to a worker and the longest first
"$VENV/bin/python" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=15 "${due[@]}" tests/pure tests/graphs
# tests that start processes: Slurm's, which mostly wait, those that wait on the clock one after the other, and all others
exec "$VENV/bin/python" -m pytest -q -n 3 --dist loadgroup --no-loadscope-reorder --durations=15 "${due[@]}" tests/distributed tests/real tests/launch
