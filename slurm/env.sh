# shellcheck shell=bash
# The one file a site edits. Every script of this folder reads it, on the first node of the job, in the folder of submission.

# Python: modules, a virtual environment or conda. The job does not inherit the shell that submits it (#SBATCH --export=NONE).
# module load cuda
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

# Or a container: by pyxis where srun has it, else by apptainer, unless CONTAINER_RUNTIME says which. Without CONTAINER_MOUNTS the folder of
# submission, HF_HOME and /tmp (the compiled kernels below) are mounted; data and run folders elsewhere have to be named, and every mount must
# be there on every node. Neither has been tried on a real cluster yet.
# CONTAINER_IMAGE=/shared/images/cfvlm_ds.sqsh    # apptainer: .sif
# CONTAINER_MOUNTS=$PWD:$PWD,$HOME/.cache/huggingface:$HOME/.cache/huggingface,/tmp:/tmp,/shared/data:/shared/data
# CONTAINER_RUNTIME=apptainer

# Caches. Hugging Face files on the shared file system, fetched before the job; what is compiled, on the node.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
# export HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/cfvlm_ds-$SLURM_JOB_ID/triton}"

# Memory of GPUs: of segments that grow, less is lost between rows of different lengths.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Network.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export CFVLM_MIN_GB_S=20    # between nodes; a job whose nodes exchange less is not started
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Tracking; without it the store is the run folder.
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# Tokens and passwords (MLFLOW_TRACKING_PASSWORD=..., HF_TOKEN=...): a file that its owner alone can read, never the command line.
CFVLM_SECRETS="${CFVLM_SECRETS:-$HOME/.config/cfvlm_ds/secrets}"
