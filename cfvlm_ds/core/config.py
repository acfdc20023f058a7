"""Run configuration: nested dataclasses that are filled from YAML files and dotted command-line options.

Unknown options are errors, and the resolved configuration can be printed as YAML. Options that also exist in transformers'
TrainingArguments have the same names. The DeepSpeed JSON sets the ZeRO stage, precision and offloading; the run configuration sets batch
sizes, learning rates and step counts. Each "auto" in the JSON is replaced by the run's value. A conflict between the JSON and the run
configuration is an error (see engine/configuration.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cfvlm_ds.core.data_config import DataConfig, DataSet
from cfvlm_ds.core.options import AT_LEAST_ONE, COUNT, FINITE, SHARE, option

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"]
"""Learning rate schedules in transformers that need no further options."""
CFVLM = ("align", "csd", "fcd")
"""Default terms of the objective, from CF-VLM (arXiv 2506.17267)."""


@dataclass(frozen=True)
class ModuleConfig:
    """Training options for one module: the vision tower, the projector or the language model.

    Args:
        tuning: ``full`` trains every weight, ``lora`` trains adapters on the linear layers, and ``frozen`` trains nothing.
        learning_rate: peak learning rate of the module; by default, ``train.learning_rate``.
    """

    tuning: Literal["full", "lora", "frozen"] = option("full", on_resume="refuse")
    learning_rate: float | None = option(None, within=FINITE)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in the modules whose ``tuning`` is ``lora``.

    Args:
        rank: rank of the low-rank matrices.
        alpha: scale of the adapters, whose output is multiplied by alpha / rank.
        dropout: dropout probability for the input of an adapter.
        load_in_4bit: store the language model's base weights in 4 bits (QLoRA, arXiv 2305.14314); requires bitsandbytes and ZeRO-2.
        dora: also train the magnitude of each weight row (DoRA, arXiv 2402.09353).
        rslora: multiply an adapter's output by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732).
    """

    rank: int = option(16, within=(1, 1e6), on_resume="refuse")
    alpha: float = 32.0
    dropout: float = option(0.0, within=SHARE)
    dora: bool = option(False, on_resume="refuse")
    rslora: bool = False
    load_in_4bit: bool = option(False, on_resume="refuse")

    @property
    def scaling(self) -> float:
        """Factor that multiplies an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The model to fine-tune.

    Args:
        name_or_path: model folder or hub name.
        attn_implementation: attention back end: ``flash_attention_2``, ``sdpa``, or one of torch's GPU kernels, ``varlen`` or ``flex``.
            ``auto`` selects ``flash_attention_2`` or ``varlen`` if it is available and supports the model, otherwise ``sdpa``.
        gradient_checkpointing: recompute activations in the backward pass. This saves memory, but a step takes about a third longer.
        min_pixels: enlarge smaller images to at least this many pixels (Qwen-VL, GLM-4V).
        max_pixels: shrink larger images to at most this many pixels, which limits their visual tokens (Qwen-VL, GLM-4V, Mistral 3, Gemma
            4).
        max_tiles: cut an image into at most this many tiles (LLaVA-NeXT, OneVision, InternVL, Idefics3, SmolVLM, Aya, Command).
        vision_tower: tuning and learning rate of the vision tower.
        projector: tuning and learning rate of the projector.
        language_model: tuning and learning rate of the language model and its output head.
        lora: adapter options, for modules whose ``tuning`` is ``lora``.
    """

    name_or_path: str = option("", on_resume="ignored")
    attn_implementation: str = option("auto", on_resume="free")
    gradient_checkpointing: bool = option(False, on_resume="free")
    min_pixels: int | None = option(None, within=AT_LEAST_ONE)
    max_pixels: int | None = option(None, within=AT_LEAST_ONE)
    max_tiles: int | None = option(None, within=AT_LEAST_ONE)
    vision_tower: ModuleConfig = field(default_factory=ModuleConfig)
    projector: ModuleConfig = field(default_factory=ModuleConfig)
    language_model: ModuleConfig = field(default_factory=ModuleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def unused(self) -> list[str]:
        """Warnings about options that have no effect, printed when a run starts. LoRA options need a module whose ``tuning`` is ``lora``;
        a rank alone does not enable LoRA.
        """
        if self.lora == LoraConfig() or "lora" in (self.vision_tower.tuning, self.projector.tuning, self.language_model.tuning):
            return []
        return [
            "warning: model.lora has no effect, because no module has tuning lora; set model.language_model.tuning to lora, or remove "
            "model.lora"
        ]


IMAGE_LIMITS = ("min_pixels", "max_pixels", "max_tiles")
"""ModelConfig options that limit an image's visual tokens."""


MICRO_BATCH_SIZE = 8
"""Default number of groups per micro-batch and rank."""


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of sampling and training. In each round, the model generates texts about pictures, a judge labels them as true or false, and
    the model is trained on the training data and these texts. Each round starts from the model of the previous one. The run folder of round
    K is ``output_dir/round-K``. All other options apply to every round.

    Args:
        number: number of rounds.
        pictures: data set of pictures with true texts, in any supported format.
        judge: ``answers``, ``match`` or MODULE:FUNCTION, which decides whether a text is true (as in ``cfvlm-ds data sample``).
        scorer: model that the judge ``match`` asks; every rank loads it in addition to the model.
        n: number of texts to sample per picture and prompt.
        temperature: sampling temperature.
        max_new_tokens: maximum number of tokens per text; texts that are cut off are discarded.
        prompt: one prompt for all pictures; by default, each picture is shown with the prompts of its row.
        weight: weight of the sampled groups in the training mixture. A single training set without a weight gets weight 1.
    """

    number: int = option(within=AT_LEAST_ONE)
    pictures: DataSet = option()
    judge: str = option()
    scorer: str = ""
    n: int = option(8, within=AT_LEAST_ONE)
    temperature: float = option(1.0, within=(0.01, 1e3))
    max_new_tokens: int = option(128, within=AT_LEAST_ONE)
    prompt: str = ""
    weight: float = option(1.0, within=(1e-9, 1e9))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, evaluation, checkpoints and the run folder.

    Args:
        output_dir: run folder, for the configuration, metrics, checkpoints, tracking store and export.
        per_device_train_batch_size: groups per micro-batch and rank (see also ``data.max_tokens_per_micro_batch``); by default 8, or fewer
            if a step would otherwise need more groups than an epoch has.
        gradient_accumulation_steps: micro-batches per optimizer step.
        per_device_eval_batch_size: groups per evaluation batch and rank. A batch is scored in forward passes of at most
            ``data.max_tokens_per_forward`` tokens or, if that is not set, ``data.max_tokens_per_micro_batch`` tokens.
        learning_rate: peak learning rate of every module that does not set its own.
        weight_decay: AdamW's decoupled weight decay; biases and norms are exempt.
        adam_beta1: AdamW's first-moment decay.
        adam_beta2: AdamW's second-moment decay.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: clip the global gradient norm to this value; 0 disables clipping.
        router_balance: weight of transformers' load-balancing loss for the routers of a mixture of experts, computed over all tokens of a
            step; published configurations use 0.001. A step with several forward passes first runs all of them without gradients, which
            takes extra time.
        hard_negatives: train only on this many counterfactuals per group: the ones that the model currently scores highest. They are
            selected in an extra forward pass without gradients. By default, a step trains on all counterfactuals.
        lr_scheduler_type: name of a transformers learning rate schedule that needs no further options.
        warmup_ratio: fraction of the steps over which the learning rate warms up linearly.
        num_train_epochs: passes over the training groups, if ``max_steps`` is not given.
        max_steps: number of optimizer steps; -1 uses ``num_train_epochs``.
        seed: seed for the data order and all other random numbers.
        bf16: train in bfloat16 (``true``) or float32 (``false``); ``auto`` uses bfloat16 if the device supports it.
        logging_steps: steps between progress lines and metric records.
        eval_steps: steps between evaluations; 0 evaluates only at the end. By default, a random sample of at most 300 groups per set is
            also evaluated after each quarter of training, which takes up to a tenth of the training time; not in very short runs.
        eval_on_start: evaluate before the first step, so that results.md shows what the training changed. ``auto`` evaluates a random
            sample of at least 100 groups per set, which takes about a tenth of the training time; ``true`` evaluates all groups and
            benchmarks; ``false`` skips this evaluation.
        samples: number of evaluation pictures for which the model generates a text at each evaluation; results.md shows the texts.
        save_steps: steps between checkpoints; 0 saves only at the end.
        save_minutes: also save when this many minutes have passed since the last checkpoint; 0 disables this.
        save_total_limit: keep only this many of the newest checkpoints; 0 keeps all.
        save_keep_every: also keep every checkpoint whose step is a multiple of this number; 0 disables this.
        save_best: name of a metric in metrics.jsonl, such as ``eval/test/group``. The checkpoint with the highest value of this metric,
            saved right after the evaluation, is also kept.
        early_stopping: stop training after this many consecutive evaluations without an improvement in the ``save_best`` metric.
        resume: ``auto`` continues from the newest complete checkpoint of output_dir, starts at step 0 if there is no checkpoint, and fails
            if there are only unusable ones; ``restart`` is like ``auto``, but starts at step 0 instead of failing; ``never`` starts at step
            0 and refuses a folder with a checkpoint; the path of a checkpoint continues from that checkpoint.
        resume_changes: action if an option that affects the training has changed since the checkpoint: ``refuse`` names the option and
            stops; ``allow`` continues with the new value and records it in resume_changes.jsonl in the run folder.
        on_nonfinite: action of all ranks if a loss or gradient is NaN or infinite on any rank: ``stop``, or ``skip`` the step (at most 10
            in a row). In both cases, the weights stay unchanged, and nonfinite.jsonl in the run folder lists the groups.
        stop_margin_s: save a checkpoint and exit with code 85 when the time left in a Slurm job is less than this many seconds plus the
            duration of the longest step so far (including its evaluation and checkpoint). The margin must be long enough to save the first
            checkpoint, because the time that this takes is not known before.
        hang_timeout_s: exit with code 86 when a rank shows no sign of life, or a step makes no progress, for this many seconds; 0 disables
            this check.
        self_check: check before the first step that all weights are finite, and that packing does not change scores beyond rounding errors
            (packed rows are compared with rows of one text). If the check fails, ``error`` stops and ``warn`` continues; ``off`` skips the
            check.
        displacement_warning: warn when the log-likelihood of the factual texts falls this many nats per token below its initial value.
        figures: at the end, draw the learning curves and write an HTML page of the groups with the smallest margins.
        export: at the end, write the model in Hugging Face format to ``output_dir/export`` or, if only adapters were trained, the adapters
            to ``output_dir/adapter``.
        rounds: alternate sampling and training; by default, the run trains once.
        dry_run: only report sizes, trainable modules and memory per GPU; needs no GPU, weights or data.
    """

    output_dir: str = option("runs/default", on_resume="ignored")
    per_device_train_batch_size: int | None = option(None, within=(1, 1e6), on_resume="free")
    gradient_accumulation_steps: int = option(1, within=(1, 1e6), on_resume="free")
    per_device_eval_batch_size: int = option(16, within=(1, 1e6), on_resume="free")
    learning_rate: float = option(1e-5, within=FINITE)
    weight_decay: float = option(0.0, within=FINITE)
    adam_beta1: float = option(0.9, within=(0, math.nextafter(1, 0)))
    adam_beta2: float = option(0.999, within=(0, math.nextafter(1, 0)))
    adam_epsilon: float = option(1e-8, within=SHARE)
    max_grad_norm: float = option(1.0, within=FINITE)
    router_balance: float = option(0.0, within=FINITE)
    hard_negatives: int | None = option(None, within=AT_LEAST_ONE)
    lr_scheduler_type: Schedule = "cosine"
    warmup_ratio: float = option(0.03, within=SHARE)
    num_train_epochs: float = option(1.0, within=(1e-6, 1e6))
    max_steps: int = option(-1, within=(-1, 1e9))
    seed: int = option(0, within=(0, 2**32 - 1), on_resume="refuse")
    bf16: Literal["auto", True, False] = "auto"
    logging_steps: int = option(10, within=AT_LEAST_ONE, on_resume="ignored")
    eval_steps: int | None = option(None, within=COUNT, on_resume="ignored")
    eval_on_start: Literal["auto", True, False] = option("auto", on_resume="ignored")
    samples: int = option(0, within=COUNT, on_resume="ignored")
    save_steps: int = option(500, within=COUNT, on_resume="ignored")
    save_minutes: float = option(0.0, within=(0, 1e8), on_resume="ignored")
    save_total_limit: int = option(2, within=COUNT, on_resume="ignored")
    save_keep_every: int = option(0, within=COUNT, on_resume="ignored")
    save_best: str | None = option(None, on_resume="ignored")
    early_stopping: int | None = option(None, within=AT_LEAST_ONE, on_resume="ignored")
    resume: str = option("auto", on_resume="ignored")
    resume_changes: Literal["refuse", "allow"] = option("refuse", on_resume="ignored")
    on_nonfinite: Literal["stop", "skip"] = option("stop", on_resume="ignored")
    stop_margin_s: float = option(120.0, within=(0, 1e8), on_resume="ignored")
    hang_timeout_s: float = option(600.0, within=(0, 1e8), on_resume="ignored")
    self_check: Literal["error", "warn", "off"] = option("error", on_resume="ignored")
    displacement_warning: float = option(0.1, on_resume="ignored")
    figures: bool = option(True, on_resume="ignored")
    export: bool = option(True, on_resume="ignored")
    rounds: RoundsConfig | None = option(None, on_resume="ignored")
    dry_run: bool = option(False, on_resume="ignored")

    @property
    def micro_batch_size(self) -> int:
        """Groups per micro-batch and rank: ``per_device_train_batch_size`` or, if that is not set, ``MICRO_BATCH_SIZE``."""
        return self.per_device_train_batch_size or MICRO_BATCH_SIZE


@dataclass(frozen=True)
class TrackingConfig:
    """Experiment tracking.

    Args:
        enabled: record the run in MLflow; metrics.jsonl is written in any case. The environment variable MLFLOW_TRACKING_URI selects a
            server; if it is not set, the store is in the run folder.
        experiment: experiment name.
        run_name: run name; by default, the name of the output folder.
        also: other trackers that receive the metrics: ``tensorboard``, or your own class as MODULE:CLASS.
    """

    enabled: bool = option(True, on_resume="ignored")
    experiment: str = option("cfvlm_ds", on_resume="ignored")
    run_name: str | None = option(None, on_resume="ignored")
    also: list[str] | None = option(None, on_resume="ignored")


@dataclass(frozen=True)
class HabitsConfig:
    """The built-in world with habits: drawn scenes of things with usual attributes (such as white moons), written as ordinary manifests
    with pictures of 64 x 64 pixels.

    Args:
        out_dir: folder to write; left unchanged if it already holds this world.
        num_train: number of training groups.
        num_test: number of groups in the validation set and in each test set.
        num_counterfactuals: number of counterfactual pairs per training group; 0 gives single pictures, for pretraining a base model.
        num_questions: maximum number of questions in a training group, in addition to the descriptions.
        seed: seed of all random numbers.
        strength: probability that a thing in a training picture follows each of its habits.
        text_bias: probability, for each habit that a training picture breaks, that its texts state the usual attribute anyway; requires
            num_counterfactuals 0. A base model pretrained on these texts states usual attributes even if a picture contradicts them.
    """

    out_dir: str
    num_train: int = option(4000, within=AT_LEAST_ONE)
    num_test: int = option(400, within=AT_LEAST_ONE)
    num_counterfactuals: int = option(1, within=COUNT)
    num_questions: int = option(0, within=COUNT)
    seed: int = 0
    strength: float = option(0.96, within=SHARE)
    text_bias: float = option(0.0, within=SHARE)


@dataclass(frozen=True)
class BuildConfig:
    """Data and models that are built before training unless they already exist. By default, nothing is built.

    Args:
        habits: the built-in world with habits.
        base: folder for a copy of the package's small model, pretrained on the world with habits.
    """

    habits: HabitsConfig | None = option(None, on_resume="ignored")
    base: str | None = option(None, on_resume="ignored")


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "tracking": TrackingConfig, "build": BuildConfig}


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run. ``objective`` holds the active terms of the loss, keyed by name."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    build: BuildConfig
    objective: Mapping[str, Any]
    deepspeed: str
    resolved: Mapping[str, Any]
    """The same configuration as plain nested values, with every default filled in."""
    yaml_folder: str = ""
    """Folder of the last YAML file. It is used only in messages: relative paths in the file are resolved against the working directory."""

    @property
    def loss(self) -> str:
        """Summary of the objective for display: each term with its weight, such as ``1 align + 1 csd + 1 fcd``."""
        return " + ".join(f"{term.weight:g} {name}" for name, term in self.objective.items())
