# shellcheck shell=bash
# What a site edits: modules, environment, network. Read by every script in this folder, on the first node, from the folder of submission.
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0
# export MLFLOW_TRACKING_URI=https://mlflow.example.org
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
