"""Proposing: a caption to counterfactual captions that differ in one thing. One file and one line a back end."""

from __future__ import annotations

from collections.abc import Callable

from cfvlm_ds.counterfactuals.propose.base import Context, Proposer
from cfvlm_ds.counterfactuals.propose.llm import LanguageModel
from cfvlm_ds.counterfactuals.propose.mine import Mine
from cfvlm_ds.counterfactuals.propose.rules import Rules

PROPOSERS: dict[str, Callable[[Context], Proposer]] = {"rules": Rules, "mine": Mine, "llm": LanguageModel}
"""Name -> back end. ``PROPOSERS["mine_too"] = ...`` in a script of your own adds one."""
