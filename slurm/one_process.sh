# Run m3 with this script's words in one process; in an array, @ in them is the element's word of M3_ARRAY. Without words
# the elements of an array are alike, and share the blocks of a job that can be shared.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    case "${M3_ARRAY:+words} $1 ${2:-}" in
    words*)
        read -r -a elements <<<"$M3_ARRAY"
        set -- "${@//@/${elements[$SLURM_ARRAY_TASK_ID]}}" ;;
    " data collect" | " data filter" | " data deduplicate" | " data tokenize" | " data references") ;;
    " data embed" | " data index" | " data neighbours") ;;
    *)
        echo "error: an array of m3 $1 ${2:-} needs M3_ARRAY, the words of its elements" >&2
        exit 2 ;;
    esac
fi
srun "${M3_SRUN[@]}" --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" python -m launch.m3 "$@"
