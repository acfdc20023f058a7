"""Tokens of every group, by which micro-batches are packed: measured once, and mapped by all ranks from one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.signals import shield_worker
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.distributed import Patience, World, broadcast_object, cores_per_rank, gather_objects
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.data.passes import Done, Scan
from cfvlm_ds.data.picture_index import PictureTable, sizes_of
from cfvlm_ds.training.read_data import by_rank_0

Tokens = npt.NDArray[np.int32]
_NAME = 16  # characters of a key in the name of a shared folder
_SAMPLE = 16  # groups that are measured again
_FORM = 1  # of the files and of what is counted; another number has everything counted again


def group_tokens(
    groups: Sequence[CounterfactualGroup],
    collator: Collator,
    data: DataConfig,
    world: World,
    pictures: PictureTable | None = None,
    tick: Callable[[], object] = lambda: None,
    *,
    folder: Path | None = None,
    depends_on: Callable[[], Any] | None = None,
    shared: Path | None = None,
) -> Tokens:
    """Tokens of every group in the rows that ``collator`` builds, counted by rank 0 on all its cores.

    Headers are read of images that ``pictures`` do not know. In ``folder``, which all ranks see and one process may do without, the counts
    are kept: the ranks of a node map one file, and the next start finds it if what they depend on is the same; None of that is known where
    pictures were not checked. ``shared`` is a folder beside the data where other runs find them too, which need not be writable. Raises
    DataError on every rank, naming a file without a header, or a group that exceeds a limit of ``data``:
    with all its images and texts that of a micro-batch, with one image and one text that of a forward.
    """
    patience, counted = Patience(world, tick), list[Tokens]()

    def sampled(places: Sequence[int]) -> Tokens | str:
        return _measured(groups, collator, data, pictures, places)

    def find() -> tuple[list[int], Path | None, int]:
        key, largest, place = _known(folder, shared, depends_on, collator, len(groups), sampled)
        tokens = None if place is None else _mapped(place, len(groups))
        if largest is None or tokens is None:
            tokens, largest = _counted(groups, collator, data, pictures, Scan(alive=patience.alive, shield=shield_worker), world.say)
            for each in () if folder is None else _places(folder, shared, key):
                with contextlib.suppress(OSError):  # a full disk costs memory and the next start's time, no more
                    _keep(each, key, tokens, largest)
        counted.append(tokens)
        return largest, place or folder, zlib.crc32(tokens.data)

    kept, place, checksum = by_rank_0(world, patience, "the count of tokens", find)
    tokens = None if place is None else _mapped(place, len(groups))
    if tokens is not None and zlib.crc32(tokens.data) != checksum:  # of an earlier start, on a full disk or in a cache of NFS
        tokens = None
    everywhere = all(gather_objects(tokens is not None, world))
    if tokens is None or not everywhere:
        (tokens,) = broadcast_object(counted) if world.size > 1 else counted
    most, at, least, least_at = kept
    problem = _too_large(groups, most, at, "max_tokens_per_micro_batch", data)
    if problem := problem or _too_large(groups, least, least_at, "max_tokens_per_forward", data):
        raise DataError(problem)
    return tokens


def _counted(
    groups: Sequence[CounterfactualGroup],
    collator: Collator,
    data: DataConfig,
    pictures: PictureTable | None,
    scan: Scan,
    say: Callable[[str], object],
) -> tuple[Tokens, list[int]]:
    """Tokens of all groups; and the most of a group with its place, and the most of an image with one text with its group's place."""

    def work(places: Sequence[int], done: Done) -> Tokens | str:
        return _measured(groups, collator, data, pictures, places, done)

    counted = [np.zeros((2, 0), np.int32)]
    for part in scan.over(range(len(groups)), work, Progress(say, "tokens", len(groups), "groups")):
        if isinstance(part, str):
            raise DataError(part)
        counted.append(part)
    both = np.concatenate(counted, 1, dtype=np.int32)
    places = both.argmax(1).tolist()
    return both[0].copy(), [int(both[0, places[0]]), places[0], int(both[1, places[1]]), places[1]]


