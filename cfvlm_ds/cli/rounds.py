"""Rounds of sampling and training (``train.rounds``): in each round, a run trains on texts that its model has just written.

    OUT/sampled-K/    work folder of `data sample`: texts that the model wrote in round K, and groups of true and false texts
    OUT/round-K/      run of round K, on the training data and these groups; it starts from the previous round's model

Sampling and training both continue where they stopped, so the same command resumes the rounds, with any number of ranks. A finished round
is not repeated.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.cli.making import author
from cfvlm_ds.cli.models import export
from cfvlm_ds.cli.options import ImageLimits
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import AUTO, Source
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, InputError
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.run_folder import named_model
from cfvlm_ds.counterfactuals.options import SampleOptions
from cfvlm_ds.counterfactuals.sample import COUNTS, GROUPS, sample
from cfvlm_ds.data import sound_groups
from cfvlm_ds.training.run import exit_with_message, locked, train
from cfvlm_ds.training.run_start import FINISHED
from cfvlm_ds.training.validation import scores_needed, validate

_SAMPLED = "sampled"
"""Source name of the sampled groups in a round's training data."""

_SHARDS = 64
"""Number of shards that a round's pictures are divided into. It is fixed, because the number of ranks can differ between two starts."""


def train_in_rounds(config: RunConfig, world: World) -> None:
    """Alternate between sampling and training. Every rank must call this.

    Raises ConfigError, before anything is written, if an option does not work with rounds, if another process uses the folder, or if the
    folder contains an ordinary run.
    """
    validate(config, world)
    rounds, out, model = config.train.rounds, Path(config.train.output_dir), config.model.name_or_path
    assert rounds is not None
    sources = mixable(config)
    own = list(map(str, out.glob("*"))) if (out / "sampled-1").exists() else []
    if not own:  # otherwise, errors in the training data would show only after sampling
        barrier = ProgressBarrier(world)
        run_on_rank0(world, lambda: _check(sources, barrier), barrier)
    with locked(out, world, partial(_refuse_run, out), [config.resolved, own]):
        for number in range(1, rounds.number + 1):
            folder, work = out / f"round-{number}", out / f"sampled-{number}"
            finished = (folder / FINISHED).exists()
            world.say(f"round {number} of {rounds.number}{': finished by an earlier start' if finished else ''}")
            if not finished:
                with exit_with_message(world):
                    roots = _sample(config, world, model, work)
                gc.collect()  # models and engines have reference cycles
                sampled = Source(str(work / GROUPS), roots, AUTO, name=_SAMPLED, weight=rounds.weight)
                train(_of_round(config, folder, model, [*sources, sampled]), world)
                gc.collect()
            with exit_with_message(world):
                model = _exported(folder, world)
        world.wait()  # rank 0 holds the store that the others have just connected to


def mixable(config: RunConfig) -> list[Source]:
    """Return the training data as a list of weighted sources, to which sampled groups can be added. Raises ConfigError for options that do
    not work with rounds.
    """
    if not config.train.export:
        raise ConfigError("train.rounds needs train.export, because a round starts from the exported model of the previous round")
    if config.model.lora.load_in_4bit:
        raise ConfigError("train.rounds merges adapters into their base, but a 4-bit base cannot be exported; set load_in_4bit to false")
    if config.train.resume not in ("auto", "never", "restart"):
        raise ConfigError(f"train.resume {config.train.resume!r} would continue every round from one checkpoint; leave it out")
    if scores_needed(config):
        raise ConfigError("train.rounds samples groups without stored scores; train only adapters, or leave out terms that need scores")
    sources = [replace(source, name=name) for name, source in config.data.train_sets.items()]
    if len(sources) == 1:
        sources = [replace(sources[0], weight=sources[0].weight or 1.0)]
    for source in sources:
        if source.name == _SAMPLED:
            raise ConfigError(f"train.rounds calls its groups {_SAMPLED!r}; give {source.path} another name in data.train")
        if source.weight is None:
            raise ConfigError(
                f"train.rounds mixes the sampled groups with data.train by weight, but source {source.name!r} has none; give it one"
            )
    return sources


def _check(sources: list[Source], barrier: ProgressBarrier) -> None:
    for source in sources:
        sound_groups(source.path, source.root, source.format or AUTO, source.limit, lambda line: barrier.alive())


def _refuse_run(out: Path) -> None:
    if (out / "config.yaml").exists():
        raise ConfigError(f"{out} contains a run without rounds; choose another train.output_dir for train.rounds")


def _of_round(config: RunConfig, folder: Path, model: str, sources: list[Source]) -> RunConfig:
    sections: dict[str, Any] = {
        "model": replace(config.model, name_or_path=model),
        "data": replace(config.data, train=sources, scores=None),
        "train": replace(config.train, output_dir=str(folder), rounds=None),
    }
    return replace(config, **sections, resolved={**config.resolved, **{name: asdict(section) for name, section in sections.items()}})


def _sample(config: RunConfig, world: World, model: str, work: Path) -> list[str]:
    """Sample the texts of a round, and return the data roots of their pictures. If any rank fails, all ranks raise the same error."""
    rounds, data, barrier = config.train.rounds, config.data, ProgressBarrier(world)
    problem: InputError | None = None
    assert rounds is not None

    def say(line: str) -> None:
        barrier.alive()
        world.say(line)

    try:
        pictures = rounds.pictures
        root, form = data.root if pictures.root is None else pictures.root, pictures.format or data.format
        store = sound_groups(pictures.path, root, form, pictures.limit, say)
        limits = ImageLimits(config.model.min_pixels, config.model.max_pixels, config.model.max_tiles)
        options = SampleOptions(
            rounds.judge, rounds.scorer, n=rounds.n, temperature=rounds.temperature, max_new_tokens=rounds.max_new_tokens,
            prompt=rounds.prompt,
        )  # fmt: skip
        identity, load = author(model, options, limits, data.max_pixels, say, world)
        sample(store, work, options, identity, load, range(world.rank, _SHARDS, world.size), say, _SHARDS)
    except InputError as error:
        problem = error
    barrier.meet()
    if problem := next((each for each in gather_objects(problem, world) if each is not None), None):
        raise problem
    world.say(f"{work}: {', '.join(f'{count} {name}' for name, count in read_json(work / COUNTS).items() if count)}")
    return list(map(str, store.roots))


def _exported(folder: Path, world: World) -> str:
    """Return the folder of a round's exported model. If the run exported only adapters, they are first merged into the base model."""
    if named_model(str(folder)).adapter is not None:
        barrier = ProgressBarrier(world)
        run_on_rank0(world, lambda: export(str(folder)), barrier)
    return str(folder / "export")
