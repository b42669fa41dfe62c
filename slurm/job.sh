# How a long job leaves and comes back.
#
# run COMMAND...: run a step. When the time is nearly up (SIGUSR1), the step gets SIGUSR1, and once it has left, the job
# goes back into the queue, to go on from what was saved. So does a job that is preempted, where Slurm itself sends
# SIGTERM to the step, and to nothing else, and one whose step dies, M3_RETRIES times. A user's mistake ends it.
# A script that sets TIME_UP=end instead ends well when its time is nearly up.
M3_RETRIES="${M3_RETRIES:-3}"
TIME_UP=requeue
MISTAKE=250 # what slurm/task.sh makes of status 2
leaving=""
step=""

ask_to_leave() {
    leaving=1
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

job_field() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | cut -d= -f2
}

is_preempted() {
    local preempted
    preempted="$(job_field PreemptTime)"
    [[ "$preempted" == 2* && "$preempted" > "$(job_field StartTime)" ]]
}

requeue() {
    echo "job $SLURM_JOB_ID: $1; back into the queue" >&2
    trap - USR1 TERM
    scontrol requeue "$SLURM_JOB_ID"
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
    [ -z "$leaving" ] || [ "$TIME_UP" = end ] || requeue "its time was nearly up"
    ! is_preempted || requeue "was preempted"
    [ "$status" -ne 0 ] || exit 0
    [ "$status" -ne "$MISTAKE" ] || exit 2
    failures="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%k)"
    [[ "$failures" =~ ^[0-9]+$ ]] || failures=0
    if [ "$failures" -lt "$M3_RETRIES" ]; then
        scontrol update JobId="$SLURM_JOB_ID" Comment="$((failures + 1))"
        requeue "step failed with status $status, try $((failures + 1)) of $M3_RETRIES"
    fi
    exit "$status"
}
