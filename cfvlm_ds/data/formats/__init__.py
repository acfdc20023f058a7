"""Manifest rows to counterfactual groups, one file per format.

A further format is one function from a row to a group (see cfvlm_ds/data/cfgroup.py) and one line in FORMATS. One that makes several groups
of a row returns a sequence, and says how many without making them in ``parts(row)``. One that makes a group of several rows has
``claim(row)`` (see truth.py). One with options is a frozen dataclass, whose fields they are.
"""

from __future__ import annotations

from typing import cast

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.named import named
from cfvlm_ds.data.cfgroup import native_group
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
    "cfgroup": native_group,
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
    """The format that ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` says; a value with a comma is in double quotes.

    Raises DataError, beginning with ``where``, for an unknown name or option.
    """
    try:
        return cast(Format, named("format", spec, FORMATS, [AUTO], ("keys", "source")))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
