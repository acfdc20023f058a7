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
by options alone: float32, sdpa, all weights trained, no gradient checkpointing, no truncation, AdamW without decay at a constant rate,
gradients clipped to a norm of 1, rows in the order of the data set. Only the text is scored, not the end of the turn. TRL gets
strings formatted with the checkpoint's chat template. ms-swift and LLaMA-Factory get a copy of the Qwen2-VL template without the end of the
turn, registered as they document. The reference model and the policy have different random weights, so the loss does not start at log 2.

Each trainer is installed from the package registry into its own environment under --environments, and runs in its own process with one
thread. A step consists of forward, backward, clipping and update. Its time is the median CPU time after a warm-up step. Memory is the peak
resident memory from the first step on, shown with the resident memory before it (libraries, the model and, except for ours and
prefix-grouper, the reference). The first step's loss is compared with one forward pass per sequence in transformers.

Results are in OUT/PEER-K.json. Existing results are kept, so a stopped run continues; delete a file to repeat its run. The exit code is 1
if a trainer fails, if token ids differ, if losses differ by more than 1e-4, or if the first step's log-probs or gradient norms differ from
ours by more than 1e-4 of their value.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.cli.main import main as cfvlm
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import read_scores
from cfvlm_ds.demo.family_checkpoints import SMALL, write_checkpoint
from cfvlm_ds.demo.habits.grammar import describe
from cfvlm_ds.demo.habits.world import STRENGTH, draw_scene
from cfvlm_ds.models import Scorer, family_of, load_model, load_processor
from cfvlm_ds.objectives import Dpo, denominators, required_cells, weighted_loss

HERE = Path(__file__).resolve().parent
TORCH = ("torch>=2.8", "torchvision>=0.23", "pillow>=11")
REQUIREMENTS: dict[str, Sequence[str]] = {
    "ours": (),
    "trl": (*TORCH, "transformers>=5.24,<6", "trl>=1.16,<2", "sentencepiece>=0.2", "protobuf>=4"),
    "ms-swift": (*TORCH, "ms-swift>=4.6,<5", "qwen-vl-utils>=0.0.14"),
    "llamafactory": (*TORCH, "llamafactory>=0.9.5,<0.10"),
    "prefix-grouper": (*TORCH, "prefix-grouper>=0.0.1.post1", "transformers>=5.24,<6"),
}
SIZE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
WARM_UP = 1  # steps
BOUND = 1e-4  # on differences between losses, and on relative differences between log-probs and gradient norms of the first step
QUESTION = "Describe the image."

