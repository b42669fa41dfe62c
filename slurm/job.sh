# How a job leaves and comes back.
#
# run COMMAND...: run a step. When the time is nearly up (SIGUSR1), the step gets SIGUSR1, and once it has left, the job
# goes back into the queue, to go on from what was saved. So does a job that is preempted, where Slurm itself sends
# SIGTERM to the step, and to nothing else, and one whose step dies, M3_RETRIES times. A user's mistake ends it, and so
# do scancel and the time limit. Before run a script may set
#   TIME_UP=end     end well when the time is nearly up
#   TIME_UP=stay    go on until the limit, since what would come back begins from nothing
#   RETRY=killed    try a step again that was killed, but not one that failed by itself
M3_RETRIES="${M3_RETRIES:-3}"
TIME_UP=requeue
RETRY=all
MISTAKE=250 # what slurm/task.sh makes of status 2
# Of an array the element alone: one of them bears the array's number, and would stand for all.
JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
JOB="${JOB:-$SLURM_JOB_ID}"
leaving=""
step=""

ask_to_leave() {
    [ "$TIME_UP" != stay ] || return 0
    leaving=1
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

job_field() {
    scontrol --oneliner show job "$JOB" | grep -o " $1=[^ ]*" | cut -d= -f2
}

# Whether Slurm has ended the job itself, by scancel, a time limit or a dead node.
is_over() {
    [[ "$(job_field JobState)" != @(RUNNING|SIGNALING|) ]]
}

is_preempted() {
    local preempted
    preempted="$(job_field PreemptTime)"
    [[ "$preempted" == 2* && ! "$preempted" < "$(job_field StartTime)" ]] # it may begin and be preempted in one second
}

requeue() {
    echo "job $JOB: $1; back into the queue" >&2
    trap - USR1 TERM
    scontrol requeue "$JOB"
    exec sleep 300 # Slurm ends this script
}

run() {
    trap ask_to_leave USR1 TERM
    "$@" &
    step=$!
    status=0
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" && status=0 || status=$?
    done
    trap '' USR1 TERM
    ! is_over || exit "$status"
    [ "$status" -ne "$MISTAKE" ] || exit 2
    [ -z "$leaving" ] || [ "$TIME_UP" = end ] || requeue "its time was nearly up"
    ! is_preempted || requeue "was preempted"
    [ "$status" -ne 0 ] || exit 0
    [ "$RETRY" = all ] || [ "$status" -gt 128 ] || exit "$status"
    failures="$(squeue --noheader --jobs="$JOB" --format=%k)"
    [[ "$failures" =~ ^[0-9]+$ ]] || failures=0
    if [ "$failures" -lt "$M3_RETRIES" ]; then
        scontrol update JobId="$JOB" Comment="$((failures + 1))"
        requeue "step failed with status $status, try $((failures + 1)) of $M3_RETRIES"
    fi
    exit "$status"
}
