"""Item check before scoring: opens every picture once and counts the tokens of every text. The ranks share the work.

The check reports items with an unreadable picture and items that exceed the context window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.batch import BLANK_SIZE
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.data.check import opened_picture
from cfvlm_ds.data.picture_index import Picture, PictureTable
from cfvlm_ds.evaluation.benchmarks import Item
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.suite.selection import Way


@dataclass(frozen=True)
class Checked:
    """Items that the model can process, (id, reason) for each item that was left out, and a table of the pictures."""

    items: tuple[Item, ...]
    left_out: tuple[tuple[str, str], ...]
    pictures: PictureTable

    def identity(self) -> dict[str, Any]:
        """Return a fingerprint of the items: their number, a digest of their texts, and a digest of their picture contents."""
        texts, pictures = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for item in self.items:
            content = [item.id, item.prompt, item.listed, item.texts, item.match, sorted(item.tags.items())]
            texts.update(json.dumps(content).encode())
            digests = [[known.digest.hex() if (known := self.pictures.find(picture)) else "" for picture in image] for image in item.images]
            pictures.update(json.dumps([item.id, digests]).encode())
        return {"items": len(self.items), "texts": texts.hexdigest(), "pictures": pictures.hexdigest()}


def checked_items(items: Sequence[Item], way: Way, collator: Collator, world: World, label: str) -> Checked:
    """Check all items. Return the valid ones, and the reason why each of the others is left out. All ranks must call this."""
    barrier = ProgressBarrier(world)

    def gathered(entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        local = {}
        for key, value in entries:
            local[key] = value
            barrier.alive()
        barrier.meet()
        return {key: value for part in gather_objects(local, world) for key, value in part.items()}

    shown = list(dict.fromkeys(picture for item in items for image in item.images for picture in image))
    mine = shown[world.rank :: world.size]
    progress = Progress(world.say, f"{label}: pictures{' of this rank' * (world.size > 1)}", len(mine), "pictures")
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        opened = pool.map(lambda path: opened_picture(path, None, None, collator.files.max_pixels, False)[0], mine)
        pictures: dict[Path, Picture | str] = gathered(progress.over(zip(mine, opened, strict=True)))
    table = PictureTable.of((path, picture) for path, picture in pictures.items() if isinstance(picture, Picture))

    def problem(item: Item) -> str | None:
        found = [[pictures[picture] for picture in image] for image in item.images]
        if unread := [entry for image in found for entry in image if isinstance(entry, str)]:
            return unread[0]
        sizes = dict.fromkeys(tuple((entry.width, entry.height) for entry in image if isinstance(entry, Picture)) for image in found)
        sizes[(BLANK_SIZE,) * len(item.images[0])] = None  # the blank image is scored too
        try:
            longest = max(
                collator.row_length(cell.prompt, cell.text, size) for size in sizes for cell in way.cells(item)
            )  # cells without a picture are shorter
        except DataError as error:
            return f"item {item.id!r}: {error}"
        longest += way.max_new_tokens if isinstance(way, Generate) else 0
        if longest > collator.max_length:
            return f"item {item.id!r}: {longest} tokens with its pictures, but the model's window is {collator.max_length}"
        return None

    numbers = range(world.rank, len(items), world.size)
    progress = Progress(world.say, f"{label}: texts{' of this rank' * (world.size > 1)}", len(numbers), "items")
    problems = gathered((number, problem(items[number])) for number in progress.over(numbers))
    kept = tuple(item for number, item in enumerate(items) if problems[number] is None)
    return Checked(kept, tuple((items[number].id, why) for number, why in sorted(problems.items()) if why is not None), table)


def prompt_of(item: Item, way: Way, collator: Collator) -> str:
    """Return the first prompt of an item, formatted with the chat template."""
    first = way.cells(item)[0]
    return collator.prompts.encoded(first.prompt, first.text, len(item.images[0]), item.id).prompt


def token_lengths(collator: Collator) -> Callable[[Candidate], int]:
    """Return a function that counts the tokens of a candidate's text under the model's tokenizer."""
    return lambda candidate: len(collator.prompts.encoded(candidate.prompt, candidate.text, 1, "a text").text_ids)
