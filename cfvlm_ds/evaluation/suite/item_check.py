"""Items against a model, before any is scored: every picture is opened once, every text measured once, ranks share the work.

What cannot be asked is known then, and named with its item: a picture that cannot be read, a text that does not fit the window.
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
from cfvlm_ds.core.distributed import ProgressBarrier, World, cores_per_rank, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.picture_check import opened_picture
from cfvlm_ds.data.picture_index import Picture, PictureTable
from cfvlm_ds.evaluation.benchmarks import Item
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.suite.selection import Way


@dataclass(frozen=True)
class Checked:
    """Items that can be asked, the others by their id with the reason, and what was found in the pictures."""

    items: tuple[Item, ...]
    left_out: tuple[tuple[str, str], ...]
    pictures: PictureTable

    def identity(self) -> dict[str, Any]:
        """What the items that are asked are recognised by: their texts and the contents of their pictures."""
        texts, pictures = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for item in self.items:
            said = [item.id, item.prompt, item.listed, item.texts, item.match, sorted(item.tags.items())]
            texts.update(json.dumps(said).encode())
            shown = [[self._digest(picture) for picture in image] for image in item.images]
            pictures.update(json.dumps([item.id, shown]).encode())
        return {"items": len(self.items), "texts": texts.hexdigest(), "pictures": pictures.hexdigest()}

    def _digest(self, picture: Path) -> str:
        found = self.pictures.find(picture)
        return "" if found is None else found.digest.hex()


def checked_items(
    items: Sequence[Item],
    way: Way,
    collator: Collator,
    world: World,
    label: str,
    seen: dict[Path, Picture | str] | None = None,
) -> Checked:
    """Look at all items; collective. Nothing is raised for what is wrong with one of them. Pictures that were ``seen`` before are not
    opened again, and the others are added to these."""
    barrier = ProgressBarrier(world)

    def together(found: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        own = {}
        for key, value in found:
            own[key] = value
            barrier.alive()
        barrier.meet()
        return {key: value for part in gather_objects(own, world) for key, value in part.items()}

    found: dict[Path, Picture | str] = {} if seen is None else seen
    shown = [picture for picture in dict.fromkeys(p for item in items for image in item.images for p in image) if picture not in found]
    mine = shown[world.rank :: world.size]
    progress = Progress(world.say, f"{label}: pictures{' of this rank' * (world.size > 1)}", len(mine), "pictures")
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        opened = pool.map(lambda path: opened_picture(path, None, None, collator.files.max_pixels, False)[0], mine)
        found |= together(progress.over(zip(mine, opened, strict=True)))
    table = PictureTable.of((path, picture) for path, picture in found.items() if isinstance(picture, Picture))

    def problem(item: Item) -> str | None:
        unread = (found[picture] for image in item.images for picture in image)
        return next((each for each in unread if isinstance(each, str)), None) or _unfit(item, way, collator, table)

    numbers = range(world.rank, len(items), world.size)
    progress = Progress(world.say, f"{label}: texts{' of this rank' * (world.size > 1)}", len(numbers), "items")
    problems = together((number, problem(items[number])) for number in progress.over(numbers))
    kept = tuple(item for number, item in enumerate(items) if problems[number] is None)
    return Checked(kept, tuple((items[number].id, why) for number, why in sorted(problems.items()) if why is not None), table)


def cells_of(item: Item, way: Way) -> tuple[Candidate, ...]:
    """What a model has to take for an item; of what it is to write the first word stands for the rest."""
    if isinstance(way, Generate):
        return (Candidate(way.asked(item), item.texts[0]),)
    return way.cells(item)  # those of the options alone are shorter


def example_of(item: Item, way: Way, collator: Collator) -> dict[str, str]:
    """What a model is asked about an item as its chat template writes it, and the first text that is scored."""
    first = cells_of(item, way)[0]
    return {"prompt": collator.prompts.encoded(first.prompt, first.text, len(item.images[0]), item.id).prompt, "answer": first.text}


def _unfit(item: Item, way: Way, collator: Collator, table: PictureTable) -> str | None:
    """Why a model cannot be asked an item, if it cannot."""
    try:
        known = [tuple((found.width, found.height) for picture in image if (found := table.find(picture))) for image in item.images]
        sizes = dict.fromkeys([*known, (BLANK_SIZE,) * len(item.images[0])])  # blank ones are shown too
        longest = max(collator.row_length(cell.prompt, cell.text, size) for size in sizes for cell in cells_of(item, way))
    except DataError as error:
        return f"item {item.id!r}: {error}"
    longest += way.max_new_tokens if isinstance(way, Generate) else 0
    if longest > collator.max_length:
        return f"item {item.id!r}: {longest} tokens with its pictures, and the model's window is {collator.max_length}"
    return None


def token_lengths(collator: Collator) -> Callable[[Candidate], int]:
    """Tokens of a text, as the model's tokenizer has them."""
    return lambda candidate: len(collator.prompts.encoded(candidate.prompt, candidate.text, 1, "a text").text_ids)
