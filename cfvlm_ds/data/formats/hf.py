"""Rows whose columns have arbitrary names, as on the Hugging Face hub. The options state which columns are read and what they hold; all
other columns are metadata.

    {"picture": "a.jpg", "qa": {"question": "How many dogs?", "answer": "Two."}, "wrong": ["Three.", "One."]}
    hf:image=picture,prompt=qa.question,caption=qa.answer,negative_caption=wrong

The options and rules are the same as for ``captions``, except that columns are not detected by common names. If ``image`` is not set, rows
are text-only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.captions import Captions


@dataclass(frozen=True)
class Mapped(Captions):
    """Format with a user-defined column mapping: the options state which column holds each field of a group."""

    usual = False
    source = "hf"
