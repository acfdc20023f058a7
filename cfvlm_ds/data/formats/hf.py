"""Columns of any name, as data sets of the Hugging Face hub have them: every one that is read is mapped, and the rest is metadata.

    {"picture": "a.jpg", "qa": {"question": "How many dogs?", "answer": "Two."}, "wrong": ["Three.", "One."]}
    hf:image=picture,prompt=qa.question,caption=qa.answer,negative_caption=wrong

The options and what follows from them are those of ``captions``, without its usual names. A row without ``image`` is one of text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.captions import Captions


@dataclass(frozen=True)
class Mapped(Captions):
    """Rows of mapped columns."""

    usual = False
    source = "hf"
