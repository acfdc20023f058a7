"""Trainer process of benchmarks/peers.py, run by the Python interpreter of the trainer's own environment.

    python peers_side.py PEER FOLDER     one optimizer step of PEER (a name in PEERS) for every line on standard input

FOLDER contains settings.json, the models policy and reference, and the data in the trainer's own format; benchmarks/peers.py writes them.
The output is JSON lines. The first line has the versions, the resident memory before the first step, and the token ids of the trainer's
first batch. Each step adds a line. Times are in seconds, and memory is in MB. Only `ours` needs this package.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("trl", "ms-swift", "llamafactory", "prefix-grouper", "transformers", "torch", "accelerate", "datasets")
Rows = list[dict[str, list[int]]]
"""Prompt ids and scored ids of each sequence in the first batch: first the chosen sequences, then the rejected ones."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # stdout carries the protocol, so the output of libraries goes to stderr
    torch.set_num_threads(1)
    peer, folder = PEERS[sys.argv[1]], Path(sys.argv[2]).resolve()
    peer(folder, json.loads((folder / "settings.json").read_text()), Clock(out))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory(name: str) -> float:
    """Return ``VmRSS`` (resident now) or ``VmHWM`` (peak since the last reset) of this process, in MB."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{name}:") + 1]) / 1024


class Clock:
    """Clock that waits for a line on standard input before each step, and writes the step's cost and the trainer's metrics."""

    def __init__(self, out: Any) -> None:
        self.out, self.ended, self.reference = out, time.process_time(), 0.0

    def write(self, found: dict[str, Any]) -> None:
        self.out.write(json.dumps(found) + "\n")

    def ready(self, rows: Rows) -> None:
        """Report that everything is loaded, and reset the peak memory."""
        Path("/proc/self/clear_refs").write_text("5")
        self.write({"versions": versions(), "memory": memory("VmRSS"), "rows": rows})

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the other side has ended")
        self.reference, self.began = 0.0, time.process_time()

    def end(self) -> None:
        self.ended = time.process_time()

    def answer(self, values: dict[str, float]) -> None:
        times = {"seconds": self.ended - self.began, "reference_seconds": self.reference}
        self.write({**times, "peak": memory("VmHWM"), **values})

    def forwards_without_gradients(self) -> None:
        """Time the outermost forward passes that run without gradients. Within a DPO step, these are the reference model's."""
        from transformers import PreTrainedModel

        inside: list[tuple[torch.nn.Module, float]] = []

        def enter(module: torch.nn.Module, _: Any) -> None:
            if not inside and not torch.is_grad_enabled() and isinstance(module, PreTrainedModel):
                inside.append((module, time.process_time()))

        def leave(module: torch.nn.Module, *_: Any) -> None:
            if inside and inside[0][0] is module:
                self.reference += time.process_time() - inside.pop()[1]

        torch.nn.modules.module.register_module_forward_pre_hook(enter)
        torch.nn.modules.module.register_module_forward_hook(leave)


