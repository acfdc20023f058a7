"""What a run reads: its training data, one data set or a mixture of sources, and what it is evaluated on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import ClassVar, Literal

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import AT_LEAST_ONE, COUNT, option

AUTO = "auto"
"""In place of a format: the one that the first row fits."""


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an address on the Hugging Face hub."""
    return str(path).startswith("hf:/")


@dataclass(frozen=True)
class DataSet:
    """A manifest with a format and a place of its own.

    Args:
        path: manifest of counterfactual groups, or any data of a known format (docs/formats.md).
        root: as ``data.root``, which is used when not given.
        format: as ``data.format``, which is used when not given.
        limit: use the first so many groups alone.
    """

    path: str
    root: list[str] | str | None = None
    format: str | None = None
    limit: int | None = option(None, within=AT_LEAST_ONE, on_resume="confirm")


@dataclass(frozen=True)
class Source(DataSet):
    """One of several data sets that a run draws its training groups from.

    Args:
        path: manifest of counterfactual groups.
        root: as ``data.root``, which is used when not given.
        format: as ``data.format``, which is used when not given.
        limit: use the first so many groups alone.
        name: names the source in metrics and group ids; the file's name without its ending when not given.
        weight: share of the draws, relative to those of the other sources; by number of groups where no source has one.
        objectives: terms that the source's groups count in; all when not given.
        scores: as ``data.scores``, for this source.
    """

    FORM: ClassVar[str] = (
        "is not a manifest; give FILE, or a list of {path: FILE, weight: NUMBER, root: FOLDER, format: NAME} with any of the last three"
    )
    name: str | None = None
    weight: float | None = option(None, within=(1e-9, 1e9), on_resume="confirm")
    objectives: list[str] | None = None
    scores: str | None = None


