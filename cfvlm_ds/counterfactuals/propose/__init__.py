"""Back ends that propose counterfactual captions, which differ from the source caption in one detail."""

from __future__ import annotations

from collections.abc import Callable

from cfvlm_ds.counterfactuals.propose.base import Context, Proposal, Proposer, Rejected, Source
from cfvlm_ds.counterfactuals.propose.llm import LanguageModel
from cfvlm_ds.counterfactuals.propose.mine import Mine
from cfvlm_ds.counterfactuals.propose.rules import Rules

PROPOSERS: dict[str, Callable[[Context], Proposer]] = {"rules": Rules, "mine": Mine, "llm": LanguageModel}
"""Back ends by name. A user's script can add one with ``PROPOSERS["my_rules"] = ...``."""
