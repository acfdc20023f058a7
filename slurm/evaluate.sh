#!/usr/bin/env bash
# sbatch slurm/evaluate.sh MODEL MANIFEST... [cfvlm-ds evaluate options]     on one GPU; --gpus-per-node=0 for none
#SBATCH --job-name=cfvlm_ds-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=60G
#SBATCH --output=%x-%j.log
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST:$(printf ' %q' cfvlm-ds evaluate "$@")"
step -- cfvlm-ds evaluate "$@"
