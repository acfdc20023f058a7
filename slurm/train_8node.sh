#!/usr/bin/env bash
# sbatch slurm/train_8node.sh [train.py options]     any -N, --ntasks-per-node or --gpus-per-node on the sbatch line wins over the lines below
#SBATCH --job-name=cfvlm_ds
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
source slurm/env.sh

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# A port of the job's own, clear of the ephemeral range, so that two jobs on one node, or a restart, do not meet.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 6000))
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: train.py --deepspeed ds_configs/z3.json $*"
# srun starts the ranks itself: exact signals and exit codes. One failed rank ends the job.
srun --kill-on-bad-exit=1 python train.py --deepspeed ds_configs/z3.json "$@"
