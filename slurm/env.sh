# shellcheck shell=bash
# Settings for your site; no other file needs changes. Every script in this folder sources this file on the job's first node, in the
# submission folder.

# Python: modules, a virtual environment or conda. The job does not inherit the submitting shell's environment (#SBATCH --export=NONE).
# module load cuda
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

# Or a container, run with pyxis if srun supports it, otherwise with apptainer; CONTAINER_RUNTIME overrides this choice. By default, the
# submission folder, HF_HOME and /tmp (for the compiled kernels below) are mounted. If data or run folders are elsewhere, list all mounts in
# CONTAINER_MOUNTS. Every mount must exist on every node. Neither runtime has been tested on a real cluster yet.
# CONTAINER_IMAGE=/shared/images/cfvlm_ds.sqsh    # apptainer: .sif
# CONTAINER_MOUNTS=$PWD:$PWD,$HOME/.cache/huggingface:$HOME/.cache/huggingface,/tmp:/tmp,/shared/data:/shared/data
# CONTAINER_RUNTIME=apptainer

# Caches: Hugging Face files are on the shared file system and should be downloaded before the job. Compiled kernels are on the node.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
# export HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/cfvlm_ds-$SLURM_JOB_ID/triton}"

# GPU memory: expandable segments reduce the fragmentation that rows of different lengths cause.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Network.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export CFVLM_MIN_GB_S=20    # minimum bandwidth between nodes; below it, training does not start
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Tracking. By default, runs are tracked in the run folder.
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# Tokens and passwords (MLFLOW_TRACKING_PASSWORD=..., HF_TOKEN=...) belong in a file that only its owner can read, never on a command line.
CFVLM_SECRETS="${CFVLM_SECRETS:-$HOME/.config/cfvlm_ds/secrets}"
