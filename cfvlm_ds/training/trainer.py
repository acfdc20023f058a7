"""Training loop: steps, records, evaluations, checkpoints, and the final export and evaluation."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from cfvlm_ds import checkpoint
from cfvlm_ds import engine as deepspeed_engine
from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.cluster import signals
from cfvlm_ds.cluster.heartbeat import Heartbeat
from cfvlm_ds.cluster.signals import EXIT_STOPPED, Stop, StopRequested, WorkerLost, together
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import ProgressBarrier, World, isolated_rng
from cfvlm_ds.core.progress import time_left
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import plain_tables
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.evaluation import flat_metrics, headline
from cfvlm_ds.evaluation.benchmarks import Outcome
from cfvlm_ds.evaluation.report import overlap_warning
from cfvlm_ds.evaluation.suite.results import RESULTS
from cfvlm_ds.evaluation.suite.tables import overview, summary
from cfvlm_ds.models import ModelFlops, peak
from cfvlm_ds.objectives import batch_terms
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, last_values
from cfvlm_ds.training.baseline import Baseline
from cfvlm_ds.training.benchmarks import BEFORE, FOLDER, benchmark_metrics, changes_of_benchmarks, headline_of, write_benchmarks
from cfvlm_ds.training.evaluation_sample import EvaluationSample
from cfvlm_ds.training.evaluator import Accuracies, Evaluator
from cfvlm_ds.training.in_batch_negatives import WholeSteps, WithNegatives
from cfvlm_ds.training.meter import Meter, measure
from cfvlm_ds.training.read_data import RunData
from cfvlm_ds.training.results import (
    PAGE,
    complete_card,
    description,
    draw_curves,
    export_checkpoint,
    write_results,
    write_results_page,
)
from cfvlm_ds.training.run_warnings import Displacement, Idle
from cfvlm_ds.training.samples import Samples
from cfvlm_ds.training.skipped import NonfiniteSteps, SkippedGroups
from cfvlm_ds.training.step import OptimizerStep


@dataclass
class Trainer:
    """Trains a model from its current state to the end of the run.

    Args:
        engine: DeepSpeed engine that wraps a Scorer.
        collator: collator that makes batches from groups.
        sampler: sampler of groups, positioned where training starts or resumes.
        pulse: heartbeat that records the phase and step, so that a hang can be located.
    """

    config: RunConfig
    world: World
    engine: Any
    collator: Collator
    data: RunData
    sampler: GroupSampler
    state: TrainState
    total_steps: int
    pulse: Heartbeat

    def __post_init__(self) -> None:
        config, data, say = self.config, self.data, self.world.say
        self._run_dir = Path(config.train.output_dir)
        self._flops = ModelFlops(self.engine.module.model, self.engine.module.family)
        self._sources = tuple(data.sources) if config.data.is_mixture else ()
        self._stop, self._idle = Stop(config.train.stop_margin_s), Idle(config, say)
        self._displacement = Displacement(config, self.state, say)
        self.evaluator = Evaluator(config, self.world, self.engine, self.collator, data.splits, data.benchmarks, self._stop)
        limits = (self._run_dir, config.data.max_pixels)
        self.samples = Samples(config.train.samples, data.splits, self.engine, self.collator, self.world, *limits, self.evaluator)

    @cached_property
    def sample(self) -> EvaluationSample:
        """The groups that are scored several times during training if ``train.eval_steps`` is not set."""
        splits = self.data.splits if self.config.train.eval_steps is None else {}
        return EvaluationSample(splits, self.sampler.groups_in(self.total_steps), self.total_steps)

    @cached_property
    def baseline(self) -> Baseline:
        """The accuracies before the first step."""
        record, trained = self.state.record or {}, self.sampler.groups_in(self.total_steps)
        dtype = self.engine.module.model.dtype
        return Baseline(self.config, self.data.splits, self.data.identities, record.get("model"), dtype, trained, self.world)

    def run(self, tracker: Any) -> None:
        """Train to the end, evaluate and export. Raises SystemExit with ``EXIT_STOPPED`` if the ranks agree to stop."""
        try:
            with together():
                if stopped := self._train(tracker):
                    self._exit_for_resume(tracker, stopped)
            self._finish(tracker)
        except StopRequested as request:
            self._exit_for_resume(tracker, f"{request}, before the evaluation finished")
        except WorkerLost as lost:
            self._end(
                tracker, f"rank {self.world.rank}, in the evaluation: {lost}", "the same command continues from the last checkpoint", True
            )

    def _train(self, tracker: Any) -> str | None:
        """Train to the end, or until the ranks agree to stop. Return the reason to stop, or None if training is complete."""
        train, state, world = self.config.train, self.state, self.world
        skipped = SkippedGroups(self.config.data, self._run_dir, state.skipped, world)
        nonfinite = NonfiniteSteps(train, self._run_dir, world)
        step = OptimizerStep(self.config, world, self.engine, self.collator, skipped, nonfinite, self.pulse.mark)
        batches = self._micro_batches()
        meter = Meter(deepspeed_engine.gather_clock(self.engine, world.device))
        self._saved_at = time.monotonic()
        if state.step == 0:
            self.pulse.mark("evaluation", 0)
            before = self.baseline.measure(self.evaluator)
            benchmarks = self.data.benchmarks
            outcomes = self.evaluator.ask() if benchmarks and train.eval_on_start is True else {}
            write_benchmarks(self._run_dir / BEFORE, self.config, benchmarks, outcomes, world, self.engine.module.model, draws=0)
            self._log_evaluation(tracker, before, outcomes, "before the first step, ")
            self.samples.write(0)
        else:
            self.samples.resume(state.step)
        part_of_step = 1 / (world.size * train.gradient_accumulation_steps)
        started, first_step = time.monotonic(), state.step
        self.engine.train()
        saved = first_step
        while state.step < self.total_steps and not self._stopped_early:
            try:
                due = world.is_main and 0 < train.save_minutes * 60 <= time.monotonic() - self._saved_at
                result = step.take(state.step + 1, batches, state.step / self.total_steps, self._stop.votes(), due)
            except WorkerLost as lost:
                if saved < state.step:
                    tracker.log(state.step, self._save(needed=True))
                then = f"step {state.step} is the last complete one and is saved" if state.step else "nothing was trained"
                self._end(tracker, f"at step {state.step + 1}, {lost}", f"{then}, and the same command continues", alone=False)
            meter.wait(result.waited_s)
            for measured in result.measured:
                measure(meter, measured, self.config.objective, part_of_step, self._flops, self._sources)
            self.sampler.advance()
            state.step_done(self.sampler.state_dict())
            stop, save_due, last = result.stop, result.save_due, state.step == self.total_steps
            if (state.step % train.logging_steps == 0 or last) and len(meter):  # the meter is empty if every step was skipped
                passed_s = time.monotonic() - started
                self._record(tracker, meter, time_left(passed_s, state.step - first_step, self.total_steps - first_step))
            state.note(run_id=tracker.run_id)
            evaluation_due = self.sample.is_due(state.step) or (bool(train.eval_steps) and state.step % (train.eval_steps or 1) == 0)
            if evaluation_due and not last and not stop:
                try:
                    save_due |= self._evaluate(tracker)
                except StopRequested as request:
                    stop = str(request)
                meter.reset()  # evaluation time is not training time
            last |= self._stopped_early
            if last or stop or save_due or (train.save_steps and state.step % train.save_steps == 0):
                self.pulse.mark("checkpoint", state.step)
                tracker.log(state.step, self._save(needed=last or stop is not None))
                saved = state.step
            if stop:
                return stop
        if self._stopped_early and state.best is not None:
            best = f"the best {train.save_best} was {state.best['value']:g} at step {state.best['step']:.0f}"
            world.say(f"early stopping after step {state.step}: {best}")
        return None

    @property
    def _stopped_early(self) -> bool:
        """True after ``train.early_stopping`` evaluations in a row without improvement."""
        patience = self.config.train.early_stopping
        return patience is not None and self.state.worse >= patience

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, starting at the sampler's position. Data workers prepare them while the engine computes.

        Raises WorkerLost if a data worker has died.
        """
        groups, sampler, num_workers, terms = self.data.groups, self.sampler, self.config.data.workers, batch_terms(self.config.objective)
        loader: Any = DataLoader(
            WithNegatives(groups, terms, self.config.train.seed) if terms else Unraised(groups),  # type: ignore[arg-type]
            batch_sampler=WholeSteps(sampler) if terms else sampler,  # type: ignore[arg-type]
            collate_fn=partial(self.collator.without_unreadable, max_tokens=self.config.data.max_tokens_per_forward),
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=signals.shield_worker,
            generator=isolated_rng(),
        )
        iterator = iter(loader)
        if num_workers:
            signals.defer_worker_deaths()
        while True:
            with signals.worker_deaths(), signals.deferred_deaths_raised():
                micro_batch = next(iterator, None)
            if micro_batch is None:
                return
            yield micro_batch

    def _save(self, needed: bool) -> dict[str, float]:
        """Save a checkpoint. Return as metrics how long this took (in seconds, and as a fraction of the time since the last checkpoint) and
        whether it failed.

        Raises SaveError if saving fails and ``needed`` is True. Otherwise, a failure is reported as a warning.
        """
        started, train, failed = time.monotonic(), self.config.train, False
        try:
            checkpoint.save(self.engine, self.state, self._run_dir, self.world, train.save_total_limit, train.save_keep_every)
        except checkpoint.SaveError as error:
            if needed:
                raise
            failed = True
            self.world.say(f"warning: {error}; training continues, and the next checkpoint is written when it is due")
        ended = time.monotonic()
        share = (ended - started) / (ended - self._saved_at)
        self._saved_at = ended
        return {"checkpoint/seconds": ended - started, "checkpoint/share": share, "checkpoint/failed": float(failed)}

    def _record(self, tracker: Any, meter: Meter, left: str) -> None:
        """Log and print the metrics accumulated since the last record."""
        engine, state, world = self.engine, self.state, self.world
        metrics = meter.reduce(world)
        weights = {name: term.weight for name, term in self.config.objective.items()}
        weights["router_balance"] = self.config.train.router_balance
        # with the final weights, because a loss that rises with a warm-up looks like divergence
        metrics = {"loss": sum(weight * metrics.get(f"loss/{name}", 0.0) for name, weight in weights.items()), **metrics}
        rates = {group["name"].split(".")[0]: group["lr"] for group in engine.optimizer.param_groups}
        metrics |= {"learning_rate": max(rates.values())} | {f"learning_rate/{module}": rate for module, rate in rates.items()}
        metrics["grad_norm"] = float(engine.get_global_grad_norm() or 0.0)
        metrics |= {
            f"epoch/{name}": passes
            for name, passes in zip(self._sources, self.sampler.order.epochs(self.sampler.samples_seen), strict=True)
        }
        metrics |= {"epoch": self.sampler.epoch, "skipped_steps": engine.skipped_steps, "skipped_groups": len(state.skipped)}
        if (fastest := peak(world.device)) is not None:
            metrics["throughput/mfu"] = metrics["throughput/model_tflop_per_s"] * 1e12 / (fastest * world.size)
        tracker.log(state.step, metrics)
        world.say(_progress(state.step, self.total_steps, metrics, meter.incomplete, left))
        self._displacement.recorded(metrics)
        self._idle.recorded(metrics)

    def _evaluate(self, tracker: Any) -> bool:
        """Evaluate between steps, and return True if the result is the best so far according to train.save_best."""
        self.pulse.mark("evaluation", self.state.step)
        sampled = self.config.train.eval_steps is None
        results, _ = self.evaluator(self.sample.groups if sampled else self.data.splits)
        outcomes = self.evaluator.ask() if self.data.benchmarks and not sampled else {}
        metrics = self._log_evaluation(tracker, results, outcomes, f"after step {self.state.step}, ")
        self.samples.write(self.state.step)
        if (best := self.config.train.save_best) is None:
            return False
        if best not in metrics:  # for example, the area under the curve of NaN scores
            self.world.say(f"warning: this evaluation has no {best} (train.save_best), which counts as no improvement")
        return self.state.evaluated(metrics.get(best, math.nan))

    def _log_evaluation(self, tracker: Any, results: Accuracies, outcomes: Mapping[str, list[Outcome]], when: str) -> dict[str, float]:
        """Log an evaluation, print its headlines, and return all metrics. If only a sample of a set was evaluated, only the sample's
        accuracy is included.
        """
        benchmarks, size = self.data.benchmarks, {name: len(groups) for name, groups in self.data.splits.items()}
        whole = {name: rows for name, rows in results.items() if rows and rows[-1].num == size[name]}
        metrics = flat_metrics(whole) | benchmark_metrics(benchmarks, outcomes)
        if metrics := metrics | self.sample.metrics(results):
            tracker.log(self.state.step, metrics)
        headlines = [
            (name if name in whole or not rows else f"{name}, {rows[-1].num} of {size[name]} groups", headline(rows))
            for name, rows in results.items()
        ]
        headlines += [(name, headline_of(benchmarks[name], outcome)) for name, outcome in outcomes.items()]
        for name, line in headlines:
            self.world.say(f"{when}{name}: {line}")
        return metrics

    def _finish(self, tracker: Any) -> None:
        """Export, evaluate every split, and write tables and figures.

        The export comes first, so that the user has the trained model even if a later part fails. If the export itself fails, its error is
        raised after the evaluation results are written.
        """
        config, step, say = self.config, self.state.step, self.world.say
        self.pulse.mark("evaluation and export", step)
        failed: Exception | None = None
        model = self.engine.module.model
        barrier = ProgressBarrier(self.world)  # otherwise, a long export would exceed the timeout of the next collective
        if self.world.is_main and config.train.export:
            try:
                export_checkpoint(config, self._run_dir / f"checkpoint-{step}", say, barrier.alive, model.dtype)
            except Exception as error:
                failed = error
                say(f"warning: the export failed ({error}); the run will end with this error after the evaluation")
        barrier.meet()
        benchmarks = self.data.benchmarks
        results, scores = self.evaluator(self.data.splits)
        outcomes = self.evaluator.ask() if benchmarks else {}
        metrics = flat_metrics(results) | benchmark_metrics(benchmarks, outcomes)
        tracker.log(step, metrics | self.sample.metrics(results))
        exported = config.train.export and failed is None
        benchmark_results = write_benchmarks(self._run_dir / FOLDER, config, benchmarks, outcomes, self.world, model, exported=exported)
        self.samples.write(step)
        if self.world.is_main:
            samples, sample_files = self.samples.report()
            of_benchmarks = changes_of_benchmarks(self._run_dir, benchmarks, say)
            sections = "\n\n".join(filter(None, [of_benchmarks, samples]))
            changes = self.baseline.compare(results)
            warnings = [self._displacement.warning(last_values(self._run_dir / METRICS_FILE)[0])]
            warnings += [overlap_warning(name, *pair[::-1]) for name, of_set in self.data.overlaps.items() for pair in of_set.items()]
            warning = "\n\n".join(filter(None, warnings))
            identities = self.data.identities
            trained = f"{len(self.data.groups):,} groups, {self.sampler.epoch:.1f} epochs"
            first, written = write_results(
                config, step, trained, self.data.splits, results, scores, identities, changes, say, benchmark_results, sections, warning
            )
            figures = draw_curves(self._run_dir, results, self.sample.counts, say) if config.train.figures else []
            write_results_page(self._run_dir, figures, say)
            written += figures
            if exported:
                complete_card(config, self._run_dir / f"checkpoint-{step}", say)
            tracker.describe(description(first, written))
            for path in written:
                tracker.artifact(path)
            for path in sample_files:
                tracker.artifact(path, "samples")
            for result in benchmark_results:
                tracker.artifact(self._run_dir / FOLDER / result.place / RESULTS, f"{FOLDER}/{result.place}")
            if results:
                print_line(f"{plain_tables(first)}\n\nall results: {self._run_dir / PAGE}")  # even with --quiet
            if of_benchmarks:
                print_line(f"\n{plain_tables(of_benchmarks)}")
            elif benchmark_results:
                print_line("\n".join([*([""] if results else []), overview(benchmark_results), "", *map(summary, benchmark_results)]))
        if failed is not None:
            raise failed

    def _exit_for_resume(self, tracker: Any, why: str) -> NoReturn:
        """Print why the run stops, and exit with ``EXIT_STOPPED``. The same command resumes the run. Every rank must call this."""
        done, goes_on = f"stopped after step {self.state.step} of {self.total_steps}", "continues from the checkpoint"
        self.world.say(f"{done}: {why}; the same command {goes_on if self.state.step else 'starts again'}")
        tracker.close("SCHEDULED")
        self.world.wait()  # the launcher kills all ranks as soon as one rank exits with a non-zero code
        sys.exit(EXIT_STOPPED)

    def _end(self, tracker: Any, what: str, then: str, alone: bool) -> NoReturn:
        """Report that a data worker was lost, and exit with code 1. If ``alone`` is False, all ranks exit together."""
        tracker.close("FAILED")
        if self.world.is_main or alone:
            print_line(f"error: {what}; such processes are usually killed for lack of memory: lower data.num_workers; {then}", error=True)
        if not alone:
            self.world.wait()
        sys.exit(1)


