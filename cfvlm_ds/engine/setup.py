"""DeepSpeed startup: process group, model loading under zero.Init, parameter groups and initialization."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch

from cfvlm_ds.core.config import ModelConfig, RunConfig
from cfvlm_ds.core.distributed import World, launch_environment, meeting_point
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.ranks import cores_per_rank, default_workers
from cfvlm_ds.core.versions import version
from cfvlm_ds.deepspeed_compat.parameters import whole_shape
from cfvlm_ds.deepspeed_compat.starting import clear_stale_locks, import_deepspeed
from cfvlm_ds.deepspeed_compat.versions import unknown_version
from cfvlm_ds.engine.configuration import unusable, warmup_steps
from cfvlm_ds.models import Scorer, family_of, load_config, load_model, trainable


def start() -> World:
    """Join the process group (NCCL on CUDA, gloo on CPU). Return this process's rank, the world size and the device.

    Collectives time out after half an hour, so a dead peer causes an error instead of a hang.
    """
    launch_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed calls collectives by deprecated names, and newer versions of torch warn on every call on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import_deepspeed()
    import deepspeed

    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank == 0:
        clear_stale_locks()
    cuda = torch.cuda.is_available()
    if cuda:
        index = device_index(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed uses it as the device index
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # sharing a core with a data worker costs a fifth of the speed
            torch.set_num_threads(max(1, cores_per_rank() - default_workers()))
    with meeting_point():
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", timeout=timedelta(minutes=30), auto_mpi_discovery=False, verbose=False
        )
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    world = World(rank, int(os.environ["WORLD_SIZE"]), device)
    if unknown := unknown_version(version("deepspeed")):
        world.say(f"warning: {unknown}")
    return world


def device_index(local_rank: int, visible: int) -> int:
    """Return a rank's GPU as an index into its visible GPUs. Raises ConfigError if a launcher started more ranks than there are GPUs.

    If a Slurm task sees only its own GPU (--gpus-per-task), the index is 0.
    """
    if local_rank >= visible and "SLURM_PROCID" not in os.environ:
        raise ConfigError(
            f"rank {os.environ['RANK']} is number {local_rank + 1} on {socket.gethostname()}, where torch finds {visible} GPUs; start one "
            f"rank per GPU (`deepspeed --num_gpus {visible}`), or check CUDA_VISIBLE_DEVICES"
        )
    return local_rank % visible


def keep_freed_memory() -> None:
    """Make the C library reuse freed memory, as torch's CUDA allocator does, instead of returning it to the system.

    Otherwise, every step requests the memory for its activations and gradients again, page by page, which takes 10 to 15 % of a training
    step on a CPU. The setting is glibc's mallopt(3). With other C libraries, the call has no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26)):
            mallopt(option, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def hidden_size(config: RunConfig) -> int:
    """Return the language model's hidden size, which determines DeepSpeed's bucket sizes."""
    model_config = load_config(config.model.name_or_path)
    return int(model_config.get_text_config().hidden_size)


def initialize(config: RunConfig, resolved: Any, world: World, total_steps: int) -> Any:
    """Load the model, initialize DeepSpeed, and return the engine, whose module is a Scorer. Under ZeRO-3, the model is partitioned while
    it loads.
    """
    import deepspeed
    from transformers import get_scheduler

    model = _loaded(config.model, resolved.dtype(), resolved)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    scorer = Scorer(model, family_of(model.config))
    groups = parameter_groups(scorer, config)
    optimizer = None
    if "optimizer" not in resolved.config:
        train = config.train
        optimizer = torch.optim.AdamW(
            groups,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=world.device.type == "cuda",
        )

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(config.train.lr_scheduler_type, optimizer, warmup_steps(config, total_steps), total_steps)

    try:
        engine, *_ = deepspeed.initialize(
            model=scorer,
            model_parameters=groups,
            optimizer=optimizer,
            lr_scheduler=None if "scheduler" in resolved.config else schedule,
            config=resolved.config,
        )
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:  # errors of DeepSpeed's own validation
        raise unusable(config.deepspeed, error) from error
    return engine


def in_parts(config: ModelConfig, dtype: torch.dtype, world: World) -> Any:
    """Load a model for forward passes only, partitioned over all ranks (ZeRO-3). Return the engine, whose module is a Scorer in evaluation
    mode.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world.size,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3},
    }
    model = _loaded(config, dtype, HfDeepSpeedConfig(settings))
    engine, *_ = deepspeed.initialize(model=Scorer(model, family_of(model.config)), config=settings)
    engine.eval()
    return engine


def _loaded(config: ModelConfig, dtype: torch.dtype, ds_config: Any) -> Any:
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    set_hf_deepspeed_config(ds_config)  # makes from_pretrained partition the model under ZeRO-3
    try:
        return load_model(config, dtype)
    finally:
        unset_hf_deepspeed_config()  # later calls to from_pretrained, such as the export's, must not partition


def recompute_activations(model: Any) -> None:
    """Enable gradient checkpointing for every block that gradients flow through."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # The call above makes all embeddings require a gradient. Only reentrant checkpointing needs that, and a frozen tower would run a
    # needless backward pass.
    model.disable_input_require_grads()


def parameter_groups(scorer: Scorer, config: RunConfig) -> list[dict[str, Any]]:
    """Return two optimizer groups per module: weights with weight decay, and biases and norms without. Both use the module's learning rate.

    The order is fixed (by module, groups with weight decay first), because checkpoints store optimizer state by position.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for module, _, parameter in trainable(scorer):
        decays = len(whole_shape(parameter)) > 1
        groups.setdefault((module, decays), []).append(parameter)
    result = []
    for (name, decays), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1])):
        rate = getattr(config.model, name).learning_rate
        result.append(
            {
                "params": parameters,
                "lr": config.train.learning_rate if rate is None else rate,
                "weight_decay": config.train.weight_decay if decays else 0.0,
                "name": f"{name}{'' if decays else '.exempt'}",
            }
        )
    return result
