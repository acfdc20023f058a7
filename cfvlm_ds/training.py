"""The training loop: the one place where engine, sampler, objectives, tracking, checkpoints and evaluation meet."""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader

from cfvlm_ds import checkpoint, engine, heartbeat, resume, stopping
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.collate import Batch, Collator, load_collator
from cfvlm_ds.config import ConfigError, RunConfig
from cfvlm_ds.data import GroupSampler, PackedSampler, data_roots, open_image
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.scores import StoredScores, read_scores, write_scores
from cfvlm_ds.distributed import Patience, World, agreed, apart, broadcast_object, random_kept, seed_everything
from cfvlm_ds.errors import masked, tell, unwritten
from cfvlm_ds.evaluation import UNLABELLED, Accuracy, GroupScores, evaluate, flat_metrics, headline, metric_names, rehearse, table
from cfvlm_ds.export import export_adapter, export_hf, refuse_replacing
from cfvlm_ds.figures import learning_curves_figure, score_matrix_figure
from cfvlm_ds.groups import CounterfactualGroup, DataError
from cfvlm_ds.models import ModelFlops, load_config, only_adapters_train, parameter_counts, peak
from cfvlm_ds.objectives import required_cells
from cfvlm_ds.preflight import RunData, forget, group_tokens, model_fingerprint, read_data
from cfvlm_ds.run_files import keep, update
from cfvlm_ds.run_files import replace as replace_file
from cfvlm_ds.run_folder import refuse_foreign_entries
from cfvlm_ds.run_lock import RunLock
from cfvlm_ds.self_check import check_scores, refuse_nonfinite, refuse_unusable
from cfvlm_ds.step import Meter, Run, optimizer_step
from cfvlm_ds.stopping import EXIT_STOPPED, Stop, shield_worker
from cfvlm_ds.tower_pass import feature_cache
from cfvlm_ds.tracking import import_mlflow, open_tracker
from cfvlm_ds.validation import scores_needed, validate
from cfvlm_ds.versions import git_revision, version


def train(config: RunConfig, world: World | None = None) -> None:
    """Train, evaluate and export one run; every rank calls it. Joins the process group unless ``world`` says that it has been joined.

    A run that has finished before only says so. One that is asked to stop saves a checkpoint and leaves by SystemExit with
    ``EXIT_STOPPED``, neither evaluated nor exported; started again, it goes on.

    Raises ConfigError or DataError before the first step for anything wrong with configuration or data, and FloatingPointError on all ranks
    when the loss or its gradient is not finite.
    """
    world = world or engine.start()
    with stopping.before_leaving(lambda code: world.say(_LEFT[code])):
        validate(config, world)
        with _locked(Path(config.train.output_dir), world, partial(_refuse_export, config)):
            _train(config, world)


_LEFT = {
    EXIT_STOPPED: "stopped: a signal asked for it; the same command continues",
    stopping.EXIT_INTERRUPTED: "ended by a second Ctrl-C; the same command continues from the last checkpoint",
}


