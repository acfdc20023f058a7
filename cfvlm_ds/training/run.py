"""A training run from options to results: validation, data, resume, engine, self-check and training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds import checkpoint, engine
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.cluster import heartbeat, signals
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import ProgressBarrier, World, preserve_rng, run_on_rank0, seed_everything
from cfvlm_ds.core.errors import ConfigError, DataError, writing
from cfvlm_ds.core.files import write_if_possible
from cfvlm_ds.core.progress import no_op
from cfvlm_ds.core.run_folder import refuse_foreign_entries
from cfvlm_ds.data import GroupSampler, PackedSampler
from cfvlm_ds.data.mixture import Order, shares_of
from cfvlm_ds.data.permutation import RowsTogether
from cfvlm_ds.data.stored import is_store
from cfvlm_ds.data.stored_scores import ScoresById, ScoresOfSources, dtype_of, read_scores
from cfvlm_ds.models import attention, fingerprint, inputs_fingerprint
from cfvlm_ds.models.variable_length import flash_attention
from cfvlm_ds.objectives import required_cells, scored_besides
from cfvlm_ds.tracking import import_mlflow
from cfvlm_ds.training import run_start
from cfvlm_ds.training.evaluator import check_best
from cfvlm_ds.training.read_data import RunData, forget, read_data
from cfvlm_ds.training.results import refuse_export
from cfvlm_ds.training.run_record import tracker_of, write_record
from cfvlm_ds.training.self_check import check_scores, refuse_nonfinite, refuse_unusable
from cfvlm_ds.training.token_counts import group_tokens
from cfvlm_ds.training.trainer import Trainer
from cfvlm_ds.training.validation import scores_needed, validate


def train(config: RunConfig, world: World | None = None) -> None:
    """Train, evaluate and export. Every rank must call this. It joins the process group unless ``world`` is given.

    If the run has already finished, it only prints a message. After a stop signal, it saves a checkpoint, skips evaluation and export, and
    raises SystemExit with ``EXIT_STOPPED``. Calling it again with the same arguments resumes the run.

    Raises ConfigError or DataError before the first step for an error in the configuration or data, and FloatingPointError on all ranks if
    the loss or its gradient is not finite.
    """
    world = world or engine.start()
    with exit_with_message(world):
        validate(config, world)
        with locked(Path(config.train.output_dir), world, partial(refuse_export, config), config.resolved):
            _run(config, world)


def prepare(config: RunConfig, world: World) -> None:
    """Prepare a run's data (stores, text lengths, token counts) as the run's first start would. Raises the same errors as ``train``."""
    validate(config, world)
    with locked(Path(config.train.output_dir), world, options=config.resolved):
        data = read_data(config, world, most_rows=None)
        besides = scored_besides(config.objective)
        _tokens(config, world, data, data.collator.of_run(required_cells(config.objective), None, data.pictures, **besides))


_LEFT = {
    signals.EXIT_STOPPED: "stopped by a signal; the same command continues",
    signals.EXIT_INTERRUPTED: "ended by a second Ctrl-C; the same command continues from the last checkpoint",
}


@contextlib.contextmanager
def exit_with_message(world: World) -> Iterator[None]:
    """If a signal makes a rank exit at once within the block, all ranks exit, and rank 0 prints how to continue the run."""
    with signals.before_leaving(lambda code: world.say(_LEFT[code])), signals.leaving_together(world):
        yield


@contextlib.contextmanager
def locked(run_dir: Path, world: World, check: Callable[[], object] = no_op, options: Any = None) -> Iterator[None]:
    """Hold the run folder's lock within the block.

    Raises ConfigError on all ranks, before anything is written, if another process holds the lock, if the folder has entries that do not
    belong to a run with these ``options``, or if ``check`` raises a ConfigError.
    """
    locks: list[RunLock] = []

    def acquire() -> None:
        with writing(run_dir, "choose another train.output_dir"):  # for example, the name is too long or the folder is unreadable
            refuse_foreign_entries(run_dir, options)
            check()
        locks.append(RunLock(run_dir))

    run_on_rank0(world, acquire)
    lock: Any = locks[0] if locks else contextlib.nullcontext()
    with lock, signals.before_leaving(lambda code: lock.release() if locks else None):
        yield


def _run(config: RunConfig, world: World) -> None:
    """Check everything, then train. The run folder and MLflow stay unchanged until the weights are loaded and have passed the self-check.

    Only the data check's cache and the ranks' heartbeats are written earlier.
    """
    seed_everything(config.train.seed)
    run_dir = Path(config.train.output_dir)
    raw, width = engine.read_json(config.deepspeed), engine.hidden_size(config)
    data = read_data(config, world)
    config = _fitted(config, data, world)
    stored = _stored_scores(config, data, world)
    check_best(config, data.splits, data.benchmarks)
    besides, packs_again = scored_besides(config.objective), config.train.hard_negatives is not None
    collator = data.collator.of_run(required_cells(config.objective), stored, data.pictures, packs_again, **besides)
    sampler = _sampler(config, world, data, collator)
    total_steps = config.train.max_steps if config.train.max_steps > 0 else sampler.num_steps(config.train.num_train_epochs, world.say)
    resolved = engine.resolve(raw, config, world.size, world.device, width, total_steps)
    for file in [Path(source.scores) for source in config.data.train_sets.values() if stored is not None and source.scores is not None]:
        if (scored := dtype_of(file)) not in (None, dtype := str(resolved.dtype()).removeprefix("torch.")):
            world.say(f"warning: {file} was computed in {scored}, but this run trains in {dtype}; see `cfvlm-ds score --dtype`")
    try:
        start = run_start.decide(config, resolved.config, world, sampler, dict(data.identity), data.identities, total_steps)
    except run_start.OtherData:
        forget(config, world)
        raise
    if start is None:
        return
    folder = run_on_rank0(world, lambda: heartbeat.prepare(run_dir))
    with heartbeat.Heartbeat(folder, world, config.train.hang_timeout_s) as pulse:
        importing = import_mlflow() if world.is_main and config.tracking.enabled else None
        ds_engine, state = engine.initialize(config, resolved, world, total_steps), TrainState(data=start.data)
        model = ds_engine.module.model
        backend = attention(config.model.attn_implementation, model.config, model.dtype)
        kernel = flash_attention() if backend == "flash_attention_2" else None
        world.say(f"attention: {backend}" + (f" ({kernel.__module__})" if kernel else ""))
        if importing is not None:
            # A process that is forked during an import inherits a locked import lock and hangs at its first import.
            importing.join()
        _checked(config, world, refuse_nonfinite, model, config.model.name_or_path)
        trainer = Trainer(config, world, ds_engine, collator, data, sampler, state, total_steps, pulse)
        if start.checkpoint_dir is not None:
            options = engine.optimizer_options(ds_engine)
            checkpoint.load(ds_engine, start.checkpoint_dir, state, world, run_dir)
            start.check(state, config, sampler)
            if start.changed:  # this run's options replace the checkpoint's
                engine.apply_optimizer_options(ds_engine, options)
            state.note(data=start.data)
            world.say(f"resumed from {start.checkpoint_dir} at step {state.step}")
            _checked(config, world, refuse_nonfinite, model, str(start.checkpoint_dir))
        state.note(record=start.complete_record(config, world))
        with preserve_rng(world.device):  # a resumed run draws the same random numbers as an uninterrupted run
            _check_scores(config, world, ds_engine, collator, data, sampler)
            if (data.splits or data.benchmarks) and state.step < total_steps:
                trainer.evaluator.rehearse()
        with (
            tracker_of(config, world, start.checkpoint_dir, data) as tracker,
            signals.before_leaving(lambda code: tracker.close("SCHEDULED" if code == signals.EXIT_STOPPED else "KILLED", timeout=5.0)),
        ):
            if world.is_main:
                (run_dir / run_start.FINISHED).unlink(missing_ok=True)
            for path in [*write_record(config, ds_engine.module, resolved.config, world, data), *start.note(run_dir, state.step, world)]:
                tracker.artifact(path)
            trainer.run(tracker)
    if world.is_main:
        ended = {"schema": checkpoint.SCHEMA, "step": state.step, "total_steps": total_steps, "record": state.record}
        ended |= {"data": state.data, "evaluation": {name: dict(identity) for name, identity in data.identities.items()}}
        write_if_possible(run_dir / run_start.FINISHED, json.dumps(ended), world.say)
    engine.release(ds_engine)
    world.wait()


def _stored_scores(config: RunConfig, data: RunData, world: World) -> ScoresById | None:
    """Return the training groups' stored scores. Return None if no objective needs them, or if the run computes them itself."""
    if not scores_needed(config):
        return None
    barrier = ProgressBarrier(world)
    made_by = run_on_rank0(world, lambda: fingerprint(config.model, barrier.alive, world.say), barrier)
    try:
        scores = {
            name: read_scores(Path(source.scores), *data.sources[name], made_by=made_by, say=world.say)
            for name, source in config.data.train_sets.items()
            if source.scores is not None
        }
    except DataError:
        forget(config, world)
        raise
    return ScoresOfSources(scores) if config.data.is_mixture else next(iter(scores.values()))


