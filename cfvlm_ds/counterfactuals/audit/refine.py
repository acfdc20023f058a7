"""Balanced subsampling: selects a subset of the groups in which true and false texts cannot be told apart by their words, by their length,
or by a scorer that does not see the pictures.

Words are balanced as in the back end ``rules`` (propose/balance.py). Length and the scorer's guess are treated as two additional words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.reading import lines, parse_json
from cfvlm_ds.core.untrusted import own_output
from cfvlm_ds.counterfactuals.propose.balance import Move, balanced, sampled
from cfvlm_ds.counterfactuals.propose.word_difference import words
from cfvlm_ds.counterfactuals.work_folder import row_line, seed_of
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.lines import MAX_LINE
from cfvlm_ds.evaluation.comparisons import factual_texts

REFINED = "refined"
"""Key of the subsampling parameters in a row's ``meta``."""


def text_pairs(group: CounterfactualGroup) -> list[tuple[str, str]]:
    """Pair each true text of the factual image with each false text that answers the same prompt."""
    return [(group.candidates[true].text, group.candidates[false].text) for true, false in factual_texts(group)]


def refine(groups: Groups, blind: Sequence[float] | None, seed: int, file: Path) -> str:
    """Write a balanced subset of the groups to ``file``. Return a sentence with the subset's size and the percentage of groups in which a
    guess based on length (or on ``blind``) is right. ``blind`` holds one margin per group, from a scorer that does not see pictures.

    Raises ConfigError if no group can be kept.
    """
    pairs = [text_pairs(group) for group in groups]
    cues: dict[str, Sequence[float]] = {"length": [sum(len(new) - len(old) for old, new in texts) for texts in pairs]}
    cues |= {} if blind is None else {"the scorer": blind}
    signs = np.sign([*cues.values()]).astype(int)
    moves: list[Move] = [(k, (cue,), sign) for cue, row in zip(cues, signs.tolist(), strict=True) for k, sign in enumerate(row)]
    for k, texts in enumerate(pairs):
        for old, new in ((set(words(old)), set(words(new))) for old, new in texts):
            moves += [(k, word, 1 if word in new else -1) for word in sorted(old ^ new)]
    _, shares = balanced(moves, len(groups), exact=[(cue,) for cue in cues])
    order = sorted(range(len(groups)), key=lambda k: (*signs[:, k], seed_of("refine", seed, groups[k].id)))
    # sort groups by their pattern of guesses, so that systematic sampling preserves the share of each pattern
    kept = sorted(order[k] for k in sampled(shares[order], "refine", seed))
    if not kept:
        worst = max(cues, key=lambda cue: abs(right(cues[cue]) - 0.5))
        raise ConfigError(
            f"--refine: a blind guess ({worst}) has the same outcome for all {len(groups)} groups, so none can be kept; propose edits in "
            "both directions"
        )
    with whole_file(file) as out:
        for k in kept:
            own = parse_json(groups[k].meta or "{}")
            row = to_row(groups[k], file.parent.absolute(), (own if isinstance(own, dict) else {"meta": own}) | {REFINED: {"seed": seed}})
            out.write(row_line(row))
    shares_right = ", ".join(f"{100 * right([margins[k] for k in kept]):.1f} % by {cue}" for cue, margins in cues.items())
    return f"{len(kept)} of {len(groups)} groups; correct blind guesses: {shares_right}"


def refined_file(file: Path, *inputs: str) -> None:
    """Raise ConfigError if the output file is one of ``inputs`` or was written by another program."""
    own_output(file, _is_refined, "audit --refine", *inputs, option="--refine")


def _is_refined(file: IO[bytes]) -> bool:
    return isinstance(parse_json(next(lines(file, MAX_LINE)).decode())["meta"][REFINED], dict)


def right(margins: Sequence[float]) -> float:
    """Return the fraction of correct guesses (positive margins). A tie counts as one half."""
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / max(len(margins), 1)
