"""Options of the commands that make groups, for YAML and the command line. This module has no slow imports."""

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
"""Edit types. Only the back ends ``mine`` and ``llm`` propose edits of type ``other``."""
TEMPLATE = 'Does this figure show "{text}"? Please answer Yes or No.'
PROMPT = "Describe the image."
Rule = Literal["match", "likelihood", "checks"]


def _at_least(options: object, **least: float) -> None:
    for name, low in least.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"--{name} {value} must be at least {low:g}")


def named(listed: str, known: Collection[str], option: str, what: str = "back end") -> list[str]:
    """Split a comma-separated list of names. Raises ConfigError for an unknown name or an empty list."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: no such {what}; {near(name, known, 'known: ')}")
    if not names:
        raise ConfigError(f"{option} is empty; name at least one of {', '.join(known)}")
    return names


def pairs(listed: str, option: str, example: str) -> dict[str, str]:
    """Split a comma-separated list of ``NAME=VALUE``. Raises ConfigError if an entry is malformed."""
    values: dict[str, str] = {}
    for part in filter(None, map(str.strip, listed.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{option} {part!r}: write NAME=VALUE, as in {example}")
        values[name] = value
    return values


def _check_template(template: str) -> None:
    if "{text}" not in template:
        raise ConfigError(f"--template {template!r} lacks {{text}}, which stands for the text in question; add it")


def meaning(options: Any) -> dict[str, Any]:
    """Return the options that determine a step's records. All other options can be changed when the step is resumed."""
    return {name: value for name, value in asdict(options).items() if name not in options.FREE}


_SOON = 0.001
"""Smallest allowed time limit for a call, in seconds."""


