#!/usr/bin/env bash
# One process of a run with `membership: survive`, started again whenever it is lost: launch/member.sh K/N RECIPE [--dotted.key value ...]
# DFL_MEMBERS=host:port[,host:port] names some of the others. A service manager does the same: launch/dfl@.service.
# In a task of Slurm, which says itself which process that is: launch/member.sh - RECIPE ...
set -uo pipefail
if [ "$1" != - ]; then export DFL_PROCESS=$1; fi
shift
trap 'kill -TERM "$child" 2> /dev/null; stopped=yes' TERM INT
stopped='' status=1
for ((starts = 0; starts < ${DFL_STARTS:-100}; starts++)); do
    ${DFL_COMMAND:-python -m dfl} train "$@" --resume &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2> /dev/null; do # a signal interrupts `wait`
        wait "$child"
        status=$?
    done
    # 0: done; 2: the recipe is refused, or the others refuse this process
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ]; then break; fi
    sleep "${DFL_PAUSE:-1}"
done
exit "$status"
