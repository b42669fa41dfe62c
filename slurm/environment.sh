# All that the jobs here know of the cluster. Each script sources it; what differs between clusters is set here, or in the
# environment of sbatch. Submit from the repository's root, or set M3_HOME to it.
M3_HOME="${M3_HOME:-$SLURM_SUBMIT_DIR}"

# Modules: what the compute nodes need before Python starts, for instance
# module load cuda/13.0

# Python: the venv that `make setup` made.
source "$M3_HOME/.venv/bin/activate"
export PYTHONPATH="$M3_HOME${PYTHONPATH:+:$PYTHONPATH}"

# Container: with pyxis, an image in which the steps run; the repository is mounted where it is. M3_MOUNTS adds folders.
M3_SRUN=()
if [ -n "${M3_CONTAINER:-}" ]; then
    M3_SRUN=(--container-image="$M3_CONTAINER" --container-mounts="$M3_HOME:$M3_HOME${M3_MOUNTS:+,$M3_MOUNTS}"
             --container-workdir="$PWD")
fi

# MPI of the bank's ranks; pmi2 serves the mpich of requirements.txt.
M3_MPI="${M3_MPI:-pmi2}"

# Processes on each node: its GPUs, or one without any. A step gets all GPUs that the job has on a node; by itself Slurm
# would give it none of those that came with a whole node, unasked.
gpus="${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)}"
export M3_PROCESSES_PER_NODE="${M3_PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
[ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ] || M3_SRUN+=(--gpus-per-node="$SLURM_GPUS_ON_NODE")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Tensor and sequence parallelism overlap rightly only with one queue (GPUs before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# NCCL: the network between nodes, where it does not find it alone, for instance
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Caches: compiled kernels on the node's own disk, downloads where all nodes see them.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/m3-triton-$UID}"
export HF_HOME="${HF_HOME:-$M3_HOME/.cache/huggingface}"

# Where the nodes of a job meet: the address by which Slurm reaches the first, and a port of the job's own.
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # to its end: none breaks off for thousands
address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export M3_RENDEZVOUS="${M3_RENDEZVOUS:-${address:-$first}:$((20000 + SLURM_JOB_ID % 10000))}"
