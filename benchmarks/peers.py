"""Comparison with other trainers on the same checkpoint and pairs, with K texts per image. Each trainer runs once on this machine.

    python benchmarks/peers.py                                      # every trainer at K = 2, 4 and 8
    python benchmarks/peers.py --peers ours prefix-grouper --texts 8 --out runs/peers-8

    ours            the objective `dpo` with stored reference scores
    trl             TRL's DPOTrainer
    ms-swift        the trainer that `swift rlhf --rlhf_type dpo` runs
    llamafactory    the trainer that `llamafactory-cli train` runs at stage `dpo`
    prefix-grouper  shared prefixes in transformers' Qwen2.5-VL, through its attention interface; it is not a trainer, so loss and step are
                    plain torch (DPO with stored reference scores, as in ours)

An image has one chosen text and K - 1 rejected texts. A trainer that only supports pairs gets K - 1 pairs. The other settings are aligned
as described in benchmarks/trl_dpo.py: float32, sdpa, all weights trained, no gradient checkpointing, AdamW at a constant rate. Only the
text is scored. For this purpose, a copy of the Qwen2-VL template without the end of the turn is registered with ms-swift and LLaMA-Factory,
as they document. Each trainer's settings are in benchmarks/RESULTS.md.

Each trainer is installed from the package registry into its own environment under --environments, and runs in its own process with one
thread. A step consists of forward, backward, clipping and update. Its time is the median CPU time after a warm-up step. Memory is the peak
resident memory from the first step on, shown with the resident memory before it (libraries, the model and, except for ours and
prefix-grouper, the reference). The first step's loss is compared with one forward pass per sequence in transformers.

Results are in OUT/PEER-K.json. Existing results are kept, so a stopped run continues; delete a file to repeat its run. If a trainer cannot
be installed or started, its file and the table show the error, and the other trainers still run. The exit code is 1 if token ids differ,
or if losses differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl_dpo
from transformers.utils.logging import disable_progress_bar

from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import read_scores

TORCH = ("torch>=2.8", "torchvision>=0.23", "pillow>=11")
REQUIREMENTS: dict[str, Sequence[str]] = {
    "ours": (),
    "trl": trl_dpo.REQUIREMENTS,
    "ms-swift": (*TORCH, "ms-swift>=4.6,<5", "qwen-vl-utils>=0.0.14"),
    "llamafactory": (*TORCH, "llamafactory>=0.9.5,<0.10"),
    "prefix-grouper": (*TORCH, "prefix-grouper>=0.0.1.post1", "transformers>=5.24,<6"),
}
SIZE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
WARM_UP = 1  # steps
BOUND = 1e-4  # largest difference between losses

Pair = dict[str, str]
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS), metavar="PEER", help="default: all")
    parser.add_argument("--texts", nargs="+", type=int, default=[2, 4, 8], help="texts of an image (default 2, 4 and 8)")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps, the first {WARM_UP} a warm-up (default 6)")
    parser.add_argument("--visual", type=int, default=256, help="visual tokens of an image; a square number (default 256)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries of the output head (default 4096)")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of models, data and results (default runs/peers)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("runs/peers-venvs"),
        help="folder of the trainers' environments (default runs/peers-venvs)",
    )
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP or min(arguments.texts) < 2:
        parser.error(f"--steps must be more than {WARM_UP}, and --texts at least 2")
    torch.set_num_threads(1)
    disable_progress_bar()
    results = []
    for texts in arguments.texts:
        rejected = texts - 1
        settings = trl_dpo.Settings(rejected, rejected * arguments.steps, arguments.visual, arguments.vocabulary, batch=rejected)
        plain = prepare(arguments.out / f"data-{texts}", settings)
        for peer in arguments.peers:
            kept = arguments.out / f"{peer}-{texts}.json"
            if not kept.is_file():
                found = run(peer, arguments.environments / peer, arguments.out / f"data-{texts}", settings)
                kept.write_text(json.dumps({"peer": peer, "texts": texts, **vars(settings), "plain": plain, **found}, indent=1) + "\n")
            results.append(json.loads(kept.read_text()))
            print(table(results)[-1], flush=True)
    print("", *table(results), sep="\n")
    if off := disagreements(results):
        sys.exit("\n".join(["losses or tokens differ:", *off]))


def prepare(folder: Path, settings: trl_dpo.Settings) -> dict[str, float]:
    """Write the models, and the pairs in every trainer's format, unless the folder exists. Returns the first step's loss and mean log-probs
    from transformers alone. Exits if the folder was made with other settings.
    """
    done, wanted = folder / "plain.json", {**vars(settings), "size": SIZE}
    if done.is_file():
        known = json.loads(done.read_text())
        if known["settings"] != wanted:
            sys.exit(f"{folder} was made with other settings; choose another --out, or delete it and the results next to it")
        return known["plain"]
    trl_dpo.prepare(folder, settings, SIZE)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    groups = read_manifest(folder / "groups.jsonl")
    stored = read_scores(folder / "groups.jsonl.scores.jsonl", groups, data_identity(groups, [folder]))
    reference = [list(stored[group.id].logp[0]) for group in groups]
    (folder / "swift.jsonl").write_text(lines(swift_rows(pairs, folder.resolve())))
    (folder / "prefixes.jsonl").write_text(lines(prefix_rows(pairs, reference)))
    (folder / "llamafactory").mkdir()
    for name, content in llamafactory_files(pairs).items():
        (folder / "llamafactory" / name).write_text(json.dumps(content, indent=1) + "\n")
    plain = trl_dpo.unaided(folder, [groups[0]], settings.beta)
    done.write_text(json.dumps({"settings": wanted, "plain": plain}))
    return plain


# --- one list of pairs in each trainer's format -------------------------------------------------------------------------------------------


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def swift_rows(pairs: Sequence[Pair], folder: Path) -> list[dict[str, Any]]:
    """Return rows for ms-swift: messages that end with the chosen answer, and a rejected response. `<image>` marks the picture."""
    return [
        {
            "messages": [{"role": "user", "content": f"<image>{pair['question']}"}, {"role": "assistant", "content": pair["chosen"]}],
            "rejected_response": pair["rejected"],
            "images": [str(folder / pair["image"])],
        }
        for pair in pairs
    ]


def llamafactory_files(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return files for LLaMA-Factory: ShareGPT conversations with a ranking, and a description of the data set."""
    rows = [
        {
            "conversations": [{"from": "human", "value": f"<image>{pair['question']}"}],
            "chosen": {"from": "gpt", "value": pair["chosen"]},
            "rejected": {"from": "gpt", "value": pair["rejected"]},
            "images": [pair["image"]],
        }
        for pair in pairs
    ]
    columns = {"messages": "conversations", **{name: name for name in ("chosen", "rejected", "images")}}
    info = {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns}}
    return {"pairs.json": rows, "dataset_info.json": info}


