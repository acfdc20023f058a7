"""What somebody meant who wrote an option that does not exist, or no longer does."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_ELSEWHERE_CALLED = {
    **dict.fromkeys(("bs", "batch", "bsz", "batch_size", "micro_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps", "ga_steps"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "clip"), "train.max_grad_norm"),
    **dict.fromkeys(("warmup", "warmup_steps"), "train.warmup_ratio"),
    **dict.fromkeys(("model", "model.path", "model.name", "model.checkpoint"), "model.name_or_path"),
    **dict.fromkeys(("manifest", "data.path", "data.manifest"), "data.train"),
    **dict.fromkeys(("val", "validation", "data.val", "data.validation"), "data.evaluation"),
    **dict.fromkeys(("lora_r", "model.lora.r"), "model.lora.rank"),
    "betas": "train.adam_beta1",
    "eps": "train.adam_epsilon",
    "flash_attn": "model.attn_implementation",
    "fp16": "train.bf16",
    "lora_alpha": "model.lora.alpha",
    "lr": "train.learning_rate",
    "resume_from_checkpoint": "train.resume",
    "scheduler": "train.lr_scheduler_type",
    "tracking.project": "tracking.experiment",
    "wd": "train.weight_decay",
    "workers": "data.num_workers",
}
"""An option, or its last part, under the name that other programs give it -> its name here."""


RENAMED = {f"model.{module}.freeze": f"model.{module}.tuning" for module in ("vision_tower", "projector", "language_model")}
"""An option, or a metric that train.save_best may name, of an earlier revision -> what it is called now."""


def nearest(option: str, names: Sequence[str]) -> str | None:
    """The one of ``names``, dotted options, that ``option`` may have meant, or None.

    First the option that other programs call so; then one of that section (of any, if none was given) whose name has all of its words; last
    the likeliest misspelling.
    """
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    section, _, last = option.rpartition(".")
    called = _ELSEWHERE_CALLED.get(option) or (None if section.startswith(("objective", "build")) else _ELSEWHERE_CALLED.get(last))
    if called in leaves:
        return called
    words = set(last.split("_"))
    containing = [name for name in leaves if not section or name.rpartition(".")[0] == section]
    containing = [name for name in containing if words <= set(name.rpartition(".")[2].split("_"))]
    if containing:
        return min(containing, key=lambda name: (name.count("."), name.count("_")))
    by_form = {name if "." in option else name.rpartition(".")[2]: name for name in reversed(leaves)}
    likely = difflib.get_close_matches(option, by_form, n=1, cutoff=0.4)
    return by_form[likely[0]] if likely else None