def _measured(
    groups: Sequence[CounterfactualGroup],
    collator: Collator,
    data: DataConfig,
    pictures: PictureTable | None,
    places: Sequence[int],
    done: Done = lambda: None,
) -> Tokens | str:
    """[2, groups] tokens of some groups, and of the largest of their images with one text; or what is wrong with one."""
    try:
        chunk = [groups[index] for index in places]
        shown = (picture for group in chunk for image in group.images for picture in image)
        with ThreadPoolExecutor(min(4, cores_per_rank())) as pool:  # this may be one of many processes
            sizes = sizes_of(shown, pictures, data.max_pixels, pool)
        counted = np.zeros((2, len(chunk)), np.int32)
        for k, group in enumerate(chunk):
            trees = collator.tree_tokens(group, sizes)
            counted[:, k] = sum(tree.whole for tree in trees), max(tree.least for tree in trees)
            done()
        return counted
    except DataError as error:
        return str(error)


def _places(folder: Path, shared: Path | None, key: str | None) -> list[Path]:
    """Where counts are kept: with the run, and where other runs find them."""
    return [folder] if shared is None or key is None else [folder, shared / key[:_NAME]]


def _known(
    folder: Path | None,
    shared: Path | None,
    depends_on: Callable[[], Any] | None,
    collator: Collator,
    count: int,
    sampled: Callable[[Sequence[int]], Tokens | str],
) -> tuple[str | None, list[int] | None, Path | None]:
    """What tells these counts from others, if anything does; and the largest of them, where an earlier start has left them, and where."""
    if folder is None or depends_on is None:
        return None, None, None
    try:
        parts = [_FORM, depends_on(), collator.cells, collator.share_prefix, transformers.__version__]
    except (OSError, ConfigError):  # of the model's files: named where they are needed
        return None, None, None
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    for place in _places(folder, shared, key):
        if (kept := _kept(place, key, count)) is not None and (place == folder or _proves(place, count, sampled)):
            return key, kept, place
    return key, None, None


def _proves(place: Path, count: int, sampled: Callable[[Sequence[int]], Tokens | str]) -> bool:
    """Whether counts that somebody else may have left are those of some groups."""
    tokens, places = _mapped(place, count), np.unique(np.linspace(0, count - 1, _SAMPLE, dtype=np.int64)).tolist()
    return tokens is not None and not isinstance(found := sampled(places), str) and bool((found[0] == tokens[places]).all())


def _kept(folder: Path | None, key: str | None, count: int) -> list[int] | None:
    """The largest counts, where those of another start are the ones that would be found."""
    if folder is None or key is None or (tokens := _mapped(folder, count)) is None:
        return None
    try:
        record = read_json(folder / "tokens.json")
        largest = record["largest"]
        valid = record["key"] == key and len(largest) == 4 and all(type(each) is int and each >= 0 for each in largest)
        return largest if valid and max(largest[1::2]) < count and tokens.min() > 0 and tokens.max() == largest[0] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _keep(folder: Path, key: str | None, tokens: Tokens, largest: list[int]) -> None:
    (folder / "tokens.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "tokens.npy") as handle:
        np.save(handle, tokens, allow_pickle=False)
    if key is not None:
        replace(folder / "tokens.json", json.dumps({"key": key, "largest": largest}).encode())


def _mapped(folder: Path, count: int) -> Tokens | None:
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(tokens) if tokens.dtype == np.int32 and tokens.shape == (count,) else None


def _too_large(groups: Sequence[CounterfactualGroup], most: int, at: int, option: str, data: DataConfig) -> str | None:
    limit = getattr(data, option)
    if limit is None or most <= limit:
        return None
    what = "one image with one text, which no forward divides," if option == "max_tokens_per_forward" else "its images and texts"
    return f"group {groups[at].id!r} has {most} tokens in {what}, and data.{option} is {limit}; raise it, or show images with fewer tokens"
