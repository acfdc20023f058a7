"""Start of a run: decides, before anything is loaded or written, whether it starts at step 0, resumes from a checkpoint or is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds import checkpoint
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import ProgressBarrier, World, run_on_rank0
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.journal import append
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.identity import Identity
from cfvlm_ds.data.identity import changes as changed_data
from cfvlm_ds.training import option_changes
from cfvlm_ds.training.option_changes import Change

FINISHED = "finished.json"
CHANGES = "resume_changes.jsonl"


class OtherData(ConfigError):
    """Raised if the training groups differ from those that the checkpoint was trained on."""


@dataclass(frozen=True)
class Start:
    """A run's start: the checkpoint that it continues from, if any, the options that have changed since that checkpoint, and the record of
    the current options.
    """

    checkpoint_dir: Path | None
    changed: Sequence[Change]
    record: dict[str, Any]
    total_steps: int
    data: dict[str, Any]

    def check(self, state: TrainState, config: RunConfig, sampler: GroupSampler) -> None:
        """Move the sampler to the position stored in ``state``. Raises ConfigError or DataError if the run cannot continue from there."""
        assert state.data is not None and state.record is not None
        _refuse_other_data(state.data, self.data, self.checkpoint_dir, config)
        if state.step > self.total_steps:
            raise ConfigError(
                f"{self.checkpoint_dir} is beyond the run's last step {self.total_steps}; raise train.max_steps, or set train.resume to an "
                "older checkpoint"
            )
        sampler.load_state_dict(state.sampler or {})
        if state.record["options"]["train"]["save_best"] != config.train.save_best:
            state.note(best=None, worse=0)  # the values belong to another metric

    def complete_record(self, config: RunConfig, world: World) -> dict[str, Any]:
        """Return the record for the run's checkpoints. If a hub model was not on disk at the start, the model's hashes are added."""
        if self.record["model"]:
            return self.record
        barrier = ProgressBarrier(world)  # rank 0 reads all weights of the model
        hashes = run_on_rank0(world, lambda: option_changes.model_hashes(config.model.name_or_path, barrier.alive, world.say), barrier)
        return {**self.record, "model": hashes}

    def note(self, run_dir: Path, step: int, world: World) -> list[Path]:
        """On rank 0, print the changes and append them to a file in the run folder. Return this file in a list, which is empty if there are
        no changes.
        """
        if not self.changed:
            return []
        for change in self.changed:
            world.say(f"after step {step}: {change}")
        if world.is_main:
            changes = {change.option: [change.before, change.now] for change in self.changed}
            append(run_dir / CHANGES, json.dumps({"step": step, "changes": changes}), world.say)
        return [run_dir / CHANGES]


def decide(
    config: RunConfig,
    deepspeed: Mapping[str, Any],
    world: World,
    sampler: GroupSampler,
    data: dict[str, Any],
    evaluation: Mapping[str, Identity],
    total_steps: int,
) -> Start | None:
    """Decide where to start. Return None if the run has finished and ``train.resume`` does not name a checkpoint. ``data`` and
    ``evaluation`` hold hashes of the training groups and of each evaluation set.

    Raises ConfigError or DataError on all ranks if the run cannot continue because of unusable checkpoints, a changed option or changed
    data.
    """
    run_dir, train = Path(config.train.output_dir), config.train
    allowed = train.resume_changes == "allow"
    barrier = ProgressBarrier(world)  # rank 0 may read all weights of the model
    make_record = partial(option_changes.record, config, deepspeed, world.size, total_steps, barrier.alive, world.say)
    record = run_on_rank0(world, make_record, barrier)

    def changed_since(before: Mapping[str, Any], what: Path, step: int | None) -> list[Change]:
        changes = option_changes.compare(before, record)
        if problem := option_changes.refused(changes, str(what), step, allowed):
            raise ConfigError(problem)
        return changes

    finished = partial(run_on_rank0, world, lambda: _finished_at(run_dir, train.early_stopping))
    if train.resume in ("auto", "restart") and (ended := finished()) is not None and ended[1] == total_steps:

        def refuse_changed() -> str:
            before = read_json(run_dir / FINISHED)
            checkpoint.refuse_other_version(before, run_dir)
            changed_since(before["record"], run_dir, None)
            _refuse_other_data(before.get("data", data), data, run_dir, config)
            sets = before.get("evaluation", {})
            changes = {name: changed_data(sets[name], identity) for name, identity in evaluation.items() if name in sets}
            changed = [f"; {name} has changed since in {change}" for name, change in changes.items() if change]
            return "".join([*changed, *(f"; {name} was not evaluated" for name in evaluation if name not in sets)])

        changes = run_on_rank0(world, refuse_changed)
        message = f"{run_dir} has finished at step {ended[0]} of {total_steps}: nothing to do{changes}"
        if (run_dir / f"checkpoint-{ended[0]}").is_dir():  # without it, the run would be trained again
            message += f"; remove {run_dir / FINISHED} to evaluate it again"
        world.say(message)
        return None
    checkpoint_dir = checkpoint.find(run_dir, train.resume, world)
    if checkpoint_dir is None:
        if train.resume == "auto" and (ended := finished()) is not None:
            raise ConfigError(
                f"{run_dir} has finished at step {ended[0]} and contains no checkpoint from which to continue to step {total_steps}; "
                "choose another train.output_dir, or set train.resume=restart to start at step 0"
            )
        return Start(None, [], record, total_steps, data)
    state = run_on_rank0(world, lambda: checkpoint.kept_state(checkpoint_dir))
    start = Start(
        checkpoint_dir,
        run_on_rank0(world, lambda: changed_since(state.record or {}, checkpoint_dir, state.step)),
        record,
        total_steps,
        data,
    )
    start.check(state, config, sampler)
    return start


def _refuse_other_data(before: Identity, now: Identity, what: Path | None, config: RunConfig) -> None:
    if change := changed_data(before, now):
        raise OtherData(
            f"{what} was trained on other data, from which {config.data.trained_on} differs in {change}; restore the data, or start a new "
            "run in another train.output_dir"
        )


def _finished_at(run_dir: Path, early_stopping: int | None) -> tuple[int, int] | None:
    """Return the last step and the planned number of steps of the finished run in the folder, or None if the run has not finished.

    If ``early_stopping`` has changed since, the last step is returned as the planned number too, so that a run that stopped early can
    continue.
    """
    with contextlib.suppress(*MALFORMED):  # a file that was truncated by a power loss counts as absent
        finished = read_json(run_dir / FINISHED)
        step = int(finished["step"])
        unchanged = finished["record"]["options"]["train"]["early_stopping"] == early_stopping
        return step, int(finished.get("total_steps", step)) if unchanged else step
    return None
