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

FOLDER = Path(__file__).resolve().parent / "base_checkpoint"
RECORD = "base.json"
"""How the base was made and what it can do: options, steps, seconds of training, accuracies in % by split and edit."""


def write_base(out_dir: str | Path) -> Path:
    """Copy the base to ``out_dir``; nothing if the folder is there. Raises ConfigError where the package has none."""
    out = Path(out_dir)
    if (out / "config.json").exists():
        return out
    if not (FOLDER / "config.json").is_file():
        raise ConfigError(f"{FOLDER} is missing; install the package whole, or make the base with `make base`")
    with whole_folder(out) as partial:
        shutil.copytree(FOLDER, partial, dirs_exist_ok=True)
    return out


def base_record() -> dict[str, Any]:
    """How the base was made and what it can do."""
    return dict(json.loads((FOLDER / RECORD).read_text(encoding="utf-8")))


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
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep_base(Path(sys.argv[1]))
