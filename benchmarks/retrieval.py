"""Retrieval by likelihood: a picture's caption among the captions of other pictures, and a caption's picture among other pictures.

    python benchmarks/retrieval.py runs/learning/base
    cfvlm-ds export runs/learning/default-3e-4-seed0                # runs of benchmarks/learning.py keep their checkpoints
    python benchmarks/retrieval.py runs/learning/default-3e-4-seed0/export --manifest runs/learning/world/test_combo.jsonl

The data are the first --pictures factual pairs with different captions, all with the same prompt. `cfvlm-ds score` scores each picture with
every caption. If a row's ``exclude`` says that a caption might also be true of a picture, this pair is not used. The results are recall at
1 in %. For texts, recall is also computed after subtraction of the blank image's score (PMI). For images, this score would cancel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Matrix = Sequence[Sequence[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="model folders in the Hugging Face format")
    parser.add_argument("--manifest", type=Path, default=Path("runs/learning/world/test_combo.jsonl"), help="(default %(default)s)")
    parser.add_argument("--pictures", type=int, default=200, help="(default 200)")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="folder of manifest and scores (default runs/retrieval)")
    arguments = parser.parse_args()
    rows = chosen((json.loads(line) for line in arguments.manifest.open()), arguments.pictures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    manifest = arguments.out / "retrieval.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in groups(rows)))
    print(f"| model, {len(rows)} pictures and captions | text, % | text, PMI | image |\n|---|---:|---:|---:|", flush=True)
    for number, model in enumerate(arguments.models):
        path = arguments.out / f"model{number}.scores.jsonl"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "cfvlm_ds", "score", str(model), str(manifest), "--batch_size", "1", "--out", str(path), "--quiet"]
        command += ["--root", str(arguments.manifest.parent)]
        subprocess.run(command, check=True)
        scores = {each["id"]: each for each in map(json.loads, path.open()) if "id" in each}
        logp, blank = ([ordered(scores[row["id"]][name], at) for at, row in enumerate(rows)] for name in ("logp", "blank"))
        found = recalls(logp, blank, takes_part(rows))
        print(f"| {model} | {' | '.join(f'{100 * value:.1f}' for value in found)} |", flush=True)


def chosen(rows: Any, number: int) -> list[dict[str, Any]]:
    """Return the first ``number`` rows whose factual captions have different keys and words."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in rows:
        text = row["texts"][0]
        if len(found) < number and not seen & {text["key"], text["text"]}:
            seen |= {text["key"], text["text"]}
            found.append(row)
    return found


def groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a group for each row's first picture, with the captions of all rows. Only the picture's own caption is known to be true."""
    texts = [{"id": f"t{place}", "text": row["texts"][0]["text"]} for place, row in enumerate(rows)]
    return [
        {
            "schema": "cfgroup/1",
            "id": row["id"],
            "prompt": rows[0]["prompt"],
            "images": [{"id": "i0", "path": row["images"][0]["path"]}],
            "texts": [texts[place], *texts[:place], *texts[place + 1 :]],
            "match": [["i0", f"t{place}", 1]],
        }
        for place, row in enumerate(rows)
    ]


def takes_part(rows: Sequence[dict[str, Any]]) -> list[list[bool]]:
    """Return a mask [pictures, captions] of the pairs to compare: each picture with its own caption and with captions false of it."""
    keys = [row["texts"][0]["key"] for row in rows]
    return [[i == c or key not in row.get("exclude", ()) for c, key in enumerate(keys)] for i, row in enumerate(rows)]


def ordered(scores: Any, place: int) -> list[float]:
    """Return the scores of a group's texts in the order of rows. In ``scores``, the caption of row ``place``, which belongs to the group's
    picture, comes first.
    """
    flat = scores[0] if isinstance(scores[0], list) else scores
    return [*flat[1 : place + 1], flat[0], *flat[place + 1 :]]


def recalls(logp: Matrix, blank: Matrix, asked: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """Return three fractions: of pictures whose own caption is the likeliest, of such pictures after ``blank`` is subtracted, and of
    captions that are likeliest on their own picture.

    The arguments are [N pictures, N captions] with true pairs on the diagonal. Only cells in ``asked`` are used. A tie counts as wrong.
    """
    size = range(len(logp))
    pmi = [[value - without for value, without in zip(*both, strict=True)] for both in zip(logp, blank, strict=True)]

    def texts(scores: Matrix) -> float:
        return sum(all(scores[i][i] > scores[i][c] for c in size if c != i and asked[i][c]) for i in size) / len(size)

    images = sum(all(logp[c][c] > logp[i][c] for i in size if i != c and asked[i][c]) for c in size) / len(size)
    return texts(logp), texts(pmi), images


if __name__ == "__main__":
    main()
