"""Imports that all ranks need, done once by the process from which ranks are forked. They include modules that libraries import on first
use.
"""

import gc

import deepspeed  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import transformers.integrations.deepspeed  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, get_scheduler  # noqa: F401

import cfvlm_ds.cli.models
import cfvlm_ds.training.run  # noqa: F401

gc.freeze()  # DeepSpeed collects garbage in every set-up, which took 0.3 s of a 3 s run without this line