@contextlib.contextmanager
def _locked(run_dir: Path, world: World, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """The run folder is this run's alone. Raises ConfigError on all ranks when it is another's, naming its holder, when what the run
    writes there would end elsewhere, and when ``check`` does, before anything is touched."""
    held: list[RunLock] = []

    def hold() -> None:
        try:
            refuse_foreign_entries(run_dir)
            check()
        except OSError as error:  # a name that is too long, a folder that must not be read
            raise ConfigError(f"{unwritten(run_dir, error)}; choose another train.output_dir") from error
        held.append(RunLock(run_dir, world.say))

    agreed(world, hold)
    lock: Any = held[0] if held else contextlib.nullcontext()
    with lock, stopping.before_leaving(lambda code: lock.release() if held else None):
        yield


def _train(config: RunConfig, world: World) -> None:
    """Check, then touch: until the weights are in place and their scores right, the run folder and MLflow stay as they are.

    Exempt are the caches of the data check and of features, and the ranks' signs of life.
    """
    seed_everything(config.train.seed)
    run_dir = Path(config.train.output_dir)
    raw, width = engine.read_json(config.deepspeed), engine.hidden_size(config)
    data = read_data(config, world)
    groups, splits = data.groups, data.splits
    _check_best(config, splits)
    stored = _stored_scores(config, data, world)
    collator = data.collator or load_collator(config.model, "full", config.data.max_pixels)
    collator = collator.building(required_cells(config.objective), stored)
    collator.checked = data.pictures
    sampler = _sampler(config, world, groups, collator)
    total_steps = config.train.max_steps if config.train.max_steps > 0 else sampler.num_steps(config.train.num_train_epochs)
    resolved = engine.resolve(raw, config, world.size, world.device, width, total_steps)
    try:
        start = resume.decide(config, resolved.config, world, sampler, dict(data.identity), total_steps)
    except resume.OtherData:
        forget(config, world)
        raise
    if start is None:
        return
    agreed(world, lambda: heartbeat.prepare(run_dir))
    with heartbeat.Heartbeat(run_dir / heartbeat.FOLDER, world, config.train.hang_timeout_s) as pulse:
        imported = import_mlflow() if world.is_main and config.tracking.enabled else None
        driven, state = engine.initialize(config, resolved, world, total_steps), TrainState(data=start.data)
        if imported is not None:
            imported.join()  # a data worker that is forked during an import inherits its lock for ever
        _checked(config, world, refuse_nonfinite, driven.module.model, config.model.name_or_path)
        flops = ModelFlops(driven.module.model, driven.module.family)
        if (folder := config.data.feature_cache) is not None:  # before Stop begins to measure how long a step takes
            pulse.mark("features", state.step)
            shown = itertools.chain(groups, *splits.values())
            collator.features = feature_cache(Path(folder), config.model, driven, collator, shown, world, config.data.workers)
            engine.forget_order(driven)  # of the tower, which does not run again
        run = Run(
            config, world, driven, collator, sampler, groups, splits, state, total_steps, flops, Stop(config.train.stop_margin_s), pulse
        )
        if start.found is not None:
            _restore(run, start.found, start)
            _checked(config, world, refuse_nonfinite, driven.module.model, str(start.found))
        state.record = start.told(config, world)
        with random_kept(world.device):  # an uninterrupted run has checked before its first step, not here
            _check_scores(run)
            _rehearse(run)
        with _tracker(run, start.found) as tracker, stopping.before_leaving(partial(_close_at_once, tracker)):
            if world.is_main:
                (run_dir / resume.FINISHED).unlink(missing_ok=True)
            for path in [*_record(run, resolved.config), *start.note(run_dir, state.step, world)]:
                tracker.artifact(path)
            try:
                with stopping.together():
                    if stopped := _loop(run, tracker):
                        _stop(run, tracker, stopped)
                _finish(run, tracker)
            except stopping.Asked as asked:
                _stop(run, tracker, f"{asked}, before the evaluation was done")
            except stopping.WorkerLost as lost:
                then = "the same command continues from the last checkpoint"
                _end(run, tracker, f"rank {world.rank}, in the evaluation: {lost}", then, alone=True)
    if world.is_main:
        keep(run_dir / resume.FINISHED, json.dumps({"step": total_steps}), world.say)
    world.wait()


def _close_at_once(tracker: Any, code: int) -> None:
    tracker.close("SCHEDULED" if code == EXIT_STOPPED else "KILLED", timeout=5.0)


def _stop(run: Run, tracker: Any, why: str) -> NoReturn:
    """Leave a run that is to go on, from the checkpoint of its last step; all ranks call it."""
    done = f"stopped after step {run.state.step} of {run.total_steps}"
    run.world.say(f"{done}: {why}; the same command continues from the checkpoint")
    tracker.close("SCHEDULED")
    run.world.wait()  # the first rank to leave with a code that is not 0 makes the launcher end the others
    sys.exit(EXIT_STOPPED)


def _end(run: Run, tracker: Any, what: str, then: str, alone: bool) -> NoReturn:
    """Leave a run that has lost a data worker; this rank, or all of them together."""
    tracker.close("FAILED")
    if run.world.is_main or alone:
        tell(f"error: {what}; memory is what such processes are usually killed for: lower data.num_workers; {then}", error=True)
    if not alone:
        run.world.wait()
    sys.exit(1)


def _restore(run: Run, found: Path, start: resume.Start) -> None:
    """Go on from a checkpoint, with the options of this run where they have changed."""
    told = engine.told(run.engine)
    checkpoint.load(run.engine, found, run.state, run.world, run.dir)
    start.check(run.state, run.config, run.sampler)
    if start.changed:
        engine.tell(run.engine, told)
    if not isinstance(run.state.data, dict):
        run.world.say(
            f"warning: {found} is of an earlier version, and on which data it was trained cannot be told; they are taken to be these"
        )
    run.state.data = start.data
    run.world.say(f"resumed from {found} at step {run.state.step}")


def _tracker(run: Run, found: Path | None) -> Any:
    config = run.config
    # Killed before its first checkpoint, a run starts over at step 0 and is still the same run.
    anew = {"step": None if config.train.resume == "never" else 0}
    written: dict[str, Any] = anew if found is None else checkpoint.description(found)
    return open_tracker(
        enabled=run.world.is_main,
        run_dir=run.dir,
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or run.dir.name,
        params=config.resolved,
        tags={
            "git_revision": git_revision(),
            "world_size": str(run.world.size),
            "model_type": load_config(config.model.name_or_path).model_type,
        },
        run_id=written.get("run_id"),
        resume_step=written["step"],
        mlflow=config.tracking.enabled,
    )


def _sampler(config: RunConfig, world: World, groups: list[CounterfactualGroup], collator: Collator) -> GroupSampler:
    options, limit = config.train, config.data.max_tokens_per_micro_batch
    tokens = group_tokens(groups, collator, config.data, world, collator.checked) if limit or config.data.max_tokens_per_forward else []
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "seed": options.seed}
    place["gradient_accumulation_steps"] = options.gradient_accumulation_steps
    if limit is not None:
        return PackedSampler(tokens=tokens, max_tokens=limit, **place)
    return GroupSampler(num_groups=len(groups), groups_per_micro_batch=options.per_device_train_batch_size, **place)


