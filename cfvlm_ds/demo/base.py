"""The demo's pretrained base: a small LLaVA that knows words and things and fails at composition.

`make base` makes it again: it trains benchmarks/base.yaml and then calls ``python -m cfvlm_ds.demo.base RUN``, which puts the run's export
where the package keeps it, with what the run was and how it did.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.run_folder import recorded_options
from cfvlm_ds.core.untrusted import refuse_filled

FOLDER = Path(__file__).resolve().parent / "base_checkpoint"
RECORD = "base.json"
"""How the base was made and what it can do: options, steps, seconds of training, accuracies in % by split and edit."""


def write_base(out_dir: str | Path) -> Path:
    """Copy the base to ``out_dir``; nothing if it is there. ConfigError where the package has none, or ``out_dir`` holds others."""
    out = Path(out_dir)
    if (out / "config.json").exists():
        return out
    if not (FOLDER / "config.json").is_file():
        raise ConfigError(f"{FOLDER} is missing; install the package whole, or make the base with `make base`")
    refuse_filled(out, "name another folder")
    with whole_folder(out) as partial:
        shutil.copytree(FOLDER, partial, dirs_exist_ok=True)
    return out


def keep_base(run: Path) -> None:
    """Put the export of a finished run in the place of the package's base."""
    finished, results = run / "finished.json", json.loads((run / "results.json").read_text(encoding="utf-8"))
    trained = [row for row in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) if "loss" in row]
    record = {
        "options": recorded_options(run),
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "steps": json.loads(finished.read_text(encoding="utf-8"))["step"],
        "seconds": round(trained[-1]["time"] - trained[0]["time"]),
        "accuracies": {
            split: {row["name"]: {"groups": row["num"], **{k: round(v, 1) for k, v in row["metrics"].items()}} for row in rows}
            for split, rows in results.items()
        },
    }
    with whole_folder(FOLDER) as partial:
        shutil.copytree(run / "export", partial, dirs_exist_ok=True)
        (partial / "README.md").write_text(_card(record), encoding="utf-8")
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _card(record: dict[str, Any]) -> str:
    rows = record["accuracies"]
    edits = [f"| {edit} | {rows['validation'][edit]['group']:.1f} | {rows['combo'][edit]['group']:.1f} |" for edit in rows["combo"]]
    asked = ", ".join(f"{split.replace('_', ' ')} {rows[split]['all']['group']:.1f}" for split in ("yes_no", "choice", "count"))
    return _CARD.format(steps=record["steps"], minutes=round(record["seconds"] / 60), edits="\n".join(edits), asked=asked)


_CARD = """---
license: "apache-2.0"
library_name: "transformers"
pipeline_tag: "image-text-to-text"
tags:
- cfvlm-ds
---

# The pretrained base of cfvlm-ds's demo

A LLaVA of one million weights for drawn scenes of 48 pixels: two kinds of things, what they look like, how many, and where. It has
learned from captions and answers by plain likelihood, {steps} steps from random weights, and was never shown two pictures that differ in
what stands where: it knows words and things better than how they go together. It is of no use for other pictures.

`make base` makes it again, in some {minutes} minutes of two CPU cores; benchmarks/base.yaml is its configuration, base.json the record of
its training. Group accuracy in %, chance 16.7: scenes like those of training, and combinations of colour and shape that it never showed.

| edit | seen combinations | held out |
|---|---:|---:|
{edits}

Questions about held-out combinations, in all: {asked}.
"""


if __name__ == "__main__":
    keep_base(Path(sys.argv[1]))
