"""DeepSpeed: start-up, the resolved JSON, loading under zero.Init, parameter groups, initialize."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.config import ConfigError, RunConfig, cores_per_rank, default_workers
from cfvlm_ds.distributed import World, launch_environment, meeting_point
from cfvlm_ds.ds_check import validate as validate
from cfvlm_ds.ds_config import read_json as read_json
from cfvlm_ds.ds_config import resolve as resolve
from cfvlm_ds.ds_config import unusable, warmup_steps
from cfvlm_ds.models import Scorer, family_of, load_config, load_model, trainable

_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse.sshfs", "ceph", "9p", "wekafs")
_STALE_AFTER_S = 300.0


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group (NCCL on CUDA, gloo on CPU) and return this process's place in it.

    ``timeout`` bounds every collective, so that a dead peer is an error and not a hang.
    """
    launch_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed calls collectives by names that newer torch renames, once per call and rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with _absent("mlflow"):  # deepspeed's autotuner would import it on every rank: 1.4 CPU seconds each
        import deepspeed
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank == 0:
        clear_stale_locks()
    # The shared-memory all-reduce serves CPU inference; ZeRO-3 makes no use of it, and it costs a compiler and a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        index = device_index(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the number of the device
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # sharing a core with a data worker costs a fifth of the speed
            torch.set_num_threads(max(1, cores_per_rank() - default_workers()))
    with meeting_point():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timeout, auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(rank, int(os.environ["WORLD_SIZE"]), local_rank, device)


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a rank among those it sees. Raises ConfigError where a launcher has started more ranks than there are GPUs.

    A task of Slurm may see its own alone (--gpus-per-task); then that is number 0.
    """
    if local_rank >= visible and "SLURM_PROCID" not in os.environ:
        raise ConfigError(
            f"rank {os.environ['RANK']} is number {local_rank + 1} on {socket.gethostname()}, where torch sees {visible} GPUs; start one "
            f"rank for each (`deepspeed --num_gpus {visible}`), or look at CUDA_VISIBLE_DEVICES"
        )
    return local_rank % visible


def keep_freed_memory() -> None:
    """Have the C library hand freed memory out again, as CUDA's allocator does, instead of returning it to the system.

    Without it every step asks for its activations and gradients anew, page by page: 10 to 15 % of a training step on a CPU. It is glibc's
    setting (mallopt(3)); where there is another C library, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26)):
            mallopt(option, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def clear_stale_locks(folder: Path | None = None, say: Callable[[str], object] = print) -> list[Path]:
    """Remove build locks that a killed process left in torch's extension cache, where every later start would wait for ever.

    The holder of a lock keeps it open, so a lock that no process of this machine has open is stale; on a network file system the holder may
    be elsewhere, and the lock must also be untouched for five minutes. Returns the locks removed.
    """
    if folder is None:
        from torch.utils.cpp_extension import _get_build_directory  # also honours TORCH_EXTENSIONS_DIR

        probe = Path(_get_build_directory("probe", verbose=False))
        folder = probe.parent
        with contextlib.suppress(OSError):
            probe.rmdir()
    removed = []
    for lock in sorted(folder.glob("*/lock")):
        while (reason := _held(lock)) and reason != "process":
            say(f"waiting for the extension build lock {lock}: {reason}")
            time.sleep(5)
        if reason is None and lock.exists():
            lock.unlink(missing_ok=True)
            removed.append(lock)
            say(f"removed the stale extension build lock {lock}, left by a process that was killed")
    return removed


def _held(lock: Path) -> str | None:
    """Why a lock may still be in use: ``process``, another reason, or None when it is stale or gone."""
    import psutil

    with contextlib.suppress(OSError):
        identity = lock.stat()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        other = entry.stat()
                        if (other.st_dev, other.st_ino) == (identity.st_dev, identity.st_ino):
                            return "process"
        mounts = [p for p in psutil.disk_partitions(all=True) if lock.resolve().is_relative_to(p.mountpoint)]
        mount = max(mounts, key=lambda p: len(p.mountpoint))
        newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
        if mount.fstype in _NETWORK_FILE_SYSTEMS and time.time() - newest < _STALE_AFTER_S:
            return f"{mount.fstype} is shared and another machine may be building"
    return None


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make ``import module`` fail inside the block, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def hidden_size(config: RunConfig) -> int:
    """Width of the language model, which sizes DeepSpeed's buckets."""
    model_config = load_config(config.model.name_or_path)
    return int(model_config.get_text_config().hidden_size)


def initialize(config: RunConfig, resolved: Any, world: World, total_steps: int) -> Any:
    """Load the model (partitioned as it loads under ZeRO-3) and hand it to DeepSpeed; returns the engine, whose module is a Scorer."""
    import deepspeed
    from transformers import get_scheduler
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    dtype = resolved.dtype()
    model = load_model(config.model, dtype)
    unset_hf_deepspeed_config()  # a later from_pretrained, such as the export's, is an ordinary one
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
    except (AssertionError, ValueError, NotImplementedError) as error:  # a combination that it refuses, and ds_check.py does not know
        raise unusable(config.deepspeed, error) from error
    return engine


def told(engine: Any) -> dict[str, Any]:
    """What optimizer, clipping and schedule were told by this run's options; a checkpoint puts those of its own run in their place."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in engine.optimizer.param_groups]
    return {
        "groups": groups,
        "clip": getattr(engine.optimizer, "clip_grad", None),
        "rates": list(getattr(engine.lr_scheduler, "base_lrs", ())),
    }


def tell(engine: Any, options: dict[str, Any]) -> None:
    """Give a restored engine what ``told`` returned before: the next step goes by it, at the place of the schedule that it has reached."""
    if options["clip"] is not None:  # without ZeRO it is the engine's own, from its configuration
        engine.optimizer.clip_grad = options["clip"]
    groups, schedule = engine.optimizer.param_groups, engine.lr_scheduler
    for group, own in zip(groups, options["groups"], strict=True):
        group.update({name: value for name, value in own.items() if name != "lr"})
    if hasattr(schedule, "lr_lambdas"):  # of transformers
        schedule.base_lrs = options["rates"]
        schedule._last_lr = [rate * by(schedule.last_epoch) for rate, by in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    elif hasattr(schedule, "last_batch_iteration"):  # of DeepSpeed, which keeps nothing else
        schedule.step(schedule.last_batch_iteration)
    else:
        raise ConfigError(f"the schedule {type(schedule).__name__} of the DeepSpeed JSON takes no changed options; restore them")


def gather_clock(engine: Any, device: torch.device) -> Callable[[], float] | None:
    """A function that returns for how many seconds, since its last call, computation waited for ZeRO-3 to gather weights; None elsewhere.

    A module's wait is from its request for its weights to their arrival: on CUDA by events of the stream that computes, and those it has
    not reached yet count in the next call, so that nothing is held up to be measured; elsewhere by the process's own clock.
    """
    if (coordinator := _coordinator(engine)) is None:
        return None
    fetch, waited = coordinator.fetch_sub_module, 0.0
    underway: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def by_clock(*arguments: Any, **options: Any) -> None:
        nonlocal waited
        asked = time.perf_counter()
        fetch(*arguments, **options)
        waited += time.perf_counter() - asked

    def by_events(*arguments: Any, **options: Any) -> None:
        asked, arrived = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        asked.record()
        fetch(*arguments, **options)
        arrived.record()
        underway.append((asked, arrived))
        collect()

    def collect() -> None:
        nonlocal waited
        while underway and underway[0][1].query():
            asked, arrived = underway.popleft()
            waited += asked.elapsed_time(arrived) / 1000

    def since_last() -> float:
        nonlocal waited
        collect()
        found, waited = waited, 0.0
        return found

    coordinator.fetch_sub_module = by_events if device.type == "cuda" else by_clock
    return since_last


def forget_order(engine: Any) -> None:
    """Have ZeRO-3 prefetch nothing in the next forward, which runs other modules than the last ones did; it notes their order anew."""
    coordinator = _coordinator(engine)
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _coordinator(engine: Any) -> Any:
    """What fetches the weights of modules; None where weights are not partitioned."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing of every block that has a gradient."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # It makes all embeddings require a gradient, which only reentrant checkpoints need, and a frozen tower would run twice and backward.
    model.disable_input_require_grads()


def parameter_groups(scorer: Scorer, config: RunConfig) -> list[dict[str, Any]]:
    """One optimizer group per module and kind of weight: each module's learning rate; no decay of biases and norms.

    The order is fixed (module, then decayed before exempt), because checkpoints store optimizer state by position.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for module, _, parameter in trainable(scorer):
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
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