def _stored_scores(config: RunConfig, data: RunData, world: World) -> dict[str, StoredScores] | None:
    """The scores file of the training groups, if an objective needs one and the model without its adapters does not serve."""
    if not scores_needed(config):
        return None
    made_by = model_fingerprint(config.model, world)
    try:
        return read_scores(Path(str(config.data.scores)), data.groups, data.identity, made_by=made_by)
    except DataError:
        forget(config, world)
        raise


def _record(run: Run, ds_config: Mapping[str, Any]) -> list[Path]:
    """Write what defines the run into its folder (rank 0), and return the files. Raises ConfigError on all ranks when it cannot."""
    scorer = run.engine.module
    counts = parameter_counts(scorer.model, scorer.family)
    environment = {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "deepspeed", "mlflow", "cfvlm-ds")},
        "world_size": run.world.size,
        "device": torch.cuda.get_device_name() if run.world.device.type == "cuda" else platform.processor() or platform.machine(),
        "parameters": {name: {"total": total, "trainable": trains} for name, (total, trains) in counts.items()},
    }
    contents = {
        run.dir / "config.yaml": yaml.safe_dump(masked(run.config.resolved), sort_keys=False),
        run.dir / "ds_config.json": json.dumps(masked(ds_config), indent=2),
        run.dir / "environment.json": json.dumps(environment, indent=2),
    }
    problem = None
    for path, text in contents.items() if run.world.is_main else ():
        try:
            update(path, text.encode())
        except OSError as error:
            problem = problem or unwritten(path, error)
    if problem := broadcast_object(problem):
        raise ConfigError(f"{problem}; make room, and start again")
    run.world.say("parameters: " + ", ".join(f"{name} {total:,} ({trains:,} trainable)" for name, (total, trains) in counts.items()))
    return list(contents)


