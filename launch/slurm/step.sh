# What the Slurm scripts share; they source it.

# modules, environments, variables of this cluster
prepare() {
    local site=${DFL_SITE:-launch/slurm/site.sh}
    if [ -f "$site" ]; then source "$site"; fi
    if [ -x "${VENV:-.venv}/bin/python" ]; then PATH=$(realpath "${VENV:-.venv}")/bin:$PATH; fi
}

# Run the words given, as a step whose number the job did not have before it was last requeued. Where a step takes longer than a message may
# to end, Slurm tells its nodes to end it once more a minute later, by its number alone: that would be the step of the requeued job.
with_new_number() {
    local before=$((${SLURM_RESTART_COUNT:-0} % 4))
    while [ "$before" -gt 0 ]; do
        srun --nodes=1 --ntasks=1 true || true
        before=$((before - 1))
    done
    exec "$@"
}

# Run the words given as a step of the job, and leave with its status. The job goes back to the queue when the warning of --signal stops
# it, or when one of its processes is killed (128 + the signal's number; a run's own errors are smaller), but not when it would come
# here again and again.
run_step() {
    with_new_number "$@" &
    local step=$! status=0 signalled='' warned='' ended='' why=''
    # srun passes SIGUSR1 on to every node; the run stops after its step and saves. Slurm's own SIGTERM (scancel, pre-emption) has reached the
    # step already, and what becomes of the job then is Slurm's to say.
    trap 'signalled=yes warned=yes; kill -USR1 "$step" 2> /dev/null || true' USR1
    trap 'signalled=yes ended=yes' TERM
    wait "$step" || status=$?
    while [ -n "$signalled" ]; do # a signal interrupts `wait`
        signalled='' status=0
        wait "$step" || status=$?
    done

    if [ "$status" -ne 0 ] && [ -z "$ended" ]; then
        if [ -n "$warned" ]; then
            why="stopped before its time was over"
        elif [ "$status" -gt 128 ]; then
            why="a process was killed (status $status)"
        fi
    fi
    if [ -n "$why" ]; then
        if [ "$SECONDS" -lt "${DFL_LEAST:-60}" ]; then
            echo "dfl: $why after $SECONDS seconds, and not requeued: it would hardly get further the next time; DFL_LEAST is" \
                "${DFL_LEAST:-60}, and --time has to be much longer than --signal is early" >&2
            exit 1
        fi
        if [ -z "$warned" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "${DFL_REQUEUES:-20}" ]; then
            echo "dfl: $why, and not requeued: that was done ${SLURM_RESTART_COUNT:-0} times; DFL_REQUEUES is ${DFL_REQUEUES:-20}" >&2
            exit "$status"
        fi
        echo "dfl: $why; job $SLURM_JOB_ID is requeued and goes on from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
