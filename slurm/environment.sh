# What the scripts here need to know of the cluster; each sources it. Submit from the repository's root.
source "${M3_HOME:-$SLURM_SUBMIT_DIR}/.venv/bin/activate"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tensor and sequence parallelism overlap rightly only with one queue (GPUs before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Where the processes of a job meet.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