def _checked(config: RunConfig, world: World, check: Callable[..., None], *arguments: Any) -> None:
    """Run a check of the model; what it finds is an error on all ranks, or what train.self_check makes of it."""
    wanted = config.train.self_check
    try:
        if wanted != "off":
            check(*arguments, world)
    except ConfigError as error:
        if wanted == "error":
            raise
        world.say(f"warning: {error}")


def _check_scores(run: Run) -> None:
    """Compare packed scores of this rank's first micro-batch with ordinary forwards."""
    run.engine.eval()
    if run.config.data.feature_cache is None:  # which does not hold the picture of the stand-in
        refuse_unusable(run.engine, run.collator, run.config.model.name_or_path, run.world.device)
    groups = [run.groups[index] for index in next(iter(run.sampler))]
    _checked(run.config, run.world, check_scores, run.config, run.engine, run.collator, groups)
    run.engine.train()


def _loop(run: Run, tracker: Any) -> str | None:
    """Train to the end, or to where the ranks agree to stop: then the reason."""
    train, state, world = run.config.train, run.state, run.world
    batches = _batches(run)
    meter = Meter(engine.gather_clock(run.engine, world.device))
    started, first_step = time.monotonic(), state.step
    run.saved_at = started
    run.engine.train()
    saved = first_step
    while state.step < run.total_steps:
        try:
            stop, save_due = optimizer_step(run, batches, meter)
        except stopping.WorkerLost as lost:
            if saved < state.step:
                _save(run, tracker, needed=True)
            then = f"step {state.step} is the last whole one and is saved" if state.step else "nothing was trained"
            _end(run, tracker, f"at step {state.step + 1}, {lost}", f"{then}, and the same command continues", alone=False)
        state.step += 1
        run.sampler.advance()
        state.sampler = run.sampler.state_dict()
        last = state.step == run.total_steps
        if (state.step % train.logging_steps == 0 or last) and len(meter):  # there are none where every step was left out
            metrics = meter.reduce(world)
            rates = {group["name"].split(".")[0]: group["lr"] for group in run.engine.optimizer.param_groups}
            metrics |= {"learning_rate": max(rates.values())} | {f"learning_rate/{module}": rate for module, rate in rates.items()}
            metrics["grad_norm"] = float(run.engine.get_global_grad_norm() or 0.0)
            metrics |= {"epoch": run.sampler.epoch, "skipped_steps": run.engine.skipped_steps, "skipped_groups": len(state.skipped)}
            if (fastest := peak(world.device)) is not None:
                metrics["throughput/mfu"] = metrics["throughput/model_tflop_per_s"] * 1e12 / (fastest * world.size)
            tracker.log(state.step, metrics)
            remaining = (time.monotonic() - started) / (state.step - first_step) * (run.total_steps - state.step)
            world.say(_progress(run, metrics, remaining))
            _watch_displacement(run, metrics)
        state.run_id = tracker.run_id
        if train.eval_steps and state.step % train.eval_steps == 0 and not last and not stop:
            run.pulse.mark("evaluation", state.step)
            try:
                results, _ = _evaluate(run)
            except stopping.Asked as asked:
                stop = str(asked)
            else:
                tracker.log(state.step, flat_metrics(results))
                for split, rows in results.items():
                    world.say(f"  {split}: {headline(rows)}")
                save_due |= _is_best(run, flat_metrics(results))
            meter.reset()  # the evaluation's time is not training time
        if last or stop or save_due or (train.save_steps and state.step % train.save_steps == 0):
            run.pulse.mark("checkpoint", state.step)
            _save(run, tracker, needed=last or stop is not None)
            saved = state.step
        if stop:
            return stop
    return None


