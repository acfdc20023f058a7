"""Model card for an export: base model, results, usage, data, objective and training.

The card is a README.md with the front matter that Hugging Face reads. Secrets are removed from each value, which is written on one line in
a code span, so that Markdown and HTML in it have no effect. Because cards are published, only the last component of a path is shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds import checkpoint as checkpoints
from cfvlm_ds.core.config import SECTIONS
from cfvlm_ds.core.journal import records
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.run_folder import recorded_options
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.core.strict import dotted
from cfvlm_ds.core.text import one_line
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.core.versions import git_revision, version
from cfvlm_ds.evaluation import Accuracy, table
from cfvlm_ds.evaluation.before_after import changes_table, from_table, of_types, rows_table
from cfvlm_ds.evaluation.report import overlap_warning
from cfvlm_ds.export.folder import CARD, UNNAMED_BASE, UNNAMED_REPO, sealed
from cfvlm_ds.training.option_changes import ON_RESUME

_PAPER = "https://arxiv.org/abs/2506.17267"
_LONGEST = 200  # maximum number of characters per value
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_EXAMPLE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {name}
{load}
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "Describe the image."}}]
chat = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=100, do_sample=False)
print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""
_USE = """\
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name)"""
_USE_ADAPTER = """\
from peft import PeftModel

