"""Step ``edit``: applies each proposed edit to its picture, several times if the editor's results depend on the seed."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.journal import Journal
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.edit import EDITORS
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task, picture_by_id, sha256_of
from cfvlm_ds.counterfactuals.edit.outside import png
from cfvlm_ds.counterfactuals.options import EditOptions, named
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder, seed_of
from cfvlm_ds.data.decoding import MAX_BYTES
from cfvlm_ds.data.picture_file import picture_bytes, tar_member

STEP = "edit"
_CHANGED = 24  # a composite keeps only differences above this level (of 255)


class Unit(NamedTuple):
    """One edit attempt, the name of its editor, and the fields copied from the step ``propose`` to the attempt's record."""

    task: Task
    editor: str
    about: Mapping[str, Any]


def edit(out: Path, options: EditOptions, shard: int, say: Say, of: int | None = None) -> dict[str, Any]:
    """Edit a shard's pictures, and return its completion record. Work that an earlier call finished is not repeated."""
    names = checked(options)
    work = WorkFolder.open(out)
    if (done := work.finished(STEP, shard, of, options, say)) is not None:
        return done
    editors = {name: EDITORS[name](options) for name in names}
    work.settle(STEP, options, settings={name: dict(editor.settings()) for name, editor in editors.items()})
    proposed = (work.done("propose", shard) or {"counts": {}})["counts"].get("edits", 0)
    most = options.attempts if any(editor.varies for editor in editors.values()) else 1
    threads = max(editor.threads for editor in editors.values())
    with ShardStep(work, STEP, shard) as step:
        units = step.remaining(
            _units(work, shard, editors, options),
            lambda unit: {"edit": unit.task.id, "attempt": unit.task.attempt},
            say,
            proposed * most,
            "pictures",
        )
        with _Tar(work, shard) as tar:
            for _, (record, content) in side_by_side(lambda unit: make(unit, editors, options), units, threads, threads):
                if content is not None:
                    record["picture"] |= {"file": tar.path.name, **tar.add(f"{step.count:08d}.png", content)}
                step.add(record)
        return step.finish(counted, say)


def checked(options: EditOptions) -> list[str]:
    """Return the names of the requested editors. Raises ConfigError for invalid options."""
    if options.masks and not Path(options.masks).is_dir():
        raise ConfigError(f"--masks {options.masks}: no such folder; name the folder with the masks SOURCE/NUMBER.png")
    return named(options.back_ends, EDITORS, "--with")


def _units(work: WorkFolder, shard: int, editors: Mapping[str, Editor], options: EditOptions) -> Iterator[Unit]:
    """Yield the attempts in order: ``options.attempts`` per edit if the editor's results depend on the seed, otherwise one per edit."""
    masks = Path(options.masks) if options.masks else None
    for line in work.records("propose", shard):
        for proposal in line.get("edits", ()):
            about = {"proposal": proposal, "caption": line["caption"], "original": line["picture"], "license": line.get("license", "")}
            name = proposal["id"]
            words = line["caption"], proposal["text"], proposal["from"], proposal["to"], proposal["instruction"]
            mask = picture_by_id(masks, name, (".png",)) if masks is not None else None
            for attempt in range(options.attempts):
                seed = seed_of(options.seed, name, attempt) % 2**53
                task = Task(name, line["source"], proposal["type"], Path(line["picture"] or ""), *words, attempt, seed, mask)
                editor = next((name for name, editor in editors.items() if editor.takes(task)), "no editor")
                editor = "none" if line["picture"] is None else "mine" if proposal.get("picture") else editor
                yield Unit(task, editor, about)
                if editor not in editors or not editors[editor].varies:
                    break


def make(unit: Unit, editors: Mapping[str, Editor], options: EditOptions) -> tuple[dict[str, Any], bytes | None]:
    """Run one edit attempt. Return its record and the PNG bytes of the edited picture, if any."""
    task = unit.task
    record: dict[str, Any] = {
        "edit": task.id,
        "source": task.source,
        "attempt": task.attempt,
        "seed": task.seed,
        "editor": unit.editor,
        **unit.about,
    }
    try:
        if unit.about["original"] is None:
            return record | {"picture": None}, None
        record["parent_sha256"] = sha256_of(picture_bytes(task.picture, MAX_BYTES))
        if real := unit.about["proposal"].get("picture"):
            return record | {"picture": {"path": real, "sha256": sha256_of(picture_bytes(Path(real), MAX_BYTES))}}, None
        if unit.editor not in editors:
            return record | {"refused": "no editor accepts this edit"}, None
        result = editors[unit.editor].edit(task)
        if result is None:
            return record | {"picture": None}, None
        if isinstance(result, Refused):
            return record | {"refused": one_line(without_secrets(result.reason), 300)}, None
        return _checked(task, result, options, record)
    except ConfigError:
        raise
    except (DataError, OSError, ValueError) as error:
        return record | {"refused": "a picture cannot be read", "detail": one_line(str(error), 300)}, None


def _checked(task: Task, edited: Picture, options: EditOptions, record: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    original, image = task.image(), edited.image
    if image.size != original.size:
        size = f"{image.width}x{image.height} instead of {original.width}x{original.height}"
        return record | {"refused": f"the edited picture has another size ({size})"}, None
    image = image.convert("RGB")  # a copy, because png() changes it
    mask = task.mask_image(original.size)
    if options.composite == "mask" and mask is not None:
        image = Image.composite(image, original, mask)
    elif options.composite == "difference":
        image = Image.composite(image, original, difference_mask(original, image))
    if task.mask is not None:
        record["mask_sha256"] = sha256_of(task.mask.read_bytes())
    content = png(image)
    about: dict[str, Any] = {"sha256": sha256_of(content), "size": list(image.size)}
    return record | {"picture": about} | ({"info": dict(edited.info)} if edited.info else {}), content


def difference_mask(original: Image.Image, edited: Image.Image) -> Image.Image:
    """Return a mask of the visible differences between two pictures, dilated by four pixels."""
    changed = np.abs(np.asarray(original, np.int16) - np.asarray(edited, np.int16)).max(2) > _CHANGED
    mask = Image.fromarray((changed * 255).astype(np.uint8))
    return mask.filter(ImageFilter.MaxFilter(9))


def counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Count an attempt by its editor and its outcome: a picture, only a text, or a refusal."""
    counts["attempts"] += 1
    counts[f"editor: {record['editor']}"] += 1
    if "refused" in record:
        counts[f"refused: {record['editor']}: {record['refused'][:80]}"] += 1
    else:
        counts["pictures" if record.get("picture") else "only text"] += 1


class _Tar(Journal):
    """Tar file of a shard's pictures. Opening it removes anything that an interrupted call wrote after the last recorded picture."""

    def __init__(self, work: WorkFolder, shard: int) -> None:
        path, end = work.tar(shard), 0
        for record in work.records(STEP, shard):
            if "start" in (picture := record.get("picture") or {}):
                end = picture["start"] + picture["length"] + -picture["length"] % tarfile.BLOCKSIZE
        if (size := path.stat().st_size if path.exists() else 0) < end:
            raise DataError(f"{path} has {size} bytes, but its records require {end}; restore it, or remove the shard's records")
        super().__init__(path, end=end)

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.append(bytes(2 * tarfile.BLOCKSIZE))
        self.close()

    def add(self, name: str, content: bytes) -> dict[str, int]:
        """Append a picture, and return its offset and length in bytes. The caller writes the record afterwards."""
        start = self.append(tar_member(name, content))
        return {"start": start + tarfile.BLOCKSIZE, "length": len(content)}