Pair = dict[str, str]
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings that all trainers share. A step has one image with one chosen and ``batch`` rejected texts: ``batch`` pairs."""

    batch: int
    steps: int
    visual: int
    vocabulary: int
    beta: float = 0.1
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0


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
        settings = Settings(texts - 1, arguments.steps, arguments.visual, arguments.vocabulary)
        plain = prepare(arguments.out / f"data-{texts}", settings)
        for peer in arguments.peers:
            kept = arguments.out / f"{peer}-{texts}.json"
            if not kept.is_file():
                found = run(peer, arguments.environments / peer, arguments.out / f"data-{texts}", settings)
                kept.write_text(json.dumps({"peer": peer, "texts": texts, **asdict(settings), "plain": plain, **found}, indent=1) + "\n")
            results.append(json.loads(kept.read_text()))
            print(table(results)[-1], flush=True)
    print("", *table(results), sep="\n")
    if off := disagreements(results):
        sys.exit("\n".join(["losses or tokens differ:", *off]))


# --- model and data -----------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, settings: Settings) -> dict[str, float]:
    """Write the models, and the pairs in every trainer's format, unless they exist. Returns the first step's loss and mean log-probs from
    transformers alone. Exits if the folder was made with other settings.
    """
    done, wanted = folder / "plain.json", {**asdict(settings), "size": SIZE}
    if done.is_file():
        known = json.loads(done.read_text())
        if known["settings"] != wanted:
            sys.exit(f"{folder} was made with other settings; choose another --out, or delete it and the results next to it")
        return known["plain"]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "llamafactory").mkdir(parents=True)
    for seed, name in enumerate(("policy", "reference")):
        write_model(folder / name, settings, seed)
    groups = write_groups(folder, settings)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    head = load_processor(ModelConfig(str(folder / "policy"))).apply_chat_template([user], add_generation_prompt=True)
    pairs = [
        {"image": group.images[0][0].name, "question": QUESTION, "prompt": head, "chosen": chosen.text, "rejected": other.text}
        for group in groups
        for chosen, *others in [group.candidates]
        for other in others
    ]
    cfvlm(["score", str(folder / "reference"), str(folder / "groups.jsonl"), "--batch_size", "2"])
    stored = stored_scores(folder, groups)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    (folder / "pairs.jsonl").write_text(lines(pairs))
    (folder / "swift.jsonl").write_text(lines(swift_rows(pairs, folder.resolve())))
    (folder / "prefixes.jsonl").write_text(lines(prefix_rows(pairs, [list(stored[group.id].logp[0]) for group in groups])))
    for name, content in llamafactory_files(pairs).items():
        (folder / "llamafactory" / name).write_text(json.dumps(content, indent=1) + "\n")
    plain = unaided(folder, groups[0], settings.beta)
    done.write_text(json.dumps({"settings": wanted, "plain": plain}))
    return plain


def stored_scores(folder: Path, groups: Sequence[CounterfactualGroup]) -> Any:
    return read_scores(folder / "groups.jsonl.scores.jsonl", groups, data_identity(groups, [folder]))


def write_model(out: Path, settings: Settings, seed: int) -> None:
    """Write a random Qwen2.5-VL checkpoint of SIZE, with query weights large enough that positions and masks matter."""

    def make(partial: Path) -> tuple[Any, Any]:
        config, processor = SMALL["qwen2_5_vl"]("qwen2_5_vl")
        head = SIZE["hidden_size"] // SIZE["num_attention_heads"] // 2
        rope = {"rope_type": "default", "mrope_section": [head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8], "rope_theta": 1e6}
        text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
        text |= {**SIZE, "vocab_size": settings.vocabulary, "rope_parameters": rope, "layer_types": None}
        vision |= {"hidden_size": 192, "intermediate_size": 512, "depth": 5, "num_heads": 4, "out_hidden_size": SIZE["hidden_size"]}
        vision |= {"fullatt_block_indexes": [4], "window_size": 112}
        config = type(config)(**{**config.to_dict(), "text_config": text, "vision_config": vision})
        processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": settings.visual * 28**2}
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("q_proj.weight"):
                    weight *= 10
        return model, processor

    write_checkpoint(out, make)


def write_groups(folder: Path, settings: Settings) -> list[CounterfactualGroup]:
    """Write and return one group per step, each with a noise image of ``settings.visual`` visual tokens and several captions."""
    generator, side = random.Random(0), 28 * math.isqrt(settings.visual)
    captions = sorted({describe([draw_scene(generator, STRENGTH)], str(number))[0] for number in range(2000)})
    groups = []
    for number in range(settings.steps):
        picture = folder / f"{number}.png"
        Image.frombytes("RGB", (32, 32), generator.randbytes(3 * 32**2)).resize((side, side)).save(picture)
        texts = [Candidate(QUESTION, caption) for caption in generator.sample(captions, 1 + settings.batch)]
        groups.append(CounterfactualGroup(f"image-{number}", ((picture,),), tuple(texts), ((1, *[0] * settings.batch),)))
    (folder / "groups.jsonl").write_text(lines([to_row(group, folder) for group in groups]))
    return groups


def unaided(folder: Path, group: CounterfactualGroup, beta: float) -> dict[str, float]:
    """Return a group's loss and mean log-probs from transformers, with one forward pass per sequence, in a separate process."""
    (folder / "first.jsonl").write_text(lines([to_row(group, folder)]))
    script = HERE.parent / "tests" / "support" / "transformers_scores.py"
    command = [sys.executable, script, folder / "first.jsonl", folder / "policy", folder / "reference"]
    scores = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    [[first, *others]], [[first_before, *before]] = (each[group.id] for each in scores)
    margins = [beta * ((first - first_before) - (other - its)) for other, its in zip(others, before, strict=True)]
    loss = statistics.mean(math.log1p(math.exp(-margin)) for margin in margins)
    return {"loss": loss, "chosen": first, "rejected": statistics.mean(others)}


# --- one list of pairs in each trainer's format -------------------------------------------------------------------------------------------


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def swift_rows(pairs: Sequence[Pair], folder: Path) -> list[dict[str, Any]]:
    """Return rows for ms-swift: messages that end with the chosen answer, and a rejected response. `<image>` stands for the image."""
    return [
        {
            "messages": [{"role": "user", "content": f"<image>{pair['question']}"}, {"role": "assistant", "content": pair["chosen"]}],
            "rejected_response": pair["rejected"],
            "images": [str(folder / pair["image"])],
        }
        for pair in pairs
    ]


