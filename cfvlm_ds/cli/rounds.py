"""Rounds of sampling and training (``train.rounds``): in each round, a run trains on texts that its model has just written.

    OUT/sampled-K/    work folder of `data sample`: texts that the model wrote in round K, and groups of true and false texts
    OUT/round-K/      run of round K, on the training data and these groups; it starts from the previous round's model

Sampling and training both continue where they stopped, so the same command resumes the rounds, with any number of ranks. A finished round
is not repeated.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from cfvlm_ds.cli.making import author
from cfvlm_ds.cli.models import export
from cfvlm_ds.cli.options import ImageLimits
from cfvlm_ds.cluster import signals
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import ProgressBarrier, World, run_on_rank0
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.run_folder import named_model
from cfvlm_ds.counterfactuals.options import SampleOptions
from cfvlm_ds.counterfactuals.sample import GROUPS, sample
from cfvlm_ds.data import sound_groups
from cfvlm_ds.training.run_start import FINISHED
from cfvlm_ds.training.validation import scores_needed

_SHARDS = 64
"""Shards of a round's pictures. The number does not depend on the number of ranks, which can differ between two starts."""


def train_in_rounds(config: RunConfig, world: World, run: Callable[[Sequence[str]], None]) -> None:
    """Alternate sampling and training. ``run`` trains one run; its argument has options that override those of the command.

    Every rank must call this. Raises ConfigError if ``train.export`` is off, if a source of the training data has no weight, or if a term
    needs stored scores, which sampled groups do not have.
    """
    rounds, out, model = config.train.rounds, Path(config.train.output_dir), config.model.name_or_path
    assert rounds is not None
    if not config.train.export:
        raise ConfigError("train.rounds needs train.export, because a round starts from the exported model of the previous round")
    if scores_needed(config):
        raise ConfigError("train.rounds samples groups without stored scores; train only adapters, or leave out terms that need scores")
    sources = [asdict(source) for source in config.data.train_sets.values()]
    if len(sources) == 1:
        sources[0]["weight"] = sources[0]["weight"] or 1.0
    if missing := [source["name"] for source in sources if source["weight"] is None]:
        raise ConfigError(
            f"train.rounds mixes the sampled groups with data.train by weight, but source {missing[0]!r} has none; give it one"
        )
    for number in range(1, rounds.number + 1):
        folder, work = out / f"round-{number}", out / f"sampled-{number}"
        finished = (folder / FINISHED).exists()
        world.say(f"round {number} of {rounds.number}{': finished by an earlier start' if finished else ''}")
        if not finished:
            sampled = {"name": "sampled", "path": str(work / GROUPS), "weight": rounds.weight, "root": _sample(config, world, model, work)}
            gc.collect()  # models and engines have reference cycles
            options = {"train.output_dir": str(folder), "model.name_or_path": model, "data.train": json.dumps([*sources, sampled])}
            options |= {"data.scores": "null", "train.rounds": "null"}
            run([part for name, value in options.items() for part in (f"--{name}", value)])
        model = _exported(folder, world)
        gc.collect()


def _sample(config: RunConfig, world: World, model: str, work: Path) -> list[str]:
    """Sample the texts of a round, and return the folders of their pictures."""
    rounds, data, barrier = config.train.rounds, config.data, ProgressBarrier(world)
    assert rounds is not None

    def say(line: str) -> None:
        barrier.alive()
        world.say(line)

    stopped = signals.before_leaving(lambda code: world.say("stopped while sampling; the same command continues"))
    with stopped, signals.leaving_together(world):
        pictures = rounds.pictures
        root, form = data.root if pictures.root is None else pictures.root, pictures.format or data.format
        store = sound_groups(pictures.path, root, form, pictures.limit, say)
        limits = ImageLimits(config.model.min_pixels, config.model.max_pixels, config.model.max_tiles)
        identity, load = author(model, limits, data.max_pixels, say, world)
        options = SampleOptions(rounds.judge, rounds.n, rounds.temperature, max_new_tokens=rounds.max_new_tokens, prompt=rounds.prompt)
        for shard in range(world.rank, _SHARDS, world.size):
            _, counts = sample(store, work, options, identity, load, shard, say, _SHARDS)
            if counts is not None:  # all shards are finished
                break
        barrier.meet()
    return list(map(str, store.roots))


def _exported(folder: Path, world: World) -> str:
    """Return the exported model of a round. Adapters are merged into their base first."""
    if named_model(str(folder)).adapter is not None:
        barrier = ProgressBarrier(world)
        run_on_rank0(world, lambda: export(str(folder)), barrier)
    return str(folder / "export")