def _tokens(config: RunConfig, world: World, data: RunData, collator: Collator) -> Any:
    """Return the token counts of all groups, or None if no option limits tokens."""
    if not (config.data.max_tokens_per_micro_batch or config.data.max_tokens_per_forward):
        return None
    known = data.identity.get("pictures") is not None  # otherwise a picture's size may change
    depends_on = (lambda: [dict(data.identity), inputs_fingerprint(config.model)]) if known else None
    folders = [Path(config.train.output_dir) / "prepared"]
    if not config.data.is_mixture and is_store(store := Path(str(config.data.train))):
        folders.insert(0, store / "tokens")  # other runs can also use counts that are stored there
    return group_tokens(data.groups, collator, config.data, world, data.pictures, folders=folders, depends_on=depends_on)


def _sampler(config: RunConfig, world: World, data: RunData, collator: Collator) -> GroupSampler:
    options, limit, tokens = config.train, config.data.max_tokens_per_micro_batch, _tokens(config, world, data, collator)
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "seed": options.seed}
    place |= {"gradient_accumulation_steps": options.gradient_accumulation_steps, "order": _order(config, data)}
    if limit is not None:
        return PackedSampler(tokens=tokens, max_tokens=limit, **place)
    return GroupSampler(num_groups=len(data.groups), groups_per_micro_batch=options.micro_batch_size, **place)


