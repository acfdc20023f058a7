"""Rows with columns of any name, as on the Hugging Face hub. Options map the columns to read; all other columns are metadata.

    {"picture": "a.jpg", "qa": {"question": "How many dogs?", "answer": "Two."}, "wrong": ["Three.", "One."]}
    hf:image=picture,prompt=qa.question,caption=qa.answer,negative_caption=wrong

The options and rules are the same as for ``captions``, but columns are not detected by their usual names. A row without ``image`` is
text-only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.captions import Captions


@dataclass(frozen=True)
class Mapped(Captions):
    """Format of rows whose columns are mapped by the options."""

    usual = False
    source = "hf"
