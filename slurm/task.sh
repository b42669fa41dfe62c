# Run one process of a step. srun tells the highest exit status of all, and ends the others when one fails: a user's
# mistake, status 2, becomes MISTAKE here (slurm/job.sh knows it) so that it is not hidden by theirs.
MISTAKE=250
trap : USR1 TERM # for the process, not for this shell
"$@" || exit $(($? == 2 ? MISTAKE : $?))
