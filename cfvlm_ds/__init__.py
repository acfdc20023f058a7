"""cfvlm_ds: counterfactual fine-tuning of generative vision-language models under DeepSpeed ZeRO-3.

What a researcher needs to write and try an objective; importing this needs torch alone.
"""

from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores, score_matrix, token_logprobs
from cfvlm_ds.objectives import OBJECTIVES, Objective, weighted_loss

__all__ = [
    "OBJECTIVES",
    "Candidate",
    "CounterfactualGroup",
    "GroupLayout",
    "Objective",
    "Scores",
    "score_matrix",
    "token_logprobs",
    "weighted_loss",
]
