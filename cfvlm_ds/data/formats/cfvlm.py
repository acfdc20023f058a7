"""CF-VLM's published rows (arXiv 2506.17267): a captioned image and K counterfactual captions with their images.

    {"orig_input": "COCO Yes: <|vision_start|>coco/17.jpg<|vision_end|>", "orig_output": "two dogs on a lawn",
     "cf_samples": [{"cf_text": "three dogs on a lawn", "cf_image_path": "cf/17_0.png"}]}

The files hold one object per line, although they are named .json. Other keys of a row or a sample are metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.data.fields import Row, as_meta, further_keys, string
from cfvlm_ds.data.formats.chat import without_nulls

_KEYS = ("orig_input", "orig_output", "cf_samples")
_SAMPLE_KEYS = ("cf_text", "cf_image_path")
_START, _END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class Cfvlm:
    """Format of the rows in CF-VLM's published files.

    Args:
        ask: prompt for rows without text around the image; empty for no prompt.
        ignore: columns that are not read, joined by ``+``.
    """

    ask: str = DESCRIBE
    ignore: str = ""

    def __call__(self, row: Row) -> CounterfactualGroup:
        """Convert a row to a group. Image 0 and text 0 are the original; image k and text k are the k-th sample.

        A sample's text is false of the original image, and the original text is false of a sample's image. It is unknown whether a sample's
        text is true of another sample's image. The prompt is the text around the image's path in ``orig_input``. Rows have no ids, so the
        group's id is a hash of the row's contents.

        Raises DataError for a missing or misspelt key, a value of the wrong type, an input that does not have exactly one image, or a group
        that CounterfactualGroup rejects. The caller adds the file and line to any DataError.
        """
        row = without_nulls(row, self.ignore)
        further = further_keys(row, _KEYS, "row")
        before, _, rest = string(row, "orig_input", "row").partition(_START)
        path, end, after = rest.partition(_END)
        if not path or not end or _START in after:
            raise DataError("row: 'orig_input' must contain exactly one image, written as <|vision_start|>PATH<|vision_end|>")
        samples = row.get("cf_samples")
        if not isinstance(samples, list) or not all(isinstance(sample, Mapping) for sample in samples):
            raise DataError(f"row: 'cf_samples' must be a list of objects, not {samples!r}")
        of_samples = [further_keys(sample, _SAMPLE_KEYS, "row: cf_samples") for sample in samples]
        if any(of_samples):
            further["cf_samples"] = of_samples
        paths = [path.strip(), *(string(sample, "cf_image_path", "row: cf_samples") for sample in samples)]
        texts = [string(row, "orig_output", "row"), *(string(sample, "cf_text", "row: cf_samples") for sample in samples)]
        prompt = f"{before} {after}".strip() or self.ask
        digest = hashlib.sha256("\0".join([prompt, *paths, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
        size = range(len(paths))
        return CounterfactualGroup(
            id=f"cfvlm-{digest[:16]}",
            images=tuple((Path(path),) for path in paths),
            candidates=tuple(Candidate(prompt, text) for text in texts),
            match=tuple(tuple(1 if i == c else 0 if 0 in (i, c) else None for c in size) for i in size),
            edits=tuple(Edit("counterfactual", image=k, text=k) for k in size[1:]),
            source="cfvlm",
            meta=as_meta(further),
        )
