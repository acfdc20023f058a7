"""cfvlm_ds: counterfactual fine-tuning of generative vision-language models under DeepSpeed ZeRO-3.

The top-level names are all you need to write and try out an objective. They depend only on torch and are imported on first use, so
`--help` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    "core.groups": ("Candidate", "CounterfactualGroup"),
    "core.layout": ("GroupLayout",),
    "core.scores": ("Scores", "score_matrix", "token_logprobs"),
    "objectives": ("OBJECTIVES", "Objective", "weighted_loss"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
