"""A folder that appears complete or not at all, in place of an older one of its kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import aside_of, whole_folder
from cfvlm_ds.core.untrusted import refuse_link


def refuse_replacing(out_dir: Path, marker: str, needed: Iterable[Path], remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` holds one of ``needed``, or files that are not an older export (recognised by its file ``marker``),
    or if it is a link, whose target would be replaced."""
    refuse_link(out_dir, remedy)
    final = out_dir.resolve()
    for path in needed:
        if path.is_relative_to(final):
            raise ConfigError(f"{out_dir} holds {path}, which the export is made from; {remedy}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{out_dir} is a file, and the export is a folder; {remedy}")
    if final.is_dir() and any(final.iterdir()) and not (final / marker).is_file():
        raise ConfigError(f"{out_dir} holds other files and no earlier export, and would be replaced; {remedy}")


@contextmanager
def replaced(out_dir: Path, marker: str, needed: Iterable[Path]) -> Iterator[Path]:
    """An empty folder to write to, which becomes ``out_dir`` at the end of the block; until then what was there stays.

    Raises ConfigError as ``refuse_replacing`` does, and StorageError for an OSError inside the block.
    """
    refuse_replacing(out_dir, marker, needed)
    final = out_dir.resolve()
    refuse_link(aside_of(final), "remove it")
    try:
        with whole_folder(final) as partial:
            yield partial
    except OSError as error:
        raise StorageError(f"{out_dir} cannot be written ({error}); what was there is unchanged; name another folder with --out") from error
