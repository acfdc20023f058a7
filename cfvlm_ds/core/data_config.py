"""Data configuration: the training data (one data set or a mixture of sources) and the evaluation sets of a run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import ClassVar, Literal

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import AT_LEAST_ONE, COUNT, option
from cfvlm_ds.core.ranks import default_workers

AUTO = "auto"
"""Default value of ``format``: the format is detected from the first row."""


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on the Hugging Face hub (``hf://...``)."""
    return str(path).startswith("hf:/")


@dataclass(frozen=True)
class DataSet:
    """A data set with its own format, image folder and limit.

    Args:
        path: manifest of counterfactual groups, or data in any supported format (docs/formats.md).
        root: overrides ``data.root`` for this data set.
        format: overrides ``data.format`` for this data set.
        limit: number of groups to use, starting with the first; by default all.
    """

    path: str
    root: list[str] | str | None = None
    format: str | None = None
    limit: int | None = option(None, within=AT_LEAST_ONE, on_resume="confirm")


@dataclass(frozen=True)
class Source(DataSet):
    """A data set in a mixture of training data.

    Args:
        path: manifest of counterfactual groups.
        root: overrides ``data.root`` for this data set.
        format: overrides ``data.format`` for this data set.
        limit: number of groups to use, starting with the first; by default all.
        name: name of the source in metrics and group ids; by default, the file name without its extension.
        weight: relative sampling weight of the source. If no source has a weight, sources are sampled in proportion to their size.
        objectives: terms of the objective that use the source's groups; by default all.
        scores: like ``data.scores``, for this source.
    """

    FORM: ClassVar[str] = (
        "is not a manifest; give FILE, or a list of {path: FILE, weight: NUMBER, root: FOLDER, format: NAME}, of which only path is "
        "required"
    )
    name: str | None = None
    weight: float | None = option(None, within=(1e-9, 1e9), on_resume="confirm")
    objectives: list[str] | None = None
    scores: str | None = None