def _check_best(config: RunConfig, splits: Mapping[str, Sequence[CounterfactualGroup]]) -> None:
    """ConfigError where train.save_best names a metric that no evaluation of this data can have."""
    name = config.train.save_best
    if name is not None and name not in (known := metric_names(splits)):
        raise ConfigError(
            f"train.save_best {name!r} is no metric that an evaluation of data.evaluation has: no comparison of its groups makes one; take "
            f"one of {', '.join(sorted(known)) or 'none, for no group has a comparison'}"
        )


def _evaluation_options(run: Run) -> dict[str, Any]:
    """Evaluation keeps the token budget of training, and says what to lower where that is not enough."""
    data, size = run.config.data, run.config.train.per_device_eval_batch_size
    limit = data.max_tokens_per_forward or data.max_tokens_per_micro_batch
    option = "data.max_tokens_per_forward" if data.max_tokens_per_forward else "data.max_tokens_per_micro_batch"
    setting = f"{option} ({limit})" if limit else f"train.per_device_eval_batch_size ({size}), set data.max_tokens_per_forward"
    remedy = f"lower {setting}, or set limits on visual tokens (model.max_pixels, model.max_tiles)"
    return {"batch_size": size, "max_tokens": limit, "remedy": remedy}


def _evaluate(run: Run, shuffled: bool = False) -> tuple[dict[str, list[Accuracy]], dict[str, list[GroupScores]]]:
    """Evaluate all splits. Raises Asked on all ranks where they are to stop, and WorkerLost on the one that has lost a data worker."""

    def ask(*arguments: Any) -> None:
        votes = run.stop.votes().to(run.world.device)
        dist.all_reduce(votes)
        if (why := stopping.reason(votes.tolist())) is not None:
            raise stopping.Asked(why)

    run.engine.eval()
    hook = run.engine.register_forward_pre_hook(ask)  # every rank makes as many forwards
    try:
        with stopping.together(), stopping.worker_deaths():
            return evaluate(
                run.engine,
                run.collator,
                run.splits,
                run.world,
                num_workers=run.config.data.workers,
                shuffled=shuffled,
                **_evaluation_options(run),
            )
    finally:
        hook.remove()
        run.engine.train()


def _rehearse(run: Run) -> None:
    """Run the largest evaluation batch before the first step: memory that it lacks is not found out when the training is over."""
    if run.splits and run.state.step < run.total_steps:
        run.engine.eval()
        rehearse(run.engine, run.collator, run.splits, run.world, shuffled=run.config.train.eval_shuffled, **_evaluation_options(run))
        run.engine.train()


def _is_best(run: Run, metrics: Mapping[str, float]) -> bool:
    """Whether this evaluation is the best so far by train.save_best; notes it. Raises ConfigError when it has no such metric."""
    name, state = run.config.train.save_best, run.state
    if name is None:
        return False
    if name not in metrics:
        raise ConfigError(f"train.save_best {name!r} is not among the metrics of an evaluation: {', '.join(sorted(metrics))}")
    if state.best is not None and metrics[name] <= state.best["value"]:
        return False
    state.best = {"step": state.step, "value": metrics[name]}
    return True


