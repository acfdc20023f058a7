"""Precomputation of a frozen vision tower's features for all pictures in a run, before the first step. No step then runs the tower.

A separate pass is needed because under ZeRO-3 all ranks must run the tower equally often. In a training step, ranks would differ in the
number of pictures whose features are missing. In this pass, all ranks run the same number of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.batching.batch import on_device
from cfvlm_ds.batching.image_source import ImageFiles, PictureKey
from cfvlm_ds.cluster.signals import shield_worker
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, isolated_rng, run_on_rank0
from cfvlm_ds.core.errors import DataError, StorageError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.data.features import FeatureCache, Features, picture_digest, write_features
from cfvlm_ds.models import fingerprint

Prepared = tuple[dict[str, Tensor], Features]
_FORM = "2"  # version of the file format; files of other versions are ignored


def precompute_features(
    folder: Path, model: ModelConfig, engine: Any, files: ImageFiles, groups: Iterable[CounterfactualGroup], world: World, num_workers: int
) -> FeatureCache:
    """Return a feature cache for all pictures in ``groups``. Missing features are computed in evaluation mode, each on a single rank.

    ``engine`` wraps a Scorer. The error for an unreadable picture is recorded, and raised when the picture is used. Every rank must call
    this. Raises StorageError on all ranks if features cannot be written.
    """
    scorer, barrier = engine.module, ProgressBarrier(world)
    hashes = run_on_rank0(world, lambda: fingerprint(model, barrier.alive, world.say), barrier)
    dtype = str(scorer.model.dtype)
    cache = FeatureCache(folder, {"form": _FORM, **hashes, "dtype": dtype, "transformers": transformers.__version__})
    keys = files.all_keys(groups)
    sizes = _existing_sizes(cache, files, keys, world)
    first = {digest: key for key, digest in reversed(cache.known.items()) if isinstance(digest, bytes)}
    missing = [(key, digest) for digest, key in first.items() if digest not in sizes]
    if missing:
        world.say(f"features: running the vision tower on {len(missing)} of {len(first)} pictures for {cache.place}")
        training = scorer.training
        scorer.eval()
        sizes |= _fill(cache, engine, files, missing, world, num_workers)
        scorer.train(training)
    total = sum(sizes.values())
    world.say(
        f"features: {len(sizes)} pictures in {cache.place}, {total / 2**20:.1f} MiB, {total / 2**20 / len(sizes):.3f} MiB per picture"
    )
    return cache


def _existing_sizes(cache: FeatureCache, files: ImageFiles, keys: list[PictureKey], world: World) -> dict[bytes, int]:
    """Add all pictures' digests to ``cache``; each rank reads a share of the pictures. Return the size in bytes of each existing feature
    file, keyed by digest.
    """

    def look(key: PictureKey) -> tuple[bytes | str, int | None]:
        try:
            digest = picture_digest(files.content(key), key[1])
        except DataError as error:
            return str(error), None
        file = cache.file(digest)
        return digest, file.stat().st_size if file.exists() else None

    with ThreadPoolExecutor(cores_per_rank()) as pool:
        shares = gather_objects(list(pool.map(look, keys[world.rank :: world.size])), world)
    sizes: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        digest, size = shares[place % world.size][place // world.size]
        cache.known[key] = digest
        if size is not None:
            sizes[digest] = size
    return sizes


def _fill(
    cache: FeatureCache, engine: Any, files: ImageFiles, missing: list[tuple[PictureKey, bytes]], world: World, num_workers: int
) -> dict[bytes, int]:
    """Compute and write the missing features. Return the size in bytes of each file written, keyed by digest."""
    rounds = -(-len(missing) // world.size)
    blank = files.blank_keys()[0]
    own_share = [missing[place] if place < len(missing) else None for place in range(world.rank, rounds * world.size, world.size)]
    loader: Any = DataLoader(
        own_share,  # type: ignore[arg-type]
        batch_size=1,
        collate_fn=_preparing(files),
        num_workers=num_workers,
        worker_init_fn=shield_worker,
        generator=isolated_rng(),
    )
    sizes, unreadable = {}, {}
    problem: str | None = None
    progress = Progress(world.say, "features", len(missing), "pictures")
    for number, (wanted, prepared) in enumerate(zip(own_share, loader, strict=True)):
        inputs, features = files.tower_inputs(blank) if prepared is None or isinstance(prepared, str) else prepared
        with torch.no_grad():
            tower = engine(image_inputs=on_device(inputs, world.device))
        if wanted is not None and isinstance(prepared, str):
            unreadable[wanted[1]] = prepared
        elif wanted is not None:
            (_, together), digest = wanted
            own = {name: output[: len(output) // (1 + together)].cpu() for name, output in tower.items()}
            try:
                write_features(cache.file(digest), replace(features, tower=own))
                sizes[digest] = cache.file(digest).stat().st_size
            except OSError as error:
                problem = f"data.feature_cache: {cache.file(digest)} cannot be written ({error}); free some space, or use another folder"
        _agree(problem, world)
        progress.advance(min(world.size, len(missing) - number * world.size))
    written = gather_objects((sizes, unreadable), world)
    reasons_by_digest = {digest: reason for _, reasons in written for digest, reason in reasons.items()}
    for key, known in list(cache.known.items()):
        if isinstance(known, bytes) and known in reasons_by_digest:
            cache.known[key] = reasons_by_digest[known]
    return {digest: size for own_sizes, _ in written for digest, size in own_sizes.items()}


def _preparing(files: ImageFiles) -> Callable[[list[Any]], Prepared | str | None]:
    """Return the data workers' collate function. It converts a picture and its digest to the tower's inputs, or to an error message."""

    def prepare(items: list[tuple[PictureKey, bytes] | None]) -> Prepared | str | None:
        if items[0] is None:
            return None
        key, digest = items[0]
        try:
            prepared = files.tower_inputs(key)
            if picture_digest(files.content(key), key[1]) != digest:
                raise DataError(f"{key[0]}: the image has changed since this run started; start the run again")
            return prepared
        except DataError as error:
            return str(error)

    return prepare


def _agree(problem: str | None, world: World) -> None:
    """Raise StorageError on all ranks if any of them reports a problem."""
    if world.size > 1:
        bad = torch.tensor(float(problem is not None), device=world.device)
        dist.all_reduce(bad)
        if not bad:
            return
    if problems := [reported for reported in gather_objects(problem, world) if reported]:
        raise StorageError(problems[0])
