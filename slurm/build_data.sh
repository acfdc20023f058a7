#!/usr/bin/env bash
# sbatch --array=0-63 slurm/build_data.sh --config examples/build_coco.yaml     one task per shard of the plan; without GPUs: --gpus-per-node=0
#
# A killed or requeued task continues where it stopped. `cfvlm-ds data status W` prints the option --array=... for the missing shards. If none
# is missing, `cfvlm-ds data select W --out groups.jsonl` writes the groups. The plan sets the number of shards, not the number of tasks.
#SBATCH --job-name=cfvlm_ds-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=60G
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
say "job $SLURM_JOB_ID, shard $SLURM_ARRAY_TASK_ID, on $SLURM_JOB_NODELIST:$(printf ' %q' cfvlm-ds data run "$@")"
step -- cfvlm-ds data run "$@" --shard "$SLURM_ARRAY_TASK_ID"
