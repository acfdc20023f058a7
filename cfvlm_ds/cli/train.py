"""``train.py`` and ``cfvlm-ds train``: start a run from command-line options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cfvlm_ds.cli.exits import escape_unencodable, exit_cleanly
from cfvlm_ds.cluster import signals
from cfvlm_ds.core.config import BuildConfig, RunConfig
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.progress import Alive, no_op
from cfvlm_ds.core.secrets import mask_tracebacks
from cfvlm_ds.core.verbosity import show

if TYPE_CHECKING:
    from cfvlm_ds.core.distributed import World

QUICKSTART = "examples/quickstart.yaml"


def train_main(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Run train.py. Without options, it runs examples/quickstart.yaml."""
    arguments = with_quickstart(sys.argv[1:] if argv is None else argv)
    mask_tracebacks()
    escape_unencodable()
    signals.install()
    exit_cleanly(signals.last_word()(lambda: run(arguments, prog)))


def with_quickstart(argv: Sequence[str]) -> list[str]:
    """Return the options in ``argv``, preceded by the quickstart's options unless ``argv`` names a model, data or an options file."""
    option_names = {option[2:].partition("=")[0] for option in argv if option.startswith("--")}
    if option_names & {"model", "data"} or any(
        name == standalone or name.startswith(f"{standalone}.") for name in option_names for standalone in _STANDALONE
    ):
        return list(argv)
    # The quickstart's max_steps would override requested epochs.
    by_epochs = ["--train.max_steps", "-1"] if "train.num_train_epochs" in option_names and "train.max_steps" not in option_names else []
    return ["--config", QUICKSTART, *by_epochs, *argv]


_STANDALONE = ("config", "model.name_or_path", *(f"data.{name}" for name in ("train", "evaluation", "format", "root", "scores")))


def run(arguments: Sequence[str], prog: str = "train.py") -> None:
    """Parse the options, build the requested data and models, and train."""
    show("--quiet" in arguments, "--verbose" in arguments)  # before the options are parsed, which may fail
    from cfvlm_ds.objectives import OBJECTIVES

    config = parse_config(arguments, OBJECTIVES, prog=prog)
    if config.data.benchmark_sets:
        from cfvlm_ds.demo.habits.writing import register

        register()
    if config.train.dry_run:
        from cfvlm_ds.training.dry_run import dry_run

        if config.train.rounds is not None:
            from cfvlm_ds.cli.rounds import mixable

            mixable(config)
        with TemporaryDirectory() as folder:
            print(dry_run(_with_model(config, str(Path(folder, "model")))))
        return
    from cfvlm_ds.engine import start
    from cfvlm_ds.training.run import train
    from cfvlm_ds.training.validation import validate

    world = start()
    if config.build != BuildConfig():
        validate(config, world)
        build_once(config.build, world)
    if config.train.rounds is None:
        train(config, world)
        return
    from cfvlm_ds.cli.rounds import train_in_rounds

    train_in_rounds(config, world)


def _with_model(config: RunConfig, folder: str) -> RunConfig:
    """Build the model in ``folder`` if the options request it, and return the configuration with the model's new path. Otherwise, return
    the configuration unchanged.
    """
    name = config.model.name_or_path
    if os.path.exists(name) or name != config.build.base:
        return config
    build(BuildConfig(base=folder))
    return replace(config, model=replace(config.model, name_or_path=folder))


def build_once(config: BuildConfig, world: World) -> None:
    """Run the build on rank 0. The other ranks wait for as long as rank 0 makes progress. An error is raised on all ranks."""
    from cfvlm_ds.core.distributed import ProgressBarrier, run_on_rank0

    barrier = ProgressBarrier(world)
    run_on_rank0(world, lambda: build(config, barrier.alive), barrier)


def build(config: BuildConfig, alive: Alive = no_op) -> None:
    """Write the requested data set (a world with habits) and base model unless they exist. ``alive`` is called repeatedly as a sign of
    progress while the data set is written.
    """
    if config.habits is not None:
        from cfvlm_ds.demo.habits import build_habits

        build_habits(config.habits, alive=alive)
    if config.base is not None:
        from cfvlm_ds.demo.base import write_base

        write_base(config.base)
