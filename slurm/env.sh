# shellcheck shell=bash
# The only file that a site edits. Every script in this folder reads it, on the first node of the job, in the submission folder.

# Python: modules, a virtual environment or conda. The job does not inherit the submitting shell's environment (#SBATCH --export=NONE).
# module load cuda
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

# Or a container, run by pyxis if srun has it, otherwise by apptainer; CONTAINER_RUNTIME overrides this choice. Without CONTAINER_MOUNTS, the
# submission folder, HF_HOME and /tmp (for the compiled kernels below) are mounted. Data and run folders elsewhere must be listed, and every
# mount must exist on every node. Neither runtime has been tried on a real cluster yet.
# CONTAINER_IMAGE=/shared/images/cfvlm_ds.sqsh    # apptainer: .sif
# CONTAINER_MOUNTS=$PWD:$PWD,$HOME/.cache/huggingface:$HOME/.cache/huggingface,/tmp:/tmp,/shared/data:/shared/data
# CONTAINER_RUNTIME=apptainer

# Caches: Hugging Face files on the shared file system, downloaded before the job; compiled kernels on the node.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
# export HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/cfvlm_ds-$SLURM_JOB_ID/triton}"

# GPU memory: with expandable segments, rows of different lengths cause less fragmentation.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Network.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export CFVLM_MIN_GB_S=20    # bandwidth between nodes below which a job is not started
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Tracking. If this is not set, runs are tracked in the run folder.
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# Tokens and passwords (MLFLOW_TRACKING_PASSWORD=..., HF_TOKEN=...): a file that only its owner can read, never the command line.
CFVLM_SECRETS="${CFVLM_SECRETS:-$HOME/.config/cfvlm_ds/secrets}"