base = {base}
processor = AutoProcessor.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), name)"""
_STEP = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
_ALWAYS = ("train.learning_rate", "train.lr_scheduler_type", "train.seed", *_STEP)
"""Options that are listed even if they have their default values, as are module tuning and, if there are adapters, their options."""
_DEFAULTS = {name: each.default for section, options in SECTIONS.items() for name, _, each, _ in dotted(options, f"{section}.")}


def card_of(checkpoint: Path, say: Say, *, adapter: bool, evaluated: bool | None = None, repo: str | None = None) -> str | None:
    """Return the model card for an export of this checkpoint. If the card cannot be composed, warn and return None: an export never fails
    because of its card.

    ``evaluated`` is True if the results in the run folder belong to this checkpoint (default: if the run finished at its step). ``repo`` is
    the hub name that the card's example loads the model from.
    """
    try:
        return model_card(checkpoint, adapter=adapter, evaluated=evaluated, repo=repo)
    except Exception as error:  # a run folder can contain anything
        say(f"warning: no {CARD} could be written for {checkpoint} ({type(error).__name__}: {' '.join(str(error).split())})")
        return None


def model_card(checkpoint: Path, *, adapter: bool, evaluated: bool | None = None, repo: str | None = None) -> str:
    """Return the text of the model card for an export of this checkpoint. Raises ConfigError if the run folder has no configuration."""
    from huggingface_hub import ModelCardData

    run_dir, step = checkpoint.parent, int(checkpoints.description(checkpoint)["step"])
    options = masked(recorded_options(run_dir))
    environment, ds_config, data, results, changes, finished = (
        read_json(path) if (path := run_dir / f"{name}.json").is_file() else {}
        for name in ("environment", "ds_config", "data", "results", "before_after", "finished")
    )
    evaluated = finished.get("step") == step if evaluated is None else evaluated
    base = str(flat(options).get("model.name_or_path"))
    local, kind = not _HUB_NAME.fullmatch(base) or os.path.isdir(base), "Adapters" if adapter else "Weights"
    front = ModelCardData(
        base_model=None if local else base,
        base_model_relation=None if local else "adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["cfvlm-ds", "counterfactual", "vision-language", *(["lora"] if adapter else [])],
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {_code(_last(str(run_dir.absolute())))}", ""]
    lines += [f"{kind} after {step} optimizer steps from {_code(_last(base) if local else base)}, fine-tuned by cfvlm-ds with the"]
    lines += [f"counterfactual objectives of [CF-VLM]({_PAPER}), computed from token likelihoods.", ""]
    lines += [UNNAMED_BASE, ""] if local else []
    license = license_of(base)
    known = f"License of the base model: {_code(license)}." if license else "The license is not known: the base model's card names none."
    lines += [f"{known} Its terms may apply to these weights.", ""]
    names = ("name", "context", "groups", "format", "source", "digest")
    sets = [[_cell(_last(str(data_set[name]))) for name in names] for data_set in data]
    terms = []
    for name, settings in (options.get("objective") or {}).items():
        others = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "weight")
        if settings["weight"] != 0:
            terms.append([_cell(name), _cell(settings["weight"]), _cell(others)])
    load = _USE_ADAPTER.format(base=json.dumps(_line(_last(base) if local else base))) if adapter else _USE
    shared = [(each["name"], *pair) for each in data for pair in each.get("overlaps", {}).items()]
    warnings = [overlap_warning(_code(name), _code(keys), _code(_last(trained))) for name, trained, keys in shared]
    sections = {
        "Results": [
            *(line for warning in warnings for line in (warning, "")),
            *_results(results, changes, evaluated, environment.get("vocabulary")),
            *_samples(run_dir, step),
        ],
        "Use": ["```python", _EXAMPLE.format(name=json.dumps(repo or UNNAMED_REPO), load=load), "```"],
        "Data": [_IDENTITY, "", *_table("set | use | groups | format | manifest | identity", sets)] if data else [_NO_DATA],
        "Objective": ["The loss is the weighted sum of these terms.", "", *_table("term | weight | settings", terms)],
        "Training": _training(flat(options), flat(environment), flat(ds_config), step, adapter),
    }
    for title, section in sections.items():
        lines += [f"## {title}", "", *section, ""]
    return sealed("\n".join(lines) + "\n")


_NO_DATA = "Not known: the run folder has no readable data.json."
_IDENTITY = "The identity is a digest of texts, labels, weights and pictures. It stays the same if a data set is moved with its folder."


def _training(options: Any, environment: Any, ds_config: Any, step: int, adapter: bool) -> list[str]:
    adapted = any(options.get(f"model.{module}.tuning") == "lora" for module in ("vision_tower", "projector", "language_model"))
    listed = {}
    for name, kind in ON_RESUME.items():
        always = name in _ALWAYS or ".tuning" in name or (adapted and ".lora." in name)
        changed = kind in ("confirm", "refuse") and ".lora." not in name and options.get(name) != _DEFAULTS[name]
        if (always or changed) and options.get(name) is not None:
            listed[name] = options[name]
    precision = " ".join(half for half in ("bf16", "fp16") if ds_config.get(f"{half}.enabled"))
    known = {
        "optimizer steps": step,
        "ranks": environment.get("world_size"),
        "device": environment.get("device"),
        "ZeRO stage": ds_config.get("zero_optimization.stage"),
        "precision of training and evaluation" + " (the weights are stored in the base model's)" * (not adapter): precision
        or ("fp32" if ds_config else None),
        **listed,
        **{name: environment.get(f"packages.{name}") for name in ("torch", "transformers", "deepspeed")},
        "cfvlm-ds (training)": environment.get("packages.cfvlm-ds"),
        "git revision (training)": environment.get("git_revision"),
        "cfvlm-ds (export)": version("cfvlm-ds"),
        "git revision (export)": git_revision(),
    }
    rows = ([name, "not known" if value is None else _cell(value)] for name, value in known.items())
    return ["All other options have their defaults.", "", *_table("setting | value", rows)]


def _results(recorded: Mapping[str, Any], changes: Mapping[str, Any], evaluated: bool, vocabulary: int | None) -> list[str]:
    if not evaluated:
        return ["Not known: these weights had not been evaluated when they were exported."]
    if not recorded:
        return ["None: the run had no evaluation sets."]
    tables = {split: [Accuracy(**row) for row in rows] for split, rows in recorded.items()}
    compared = from_table(changes) if changes else []
    types = of_types(compared)
    first = [*changes_table(compared, plain=_cell, vocabulary=vocabulary).splitlines(), ""] if compared else []
    first += [*rows_table(types, plain=_cell).splitlines(), ""] if types else []
    sets = ", ".join(f"{_code(split)} ({rows[-1].num} groups)" for split, rows in tables.items() if rows)
    limits = f"Limits: evaluated only on {sets}; nothing is known about other pictures, prompts, languages and edit types."
    return [*first, *_CONTROLS, "", *table(tables, _cell).splitlines(), "", limits]


def _samples(run_dir: Path, step: int) -> list[str]:
    """Return the lines of a Markdown table with the first two texts that the model wrote at this step (``train.samples``), or [] if there
    are none.
    """
    written = [row for row in records(run_dir / "samples.jsonl", "delete it") if row["step"] == step][:2]
    rows = [[_cell(row["prompt"]), _cell(" / ".join(row["true"])), _cell(row["text"])] for row in written]
    return ["", "What the model writes about the first pictures:", "", *_table("prompt | true text | written", rows)] if rows else []


_CONTROLS = (
    "Accuracies for each edit type, and their unweighted mean, also for a blank image, which shows what language alone achieves. The last",
    "row is that of random scores.",
)


def _table(head: str, rows: Iterable[Iterable[str]]) -> list[str]:
    return [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}", *(f"| {' | '.join(row)} |" for row in rows)]


def license_of(base: str) -> str:
    """Return the name of the licence in the base model's card, or "" if the card states none or is not on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        path: Any = own_file(Path(base), CARD, base) if os.path.isdir(base) else try_to_load_from_cache(base, CARD)
        text = Path(path).read_text() if isinstance(path, str | Path) and os.path.isfile(path) else ""
        front = ModelCard(text).data.to_dict() if text.lstrip().startswith("---") else {}  # huggingface_hub warns about other cards
    except Exception:  # a card can contain anything
        return ""
    stated = front.get("license_name") or front.get("license")
    return _line(stated) if isinstance(stated, str) else ""


def _last(path: str) -> str:
    return Path(path).name


def _line(value: Any) -> str:
    """Format a value as one printable line with secrets removed."""
    return one_line(without_secrets(value if isinstance(value, str) else json.dumps(value, default=str)), _LONGEST)


def _code(value: Any) -> str:
    """Format a value as a code span, where no character has a special meaning."""
    return f"`{_line(value).replace('`', chr(39)) or ' '}`"


def _cell(value: Any) -> str:
    """Format a value as a code span for a table cell. Vertical bars are replaced, because they would end the cell even if escaped."""
    return _code(value).replace("|", "\N{BROKEN BAR}")
