"""What every rank imports: read once, by the process that ranks are forked from."""

import os

# Ranks on a CPU, also beside a GPU: CUDA does not live through a fork.
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "DEEPSPEED_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
os.environ |= ON_CPU

import deepspeed  # noqa: E402, F401

import cfvlm_ds.cli  # noqa: E402
import cfvlm_ds.training  # noqa: E402, F401