def _save(run: Run, tracker: Any, needed: bool) -> None:
    """Save a checkpoint and record its cost. One that cannot be written is a warning, and an error where it is ``needed``."""
    started, train = time.monotonic(), run.config.train
    failed = False
    try:
        checkpoint.save(run.engine, run.state, run.dir, run.world, train.save_total_limit, train.save_keep_every)
    except checkpoint.SaveError as error:
        if needed:
            raise
        failed = True
        run.world.say(f"warning: {error}; training goes on and the next checkpoint is tried in its turn")
    ended = time.monotonic()
    share = (ended - started) / (ended - run.saved_at)  # of the time since the last one
    run.saved_at = ended
    tracker.log(run.state.step, {"checkpoint/seconds": ended - started, "checkpoint/share": share, "checkpoint/failed": float(failed)})


def _batches(run: Run) -> Iterator[list[Batch]]:
    """Micro-batches, each in the parts that are run one after the other."""
    workers = run.config.data.workers
    collate = partial(run.collator.without_unreadable, max_tokens=run.config.data.max_tokens_per_forward)
    loader: Any = DataLoader(
        run.groups,  # type: ignore[arg-type]
        batch_sampler=run.sampler,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=run.world.device.type == "cuda",
        worker_init_fn=shield_worker,
        generator=apart(),
    )
    iterator = iter(loader)
    if workers:
        stopping.hold_deaths_back()
    while True:
        with stopping.worker_deaths(), stopping.deaths_heard():
            parts = next(iterator, None)
        if parts is None:
            return
        yield parts


def _progress(run: Run, metrics: Mapping[str, float], remaining: float) -> str:
    terms = " ".join(f"{name.split('/')[1]} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/"))
    rates = {name: metrics[f"throughput/{name}"] for name in ("groups_per_s", "tokens_per_s", "model_tflop_per_s", "data_wait_share")}
    utilisation = f" (MFU {metrics['throughput/mfu']:.1%})" if "throughput/mfu" in metrics else ""
    gathering = f" all-gather {metrics['throughput/all_gather_share']:.1%}" if "throughput/all_gather_share" in metrics else ""
    minutes, seconds = divmod(int(remaining), 60)
    return (
        f"step {run.state.step}/{run.total_steps} epoch {metrics['epoch']:.2f} loss {metrics['loss']:.4f} ({terms}) "
        f"lr {metrics['learning_rate']:.2e} {rates['groups_per_s']:.1f} groups/s {rates['tokens_per_s']:.0f} tokens/s "
        f"{rates['model_tflop_per_s']:.3g} TFLOP/s{utilisation} wait {rates['data_wait_share']:.1%}{gathering} ETA {minutes}:{seconds:02d}"
    )


def _watch_displacement(run: Run, metrics: Mapping[str, float]) -> None:
    """Warn when the factual caption itself becomes less likely: the margin then grows by pushing everything down (arXiv 2410.08847)."""
    current = metrics.get("logp/lp_00")
    if current is None:
        return
    if run.state.baseline_lp is None:
        run.state.baseline_lp = current
    fallen = run.state.baseline_lp - current
    if fallen > run.config.train.displacement_warning:
        run.world.say(
            f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its start; raise "
            "objective.align.weight or lower the margins"
        )


def _finish(run: Run, tracker: Any) -> None:
    """Export, evaluate every split, write the tables and figures.

    The export is first, so that nothing that fails afterwards keeps a trained model from its user; where it fails itself, that is raised
    when the evaluation has been written.
    """
    run.pulse.mark("evaluation and export", run.state.step)
    failed: Exception | None = None
    patience = Patience(run.world)  # an export of hours outlasts the time limit of the evaluation's first collective
    if run.world.is_main and run.config.train.export:
        try:
            _export(run, patience.alive)
        except Exception as error:
            failed = error
            run.world.say(f"warning: the export failed ({error}); the evaluation follows, then this error ends the run")
    patience.meet()
    results, scores = _evaluate(run, run.config.train.eval_shuffled)
    tracker.log(run.state.step, flat_metrics(results))
    if run.world.is_main:
        path = run.dir / "results.md"
        try:
            replace_file(path, (table(results) + "\n").encode())
            path = run.dir / "results.json"
            replace_file(path, json.dumps({s: [vars(row) for row in rows] for s, rows in results.items()}, indent=1).encode())
            (run.dir / "scores").mkdir(exist_ok=True)
            for split, groups in run.splits.items():
                stored = {group.id: score.stored() for group, score in zip(groups, scores[split], strict=True)}
                given = run.config.data.evaluation_sets[split]
                identity = data_identity(groups, data_roots(given.path, given.root), run.collator.checked)
                write_scores(path := run.dir / "scores" / f"{split}.jsonl", groups, stored, str(run.dir), identity)
        except OSError as error:
            raise ConfigError(f"{unwritten(path, error)}; the training is done: make room, and the same command evaluates again") from error
        for path in [run.dir / "results.md", run.dir / "results.json", *_figures(run, scores)]:
            tracker.artifact(path)
        if results:
            run.world.say(table(results))
    if failed is not None:
        raise failed


