"""What every rank imports: read once, by the process that ranks are forked from."""

import deepspeed  # noqa: F401

import cfvlm_ds.cli
import cfvlm_ds.training  # noqa: F401
