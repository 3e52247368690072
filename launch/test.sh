#!/usr/bin/env bash
# All tests, in an environment of their own. Arguments go to pytest: bash launch/test.sh tests/pure -k rules
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment demo,data,vision,topologies,trackers,test
"$VENV/bin/ruff" check .
HF_HUB_OFFLINE=1 exec "$VENV/bin/python" -m pytest "$@"
