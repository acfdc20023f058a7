"""``cfvlm-ds describe``: have a model write texts about pictures, or rank given texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cfvlm_ds.cli.models import load_scorer
from cfvlm_ds.cli.options import ImageLimits, Positive, add_function, model_named, say
from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.ranks import num_ranks
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import quoted

SomePictures = Annotated[list[str], ("nargs", "*"), ("metavar", "PICTURE")]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    add_function(commands, _describe)


def _describe(
    model: str,
    picture: SomePictures,
    *,
    prompt: str = DESCRIBE,
    choices: list[str] | None = None,
    max_new_tokens: Positive = 128,
    limits: ImageLimits,
) -> None:
    """Have a model write texts about pictures, or rank given texts by their likelihood. If no pictures are given, their paths are read from
    standard input.

    Example: cfvlm-ds describe runs/quickstart dog.jpg --choices "a dog on a sofa" "a sofa on a dog"

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        picture: picture files; give them before the options.
        prompt: question or instruction.
        choices: texts to rank by their log-likelihood as answers to the prompt, instead of generating a text.
        max_new_tokens: maximum number of tokens to generate.
    """
    if num_ranks() > 1:
        raise ConfigError(f"describe runs in one process, but {num_ranks()} were started; start only one")
    if missing := [each for each in picture if not Path(each).is_file()]:
        raise ConfigError(f"{missing[0]} is not a file; name image files")
    if choices and (misplaced := [each for each in choices if Path(each).is_file()]):
        raise ConfigError(f"--choices: {misplaced[0]} is a file, not a text; put pictures before the options")
    if choices and len(set(choices)) < len(choices):
        raise ConfigError("--choices has the same text twice; give different texts")
    from cfvlm_ds.demo.family_checkpoints import is_random
    from cfvlm_ds.evaluation.generation import write
    from cfvlm_ds.models import load_config

    config, adapter = model_named(model, limits)
    scorer, collator, world = load_scorer(config, adapter, max_pixels=DataConfig().max_pixels)
    if is_random(Path(config.name_or_path)):
        say(f"note: {config.name_or_path} is a small model with random weights; its texts mean nothing")
    stored, loaded = load_config(config.name_or_path).dtype, scorer.model.dtype
    if stored not in (None, loaded):
        names = [str(dtype).removeprefix("torch.") for dtype in (loaded, stored)]
        say(f"note: computed in {names[0]}, as by evaluate; transformers loads the weights in {names[1]} by default")
    failed = 0
    for path in picture or _typed():
        try:
            answer = (
                _preferences(scorer, collator, world, Path(path), prompt, choices)
                if choices
                else write(scorer.model, collator, world.device, (Path(path),), prompt, max_new_tokens, do_sample=False)
            )
        except DataError as error:
            failed += 1
            print_line(f"error: {path}: {error}", error=True)
        else:
            print(f"{path}\n{answer}\n", flush=True)
    if failed and not (sys.stdin and sys.stdin.isatty() and not picture):
        raise DataError(f"{failed} pictures could not be described; see the errors above")


def _typed() -> Iterator[str]:
    while line := _line():
        yield line


def _line() -> str:
    if sys.stdin is None:  # standard input is closed
        return ""
    if sys.stdin.isatty():
        print("picture (empty line to quit): ", end="", flush=True)
    return sys.stdin.readline().strip()


def _preferences(scorer: Any, collator: Any, world: Any, picture: Path, prompt: str, choices: list[str]) -> str:
    """Return a table of the texts, most likely first, the preferred text, and a line that explains the columns."""
    from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
    from cfvlm_ds.evaluation import score_groups

    texts = tuple(Candidate(prompt, text) for text in choices)
    group = CounterfactualGroup(str(picture), ((picture,),), texts, ((1, *(None for _ in choices[1:])),))
    (scores,) = score_groups(scorer, collator, [group], world, label="choices")
    rows = sorted(zip(scores.logp[0].tolist(), scores.blank.tolist(), choices, strict=True), reverse=True)
    lines = [f"{'nats':>9} {'behind':>9} {'blank':>9} {'gain':>9}  text"]
    lines += [f"{seen:9.2f} {rows[0][0] - seen:9.2f} {blank:9.2f} {seen - blank:9.2f}  {quoted(text)}" for seen, blank, text in rows]
    gained = max(rows, key=lambda row: row[0] - row[1])[2]
    preferred = f"preferred: {quoted(rows[0][2])} by nats, which the metric pair compares"
    if gained != rows[0][2]:
        preferred += f"; by gain, which leaves out the language prior: {quoted(gained)}"
    return "\n".join([*lines, preferred, _COLUMNS])


_COLUMNS = "nats: log p(text | picture); behind: distance to the first text; blank: nats on a blank picture; gain: nats - blank"