@dataclass(frozen=True)
class ProposeOptions:
    """Options of `data propose`.

    Args:
        back_ends: back ends, separated by commas: rules, mine, llm, or a back end from a script.
        types: edit types, separated by commas.
        per_type: maximum number of proposals per type, caption and back end.
        seed: seed for choosing among possible edits.
        words: YAML file with lines TYPE: [WORD, ...]. Edits of type TYPE introduce only these words, all equally often. By default, edits
            use the built-in words, and introduce each word about as often as they remove it.
        llm_url: address of an OpenAI-compatible server, such as http://node7:8000/v1.
        llm_model: name of the model on the server.
        llm_see: send the picture as well as the caption.
        llm_calls: maximum number of concurrent calls.
        llm_timeout_s: time limit per call, in seconds.
        llm_attempts: maximum number of calls per caption; if all fail, the failure is recorded.
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
        """Requested edit types. Raises ConfigError for an unknown type."""
        return tuple(named(self.types, TYPES, "--types", "type of edit"))


@dataclass(frozen=True)
class EditOptions:
    """Options of `data edit`.

    Args:
        back_ends: editors, separated by commas: flip, folder, none, diffusers, command, or an editor from a script. Each edit goes to the
            first editor that accepts it.
        model: model folder or hub name for the diffusers editor.
        attempts: number of pictures to make per edit, for editors whose results depend on the seed.
        seed: random seed, combined with the id of the edit and the number of the attempt.
        folder: folder of edited pictures, FOLDER/SOURCE/NUMBER.png (or .jpg, .jpeg, .webp), for the folder editor.
        masks: folder of masks, MASKS/SOURCE/NUMBER.png; white marks pixels that are allowed to change.
        composite: where to restore the original pixels: outside the mask (mask), outside the visibly changed area (difference), or nowhere
            (none).
        command: command line for the command editor, run once per picture; it must contain {request} and {output}.
        options: arguments of the diffusers pipeline, NAME=VALUE,..., such as num_inference_steps=28,guidance_scale=3.5.
        timeout_s: time limit for the command, in seconds per picture.
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
        scorer: model folder, hub name or run folder of the model that scores candidates. Without a scorer, only pixels are compared.
        template: question that asks whether a picture shows {text}. The default is VQAScore's question.
        prompt: prompt that the captions answer.
        batch_size: candidates per batch of the scorer.
    """

    FREE: ClassVar = ("batch_size",)
    scorer: str = ""
    template: str = TEMPLATE
    prompt: str = PROMPT
    batch_size: int = 32

    def __post_init__(self) -> None:
        _at_least(self, batch_size=1)
        _check_template(self.template)


@dataclass(frozen=True)
class SelectOptions:
    """Options of `data select`.

    Args:
        rule: scores to use: match, likelihood, or checks (pixels only). The default is the rule in the thresholds file; without a file,
            match if candidates were scored, otherwise checks.
        margin: threshold in nats, at least 0. The margin of each comparison must exceed it.
        thresholds: file with thresholds. The default is thresholds.json in the work folder if `data verify --calibrate` wrote it.
        per_type: maximum number of edits per type, drawn at random from the good edits; 0 for all.
        per_source: maximum number of edits per caption, drawn at random from the good edits (a choice by margin would favour easy edits).
        splits: share of the source pictures in each split, NAME=SHARE,..., such as train=0.9,test=0.1. Writes one file per split.
        exclude: file with the ids of edits to leave out, one per line, as the page of `data view` shows them.
        prompt: prompt that the texts answer.
        source: name of the data set, written to every row.
        seed: seed for assigning pictures to splits.
    """

    rule: Rule | None = None
    margin: float | None = None
    thresholds: str = ""
    per_type: int = 0
    per_source: int = 4
    splits: str = ""
    exclude: str = ""
    prompt: str = PROMPT
    source: str = "made"
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, per_type=0, per_source=1, **({} if self.margin is None else {"margin": 0}))


@dataclass(frozen=True)
class SampleOptions:
    """Options of `data sample`.

    Args:
        judge: judge that decides whether a text is true; it must not be the model itself. The judge ``answers`` compares short answers with
            those in the data; ``match`` asks the model in --scorer. MODULE:FUNCTION names a function that takes a text and its row, and
            returns True, False or None (undecided).
        scorer: model folder, hub name or run folder of the model that the judge match asks.
        template: question of the judge match about {text}; {prompt} stands for the prompt that the text answers.
        margin: threshold of the judge match, in nats: a text is true if the log-odds of yes exceed it, and false if those of no do.
        n: number of texts per picture and prompt, generated in one batch.
        temperature: sampling temperature; 1 is the model's own distribution.
        top_p: each token is sampled from the smallest set of most likely tokens with at least this total probability; 1 for all tokens.
        max_new_tokens: maximum number of tokens per text; texts that are cut off are discarded.
        prompt: one prompt for all pictures; the answers to a row's first prompt count as the picture's true texts. By default, each picture
            is shown with the prompts of its row.
        most_false: maximum number of false texts in a group.
        seed: sampling seed, combined with the picture's contents and the prompt.
        served_model: name of the model on the server, if MODEL is the address of an OpenAI-compatible server.
        calls: maximum number of concurrent calls to the server.
        timeout_s: time limit per call, in seconds.
        attempts: maximum number of calls per request.
    """

    FREE: ClassVar = ("margin", "most_false", "calls", "timeout_s", "attempts")
    judge: str
    scorer: str = ""
    template: str = TEMPLATE
    margin: float = 0.0
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    prompt: str = ""
    most_false: int = 4
    seed: int = 0
    served_model: str = ""
    calls: int = 8
    timeout_s: float = 120.0
    attempts: int = 4

    def __post_init__(self) -> None:
        _at_least(self, n=1, temperature=0.01, top_p=0.01, max_new_tokens=1, most_false=1, margin=0, calls=1, timeout_s=_SOON, attempts=1)
        _check_template(self.template)
        if (self.judge == "match") != bool(self.scorer):
            raise ConfigError("--judge match and --scorer go together: the scorer is the model that the judge asks")
        if self.top_p > 1:
            raise ConfigError(f"--top_p {self.top_p} must be at most 1")
        if self.prompt and self.judge == "answers":
            raise ConfigError("--judge answers compares texts with the answers to the prompts of the rows; leave out --prompt")


@dataclass(frozen=True)
class AuditOptions:
    """Options of `data audit`.

    Args:
        scorer: model that measures how well true and false texts can be told apart without a picture.
        seed: seed for dividing the groups into halves and drawing samples.
        strict: exit with code 1 if a limit is exceeded.
    """

    scorer: str = ""
    seed: int = 0
    strict: bool = False
