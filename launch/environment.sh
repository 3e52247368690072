# Sourced by the scripts beside it: a virtual environment in .venv (or $VENV) with the project and the named extras.
# PYTHON chooses the interpreter. pip's own settings (PIP_CONSTRAINT, an index, a proxy) are respected.

make_environment() {
    local extras=$1 python=${PYTHON:-python3}
    VENV=${VENV:-.venv}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "$0: needs Python 3.10 or newer as '$python'; set PYTHON to one" >&2
        exit 1
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        "$python" -m venv "$VENV" || { echo "$0: '$python -m venv' failed; on Debian: apt install python3-venv" >&2; exit 1; }
    fi
    # installed once for each set of requirements
    local wanted
    wanted="$extras $(cksum < setup.cfg)"
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
        echo "$wanted" > "$VENV/.installed"
    fi
    # several processes share the cores
    export TOKENIZERS_PARALLELISM=false
}
