"""GLM-4.1V and GLM-4.6V: a native-resolution vision tower that downsamples its output by 2 x 2 before the projector, and Qwen-VL's position
ids.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cfvlm_ds.models.families.qwen import QWEN_VL
from cfvlm_ds.models.visual_token_limits import pixels

GLM_4V = replace(
    QWEN_VL,
    model_types=("glm4v", "glm46v"),
    projector=("model.visual.merger",),
    limit=partial(pixels, counts_frames=True),
)
