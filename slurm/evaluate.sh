#!/usr/bin/env bash
# sbatch slurm/evaluate.sh MODEL MANIFEST... [cfvlm-ds evaluate options]     on one GPU; without a GPU: --gpus-per-node=0
# sbatch -N 2 --ntasks-per-node=8 --gpus-per-node=8 --mem=0 slurm/evaluate.sh MODEL --benchmarks pope --benchmark_root FOLDER --out FOLDER
# The tasks share the scoring of benchmarks. A job with benchmarks is requeued before its time limit and continues from the scores on disk. See
# docs/slurm.md.
#SBATCH --job-name=cfvlm_ds-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=60G
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --export=NONE
set -euo pipefail
source slurm/launch.sh
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST:$(printf ' %q' cfvlm-ds evaluate "$@")"
rendezvous "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
resumable=0 requeued=0
if [[ " $* " == *" --benchmarks"[\ =]* ]]; then resumable=1; fi # here, because in a trap $* holds the interrupted function's arguments
trap 'interrupted=1; if ((resumable)) && [[ -n ${ranks:-} ]]; then requeued=1; say "USR1: ending the ranks"; kill "$ranks"; fi' USR1
trap 'interrupted=1; if [[ -n ${ranks:-} ]]; then kill "$ranks"; fi' TERM
step -- cfvlm-ds evaluate "$@" &
ranks=$!
await $ranks
if ((resumable && requeued && rc != 0 && rc != 2)); then
    say "requeue: the time limit is near; the scores so far are on disk"
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm does not requeue this job; the same sbatch command continues it"
fi
exit "$rc"