def prefix_rows(pairs: Sequence[Pair], reference: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return rows for prefix-grouper: a prompt, all its texts with the chosen one first, and the reference scores in nats."""
    groups: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        group = groups.setdefault(pair["image"], {"image": pair["image"], "prompt": pair["prompt"], "texts": [pair["chosen"]]})
        group["texts"].append(pair["rejected"])
    return [{**group, "reference": list(scores)} for group, scores in zip(groups.values(), reference, strict=True)]


# --- runs and their table -----------------------------------------------------------------------------------------------------------------


def run(peer: str, environment: Path, folder: Path, settings: trl_dpo.Settings) -> Result:
    """Run one trainer. Returns the records of its steps, or the error that stopped it."""
    shutil.rmtree(folder / "trained", ignore_errors=True)
    side = None
    try:
        python = trl_dpo.environment(environment, REQUIREMENTS[peer]) if REQUIREMENTS[peer] else sys.executable
        side = trl_dpo.Side(python, peer, folder)
        return {**side.first, "steps": [side.step() for _ in range(settings.steps)]}
    except trl_dpo.SideError as error:
        return {"error": str(error), "versions": error.versions}
    finally:
        if side is not None:
            side.close()


def table(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table with one row per run. Ratios and differences are relative to our run with the same number of texts, if there
    is one.
    """
    titles = [
        "texts",
        "trainer",
        "s per step",
        "s of the reference",
        "ratio to ours",
        "without the reference",
        "peak MB",
        "before the first step",
        "loss of step 1",
    ]
    titles += ["from transformers alone", "largest from ours, all steps"]
    rows = ["| " + " | ".join(titles) + " |", "|---:|---|" + "---:|" * (len(titles) - 2)]
    own = {found["texts"]: found for found in results if found["peer"] == "ours" and "error" not in found}
    for found in results:
        start = [str(found["texts"]), named(found)]
        if "error" in found:
            rows.append("| " + " | ".join([*start, f"does not run: {found['error'].replace('|', '/')}", *[""] * (len(titles) - 3)]) + " |")
            continue
        time, mine = seconds(found, "seconds"), own.get(found["texts"])
        first, peak = found["steps"][0]["loss"], max(step["peak"] for step in found["steps"])
        reference = seconds(found, "reference_seconds")
        cells = [f"{time:.2f}", f"{reference:.2f}"]
        cells += [f"{each / seconds(mine, 'seconds'):.2f}" if mine else "" for each in (time, time - reference)]
        cells += [f"{peak:.0f}", f"{found['memory']:.0f}", f"{first:.6f}", f"{abs(first - found['plain']['loss']):.1e}"]
        cells.append(f"{difference(found, mine):.1e}" if mine else "")
        rows.append("| " + " | ".join(start + cells) + " |")
    return rows


def named(found: Result) -> str:
    version = found["versions"].get(found["peer"])
    return f"{found['peer']} {version}" if version else found["peer"]


def seconds(found: Result, name: str) -> float:
    return statistics.median(step[name] for step in found["steps"][WARM_UP:])


def difference(found: Result, mine: Result) -> float:
    """Return the largest difference between losses of the same step."""
    return max(abs(one["loss"] - other["loss"]) for one, other in zip(found["steps"], mine["steps"], strict=True))


def disagreements(results: Sequence[Result]) -> list[str]:
    """Return a line for each run whose first loss differs from transformers' loss, or whose tokens or later losses differ from ours."""
    own = {found["texts"]: found for found in results if found["peer"] == "ours" and "error" not in found}
    off = []
    for found in (found for found in results if "error" not in found):
        where, first, mine = f"{found['peer']} with {found['texts']} texts", found["steps"][0]["loss"], own.get(found["texts"], found)
        if not abs(first - found["plain"]["loss"]) <= BOUND:
            off.append(f"{where}: {first}, but {found['plain']['loss']} with transformers only")
        elif not difference(found, mine) <= BOUND:
            off.append(
                f"{where}: {[step['loss'] for step in found['steps']]}, but {[step['loss'] for step in mine['steps']]} with this package"
            )
        for number, (its, rows) in enumerate(zip(found["rows"], mine["rows"], strict=True)):
            off += [f"{where}: token ids of sequence {number}: {its} and {rows}"] if its != rows else []
    return off


if __name__ == "__main__":
    main()
