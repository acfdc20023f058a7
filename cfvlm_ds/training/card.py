"""The model card of an export: what was trained from what, on which data, with which objective, and how it did.

A README.md with the front matter that Hugging Face reads. It is made of what the run folder records, which may be somebody else's: what
comes from there stands in code spans, in which neither Markdown nor HTML means anything, on one line, without secrets. Cards are published,
so of paths only the last name is shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds import checkpoint as checkpoints
from cfvlm_ds.core.reading import parse_yaml, read_json
from cfvlm_ds.core.run_folder import recorded_options
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.core.text import one_line
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.core.versions import git_revision, version
from cfvlm_ds.evaluation import Accuracy, table
from cfvlm_ds.export.folder import CARD, sealed

_PAPER = "https://arxiv.org/abs/2506.17267"
_LONGEST = 200  # characters of a value
_MOST_ROWS = 50  # of a split in the table of results
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"\w[\w./+-]{0,99}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{32}")

_SETTINGS = (
    "train.learning_rate", "train.lr_scheduler_type", "train.warmup_ratio", "train.weight_decay", "train.max_grad_norm",
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "data.max_tokens_per_micro_batch", "train.seed",
    "model.vision_tower.tuning", "model.projector.tuning", "model.language_model.tuning", "model.min_pixels", "model.max_pixels",
    "model.max_tiles",
)  # fmt: skip
_OF_ADAPTERS = tuple(f"model.lora.{name}" for name in ("rank", "alpha", "dropout", "dora", "rslora", "load_in_4bit"))


def card_of(checkpoint: Path, say: Callable[[str], object], *, adapter: bool, evaluated: bool | None = None) -> str | None:
    """The card of an export of this checkpoint; None, with a warning, where it cannot be made: no export fails for its card.

    ``evaluated`` says whether the results in the run folder are this checkpoint's; when not given, that is so where the run has finished
    with it.
    """
    try:
        return model_card(checkpoint, adapter=adapter, evaluated=evaluated)
    except Exception as error:  # of whatever somebody's run folder holds
        say(f"warning: no {CARD} could be written for {checkpoint} ({type(error).__name__}: {' '.join(str(error).split())})")
        return None


def model_card(checkpoint: Path, *, adapter: bool, evaluated: bool | None = None) -> str:
    """The text of the card. Raises ConfigError where the run folder has no configuration."""
    run_dir, step = checkpoint.parent, int(checkpoints.description(checkpoint)["step"])
    options = masked(recorded_options(run_dir))
    environment, ds_config = _recorded(run_dir / "environment.json"), _recorded(run_dir / "ds_config.json")
    if evaluated is None:
        evaluated = _at(_recorded(run_dir / "finished.json"), "step") == step
    base = str(_at(options, "model.name_or_path"))
    local, kind = not _HUB_NAME.fullmatch(base) or os.path.isdir(base), "Adapters" if adapter else "Weights"
    front = {} if local else {"base_model": base}
    front |= {"base_model_relation": "adapter" if adapter else "finetune"}
    front |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "image-text-to-text"} | license_of(base)
    tags = ["cfvlm-ds", "counterfactual", "vision-language", *(["lora"] if adapter else [])]
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [f"# {_code(_last(str(run_dir.absolute())))}", ""]
    lines += [f"{kind} after {step} optimizer steps from {_code(_last(base) if local else base)}, fine-tuned with counterfactual"]
    lines += [f"objectives (those of [CF-VLM]({_PAPER}), stated over token likelihoods) by cfvlm-ds.", ""]
    if local:
        lines += ["The base is a folder; its name on a hub, and a line `base_model` above, are yours to add before you publish this.", ""]
    if "license" not in front:
        lines += ["The license is not known: the base states none that this program has found.", ""]
    lines += ["## Data", "", *_data(run_dir / "data.json"), ""]
    lines += ["## Objective", "", *_objective(_at(options, "objective")), ""]
    lines += ["## Training", "", *_training(options, environment, ds_config, step), ""]
    lines += ["## Results", "", *_results(run_dir / "results.json", evaluated), ""]
    lines += ["## Use", "", "```python", *(_USE_ADAPTER if adapter else _USE), "```", ""]
    return sealed("\n".join(lines) + "\n")


_USE = (
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "",
    'model = AutoModelForImageTextToText.from_pretrained("path/of/this/folder")',
    'processor = AutoProcessor.from_pretrained("path/of/this/folder")',
)
_USE_ADAPTER = (
    "from peft import PeftModel",
    "from transformers import AutoModelForImageTextToText",
    "",
    'base = AutoModelForImageTextToText.from_pretrained("path/or/name/of/the/base")',
    'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
)


def _data(path: Path) -> list[str]:
    listed = _recorded(path, list)
    if not listed:
        return ["Not known: the run folder has no data.json that can be read; earlier revisions wrote none."]
    rows = []
    for each in listed if isinstance(listed, list) else ():
        found = _at(each, "digest")
        identity = _cell(found) if isinstance(found, str) and _DIGEST.fullmatch(found) else "not known"
        shown = [_cell(_at(each, name)) for name in ("name", "context", "groups", "format")]
        rows.append(f"| {' | '.join(shown)} | {_cell(_last(str(_at(each, 'source'))))} | {identity} |")
    text = "The identity is a digest of texts, labels, weights and pictures; moved with its folder, a data set keeps it."
    return [text, "", "| set | use | groups | format | manifest | identity |", "|---|---|---:|---|---|---|", *rows]


def _objective(terms: Any) -> list[str]:
    if not isinstance(terms, Mapping) or not terms:
        return ["Not known: the run's config.yaml states none."]
    rows = []
    for name, settings in terms.items():
        others = {key: value for key, value in settings.items() if key != "weight"} if isinstance(settings, Mapping) else {}
        if (weight := _at(settings, "weight")) != 0:
            rows.append(f"| {_cell(name)} | {_cell(weight)} | {_cell(', '.join(f'{key} {value}' for key, value in others.items()))} |")
    return ["The loss is the weighted sum of these terms.", "", "| term | weight | settings |", "|---|---:|---|", *rows]


def _training(options: Any, environment: Any, ds_config: Any, step: int) -> list[str]:
    modules = ("vision_tower", "projector", "language_model")
    adapted = any(_at(options, f"model.{module}.tuning") == "lora" for module in modules)
    given = {name: _at(options, name) for name in (*_SETTINGS, *(_OF_ADAPTERS if adapted else ()))}
    for module in modules:
        given[f"model.{module}.learning_rate"] = _at(options, f"model.{module}.learning_rate")
    known = {"optimizer steps": step, "ranks": _at(environment, "world_size"), "device": _at(environment, "device")}
    known |= {"ZeRO stage": _at(ds_config, "zero_optimization.stage"), "bfloat16": _at(ds_config, "bf16.enabled")}
    known |= {name: value for name, value in given.items() if value is not None}
    packages = _at(environment, "packages")
    for name in ("torch", "transformers", "deepspeed"):
        known[name] = _at(packages, name)
    known["cfvlm-ds of the training"] = _at(packages, "cfvlm-ds")
    known["revision of the training"] = _at(environment, "git_revision")
    known |= {"cfvlm-ds of this export": version("cfvlm-ds"), "revision of this export": git_revision()}
    rows = [f"| {name} | {'not known' if value in (None, 'unknown', 'none') else _cell(value)} |" for name, value in known.items()]
    return ["| setting | value |", "|---|---|", *rows]


def _results(path: Path, evaluated: bool) -> list[str]:
    if not evaluated:
        return ["Not known: these weights were exported before, or without, an evaluation of them."]
    try:
        found = _accuracies(_recorded(path))
        if not found:
            return ["None: the run had no evaluation sets."]
        shown, left_out = {}, 0
        for split, rows in found.items():
            left_out += max(0, len(rows) - _MOST_ROWS)
            shown[split] = rows if len(rows) <= _MOST_ROWS else [*rows[: _MOST_ROWS - 1], rows[-1]]
        lines = table(shown, _cell).splitlines()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError):
        return ["Not known: the run folder's results.json cannot be read."]
    text = (
        "Accuracies in %, by edit type and in their mean (`all`), which also stands for a blank image and for another group's image: what"
    )
    more = [f"{left_out} more rows are in the run's results.md.", ""] if left_out else []
    return [text, "language alone achieves. Chance is in the last row.", "", *lines, "", *more][:-1]


def _accuracies(recorded: Any) -> dict[str, list[Accuracy]]:
    """The rows of a results.json. Raises ValueError or TypeError where it has other names than results can have."""
    found: dict[str, list[Accuracy]] = {}
    for split, rows in recorded.items():
        found[split] = [Accuracy(**row) for row in rows]
        for row in found[split]:
            names = [split, *row.metrics, *row.blind, *row.shuffled, *row.groups, *row.losses]
            if not all(_NAME.fullmatch(name) for name in names) or not isinstance(row.num, int) or not isinstance(row.name, str):
                raise ValueError(split)
            counts: Iterable[Any] = (*row.groups.values(), *row.comparisons.values())
            if not all(isinstance(count, int) for count in counts):
                raise ValueError(split)
            for unused in (*row.unused.values(), *(term["unused"] for term in row.losses.values())):
                if not all(isinstance(name, str) for name in unused):
                    raise ValueError(split)
            for term in row.losses.values():
                if not isinstance(term["groups"], int) or not isinstance(term["lacking"], str):
                    raise ValueError(split)
    return found


def license_of(base: str) -> dict[str, str]:
    """The license that the base's own card states, as front matter; nothing where it states none, or has no card here."""
    path: Any = None
    try:
        if os.path.isdir(base):
            path = own_file(Path(base), CARD, base)
        else:
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(base, CARD)
        if not isinstance(path, str | Path):
            return {}
        found = re.match(r"---\r?\n(.*?)\r?\n---\s", Path(path).read_text(), re.DOTALL)
        if found is None:
            return {}
        front = parse_yaml(found[1])
    except (OSError, ValueError, RecursionError):  # a ConfigError is a ValueError, and so is a hub's name that is none
        return {}
    if not isinstance(front, dict) or not isinstance(front.get("license"), str) or not _LICENSE.fullmatch(front["license"]):
        return {}
    named = {name: front[name] for name in ("license_name", "license_link") if isinstance(front.get(name), str)}
    return {"license": front["license"]} | {name: _line(value) for name, value in named.items()}


def _recorded(path: Path, kind: type = dict) -> Any:
    """A record of the run folder; empty where it is missing or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _at(values: Any, option: str) -> Any:
    """The value of a dotted option in nested ones; None where it is not there."""
    for name in option.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _line(value: Any) -> str:
    """A value on one printable line without secrets."""
    return one_line(without_secrets(value if isinstance(value, str) else json.dumps(value, default=str)), _LONGEST)


def _code(value: Any) -> str:
    """A value as a code span: its text and nothing else, whatever it holds."""
    return f"`{_line(value).replace('`', chr(39)) or ' '}`"


def _cell(value: Any) -> str:
    """The same in a cell of a table, which a bar would end; after a backslash of the value's own even one that is escaped."""
    return _code(value).replace("|", "\N{BROKEN BAR}")
