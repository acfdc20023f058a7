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
    **dict.fromkeys(("manifest", "data.path", "data.manifest", "dataset", "data_path", "train_file", "train_dataset"), "data.train"),
    **dict.fromkeys(("image_folder", "media_dir", "dataset_dir"), "data.root"),
    **dict.fromkeys(("val", "validation", "data.val", "data.validation", "eval_dataset", "val_dataset"), "data.evaluation"),
    **dict.fromkeys(("precompute_ref_log_probs", "ref_model"), "data.scores"),
    **dict.fromkeys(("dataloader_num_proc", "workers"), "data.num_workers"),
    **dict.fromkeys(("freeze_vision_tower", "freeze_vit"), "model.vision_tower.tuning"),
    **dict.fromkeys(("freeze_multi_modal_projector", "freeze_aligner", "tune_mm_mlp_adapter"), "model.projector.tuning"),
    **dict.fromkeys(("freeze_language_model", "freeze_llm", "freeze_backbone"), "model.language_model.tuning"),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "lora_enable", "use_peft"), "model.language_model.tuning"),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules"), "model.language_model.tuning"),
    **dict.fromkeys(("lora_r", "lora_rank", "model.lora.r"), "model.lora.rank"),
    **dict.fromkeys(("bits", "quant_bits", "quantization_bit"), "model.lora.load_in_4bit"),
    **dict.fromkeys(("vit_lr", "vision_lr", "mm_vision_tower_lr"), "model.vision_tower.learning_rate"),
    **dict.fromkeys(("aligner_lr", "mm_projector_lr", "merger_lr"), "model.projector.learning_rate"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.eval_steps"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), "train.save_best"),
    **dict.fromkeys(("dtype", "fp16", "torch_dtype"), "train.bf16"),
    **dict.fromkeys(("rpo_alpha", "sft_alpha"), "objective.align.weight"),
    "betas": "train.adam_beta1",
    "deepspeed": "deepspeed",
    "eps": "train.adam_epsilon",
    "flash_attn": "model.attn_implementation",
    "lora_alpha": "model.lora.alpha",
    "lr": "train.learning_rate",
    "packing": "data.max_tokens_per_micro_batch",
    "report_to": "tracking.enabled",
    "resume_from_checkpoint": "train.resume",
    "scheduler": "train.lr_scheduler_type",
    "tracking.project": "tracking.experiment",
    "wd": "train.weight_decay",
}
"""An option, or its last part, under the name that other programs give it -> its name here."""


def nearest(option: str, names: Sequence[str]) -> str | None:
    """The one of ``names``, dotted options, that ``option`` may have meant, or None.

    First the option that other programs call so; then one of that section (of any, if none was given) whose name has all of its words; last
    the likeliest misspelling, where its last part is like the given one's too: most options of a section share half of their letters.
    """
    names = [name for name in names if not name.endswith(".help")]
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
    like = _LIKE_IN_SECTION if "." in option else _LIKE
    forms = difflib.get_close_matches(option, by_form, n=3, cutoff=like)
    likely = [form for form in forms if difflib.SequenceMatcher(None, last, form.rpartition(".")[2]).ratio() >= like]
    return by_form[likely[0]] if likely else None


_LIKE, _LIKE_IN_SECTION = 0.75, 0.65
