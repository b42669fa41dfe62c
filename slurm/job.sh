# How a job leaves and comes back.
#
# run COMMAND...: run a step. When the time is nearly up (SIGUSR1), the step gets SIGUSR1, and once it has left, the job
# goes back into the queue, to go on from what was saved. So does a job that is preempted, where Slurm itself sends
# SIGTERM to the step, and to nothing else, and one whose step dies. A job whose step died, or whose time was up, without
# having kept anything new goes back M3_RETRIES times in a row: the step removes the file M3_STANDSTILL when it has kept
# a block or a checkpoint. A user's mistake ends the job, and so do scancel and the time limit. Before run a script may set
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
    grep -o " $1=[^ ]*" <<<"$job" | cut -d= -f2
}

# Whether Slurm has ended the job itself, by scancel, a time limit or a dead node.
is_over() {
    [[ "$(job_field JobState)" != @(RUNNING|SIGNALING) ]]
}

is_preempted() {
    local preempted
    preempted="$(job_field PreemptTime)"
    [[ "$preempted" == 2* && ! "$preempted" < "$(job_field StartTime)" ]] # it may begin and be preempted in one second
}

stands_still() {
    (: <"$M3_STANDSTILL") 2>/dev/null # a network file system may say from memory that a file exists, but opens none
}

requeue() {
    echo "job $JOB: $1; back into the queue" >&2
    rm -f "$M3_STANDSTILL"
    trap - USR1 TERM
    scontrol requeue "$JOB"
    exec sleep 300 # Slurm ends this script
}

# Go back into the queue unless too many tries in a row kept nothing; the job's Comment counts them.
try_again() {
    local failures
    failures="$(job_field Comment || true)"
    [[ "$failures" =~ ^[0-9]+$ ]] && stands_still || failures=0
    if [ "$failures" -lt "$M3_RETRIES" ]; then
        scontrol update JobId="$JOB" Comment="$((failures + 1))"
        requeue "$1, try $((failures + 1)) of $M3_RETRIES"
    fi
}

run() {
    M3_STANDSTILL="$(mktemp "$PWD/.m3-standstill-$SLURM_JOB_ID-XXXXXX")"
    export M3_STANDSTILL
    trap 'rm -f "$M3_STANDSTILL"' EXIT
    trap ask_to_leave USR1 TERM
    "$@" &
    step=$!
    [ -z "$leaving" ] || ask_to_leave
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    trap '' USR1 TERM
    wait "$step" && status=0 || status=$? # of the step, where the wait before may have told of a signal to this script
    until job="$(scontrol --oneliner show job "$JOB")"; do sleep 5; done # the controller may be away for a while
    ! is_over || exit "$status"
    [ "$status" -ne "$MISTAKE" ] || exit 2
    ! is_preempted || requeue "was preempted"
    if [ -n "$leaving" ] && [ "$TIME_UP" = requeue ]; then
        if ! stands_still; then
            [[ "$(job_field Comment)" != [1-9]* ]] || scontrol update JobId="$JOB" Comment=0
            requeue "its time was nearly up"
        fi
        try_again "its time was nearly up, and it has kept nothing new"
        echo "error: job $JOB: the time limit is too short for one block or one step of training; give it more (--time)" >&2
        exit $((status ? status : 1))
    fi
    [ "$status" -ne 0 ] || exit 0
    [ "$RETRY" = all ] || [ "$status" -gt 128 ] || exit "$status"
    try_again "step failed with status $status"
    exit "$status"
}
