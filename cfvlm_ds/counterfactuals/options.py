"""Options of the commands that make groups, in YAML and on the command line. This module has no slow imports."""

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
"""Types of edits. Only `mine` and a language model propose edits of type ``other``."""
TEMPLATE = 'Does this figure show "{text}"? Please answer Yes or No.'
PROMPT = "Describe the image."
Rule = Literal["match", "likelihood", "checks"]


def _at_least(options: object, **least: float) -> None:
    """Raise ConfigError for a number below its smallest value, and for one that is not finite."""
    for name, low in least.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"--{name} {value} must be at least {low:g}")


def named(listed: str, known: Collection[str], option: str, what: str = "back end") -> list[str]:
    """Split a list of names. Raises ConfigError for an unknown name, and for an empty list."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: no such {what}; {near(name, known, 'known: ')}")
    if not names:
        raise ConfigError(f"{option} is empty; name at least one of {', '.join(known)}")
    return names


def pairs(listed: str, option: str, example: str) -> dict[str, str]:
    """Split a list of ``NAME=VALUE``. Raises ConfigError for another form."""
    values: dict[str, str] = {}
    for part in filter(None, map(str.strip, listed.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{option} {part!r}: write NAME=VALUE, as in {example}")
        values[name] = value
    return values


def meaning(options: Any) -> dict[str, Any]:
    """Return the options of a step that determine its records; the others may change before the step is resumed."""
    return {name: value for name, value in asdict(options).items() if name not in options.FREE}


_SOON = 0.001
"""Smallest time limit of a call, in seconds."""


@dataclass(frozen=True)
class ProposeOptions:
    """Options of `data propose`.

    Args:
        back_ends: back ends, separated by commas: rules, mine, llm, or one of a script.
        types: types of edits, separated by commas.
        per_type: largest number of proposals of one type for a caption and back end.
        seed: seed of the choice between several possible edits.
        words: YAML file of TYPE: [WORD, ...], the words that edits of a type may introduce, all equally often. By default the built-in
            words are used, as often as they occur in the captions.
        llm_url: address of an OpenAI-compatible server, such as http://node7:8000/v1.
        llm_model: name of its model.
        llm_see: also send the picture.
        llm_calls: largest number of concurrent calls.
        llm_timeout_s: time limit of a call in seconds.
        llm_attempts: calls for a caption before its failure is recorded.
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
        _ = self.wanted  # raises for an unknown type

    @property
    def wanted(self) -> tuple[str, ...]:
        """Requested types of edits. Raises ConfigError for an unknown one."""
        return tuple(named(self.types, TYPES, "--types", "type of edit"))


@dataclass(frozen=True)
class EditOptions:
    """Options of `data edit`.

    Args:
        back_ends: editors, separated by commas; each edit goes to the first that accepts it: flip, folder, none, diffusers, command,
            or one of a script.
        model: model folder or hub name for the editor diffusers.
        attempts: pictures per edit, for editors whose results depend on the seed.
        seed: seed of the attempts, combined with their ids.
        folder: folder of edited pictures for the editor folder, FOLDER/SOURCE/NUMBER.png.
        masks: folder of masks with the same names; white marks where the picture may change.
        composite: restore the original outside of the mask, outside of the measured difference, or nowhere (none).
        command: command line of the editor command, run for each picture; it must contain {request} and {output}.
        options: arguments of the diffusers pipeline, NAME=VALUE,..., such as num_inference_steps=28,guidance_scale=3.5.
        timeout_s: time limit of the command for one picture in seconds.
        threads: number of concurrent commands.
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
        prompt: prompt of the captions.
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
            raise ConfigError(f"--template {self.template!r} lacks {{text}}, which stands for the caption; add it")


@dataclass(frozen=True)
class SelectOptions:
    """Options of `data select`.

    Args:
        rule: scores that decide: match, likelihood, or checks for pixels only; match if candidates were scored.
        margin: nats by which each comparison must be won, at least 0.
        thresholds: file of thresholds; W/thresholds.json if `data verify --calibrate` wrote one.
        per_type: largest number of edits of a type, drawn from the good ones; 0 for all.
        per_source: largest number of edits of one caption, drawn from the good ones, because those with the largest margins are the
            easiest.
        splits: splits of the source pictures, NAME=SHARE,..., such as train=0.9,test=0.1; one file per split.
        prompt: prompt of the texts.
        source: name of the data set in its rows.
        seed: seed for assigning pictures to splits.
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
class SampleOptions:
    """Options of `data sample`.

    Args:
        judge: what decides whether a text is true, and is not the model itself: answers, which compares short answers with those of the
            data, or MODULE:FUNCTION, a function of a text and its row that returns True, False or None (undecided).
        n: texts per picture and prompt; they are generated together.
        temperature: temperature of the sampling; 1 is the model's own distribution.
        top_p: share of the probability from which tokens are sampled; 1 for all.
        max_new_tokens: largest number of tokens; a text that is cut off is left out.
        prompt: prompt of every picture, whose true texts are then those of the first prompt in its row; by default, all prompts of the rows
            are used.
        most_false: largest number of false texts in a group.
        seed: seed of the sampling, combined with the contents of the picture and the prompt.
    """

    FREE: ClassVar = ("most_false",)
    judge: str
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    prompt: str = ""
    most_false: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, n=1, temperature=0.01, top_p=0.01, max_new_tokens=1, most_false=1)
        if self.top_p > 1:
            raise ConfigError(f"--top_p {self.top_p} must be at most 1")
        if self.prompt and self.judge == "answers":
            raise ConfigError("--judge answers compares texts with the answers to the prompts of the rows; leave out --prompt")


@dataclass(frozen=True)
class AuditOptions:
    """Options of `data audit`.

    Args:
        scorer: model that measures how well the texts can be guessed without a picture.
        against: benchmarks that must share nothing with the data: manifests, and folders of pictures, separated by commas.
        sample: largest number of picture pairs whose grain is compared.
        seed: seed of halves and samples.
        refine: file for a balanced subset of the groups. In it, guessing by length, and by the scorer on a blank picture if one is given,
            is right as often as wrong, and every word is introduced as often as it is removed.
        strict: exit with code 1 if a limit is exceeded.
    """

    scorer: str = ""
    against: str = ""
    sample: int = 5000
    seed: int = 0
    refine: str = ""
    strict: bool = False

    def __post_init__(self) -> None:
        _at_least(self, sample=1)
