# Run m3 with this script's words in one process, as a step that leaves and comes back (slurm/job.sh). In an array,
# {element} in the words is the element's word of M3_ARRAY; without it the elements are alike, and share the blocks of a
# job that can be shared. One that cannot be begins from nothing when it comes back.
RETRY=killed
case "${1:-} ${2:-}" in
"data collect" | "data filter" | "data deduplicate" | "data tokenize" | "data references") ;;
"data embed" | "data index" | "data neighbours") ;;
*) TIME_UP=stay ;;
esac
if [[ "$*" == *"{element}"* ]]; then
    read -r -a elements <<<"${M3_ARRAY:-}"
    element="${elements[${SLURM_ARRAY_TASK_ID:-0}]:-}"
    if [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [ -z "$element" ]; then
        echo "error: {element} needs --array=0-N, and M3_ARRAY with a word for each of them (M3_ARRAY=${M3_ARRAY:-}," \
             "element ${SLURM_ARRAY_TASK_ID:-none})" >&2
        exit 2
    fi
    set -- "${@//"{element}"/"$element"}"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ "$TIME_UP" = stay ]; then
    echo "error: the elements of an array of m3 $1 ${2:-} would all do the same; put {element} where they differ, and" \
         "their words into M3_ARRAY" >&2
    exit 2
fi
run srun "${M3_SRUN[@]}" --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
    --kill-on-bad-exit=1 bash slurm/task.sh python -m launch.m3 "$@"
