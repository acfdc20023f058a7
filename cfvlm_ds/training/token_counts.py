"""Token counts of all groups, used to pack micro-batches. They are computed once, and all ranks memory-map the same file."""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from cfvlm_ds.core.distributed import ProgressBarrier, World, broadcast_object, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.data.passes import Done, Scan
from cfvlm_ds.data.picture_index import PictureTable, sizes_of
from cfvlm_ds.training.read_data import by_rank_0

Tokens = npt.NDArray[np.int32]
_NAME = 16  # characters of the hash in a file name
_FORM = 2  # version of the counts; stored counts of a different version are ignored


def group_tokens(
    groups: Groups,
    collator: Collator,
    data: DataConfig,
    world: World,
    pictures: PictureTable | None = None,
    *,
    folders: Sequence[Path] = (),
    depends_on: Callable[[], Any] | None = None,
) -> Tokens:
    """Return each group's number of tokens in the rows that ``collator`` builds. Rank 0 counts them, using all its cores.

    If a picture is not in ``pictures``, its header is read. The counts are stored in the first writable folder of ``folders``, in a file
    named after a hash of everything that they depend on. All ranks map this file into memory, and the next start reads it. If
    ``depends_on`` is None, nothing is stored.

    Raises DataError on every rank for a picture file without a readable header, and for a group that exceeds a limit in ``data``. The limit
    per micro-batch applies to all images and texts of a group together, the limit per forward pass to one image with one text.
    """
    barrier, counted = ProgressBarrier(world), list[Tokens]()

    def work(places: Sequence[int], done: Done) -> Tokens | str:
        """Return the counts of the groups at the indices in ``places``, or an error message if a group cannot be read."""
        try:
            chunk = [groups[index] for index in places]
            shown = (picture for group in chunk for image in group.images for picture in image)
            with ThreadPoolExecutor(min(4, cores_per_rank())) as pool:  # many such processes may run
                sizes = sizes_of(shown, pictures, data.max_pixels, pool)
            counts = np.zeros((2, len(chunk)), np.int32)
            for k, group in enumerate(chunk):
                counts[:, k] = collator.group_tokens(group, sizes)
                done()
            return counts
        except DataError as error:
            return str(error)

    def counts_of_all() -> Tokens:
        """Return token counts [2, groups]: row 0 for whole groups, row 1 for each group's longest pair of an image and a text."""
        parts, scan = [np.zeros((2, 0), np.int32)], Scan(barrier.alive, shield_worker)
        for part in scan.over(range(len(groups)), work, Progress(world.say, "tokens", len(groups), "groups")):
            if isinstance(part, str):
                raise DataError(part)
            parts.append(part)
        return np.concatenate(parts, 1, dtype=np.int32)

    def find() -> Path | None:
        files = _files(folders, depends_on, collator)
        for file in files:
            if (known := _mapped(file, len(groups))) is not None:
                counted.append(known)
                return file
        counted.append(counts_of_all())
        for file in files:
            with contextlib.suppress(OSError):  # if the disk is full, counts stay in memory and the next start counts again
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as handle:
                    np.save(handle, counted[0], allow_pickle=False)
                return file
        return None

    stored_file = by_rank_0(world, barrier, "the count of tokens", find)
    tokens = counted[0] if counted else None if stored_file is None else _mapped(stored_file, len(groups))
    if not all(gather_objects(tokens is not None, world)):
        (tokens,) = broadcast_object(counted)
    assert tokens is not None
    parts = {
        "max_tokens_per_micro_batch": "its images and texts",
        "max_tokens_per_forward": "one image with one text, which cannot be divided",
    }
    for counts, (option, what) in zip(tokens, parts.items(), strict=True):
        limit, most = getattr(data, option), int(counts.max())
        if limit is not None and most > limit:
            group = groups[int(counts.argmax())].id
            raise DataError(
                f"group {group!r} has {most} tokens in {what}, but data.{option} is {limit}; raise it, or use images with fewer tokens"
            )
    return tokens[0]


def _files(folders: Sequence[Path], depends_on: Callable[[], Any] | None, collator: Collator) -> list[Path]:
    """Return the paths where the counts can be stored. The list is empty if ``depends_on`` is None."""
    if depends_on is None:
        return []
    parts = [_FORM, depends_on(), collator.cells, collator.blank, transformers.__version__]
    return [folder / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_NAME]}.npy" for folder in folders]


def _mapped(file: Path, count: int) -> Tokens | None:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(tokens) if tokens.dtype == np.int32 and tokens.shape == (2, count) else None