@dataclass(frozen=True)
class EvaluationSet(DataSet):
    """What a run is evaluated on: a manifest, or a public benchmark.

    Args:
        path: manifest of counterfactual groups, or any data of a known format (docs/formats.md).
        root: as ``data.root``, which is used when not given; of a benchmark the folder that holds the benchmarks' own.
        format: as ``data.format``, which is used when not given.
        limit: use the first so many groups alone; of a benchmark about so many items, spread over it.
        benchmark: name of a benchmark (docs/benchmarks/index.md), in place of ``path``.
        probe: how the benchmark is asked; its own default when not given.
    """

    FORM: ClassVar[str] = (
        "is not a manifest; give NAME: PATH, or NAME: {path: PATH, root: FOLDER, format: NAME} with any of the last two, or "
        "NAME: {benchmark: NAME, root: FOLDER}"
    )
    path: str = ""
    benchmark: str | None = None
    probe: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data.

    Args:
        train: manifest of counterfactual groups, a store made by ``cfvlm-ds data prepare``, or any data of a known format: JSON lines, a
            JSON list, CSV, TSV, Parquet, a saved data set, tars; a file, a folder, or a pattern of files; or a list of
            {path: ..., weight: ...}, a mixture of sources, each with its own root, format, limit, objectives and scores (docs/mixtures.md).
        stopping_strategy: an epoch of a mixture ends when ``all_exhausted`` sources have been seen whole, the smaller ones again and again
            meanwhile, or when the ``first_exhausted`` has.
        evaluation: name -> manifest, evaluated every ``train.eval_steps`` and at the end; or name -> {path: manifest, root: FOLDERS,
            format: NAME, limit: N} where a manifest has a root, format or limit of its own (``--data.evaluation.NAME.root FOLDER``); or
            name -> {benchmark: NAME, root: FOLDER} for a public benchmark.
        format: format of the rows, NAME (of ``cfvlm_ds.data.formats.FORMATS``) or NAME:OPTION=VALUE,OPTION=VALUE, such as
            ``captions:image=file_name,caption=text``; ``auto`` takes the one that the first row has by its keys, and says which.
        root: folder of the images, or a list of folders; the manifest's own when not given. Paths in a manifest are absolute, or relative
            to the first of them that has the file; what a path leads to, through links too, must be inside one of them.
        scores: file written by ``cfvlm-ds score`` with reference and blind log-likelihoods of the training manifest (DPO and PMI need it).
        max_pixels: refuse images with more pixels than this.
        check: ``full`` opens every image before training starts; ``rows`` checks the manifests only.
        on_error: what all ranks do when a training group cannot be read, for instance because an image was damaged after the check:
            ``error``, or ``skip`` the whole group. skipped.json in the run folder lists those. What is broken before the run starts is
            refused; ``cfvlm-ds data prepare --on_error skip`` leaves it out.
        max_skipped: groups that ``skip`` may leave out in a run; one more is an error.
        num_workers: processes that prepare batches, per rank; one per spare core, at most 4, when not given.
        max_tokens_per_micro_batch: pack whole groups up to this many tokens into a micro-batch, in place of
            ``train.per_device_train_batch_size`` of them; ranks then have equal work whatever the sizes of images and texts.
        max_tokens_per_forward: run a larger micro-batch as several forwards of at most this many tokens, twice (a gradient cache, arXiv
            2101.06983): the memory of one, the same gradients, about a third more time. An image with too many texts is divided.
        feature_cache: folder for the outputs of a frozen vision tower, one per picture; filled before the first step, after which the tower
            never runs. Every rank must see it; runs may share it. docs/families.md says how large it gets.
    """

    train: list[Source] | str = option("", on_resume="ignored")
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = option("all_exhausted", on_resume="confirm")
    evaluation: dict[str, str | EvaluationSet] = option(default_factory=dict, on_resume="ignored")
    format: str = option(AUTO, on_resume="ignored")
    root: list[str] | str | None = option(None, on_resume="ignored")
    scores: str | None = option(None, on_resume="ignored")
    max_pixels: int = option(50_000_000, within=AT_LEAST_ONE, on_resume="ignored")
    check: Literal["full", "rows"] = option("full", on_resume="ignored")
    on_error: Literal["error", "skip"] = option("error", on_resume="ignored")
    max_skipped: int = option(10, within=COUNT, on_resume="ignored")
    num_workers: int | None = option(None, within=(0, 1024), on_resume="free")
    max_tokens_per_micro_batch: int | None = option(None, within=AT_LEAST_ONE, on_resume="confirm")
    max_tokens_per_forward: int | None = option(None, within=AT_LEAST_ONE, on_resume="free")
    feature_cache: str | None = option(None, on_resume="free")

    @property
    def is_mixture(self) -> bool:
        """Whether ``train`` is a list of sources."""
        return not isinstance(self.train, str)

    @property
    def train_sets(self) -> dict[str, Source]:
        """The sources of training groups by name, each with its root and format; one, called train, where there is no mixture.

        Raises ConfigError where two have one name, or a name that metrics and files cannot have, and where only some have a weight.
        """
        if isinstance(self.train, str):
            return {"train": Source(self.train, self.root, self.format, scores=self.scores)}
        found: dict[str, Source] = {}
        for each in self.train:
            name = each.name or PurePath(each.path).stem
            if not re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII):
                raise ConfigError(f"data.train: {name!r} names metrics and groups; give {each.path} a name of letters, digits and _ . + -")
            if name in found:
                raise ConfigError(f"data.train: {found[name].path} and {each.path} are both called {name!r}; give one of them another name")
            root = self.root if each.root is None else each.root
            found[name] = replace(each, root=root, format=each.format or self.format, name=name)
        without = [name for name, each in found.items() if each.weight is None]
        if 0 < len(without) < len(found):
            raise ConfigError(f"data.train: source {without[0]!r} has no weight and others have; give each a weight, or none")
        return found

    @property
    def trained_on(self) -> str:
        """The training data, for a sentence about them."""
        return self.train if isinstance(self.train, str) else ", ".join(each.path for each in self.train)

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """The evaluation manifests, each with its root and format."""
        sets = {name: EvaluationSet(split) if isinstance(split, str) else split for name, split in self.evaluation.items()}
        return {
            name: replace(split, root=self.root if split.root is None else split.root, format=split.format or self.format)
            for name, split in sets.items()
            if split.benchmark is None
        }

    @property
    def benchmark_sets(self) -> dict[str, EvaluationSet]:
        """The benchmarks of the evaluation."""
        return {name: split for name, split in self.evaluation.items() if isinstance(split, EvaluationSet) and split.benchmark is not None}

    @property
    def workers(self) -> int:
        """``num_workers``, or the machine's."""
        from cfvlm_ds.core.distributed import default_workers  # torch, which a command's --help does not need

        return default_workers() if self.num_workers is None else self.num_workers
