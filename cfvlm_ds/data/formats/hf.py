"""Columns of any name, as in data sets of the Hugging Face hub: every column that is read is mapped, and the others are metadata.

    {"picture": "a.jpg", "qa": {"question": "How many dogs?", "answer": "Two."}, "wrong": ["Three.", "One."]}
    hf:image=picture,prompt=qa.question,caption=qa.answer,negative_caption=wrong

Options and rules are those of ``captions``, but columns are not detected by their usual names. A row without ``image`` is text only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.captions import Captions


@dataclass(frozen=True)
class Mapped(Captions):
    """Format of rows whose columns are mapped by the options."""

    usual = False
    source = "hf"