def callback(clock: Clock, rows: Callable[[Any], Rows] | None = None) -> Any:
    """Wrap the clock in a callback for transformers' Trainer. ``rows`` extracts the token ids of the first batch."""
    from transformers import TrainerCallback

    clock.forwards_without_gradients()

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            if rows is not None:
                clock.ready(rows(next(iter(train_dataloader))))

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                kept = {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected", "grad_norm": "grad_norm"}
                clock.answer({ours: float(logs[theirs]) for ours, theirs in kept.items()})

    return Steps()


def labelled(batch: dict[str, Any]) -> Rows:
    """Return the sequences of a batch that marks unscored tokens with the label -100 (ms-swift, LLaMA-Factory)."""
    return [split(ids[seen.bool()], label[seen.bool()] != -100) for ids, seen, label in columns(batch, "labels")]


def columns(batch: dict[str, Any], scored: str) -> Iterable[tuple[torch.Tensor, ...]]:
    return zip(batch["input_ids"], batch["attention_mask"], batch[scored], strict=True)


def split(ids: torch.Tensor, scored: torch.Tensor) -> dict[str, list[int]]:
    return {"prompt": ids[~scored].tolist(), "scored": ids[scored].tolist()}


def trainer_options(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return options of transformers' Trainer that all three trainers accept, for plain AdamW steps in the order of the rows."""
    return {
        "output_dir": str(folder / "trained"),
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": settings["max_grad_norm"],
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def load(folder: Path, name: str, attention: Any = "sdpa") -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32, attn_implementation=attention)


# --- the trainers -------------------------------------------------------------------------------------------------------------------------


def trl(folder: Path, settings: dict[str, Any], clock: Clock) -> None:
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoProcessor, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    features = Features({"images": List(Image()), **{name: Value("string") for name in ("prompt", "chosen", "rejected")}})

    def dataset(pairs: Sequence[dict[str, Any]]) -> Dataset:
        rows = [{"images": [str(folder / pair["image"])], **{name: pair[name] for name in list(features)[1:]}} for pair in pairs]
        return Dataset.from_list(rows, features=features)

    own = {"train_sampling_strategy": "sequential", "max_length": None, "report_to": "none", "beta": settings["beta"]}
    trainer = DPOTrainer(
        model=load(folder, "policy"),
        ref_model=load(folder, "reference"),
        args=DPOConfig(**trainer_options(folder, settings), **own),
        train_dataset=dataset(pairs),
        processing_class=AutoProcessor.from_pretrained(folder / "policy"),
        callbacks=[callback(clock)],
    )
    trainer.remove_callback(PrinterCallback)

    def tokens(rows: list[dict[str, Any]]) -> Rows:
        batch = trainer.data_collator(rows)
        return [split(ids[seen.bool()], scored[seen.bool()].bool()) for ids, seen, scored in columns(batch, "completion_mask")]

    clock.ready(tokens(list(dataset(pairs[: settings["batch"]]))))
    trainer.train()


def swift(folder: Path, settings: dict[str, Any], clock: Clock) -> None:
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main
    from swift.template import TEMPLATE_MAPPING, register_template

    steps = callback(clock, labelled)
    callbacks_map["clock"] = lambda args, trainer: steps
    of, config = TEMPLATE_MAPPING["qwen2_5_vl"], json.loads((folder / "policy" / "config.json").read_text())
    # ms-swift recognises placeholders by ids of the published vocabulary. With another vocabulary, it silently trains without the picture.
    own = type("OwnIds", (of.template_cls,), {name: config[name] for name in ("image_token_id", "video_token_id")})
    register_template(replace(of, template_type="text_alone", template_cls=own, suffix=[]))
    options = {
        **trainer_options(folder, settings),
        "rlhf_type": "dpo",
        "model": str(folder / "policy"),
        "ref_model": str(folder / "reference"),
        "model_type": "qwen2_5_vl",
        "ref_model_type": "qwen2_5_vl",
        "template": "text_alone",
        "dataset": str(folder / "swift.jsonl"),
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "beta": settings["beta"],
        "freeze_vit": False,
        "freeze_aligner": False,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "callbacks": "clock",
    }
    rlhf_main([part for name, value in options.items() for part in (f"--{name}", str(value))])


def llamafactory(folder: Path, settings: dict[str, Any], clock: Clock) -> None:
    try:
        import torchaudio  # noqa: F401  (LLaMA-Factory imports it for recordings)
    except OSError:  # the registry's build needs CUDA libraries, which a CPU build of torch lacks
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template
    from llamafactory.train.tuner import run_exp

    of = TEMPLATES["qwen2_vl"]
    register_template(
        name="text_alone",
        format_user=of.format_user,
        format_assistant=StringFormatter(slots=["{{content}}"]),
        format_system=of.format_system,
        default_system=of.default_system,
        mm_plugin=of.mm_plugin,
    )
    options = {
        **trainer_options(folder, settings),
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": str(folder / "policy"),
        "ref_model": str(folder / "reference"),
        "template": "text_alone",
        "dataset": "pairs",
        "dataset_dir": str(folder / "llamafactory"),
        "media_dir": str(folder),
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "infer_dtype": "float32",
        "pref_beta": settings["beta"],
        "pref_loss": "sigmoid",
        "disable_shuffling": True,
        "cutoff_len": 1 << 20,
        "image_max_pixels": 1 << 30,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    run_exp(options, [callback(clock, labelled)])


def prefix_grouper(folder: Path, settings: dict[str, Any], clock: Clock) -> None:
    """Run prefix-grouper on a transformers model, through ``AttentionInterface``, with DPO and stored reference scores."""
    from PIL import Image
    from prefix_grouper import PrefixGrouper
    from prefix_grouper.forward import AttentionForward
    from transformers import AttentionInterface, AutoProcessor
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(query: Any, key: Any, value: Any, seen: Any, module: Any, **named: Any) -> torch.Tensor:
        """Attend causally to the keys marked in ``seen`` [rows, keys], which excludes padding. The queries are the last positions. A single
        prefix needs no mask.
        """
        whole = query.shape[2] == key.shape[2] and bool(seen.all())
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        mask = None if whole else causal & seen[:, None, None]
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=whole, **named)[0]

    def grouped(module: Any, query: Any, key: Any, value: Any, _: Any, **named: Any) -> tuple[torch.Tensor, None]:
        kept = {name: named[name] for name in ("scaling", "dropout")}
        return AttentionForward(attend)(named["prefix_grouper"], query, key, value, module, **kept), None

    AttentionInterface.register("grouped", grouped)
    model = load(folder, "policy", {"text_config": "grouped", "vision_config": "sdpa"}).train()
    processor = AutoProcessor.from_pretrained(folder / "policy")
    processor.tokenizer.padding_side = "right"
    groups = [json.loads(line) for line in (folder / "prefixes.jsonl").read_text().splitlines()]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0)

    def prepare(group: dict[str, Any]) -> tuple[dict[str, Any], Any, Any, Any]:
        prompt = processor(text=[group["prompt"]], images=[Image.open(folder / group["image"])], return_tensors="pt")
        texts = processor.tokenizer(group["texts"], padding=True, add_special_tokens=False, return_tensors="pt")
        masks, ids = (prompt.pop("attention_mask"), texts.attention_mask), prompt.pop("input_ids")
        grouper = PrefixGrouper.from_ungrouped_masks(*masks, group_sizes=len(group["texts"]), padding_mode="right")
        before, _ = model.model.get_rope_index(ids, **{name: prompt[name] for name in ("mm_token_type_ids", "image_grid_thw")})
        after = [before.max() + 1 + torch.arange(length) for length in grouper.ungrouped_suffix_lens]
        inputs = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
        inputs["input_ids"] = grouper.concat_input(ids, masks[0], texts.input_ids, masks[1])
        inputs["position_ids"] = torch.cat([before, torch.cat(after).expand(3, 1, -1)], dim=-1)
        return inputs, grouper, texts, ids[0].tolist()

    *_, texts, prompt = prepare(groups[0])
    rows = zip(texts.input_ids, texts.attention_mask.bool(), strict=True)
    first, *others = [{"prompt": prompt, "scored": ids[seen].tolist()} for ids, seen in rows]
    clock.ready([first] * len(others) + others)
    for group in groups:
        inputs, grouper, texts, _ = prepare(group)
        clock.begin()
        logits = model(**inputs, use_cache=False, prefix_grouper=grouper).logits
        _, _, logits, seen = grouper.split_output(logits, include_prefix_last=1)
        logp = logits[:, :-1].log_softmax(-1).gather(-1, texts.input_ids.unsqueeze(-1)).squeeze(-1)
        policy = (logp * seen[:, 1:]).sum(-1)
        gain = policy - torch.tensor(group["reference"])
        loss = -torch.nn.functional.logsigmoid(settings["beta"] * (gain[0] - gain[1:])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
        values = {"loss": loss, "chosen": policy[0], "rejected": policy[1:].mean(), "grad_norm": norm}
        clock.answer({name: value.item() for name, value in values.items()})


def ours(folder: Path, settings: dict[str, Any], clock: Clock) -> None:
    import peers

    side = peers.Ours(folder, peers.Settings(**settings))
    clock.ready(side.tokens())
    for number in range(settings["steps"]):
        clock.begin()
        found = side.step(number)
        clock.ended = clock.began + found.pop("seconds")
        clock.answer({**found, "reference_seconds": 0.0})


PEERS = {"ours": ours, "trl": trl, "ms-swift": swift, "llamafactory": llamafactory, "prefix-grouper": prefix_grouper}

if __name__ == "__main__":
    main()