_SHOWN_TFLOPS = 0.1  # lowest speed that the progress line shows; a small model on a CPU is slower


def _progress(step: int, total_steps: int, metrics: Mapping[str, float], incomplete: Mapping[str, str], left: str) -> str:
    terms = " ".join(
        f"{name.split('/')[1]} {value:.4f}{incomplete.get(name, '')}" for name, value in metrics.items() if re.fullmatch("loss/[^/]+", name)
    )
    rates = {name: metrics[f"throughput/{name}"] for name in ("groups_per_s", "tokens_per_s", "data_wait_share")}
    utilisation = f" (MFU {metrics['throughput/mfu']:.1%})" if "throughput/mfu" in metrics else ""
    gathering = f" all-gather {metrics['throughput/all_gather_share']:.1%}" if "throughput/all_gather_share" in metrics else ""
    speed = metrics["throughput/model_tflop_per_s"]
    flops = f"{speed:.3g} TFLOP/s{utilisation} " if speed >= _SHOWN_TFLOPS else ""
    return (
        f"step {step}/{total_steps} epoch {metrics['epoch']:.2f} loss {metrics['loss']:.4f} ({terms}) "
        f"lr {metrics['learning_rate']:.2e} {rates['groups_per_s']:.1f} groups/s {rates['tokens_per_s']:.0f} tokens/s "
        f"{flops}wait {rates['data_wait_share']:.1%}{gathering} ETA {left}"
    )