def _figures(run: Run, scores: Mapping[str, Sequence[GroupScores]]) -> list[Path]:
    """The run's figures that could be drawn, where it wants any; one that could not is a warning."""
    drawn: list[Path] = []
    if not run.config.train.figures:
        return drawn

    def attempt(name: str, draw: Callable[[Path], None]) -> None:
        path = run.dir / name
        try:
            draw(path)
            drawn.append(path)
        except Exception as error:  # whatever a drawing library has against captions and numbers
            run.world.say(f"warning: {path} could not be drawn ({type(error).__name__}: {' '.join(str(error).split())}); the run goes on")

    attempt("learning_curves.png", lambda path: learning_curves_figure(path, run.dir / "metrics.jsonl"))
    for split, groups in run.splits.items():
        shown = partial(_samples, groups, scores[split], run.config.data.max_pixels)
        attempt(f"scores-{split}.png", lambda path, shown=shown: score_matrix_figure(path, shown()))  # type: ignore[misc]
    return drawn


def _export(run: Run, alive: Callable[[], object]) -> None:
    model, last = run.config.model, run.dir / f"checkpoint-{run.state.step}"
    folder, _ = _exported(run.config)
    if only_adapters_train(model):
        exported = export_adapter(last, model.name_or_path, folder, model.lora, run.world.say, alive)
    else:
        exported = export_hf(last, model.name_or_path, folder, run.world.say, model.lora, alive)
    run.world.say(f"exported to {exported}")


def _exported(config: RunConfig) -> tuple[Path, str]:
    """The folder of a run's export, and the file by which an export is known."""
    name, marker = ("adapter", "adapter_config.json") if only_adapters_train(config.model) else ("export", "config.json")
    return Path(config.train.output_dir) / name, marker


def _refuse_export(config: RunConfig) -> None:
    """ConfigError where the export could not take its place when the training is over."""
    if config.train.export:
        folder, marker = _exported(config)
        remedy = "choose another train.output_dir, or set train.export to false"
        refuse_replacing(folder, marker, [Path(config.model.name_or_path).resolve()], remedy)


def _captions(group: CounterfactualGroup) -> list[str]:
    """The texts, behind their prompts where the group has several."""
    alone = len(set(group.prompt_ids)) == 1
    return [each.text if alone else f"{each.prompt} {each.text}" for each in group.candidates]


def _samples(groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores], max_pixels: int) -> list[dict[str, Any]]:
    """One group of each edit type, at most four types, as score_matrix_figure takes them."""
    first: dict[str, int] = {}
    for index, group in enumerate(groups):
        first.setdefault(group.edits[0].type if group.edits else UNLABELLED, index)
    return [
        {
            "title": f"{kind}: {groups[index].id}",
            "images": [[open_image(picture, max_pixels) for picture in pictures] for pictures in groups[index].images],
            "captions": _captions(groups[index]),
            "scores": scores[index].logp.tolist(),
            "match": groups[index].match,
        }
        for kind, index in list(first.items())[-4:]
    ]
