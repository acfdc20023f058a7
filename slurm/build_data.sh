#!/usr/bin/env bash
# sbatch --array=0-63 slurm/build_data.sh --config examples/build_coco.yaml     one task a shard of the plan; --gpus-per-node=0 for none
#
# A task that was killed, or requeued, goes on where it was. `cfvlm-ds data status W` prints the shards that are missing as --array=...; when
# none is, `cfvlm-ds data select W --out groups.jsonl` makes the groups. The number of shards is the plan's, however many tasks there are.
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
