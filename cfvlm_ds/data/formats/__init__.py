"""Formats: functions that convert the rows of a manifest to counterfactual groups, one file per format.

A new format needs a function that converts a row to a group (see cfvlm_ds/data/cfgroup.py) and a line in FORMATS. A format with several
groups per row returns a sequence, and has ``parts(row)``, which counts the groups without building them. A format that joins several rows
into one group has ``claim(row)``, which returns the labelled texts of a row (see truth.py). A format with options is a frozen dataclass
whose fields are the options.
"""

from __future__ import annotations

from typing import cast

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.named import named
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.data.formats.captions import Captions
from cfvlm_ds.data.formats.cfvlm import Cfvlm
from cfvlm_ds.data.formats.hf import Mapped
from cfvlm_ds.data.formats.llava import Llava
from cfvlm_ds.data.formats.messages import Messages
from cfvlm_ds.data.formats.pairs import Pairs
from cfvlm_ds.data.formats.preference import Preference
from cfvlm_ds.data.formats.webdataset import WebDataset
from cfvlm_ds.data.store import Format

FORMATS: dict[str, Format] = {
    "cfgroup": from_row,
    "pairs": Pairs(),
    "cfvlm": Cfvlm(),
    "llava": Llava(),
    "messages": Messages(),
    "preference": Preference(),
    "captions": Captions(),
    "webdataset": WebDataset(),
    "hf": Mapped(),
}


def format_named(spec: str, where: object) -> Format:
    """Return the format for ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``. A value that contains a comma must be in double quotes.

    Raises DataError for an unknown name or option. The error message starts with ``where``, the location of the data.
    """
    try:
        return cast(Format, named("format", spec, FORMATS, [AUTO]))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
