"""Thinning a set until what is guessed without a picture is as often wrong as right: by length, by words, by a scorer on a blank picture.

Adversarial, as in the filtering of SugarCrepe: of each pattern of right and wrong guesses as many stay as of the opposite, and the
words are learnt anew on what is left until they tell nothing more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import lines, parse_json
from cfvlm_ds.core.untrusted import own_output
from cfvlm_ds.counterfactuals.audit.shortcuts import word_weights
from cfvlm_ds.counterfactuals.propose.word_difference import words
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.formats.cfgroup import to_row
from cfvlm_ds.data.lines import MAX_LINE
from cfvlm_ds.evaluation.comparisons import factual_texts

TARGET = 0.02
"""How far from one half the share of right guesses may be."""
REFINED = "refined"
"""Key of a row's ``meta`` that says how the set was thinned."""
_ROUNDS = 50

Pairs = Sequence[tuple[str, str]]


def text_pairs(group: CounterfactualGroup) -> list[tuple[str, str]]:
    """Each true text of the factual image with each false one of the same prompt."""
    return [(group.candidates[true].text, group.candidates[false].text) for true, false in factual_texts(group)]


def refine(groups: Sequence[CounterfactualGroup], blind: Sequence[float] | None, seed: int, file: Path) -> str:
    """Write the groups that stay, and say what a guess is worth on them. ``blind`` are the margins of a scorer without a picture.

    Raises ConfigError where none can stay.
    """
    pairs = [text_pairs(group) for group in groups]
    draw = {k: seed_of("refine", seed, group.id) for k, group in enumerate(groups)}
    kept, shares = thinned(pairs, blind, draw)
    if not kept:
        worst = max(shares, key=lambda cue: abs(shares[cue] - 0.5))
        raise ConfigError(
            f"--refine: a blind guess ({worst}) is right or wrong in the same way for all {len(groups)} groups, so "
            "none can stay; propose edits in both directions"
        )
    folder = file.parent.absolute()
    with whole_file(file) as out:
        for k in kept:
            out.write(json.dumps(_row(groups[k], folder, seed), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    said = ", ".join(f"{100 * share:.1f} % by {cue}" for cue, share in shares.items())
    return f"{len(kept)} of {len(groups)} groups, of which a blind guess is right in {said}"


def refined_file(file: Path, *inputs: str) -> None:
    """Raise ConfigError where the groups that stay cannot be written to a file: it is read here, or somebody else's."""
    own_output(file, _is_refined, "audit --refine", *inputs, option="--refine")


def _is_refined(file: IO[bytes]) -> bool:
    return isinstance(parse_json(next(lines(file, MAX_LINE)).decode())["meta"][REFINED], dict)


def _row(group: CounterfactualGroup, folder: Path, seed: int) -> dict[str, Any]:
    own = parse_json(group.meta) if group.meta else {}
    return to_row(group, folder, (own if isinstance(own, dict) else {"meta": own}) | {REFINED: {"seed": seed}})


def thinned(pairs: Sequence[Pairs], blind: Sequence[float] | None, draw: Mapping[int, int]) -> tuple[list[int], dict[str, float]]:
    """The places of the groups that stay, and the share of right guesses of each cue on them; where none can, on all."""
    kept, whole = list(range(len(pairs))), dict[str, float]()
    for _ in range(_ROUNDS):
        cues = cues_of(pairs, blind, draw, kept)
        shares = {cue: right(margins) for cue, margins in cues.items()}
        whole = whole or shares
        noise = 0.98 / math.sqrt(max(len(kept), 1))  # of a guess that is none
        if all(abs(share - 0.5) <= (max(TARGET, noise) if cue == "words" else TARGET) for cue, share in shares.items()):
            return kept, shares
        stay = balanced(list(zip(*cues.values(), strict=True)), [draw[k] for k in kept])
        kept = [kept[k] for k in stay]
        if not kept:
            break
    return [], whole


def cues_of(pairs: Sequence[Pairs], blind: Sequence[float] | None, draw: Mapping[int, int], kept: Sequence[int]) -> dict[str, list[float]]:
    """By cue the margin of each group that is left: above 0 where the guess is right. The words of one half are learnt on the other."""
    weights = [word_weights([pair for k in kept if draw[k] % 2 == half for pair in pairs[k]]) for half in (0, 1)]

    def by_words(k: int) -> float:
        weight = weights[1 - draw[k] % 2]
        scores = [[sum(weight.get(word, 0.0) for word in set(words(text))) for text in pair] for pair in pairs[k]]
        return sum(new - old for old, new in scores)

    cues = {
        "length": [float(sum(len(new) - len(old) for old, new in pairs[k])) for k in kept],
        "words": [round(by_words(k), 9) for k in kept],
    }
    return cues | ({} if blind is None else {"the scorer": [blind[k] for k in kept]})


def balanced(margins: Sequence[Sequence[float]], draw: Sequence[int]) -> list[int]:
    """The places that stay where as many have a pattern of right and wrong guesses as have the opposite one; which of the more go is drawn.
    Where nothing is guessed, all stay."""
    patterns: dict[tuple[int, ...], list[int]] = {}
    for k, row in enumerate(margins):
        patterns.setdefault(tuple((margin > 0) - (margin < 0) for margin in row), []).append(k)
    kept: list[int] = []
    for pattern, places in patterns.items():
        opposite = patterns.get(tuple(-sign for sign in pattern), [])
        kept += sorted(places, key=lambda k: (draw[k], k))[: len(opposite)]
    return sorted(kept)


def right(margins: Sequence[float]) -> float:
    """Share of right guesses, ties one half."""
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / max(len(margins), 1)
