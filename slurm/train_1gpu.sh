#!/usr/bin/env bash
# sbatch slurm/train_1gpu.sh [train.py options]     submit in the parent folder; options of sbatch override the lines below, for example
# --mem=96G, or --ntasks-per-node=2 --gpus-per-node=2 --mem=128G for two GPUs. The job uses part of a node and leaves the other GPUs to
# other jobs. See docs/slurm.md.
#SBATCH --job-name=cfvlm_ds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
launch "$@"
