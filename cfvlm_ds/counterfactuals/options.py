"""Options of the commands that make groups: what people say, in YAML and on the command line. Nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.named import near

TYPES = (
    "colour", "size", "material", "texture", "count", "relation", "object", "action", "swap_attribute", "swap_object", "other",
)  # fmt: skip
"""What an edit changes. ``other`` is what only `mine` and a language model find."""
TEMPLATE = 'Does this figure show "{text}"? Please answer Yes or No.'
PROMPT = "Describe the image."
Rule = Literal["match", "likelihood", "both", "checks"]


def _at_least(options: object, **least: float) -> None:
    """Raise ConfigError for a number below its least value, or one that is none."""
    for name, low in least.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"--{name} {value}: it is at least {low:g}")


def named(listed: str, known: Collection[str], option: str, what: str = "back end") -> list[str]:
    """The names of a list. Raises ConfigError for one that is not known, or none."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: no such {what}; {near(name, known, 'there are ')}")
    if not names:
        raise ConfigError(f"{option} names none; there are {', '.join(known)}")
    return names


def meaning(options: Any) -> dict[str, Any]:
    """What of the options of a step decides its records; the others may change when it goes on."""
    return {name: value for name, value in asdict(options).items() if name not in options.FREE}


_SOON = 0.001
"""Seconds: what a call may take at least."""


@dataclass(frozen=True)
class ProposeOptions:
    """Options of `data propose`.

    Args:
        back_ends: back ends to ask, separated by commas: rules, mine, llm, or one of a script.
        types: types of edits, separated by commas.
        per_type: proposals of a type, a caption and a back end at most.
        seed: draws which of several possible edits is proposed.
        words: YAML of TYPE: [WORD, ...], the words that edits of a type may lead to, all as often; where not given, those of the built-in
            lists as often as the captions use them.
        llm_url: address of an OpenAI-compatible server, such as http://node7:8000/v1.
        llm_model: name of its model.
        llm_see: also send the picture.
        llm_calls: calls in flight at most.
        llm_timeout_s: seconds for one call.
        llm_attempts: calls for a caption before its failure is noted.
    """

    FREE: ClassVar = ("llm_calls", "llm_timeout_s", "llm_attempts", "words")
    back_ends: str = "rules"
    types: str = ",".join(TYPES[:-1])
    per_type: int = 1
    seed: int = 0
    words: str = ""
    llm_url: str = ""
    llm_model: str = ""
    llm_see: bool = False
    llm_calls: int = 8
    llm_timeout_s: float = 60.0
    llm_attempts: int = 4

    def __post_init__(self) -> None:
        _at_least(self, per_type=1, llm_calls=1, llm_timeout_s=_SOON, llm_attempts=1)
        _ = self.wanted  # which refuses an unknown one

    @property
    def wanted(self) -> tuple[str, ...]:
        """The types. Raises ConfigError for an unknown one."""
        return tuple(named(self.types, TYPES, "--types", "type of edit"))


@dataclass(frozen=True)
class EditOptions:
    """Options of `data edit`.

    Args:
        back_ends: editors, separated by commas; each edit goes to the first that takes it: flip, folder, none, diffusers, command,
            or one of a script.
        model: model folder or hub name, of diffusers.
        attempts: pictures that are made of each edit, by editors that draw.
        seed: draws the attempts, with their ids.
        folder: edited pictures by id, FOLDER/SOURCE/NUMBER.png, of folder.
        masks: masks by id in the same way; white is where something may change.
        composite: lay the original over what is outside: the mask, the difference that was found, or nothing (none).
        command: command that is called for each picture, with {request} and {output} in it.
        options: NAME=VALUE,... that a diffusers pipeline is called with, such as num_inference_steps=28,guidance_scale=3.5.
        timeout_s: seconds for one picture of command.
        threads: pictures that command is asked for side by side.
    """

    FREE: ClassVar = ("threads", "timeout_s")
    back_ends: str = "flip,none"
    model: str = ""
    attempts: int = 1
    seed: int = 0
    folder: str = ""
    masks: str = ""
    composite: Literal["mask", "difference", "none"] = "mask"
    command: str = ""
    options: str = ""
    timeout_s: float = 120.0
    threads: int = 4

    def __post_init__(self) -> None:
        _at_least(self, attempts=1, threads=1, timeout_s=_SOON)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `data verify`.

    Args:
        scorer: model folder, hub name or run folder that scores the candidates; without one only pixels are compared.
        template: question whether a picture shows a text, with {text} in it; the default is that of VQAScore.
        prompt: what a caption answers.
        batch_size: candidates per batch of the scorer.
    """

    FREE: ClassVar = ("batch_size",)
    scorer: str = ""
    template: str = TEMPLATE
    prompt: str = PROMPT
    batch_size: int = 32

    def __post_init__(self) -> None:
        _at_least(self, batch_size=1)
        if "{text}" not in self.template:
            raise ConfigError(f"--template {self.template!r}: it has no {{text}} in it, the place of the caption")


@dataclass(frozen=True)
class SelectOptions:
    """Options of `data select`.

    Args:
        rule: scores that decide: match, likelihood, both, or checks for pixels alone; match where candidates were scored.
        margin: nats by which each comparison must be won, 0 at least.
        thresholds: file of thresholds; W/thresholds.json where `data verify --calibrate` wrote one.
        per_type: groups' edits of a type at most, drawn from the good ones; 0 for all.
        per_source: edits of one caption at most, drawn from the good ones: those with the largest margins would be the easy ones.
        splits: NAME=SHARE,... by source picture, such as train=0.9,test=0.1; one file for each.
        prompt: what the texts answer.
        source: name of the data set in its rows.
        seed: draws which picture belongs to which split.
    """

    rule: Rule | None = None
    margin: float | None = None
    thresholds: str = ""
    per_type: int = 0
    per_source: int = 4
    splits: str = ""
    prompt: str = PROMPT
    source: str = "made"
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, per_type=0, per_source=1, **({} if self.margin is None else {"margin": 0}))


@dataclass(frozen=True)
class AuditOptions:
    """Options of `data audit`.

    Args:
        scorer: model that shows how much of the texts is guessed without a picture.
        against: benchmarks that must share nothing with the data: manifests, and folders of pictures; several by commas.
        sample: pictures that are looked at by grain at most.
        seed: draws halves and samples.
        refine: file for the groups that stay when the set is thinned until a guess by length and, with a scorer, on a blank picture is as
            often right as wrong, and every word comes as often as it goes.
        strict: end with exit code 1 where something passes a limit.
    """

    scorer: str = ""
    against: str = ""
    sample: int = 5000
    seed: int = 0
    refine: str = ""
    strict: bool = False

    def __post_init__(self) -> None:
        _at_least(self, sample=1)