@dataclass(frozen=True)
class EvaluationSet(DataSet):
    """An evaluation set: a manifest, or a public benchmark.

    Args:
        path: manifest of counterfactual groups, or data in any supported format (docs/formats.md).
        root: overrides ``data.root`` for this set; for a benchmark, the folder that contains one folder per benchmark.
        format: overrides ``data.format`` for this data set.
        limit: number of groups to use, starting with the first; by default all. For a benchmark, the approximate number of items, which are
            spread evenly over the benchmark.
        benchmark: name of a benchmark (docs/benchmarks/index.md), instead of ``path``.
        probe: way to ask the benchmark's questions; every benchmark has a default.
    """

    FORM: ClassVar[str] = (
        "is not a manifest; give NAME: PATH, or NAME: {path: PATH, root: FOLDER, format: NAME} with root and format optional, or "
        "NAME: {benchmark: NAME, root: FOLDER}"
    )
    path: str = ""
    benchmark: str | None = None
    probe: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data.

    Args:
        train: manifest of counterfactual groups, a store made by ``cfvlm-ds data prepare``, or data in any supported format (JSON lines, a
            JSON list, CSV, TSV, Parquet, a folder written by ``save_to_disk``, or tar files), given as a file, a folder, or a file name
            pattern. A list of {path: ..., weight: ...} is a mixture of sources; each source can have its own root, format, limit,
            objectives and scores (docs/mixtures.md).
        stopping_strategy: condition that ends an epoch of a mixture. ``all_exhausted``: every source has been used completely; smaller
            sources are repeated until then. ``first_exhausted``: one source has been used completely.
        evaluation: evaluation sets by name, evaluated every ``train.eval_steps`` steps and at the end. Each value is MANIFEST; {path:
            MANIFEST, root: FOLDERS, format: NAME, limit: N} to override the root, format or limit (``--data.evaluation.NAME.root FOLDER``);
            or {benchmark: NAME, root: FOLDER} for a public benchmark.
        format: row format, as NAME (a key of ``cfvlm_ds.data.formats.FORMATS``) or NAME:OPTION=VALUE,OPTION=VALUE, such as
            ``captions:image=file_name,caption=text``; ``auto`` detects the format from the keys of the first row, and reports it.
        root: folder of the images, or a list of folders; by default, the manifest's folder. A path in a manifest is absolute, or relative
            to the first of these folders that contains the file. After links are resolved, the file must be inside one of the folders.
        scores: file that ``cfvlm-ds score`` wrote for the training manifest, with log-likelihoods under the reference model and on a blank
            image; DPO and PMI need it.
        max_pixels: reject images with more pixels than this.
        check: ``full`` opens every image before training starts; ``rows`` checks only the manifests.
        on_error: action of all ranks if a training group cannot be read, for instance because an image was damaged after the check:
            ``error``, or ``skip`` the whole group. skipped.json in the run folder lists skipped groups. If the check before training finds
            broken data, the run does not start; ``cfvlm-ds data prepare --on_error skip`` leaves broken rows out.
        max_skipped: maximum number of skipped groups in a run; the run fails if there are more.
        num_workers: processes per rank that prepare batches; by default one per spare core, at most 4.
        max_tokens_per_micro_batch: fill each micro-batch with whole groups up to this many tokens, instead of
            ``train.per_device_train_batch_size`` groups. The ranks then have similar amounts of work, even if images and texts differ in
            size.
        max_tokens_per_forward: split a micro-batch with more tokens than this into forward passes of at most this size; all but the last
            run twice (gradient cache, arXiv 2101.06983). The gradients are the same. Only one pass has to fit into memory, but a step takes
            about a third longer. If an image has too many texts for one pass, the texts are divided among several.
    """

    train: list[Source] | str = option("", on_resume="ignored")
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    evaluation: dict[str, str | EvaluationSet] = option(default_factory=dict, on_resume="ignored")
    format: str = option(AUTO, on_resume="ignored")
    root: list[str] | str | None = option(None, on_resume="ignored")
    scores: str | None = option(None, on_resume="ignored")
    max_pixels: int = option(50_000_000, within=AT_LEAST_ONE, on_resume="ignored")
    check: Literal["full", "rows"] = option("full", on_resume="ignored")
    on_error: Literal["error", "skip"] = option("error", on_resume="ignored")
    max_skipped: int = option(10, within=COUNT, on_resume="ignored")
    num_workers: int | None = option(None, within=(0, 1024), on_resume="free")
    max_tokens_per_micro_batch: int | None = option(None, within=AT_LEAST_ONE)
    max_tokens_per_forward: int | None = option(None, within=AT_LEAST_ONE, on_resume="free")

    @property
    def is_mixture(self) -> bool:
        """True if ``train`` is a list of sources."""
        return not isinstance(self.train, str)

    @property
    def train_sets(self) -> dict[str, Source]:
        """Training sources by name, with ``data.root`` and ``data.format`` as defaults. Training data that are not a mixture become a
        single source named "train".

        Raises ConfigError if two sources have the same name, if a name cannot be part of a metric or file name, or if only some sources
        have a weight.
        """
        if isinstance(self.train, str):
            return {"train": Source(self.train, self.root, self.format, scores=self.scores)}
        sources: dict[str, Source] = {}
        for source in self.train:
            name = source.name or PurePath(source.path).stem
            if not re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII):
                raise ConfigError(
                    f"data.train: {name!r} cannot be part of metric and group names; give {source.path} a name of letters, digits and _ "
                    ". + -"
                )
            if name in sources:
                paths = f"{sources[name].path} and {source.path}"
                raise ConfigError(f"data.train: {paths} are both called {name!r}; give one of them another name")
            root = self.root if source.root is None else source.root
            sources[name] = replace(source, root=root, format=source.format or self.format, name=name)
        without = [name for name, source in sources.items() if source.weight is None]
        if 0 < len(without) < len(sources):
            raise ConfigError(f"data.train: source {without[0]!r} has no weight, but others have one; give every source a weight, or none")
        return sources

    @property
    def trained_on(self) -> str:
        """Paths of the training data as one string, for messages."""
        return self.train if isinstance(self.train, str) else ", ".join(source.path for source in self.train)

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """Evaluation manifests by name, with ``data.root`` and ``data.format`` as defaults."""
        sets = {name: EvaluationSet(split) if isinstance(split, str) else split for name, split in self.evaluation.items()}
        return {
            name: replace(split, root=self.root if split.root is None else split.root, format=split.format or self.format)
            for name, split in sets.items()
            if split.benchmark is None
        }

    @property
    def benchmark_sets(self) -> dict[str, EvaluationSet]:
        """Evaluation benchmarks by name."""
        return {name: split for name, split in self.evaluation.items() if isinstance(split, EvaluationSet) and split.benchmark is not None}

    @property
    def workers(self) -> int:
        """Number of data workers per rank: ``num_workers`` or, if that is not set, a default that depends on the number of cores."""
        return default_workers() if self.num_workers is None else self.num_workers
