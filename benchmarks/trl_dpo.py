"""DPO with TRL's trainer and with this package, on the same checkpoint and pairs with the same optimizer. The two take steps in turns, with
one thread each.

    python benchmarks/trl_dpo.py                                   # 32 pairs, with one and with four rejected texts per image
    python benchmarks/trl_dpo.py --rejected 1 --pairs 16 --json runs/trl_dpo.json

`trl.DPOTrainer` is installed from the package registry into its own environment (runs/trl-venv, created in the first run). The model is a
Qwen2.5-VL with random weights. The reference has other random weights, so that the loss does not start at log 2. TRL is not patched. Only
options and data align the two sides:

    text        pairs are strings formatted with the checkpoint's chat template, and token ids are compared. In conversational pairs, TRL
                also scores the end of the turn (`<|im_end|>` and a newline) of both answers. Our `dpo` scores only the text. The number of
                these tokens is printed.
    rows        in the order of the data set; an image with R rejected texts is one group here, and R pairs with one chosen text in TRL
    length      no truncation (max_length=None; TRL's default of 1024 would cut answers after a large image without an error)
    numbers     float32, sdpa, no gradient checkpointing (on by default in TRL), all weights trained
    optimizer   AdamW without decay, constant rate, gradients clipped to a norm of 1
    reference   stored scores here (`cfvlm-ds score`); TRL refuses precompute_ref_log_probs for images and runs the reference model in each
                step. The time of these passes is measured within TRL's step and reported separately.

The script compares token ids and the losses of all steps. It also compares log-probs and gradient norm of the first step between TRL, this
package, and one forward pass per sequence in transformers (tests/support/transformers_scores.py). It exits with code 1 if any of them
differ. Neither side runs under DeepSpeed. A step consists of forward, backward, clipping and update. Times are medians after a warm-up, in
CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
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
from dataclasses import dataclass
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
from cfvlm_ds.demo.family_checkpoints import SMALL
from cfvlm_ds.demo.habits.grammar import describe
from cfvlm_ds.demo.habits.world import STRENGTH, draw_scene
from cfvlm_ds.demo.tiny_llava import write_checkpoint
from cfvlm_ds.models import Scorer, family_of, load_model, load_processor
from cfvlm_ds.objectives import Dpo, denominators, required_cells, weighted_loss

HERE = Path(__file__).resolve().parent
REQUIREMENTS = (
    "torch>=2.8",
    "torchvision>=0.23",
    "transformers>=5.24,<6",
    "trl>=1.16,<2",
    "pillow>=11",
    "sentencepiece>=0.2",
    "protobuf>=4",
)
SIZE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
QUESTION = "Describe the image."
WARM_UP = 2  # steps
LOSS, LATER, RELATIVE = 1e-4, 1e-3, 1e-4  # bounds: loss of the first step; loss of later steps; log-probs and gradient norm


@dataclass(frozen=True)
class Settings:
    """Settings that both sides share."""

    rejected: int
    pairs: int
    visual: int
    vocabulary: int
    batch: int  # number of pairs
    beta: float = 0.1
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0

    @property
    def steps(self) -> int:
        return self.pairs // self.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rejected", nargs="+", type=int, default=[1, 4], help="rejected texts of an image (default 1 and 4)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a chosen and a rejected text (default 32)")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step (default 4)")
    parser.add_argument("--visual", type=int, default=256, help="visual tokens of an image; a square number (default 256)")
    parser.add_argument(
        "--vocabulary",
        nargs="+",
        type=int,
        default=[4096],
        help="entries of the output head (default 4096, in proportion to this model's 8 layers as 152k to 28 layers of width 3584)",
    )
    parser.add_argument("--attention", default="auto", help="attention back end of this package (default auto: sdpa on a CPU)")
    parser.add_argument("--out", type=Path, default=Path("runs/trl_dpo"), help="folder of models and data (default runs/trl_dpo)")
    parser.add_argument("--environment", type=Path, default=Path("runs/trl-venv"), help="TRL's environment (default runs/trl-venv)")
    parser.add_argument("--json", type=Path, help="file to which all results are also written")
    arguments = parser.parse_args()
    if any(arguments.batch % rejected for rejected in arguments.rejected) or arguments.pairs < (WARM_UP + 1) * arguments.batch:
        parser.error(f"--batch must be a multiple of every --rejected, and --pairs at least {WARM_UP + 1} batches")
    torch.set_num_threads(1)
    disable_progress_bar()
    results, off = [], []
    for vocabulary in arguments.vocabulary:
        for rejected in arguments.rejected:
            settings = Settings(rejected, arguments.pairs, arguments.visual, vocabulary, arguments.batch)
            folder = arguments.out / f"{settings.visual}-{vocabulary}-{rejected}-{settings.pairs}-{settings.batch}"
            prepare(folder, settings)
            try:
                results.append(compare(folder, settings, arguments.attention, environment(arguments.environment)))
            except SideError as error:
                sys.exit(f"TRL's side: {error} (its log is in {folder})")
            off += [f"{rejected} rejected, vocabulary {vocabulary}: {each}" for each in results[-1]["off"]]
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    if off:
        sys.exit("\n".join(["the two sides differ:", *off]))


class SideError(Exception):
    """Raised if a trainer could not be installed, started or finished. ``versions`` holds the versions that it reported."""

    def __init__(self, said: str, versions: dict[str, str] | None = None) -> None:
        super().__init__(said)
        self.versions = versions or {}


def environment(folder: Path, requirements: Sequence[str] = REQUIREMENTS) -> Path:
    """Return the Python interpreter of an environment with the requirements. Creates the environment if necessary. Raises SideError."""
    python, stamp, wanted = folder / "bin" / "python", folder / "requirements.txt", "\n".join(requirements) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"setting up {folder} (a few minutes)", flush=True)
        installing = [python, "-m", "pip", "install", "--quiet", *requirements]
        for command in ([sys.executable, "-m", "venv", "--clear", folder], installing):
            tried = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            if tried.returncode:
                lines = [line for line in tried.stdout.splitlines() if line.strip()] or ["no output"]
                raise SideError(f"{command[2]}: " + next((line for line in lines if line.startswith("ERROR")), lines[0]))
        stamp.write_text(wanted)
    return python


# --- model and data -----------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, settings: Settings, size: dict[str, int] = SIZE) -> None:
    """Write a new folder: policy, reference, images, groups.jsonl with the reference's scores, and the same data as pairs.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for seed, name in enumerate(("policy", "reference")):
        write_model(folder / name, settings, size, seed)
    groups = write_groups(folder, settings)
    processor = load_processor(ModelConfig(str(folder / "policy")))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    head = processor.apply_chat_template([user], add_generation_prompt=True)
    pairs = [
        {"image": group.images[0][0].name, "question": QUESTION, "prompt": head, "chosen": chosen.text, "rejected": other.text}
        for group in groups
        for chosen, *others in [group.candidates]
        for other in others
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    began = time.process_time()
    cfvlm(["score", str(folder / "reference"), str(folder / "groups.jsonl"), "--batch_size", "2"])
    scoring = time.process_time() - began
    (folder / "settings.json").write_text(json.dumps({**vars(settings), "steps": settings.steps, "scoring_seconds": scoring}))


def write_model(out: Path, settings: Settings, size: dict[str, int], seed: int) -> None:
    """Write a Qwen2.5-VL checkpoint of the given ``size``, with random queries so large that positions and masks matter."""

    def make(partial: Path) -> tuple[Any, Any]:
        config, processor = SMALL["qwen2_5_vl"]("qwen2_5_vl", partial)
        head = size["hidden_size"] // size["num_attention_heads"] // 2
        rope = {"rope_type": "default", "mrope_section": [head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8], "rope_theta": 1e6}
        text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
        text |= {**size, "vocab_size": settings.vocabulary, "rope_parameters": rope, "layer_types": None}
        vision |= {"hidden_size": 192, "intermediate_size": 512, "depth": 5, "num_heads": 4, "out_hidden_size": size["hidden_size"]}
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
    """Write groups, each with one noise image and several captions, and return them. An image has ``settings.visual`` visual tokens."""
    generator, side = random.Random(0), 28 * math.isqrt(settings.visual)
    captions = sorted({describe([draw_scene(generator, STRENGTH)], str(number))[0] for number in range(2000)})
    groups = []
    for number in range(settings.pairs // settings.rejected):
        picture = folder / f"{number}.png"
        Image.frombytes("RGB", (32, 32), generator.randbytes(3 * 32**2)).resize((side, side)).save(picture)
        texts = [Candidate(QUESTION, caption) for caption in generator.sample(captions, 1 + settings.rejected)]
        groups.append(CounterfactualGroup(f"pair-{number}", ((picture,),), tuple(texts), ((1, *[0] * settings.rejected),)))
    (folder / "groups.jsonl").write_text("".join(json.dumps(to_row(group, folder)) + "\n" for group in groups))
    return groups


# --- the three sides ----------------------------------------------------------------------------------------------------------------------


class Ours:
    """This package's side: collator, scorer, the objective `dpo` with stored reference scores, and AdamW, without DeepSpeed."""

    def __init__(self, folder: Path, settings: Settings, attention: str = "auto") -> None:
        model = load_model(ModelConfig(str(folder / "policy"), attn_implementation=attention), torch.float32)
        self.settings, self.scorer = settings, Scorer(model, family_of(model.config)).train()
        self.objectives = {"dpo": Dpo(weight=1.0, beta=settings.beta)}
        self.groups = read_manifest(folder / "groups.jsonl")
        stored = read_scores(folder / "groups.jsonl.scores.jsonl", self.groups, data_identity(self.groups, [folder]))
        self.collator = load_collator(ModelConfig(str(folder / "policy")), required_cells(self.objectives), stored=stored)
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)

    def batch(self, step: int) -> list[CounterfactualGroup]:
        size = self.settings.batch // self.settings.rejected
        return self.groups[step * size : (step + 1) * size]

    def step(self, number: int) -> dict[str, float]:
        asked = time.process_time()
        batch = self.collator(self.batch(number))
        began, clock = time.process_time(), time.perf_counter()
        scores = batch.scores(self.scorer(**batch.model_inputs))
        loss, _ = weighted_loss(self.objectives, scores, denominators(self.objectives, batch.layout))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times = {"seconds": time.process_time() - began, "wall": time.perf_counter() - clock, "between": began - asked}
        chosen, rejected = scores.logp[:, 0, 0].mean().item(), scores.logp[:, 0, 1:].mean().item()
        return {**times, "loss": loss.item(), "chosen": chosen, "rejected": rejected, "grad_norm": norm.item()}

    def tokens(self) -> list[dict[str, list[int]]]:
        """Return the token ids of prompt and text for every pair of the first batch, in the format of benchmarks/peers_side.py (chosen
        texts first).
        """
        batch = self.collator(self.batch(0))
        ids, forest, ends = batch.model_inputs["input_ids"][0].tolist(), batch.model_inputs["forest"], batch.layout.num_end_tokens[:, 0]
        chosen, rejected, start = [], [], 0
        for (root, after), end in zip(itertools.pairwise(forest.roots), ends.tolist(), strict=True):
            prefix, *branches = forest.lengths[root:after]
            prompt, start, texts = ids[start : start + prefix], start + prefix, []
            for length, closing in zip(branches, end, strict=True):
                texts.append({"prompt": prompt, "scored": ids[start : start + length - closing]})
                start += length
            chosen += texts[:1] * len(texts[1:])
            rejected += texts[1:]
        return chosen + rejected


def unaided(folder: Path, groups: Sequence[CounterfactualGroup], beta: float) -> dict[str, float]:
    """Return the groups' loss and mean log-probs from transformers, with one forward pass per sequence, in a separate process."""
    manifest = folder / "first.jsonl"
    manifest.write_text("".join(json.dumps(to_row(group, folder)) + "\n" for group in groups))
    command = [
        sys.executable,
        HERE.parent / "tests" / "support" / "transformers_scores.py",
        manifest,
        folder / "policy",
        folder / "reference",
    ]
    policy, reference = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    losses, chosen, rejected = [], [], []
    for name, [[first, *others]] in policy.items():
        [[first_before, *others_before]] = reference[name]
        for other, before in zip(others, others_before, strict=True):
            margin = beta * ((first - first_before) - (other - before))
            losses.append(math.log1p(math.exp(-margin)))
            chosen.append(first)
            rejected.append(other)
    return {"loss": statistics.mean(losses), "chosen": statistics.mean(chosen), "rejected": statistics.mean(rejected)}


class Side:
    """Process of benchmarks/peers_side.py that runs one trainer step by step. Raises SideError."""

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
            said = self.log.read_text().strip().splitlines()[-1:] or ["nothing on standard error"]
            raise SideError(f"exit code {self.process.wait()}: {said[0]}")
        found = json.loads(line)
        if "error" in found:
            self.close()
            raise SideError(found["error"], found["versions"])
        return found

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the error is read below
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def compare(folder: Path, settings: Settings, attention: str, python: Path) -> dict[str, Any]:
    ours, trl = Ours(folder, settings, attention), Side(python, "trl", folder)
    own, rows, messages = ours.tokens(), trl.first["rows"], trl.first["messages"]
    off = [f"token ids of sequence {k}: {mine} and {its}" for k, (mine, its) in enumerate(zip(own, rows, strict=True)) if mine != its]
    decode = ours.collator.processor.tokenizer.decode
    found = {
        **json.loads((folder / "settings.json").read_text()),
        "attention": attention,
        "versions": {"ours": {name: importlib.metadata.version(name) for name in ("transformers", "torch")}, "trl": trl.first["versions"]},
        "prompt_tokens": len(own[0]["prompt"]),
        "text_tokens": statistics.mean(len(each["scored"]) for each in own),
        "conversational_adds": sorted({decode(its["scored"][len(mine["scored"]) :]) for mine, its in zip(own, messages, strict=True)}),
        "image_nats": statistics.mean(abs(each.logp[0][0] - each.blank[0]) for each in ours.collator.stored.values()),
        "plain": unaided(folder, ours.batch(0), settings.beta),
    }
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    steps: list[dict[str, dict[str, float]]] = []
    for number in range(settings.steps):
        steps.append({"trl": trl.step(), "ours": ours.step(number)})
        theirs, mine = steps[-1]["trl"], steps[-1]["ours"]
        print(
            f"step {number + 1}/{settings.steps}: loss {theirs['loss']:.6f} (TRL) {mine['loss']:.6f} (ours), gradient norm "
            f"{theirs['grad_norm']:.4f} {mine['grad_norm']:.4f}, {theirs['seconds']:.2f} s (including {theirs['reference_seconds']:.2f} "
            f"s of the reference) {mine['seconds']:.2f} s",
            flush=True,
        )
    trl.close()
    return {**found, "off": off + disagreements(steps, found["plain"]), **summary(steps, found["scoring_seconds"]), "steps": steps}


def disagreements(steps: Sequence[dict[str, dict[str, float]]], plain: dict[str, float]) -> list[str]:
    """Return a line for each value of the first step and each later loss that differs between the sides by more than its bound."""
    sides, off = {**steps[0], "transformers": plain}, []
    for name, bound in (("loss", LOSS), ("chosen", RELATIVE), ("rejected", RELATIVE), ("grad_norm", RELATIVE)):
        values = {side: found[name] for side, found in sides.items() if name in found}
        allowed = bound * (1 if name == "loss" else abs(values["ours"]))
        if not max(values.values()) - min(values.values()) <= allowed:
            off.append(f"step 1: {name}: {values}")
    for number, step in enumerate(steps[1:], start=2):
        if not abs(step["trl"]["loss"] - step["ours"]["loss"]) <= LATER:
            off.append(f"step {number}: loss: {step['trl']['loss']} (trl) and {step['ours']['loss']} (ours)")
    return off


def summary(steps: Sequence[dict[str, dict[str, float]]], scoring: float) -> dict[str, float]:
    """Return median times in seconds after the warm-up, the ratios of TRL's times to ours, and the largest difference between losses.

    ``scoring`` is the CPU time in seconds that the stored scores of all steps took.
    """
    kept = steps[WARM_UP:]

    def median(side: str, name: str) -> float:
        return statistics.median(step[side][name] for step in kept)

    without = statistics.median(step["trl"]["seconds"] - step["trl"]["reference_seconds"] for step in kept)
    return {
        "trl_seconds": median("trl", "seconds"),
        "trl_reference_seconds": median("trl", "reference_seconds"),
        "ours_seconds": median("ours", "seconds"),
        "ratio": median("trl", "seconds") / median("ours", "seconds"),
        "ratio_without_reference": without / median("ours", "seconds"),
        "ratio_with_scoring": median("trl", "seconds") / (median("ours", "seconds") + scoring / len(steps)),
        "ratio_of_wall_clock": median("trl", "wall") / median("ours", "wall"),
        "loss_difference": max(abs(step["trl"]["loss"] - step["ours"]["loss"]) for step in steps),
        "loss_difference_at_first": abs(steps[0]["trl"]["loss"] - steps[0]["ours"]["loss"]),
    }


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table with one row per comparison."""
    ratios = {
        "ratio": "TRL / ours",
        "ratio_without_reference": "without its reference",
        "ratio_with_scoring": "with our scoring, one epoch",
        "ratio_of_wall_clock": "wall clock",
    }
    seconds = {"trl_seconds": "TRL: s", "trl_reference_seconds": "TRL's reference: s", "ours_seconds": "ours: s"}
    titles = ("rejected texts", "vocabulary", "loss of step 1: TRL", "ours", "transformers alone", "largest difference, all steps")
    lines = [
        f"| {' | '.join([*titles, *seconds.values(), *ratios.values()])} |",
        "|" + "---:|" * (len(titles) + len(seconds) + len(ratios)),
    ]
    for found in results:
        first = found["steps"][0]
        cells = [str(found["rejected"]), str(found["vocabulary"])]
        cells += [f"{value:.6f}" for value in (first["trl"]["loss"], first["ours"]["loss"], found["plain"]["loss"])]
        cells += [f"{found['loss_difference']:.1e}", *(f"{found[name]:.2f}" for name in (*seconds, *ratios))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