def _fitted(config: RunConfig, data: RunData, world: World) -> RunConfig:
    """Return the configuration, with the default micro-batch size lowered if a step would need more groups than an epoch has.

    A configured size is never lowered. Raises ConfigError if it is so large that a step would contain a group twice.
    """
    train, ranks = config.train, world.size
    epoch = _order(config, data).length
    packed, accumulated = config.data.max_tokens_per_micro_batch is not None, train.gradient_accumulation_steps
    size, fits = 1 if packed else train.micro_batch_size, epoch // (accumulated * ranks)
    if size <= fits:
        return config
    if packed or train.per_device_train_batch_size is not None or not fits:
        size_text = "one" if packed else f"{size} (train.per_device_train_batch_size)"
        if fits:
            remedy = f"set train.per_device_train_batch_size to at most {fits}"
        elif epoch >= ranks:
            remedy = f"set train.gradient_accumulation_steps to at most {epoch // ranks}"
        else:
            remedy = f"start at most {epoch} ranks"
        raise ConfigError(
            f"a step takes {size_text} x {accumulated} (train.gradient_accumulation_steps) x {ranks} (ranks) groups, but an epoch has only "
            f"{epoch}; {remedy}"
        )
    world.say(f"train.per_device_train_batch_size is lowered from {size} to {fits}, because an epoch has only {epoch} groups")
    resolved = {**config.resolved, "train": {**config.resolved["train"], "per_device_train_batch_size": fits}}
    return replace(config, train=replace(train, per_device_train_batch_size=fits), resolved=resolved)


def _order(config: RunConfig, data: RunData) -> Order:
    sources = config.data.train_sets
    sizes = tuple(len(each.groups) for each in data.sources.values())
    shares = shares_of([each.weight for each in sources.values()], sizes) if config.data.is_mixture else ()
    firsts = [each.groups.together for each in data.sources.values()]  # the first group of each row, if rows hold several groups
    rows = tuple(None if first is None else RowsTogether(first, size) for first, size in zip(firsts, sizes, strict=True))
    return Order(sizes, shares, config.train.seed, config.data.stopping_strategy, rows)


def _checked(config: RunConfig, world: World, check: Callable[..., None], *arguments: Any) -> None:
    """Run a check of the model. Depending on ``train.self_check``, a failure raises ConfigError or prints a warning, or the check is
    skipped.
    """
    mode = config.train.self_check
    try:
        if mode != "off":
            check(*arguments, world)
    except ConfigError as error:
        if mode == "error":
            raise
        world.say(f"warning: {error}")


def _check_scores(config: RunConfig, world: World, ds_engine: Any, collator: Collator, data: RunData, sampler: GroupSampler) -> None:
    """Compare scores in this rank's first packed row with the scores of the same texts in rows of their own."""
    ds_engine.eval()
    refuse_unusable(ds_engine, collator, config.model.name_or_path, world.device)
    groups = [data.groups[index] for index in next(iter(sampler))]
    _checked(config, world, check_scores, config, ds_engine, collator, groups)
    ds_engine.train()
