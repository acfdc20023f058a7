#!/usr/bin/env bash
# sbatch slurm/train_1node.sh [train.py options]     submit in the parent folder; options of sbatch override the lines below, for example
# -N 4, --ntasks-per-node=4 --gpus-per-node=4, or --gpus-per-node=0 --ntasks-per-node=1 without GPUs. The job uses all memory of its
# nodes, and eight cores per task (one computes, four prepare data). See docs/slurm.md.
#SBATCH --job-name=cfvlm_ds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
launch "$@"
