#!/usr/bin/env bash
# sbatch --array=0-7 slurm/prepare_data.sh groups.jsonl --out STORE     the tasks share the work; submit this again when all of them have ended
#
# A killed or requeued task continues where it stopped. The first call checks pictures, the second writes rows. Number the tasks from 0.
#SBATCH --job-name=cfvlm_ds-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
shard="${SLURM_ARRAY_TASK_ID:-0}/${SLURM_ARRAY_TASK_COUNT:-1}"
say "job $SLURM_JOB_ID, part $shard, on $SLURM_JOB_NODELIST:$(printf ' %q' cfvlm-ds data prepare "$@")"
step -- cfvlm-ds data prepare "$@" --shard "$shard"
