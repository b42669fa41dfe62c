# Run m3 with this script's words in one process; in an array, @ in them is the element's word of M3_ARRAY.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    read -r -a elements <<<"${M3_ARRAY:?an array needs M3_ARRAY, the words of its elements}"
    set -- "${@//@/${elements[$SLURM_ARRAY_TASK_ID]}}"
fi
srun "${M3_SRUN[@]}" --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m launch.m3 "$@"