def llamafactory_files(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return {name: content} of the files for LLaMA-Factory: ranked ShareGPT conversations, and a description of the data set."""
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


def interpreter(folder: Path, requirements: Sequence[str]) -> Path:
    """Return the Python interpreter of an environment with the requirements. Creates the environment if necessary."""
    python, stamp, wanted = folder / "bin" / "python", folder / "requirements.txt", "\n".join(requirements) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"setting up {folder} (a few minutes)", flush=True)
        installing = [python, "-m", "pip", "install", "--quiet", *requirements]
        for command in ([sys.executable, "-m", "venv", "--clear", folder], installing):
            subprocess.run(command, check=True)
        stamp.write_text(wanted)
    return python


class Ours:
    """This package's trainer: collator, scorer, the objective `dpo` with stored reference scores, and AdamW, without DeepSpeed."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        config = ModelConfig(str(folder / "policy"))
        model = load_model(config, torch.float32)
        self.scorer, self.max_grad_norm = Scorer(model, family_of(model.config)).train(), settings.max_grad_norm
        self.objectives = {"dpo": Dpo(weight=1.0, beta=settings.beta)}
        self.groups = read_manifest(folder / "groups.jsonl")
        self.collator = load_collator(config).building(required_cells(self.objectives), stored_scores(folder, self.groups))
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)

    def step(self, number: int) -> dict[str, float]:
        batch = self.collator([self.groups[number]])
        began = time.process_time()
        scores = batch.scores(self.scorer(**batch.model_inputs))
        loss, _ = weighted_loss(self.objectives, scores, denominators(self.objectives, batch.layout))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds, (chosen, *rejected) = time.process_time() - began, scores.logp[0, 0].tolist()
        values = {"chosen": chosen, "rejected": statistics.mean(rejected), "grad_norm": norm.item()}
        return {"seconds": seconds, "loss": loss.item(), **values}

    def tokens(self) -> list[dict[str, list[int]]]:
        """Return the token ids of prompt and text for every pair of the first step, in the format of benchmarks/peers_side.py (chosen
        texts first).
        """
        batch = self.collator([self.groups[0]])
        ids, forest, ends = batch.model_inputs["input_ids"][0].tolist(), batch.model_inputs["forest"], batch.layout.num_end_tokens[0, 0]
        prompt, *branches = forest.lengths
        starts = itertools.accumulate(branches, initial=prompt)
        texts = [
            {"prompt": ids[:prompt], "scored": ids[start : start + length - end]}
            for start, length, end in zip(starts, branches, ends.tolist(), strict=False)
        ]
        return texts[:1] * len(texts[1:]) + texts[1:]


class Side:
    """Process of benchmarks/peers_side.py that runs one trainer step by step."""

    def __init__(self, python: Path | str, peer: str, folder: Path) -> None:
        self.log = folder / f"{peer}.log"
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *(() if peer == "ours" else ("PYTHONPATH",)))
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder.resolve() / "cache"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [python, HERE / "peers_side.py", peer, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**{name: value for name, value in os.environ.items() if name not in hidden}, **offline},
        )
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{self.log.stem} has failed; see {self.log}, or leave it out with --peers")
        return json.loads(line)  # type: ignore[no-any-return]

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the next line is then missing
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self.read()


def run(peer: str, environment: Path, folder: Path, settings: Settings) -> Result:
    """Run one trainer. Returns its versions, memory, token ids and step records."""
    shutil.rmtree(folder / "trained", ignore_errors=True)
    side = Side(interpreter(environment, REQUIREMENTS[peer]) if REQUIREMENTS[peer] else sys.executable, peer, folder)
    found = {**side.first, "steps": [side.step() for _ in range(settings.steps)]}
    side.process.communicate()
    return found


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
    own = {found["texts"]: found for found in results if found["peer"] == "ours"}
    for found in results:
        time, mine = seconds(found, "seconds"), own.get(found["texts"])
        first, peak = found["steps"][0]["loss"], max(step["peak"] for step in found["steps"])
        reference = seconds(found, "reference_seconds")
        cells = [
            str(found["texts"]),
            f"{found['peer']} {found['versions'].get(found['peer'], '')}".strip(),
            f"{time:.2f}",
            f"{reference:.2f}",
        ]
        cells += [f"{each / seconds(mine, 'seconds'):.2f}" if mine else "" for each in (time, time - reference)]
        cells += [f"{peak:.0f}", f"{found['memory']:.0f}", f"{first:.6f}", f"{abs(first - found['plain']['loss']):.1e}"]
        cells.append(f"{difference(found, mine):.1e}" if mine else "")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def seconds(found: Result, name: str) -> float:
    return statistics.median(step[name] for step in found["steps"][WARM_UP:])


def difference(found: Result, mine: Result) -> float:
    """Return the largest difference between losses of the same step."""
    return max(abs(one["loss"] - other["loss"]) for one, other in zip(found["steps"], mine["steps"], strict=True))


def disagreements(results: Sequence[Result]) -> list[str]:
    """Return a line for each disagreement. A run's first loss is compared with that of transformers. Its losses, its token ids, and the
    first step's log-probs and gradient norm are compared with ours.
    """
    own = {found["texts"]: found for found in results if found["peer"] == "ours"}
    off = []
    for found in results:
        where, first, mine = f"{found['peer']} with {found['texts']} texts", found["steps"][0]["loss"], own.get(found["texts"], found)
        if not abs(first - found["plain"]["loss"]) <= BOUND:
            off.append(f"{where}: {first}, but {found['plain']['loss']} with transformers only")
        elif not difference(found, mine) <= BOUND:
            off.append(
                f"{where}: {[step['loss'] for step in found['steps']]}, but {[step['loss'] for step in mine['steps']]} with this package"
            )
        for name in ("chosen", "rejected", "grad_norm"):
            its, ours = found["steps"][0][name], mine["steps"][0][name]
            off += [] if abs(its - ours) <= BOUND * abs(ours) else [f"{where}: {name} of step 1: {its} and {ours}"]
        for number, (its, rows) in enumerate(zip(found["rows"], mine["rows"], strict=True)):
            off += [f"{where}: token ids of sequence {number}: {its} and {rows}"] if its != rows else []
    return off


if __name__ == "__main__":
    main()
