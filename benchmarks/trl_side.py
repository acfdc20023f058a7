"""TRL's side of benchmarks/trl_dpo.py; its own environment's Python runs it, and this package is not in there.

    python trl_side.py FOLDER     one optimizer step of trl.DPOTrainer for every line on standard input

FOLDER holds settings.json, pairs.jsonl and the models policy and reference. Lines of JSON on standard output: first the versions and the
token ids that TRL makes of the first batch, then one line per step.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets")


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not part of the protocol
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    policy, reference = (
        AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="sdpa")
        for name in ("policy", "reference")
    )
    clock = Clock(out, reference)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            beta=settings["beta"],
            per_device_train_batch_size=settings["batch"],
            max_steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=settings["max_grad_norm"],
            train_sampling_strategy="sequential",
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset(pairs, folder),
        processing_class=AutoProcessor.from_pretrained(folder / "policy"),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    rows = list(dataset(pairs[: settings["batch"]], folder))
    messages = [{**row, **conversation(pair)} for row, pair in zip(rows, pairs, strict=False)]
    found = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rows": tokens(trainer, rows),
        "messages": tokens(trainer, messages),
    }
    out.write(json.dumps(found) + "\n")
    trainer.train()


class Clock(TrainerCallback):
    """Lets a step begin when a line comes in, and writes what it cost (seconds) and what TRL logged of it."""

    def __init__(self, out: Any, reference: torch.nn.Module) -> None:
        self.out, self.ended = out, time.process_time()
        reference.register_forward_pre_hook(lambda module, args: setattr(self, "asked", time.process_time()))
        reference.register_forward_hook(lambda module, args, output: setattr(self, "reference", time.process_time() - self.asked))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.between = time.process_time() - self.ended
        if not sys.stdin.readline():
            sys.exit("the other side is gone")
        self.began, self.clock = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.wall, self.ended = time.perf_counter() - self.clock, time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        times = {"seconds": self.ended - self.began, "wall": self.wall, "between": self.between, "reference_seconds": self.reference}
        values = {"loss": logs["loss"], "chosen": logs["logps/chosen"], "rejected": logs["logps/rejected"], "grad_norm": logs["grad_norm"]}
        self.out.write(json.dumps({**times, **values}) + "\n")


def dataset(pairs: Sequence[dict[str, Any]], folder: Path) -> Dataset:
    features = Features({"images": List(Image()), **{name: Value("string") for name in ("prompt", "chosen", "rejected")}})
    rows = [{"images": [str(folder / pair["image"])], **{name: pair[name] for name in list(features)[1:]}} for pair in pairs]
    return Dataset.from_list(rows, features=features)


def conversation(pair: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The pair as messages, which is how TRL's documentation writes data with images."""
    said = {"prompt": ("user", "question"), "chosen": ("assistant", "chosen"), "rejected": ("assistant", "rejected")}
    return {name: [{"role": role, "content": pair[column]}] for name, (role, column) in said.items()}


def tokens(trainer: DPOTrainer, rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Per sequence of a batch (all chosen ones, then all rejected ones) the ids of its prompt and those that TRL scores."""
    batch = trainer.data_collator(rows)
    scored, seen = batch["completion_mask"].bool(), batch["attention_mask"].bool()
    return [
        {"prompt": ids[s & ~c].tolist(), "scored": ids[s & c].tolist()} for ids, s, c in zip(batch["input_ids"], seen, scored, strict=True)
    ]


if __name__ == "__main__":
    main()
