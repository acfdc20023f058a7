"""Picture inputs of a batch: converts picture files to the model's inputs, and to the placeholder ids that represent them in a prompt.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig

from cfvlm_ds.batching.batch import BLANK, BLANK_SIZE, Inputs
from cfvlm_ds.batching.prompts import placeholder_id
from cfvlm_ds.core.errors import DataError, is_failure
from cfvlm_ds.core.groups import Groups, Pictures
from cfvlm_ds.data.decoding import MAX_BYTES, MAX_PIXELS, Size, open_image
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.models import Family

PictureKey = tuple[Path, bool]
"""A picture's file, and a flag that is True if the model processes the picture as one of several in a prompt."""


class Unprocessable(DataError):
    """Raised if the model's processor fails on a picture of this ``size``."""

    def __init__(self, size: Size, error: BaseException) -> None:
        self.size = size
        super().__init__(
            f"the model's processor cannot take an image of {size[0]}x{size[1]} pixels ({type(error).__name__}: {error}); crop or resize "
            "it, or drop the row"
        )


def with_names(error: Unprocessable, groups: Groups, sizes: Mapping[Path, Size]) -> str:
    """Return the error message, preceded by the group and file of the first picture that has the size at which the processor failed."""
    for group in groups:
        for picture in (picture for pictures in group.images for picture in pictures):
            if sizes.get(picture) == error.size:
                return f"group {group.id!r}: {picture}: {error}"
    return str(error)


@dataclass
class ImageFiles:
    """Source of picture inputs that opens the files and runs the processor.

    Args:
        family, config: the model's family record and configuration.
        max_pixels: maximum number of pixels per picture.
        checked: picture properties recorded by the data check, or None; a picture that has changed since then raises DataError.
    """

    processor: Any
    family: Family
    config: PreTrainedConfig
    max_pixels: int = MAX_PIXELS
    checked: PictureTable | None = None
    _counted: dict[tuple[Size, bool], tuple[int, int]] = field(default_factory=dict, init=False)

    def keys(self, pictures: Pictures) -> tuple[PictureKey, ...]:
        """Return an image's pictures as keys (see ``PictureKey``)."""
        return tuple((picture, self.family.tiles_alone and len(pictures) > 1) for picture in pictures)

    def open(self, key: PictureKey) -> Image.Image:
        """Open a picture. Raises DataError naming the file if it cannot be opened or has changed since the data check."""
        path = key[0]
        if path.parent == BLANK.parent:
            return Image.new("RGB", BLANK_SIZE, (128, 128, 128))
        if self.checked is not None:
            self.checked.verify(path)
        return open_image(path, self.max_pixels)

    def content(self, key: PictureKey) -> bytes:
        """Return a picture file's bytes. Raises DataError naming the file if it cannot be read."""
        try:
            if key[0] == BLANK:
                return BLANK.name.encode()
            if self.checked is not None:
                self.checked.verify(key[0])
            return picture_bytes(key[0], MAX_BYTES)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{key[0]}: image cannot be read ({reason}); restore the file, or correct its path in the manifest") from error

    def model_inputs(self, opened: Sequence[Any], keys: Sequence[PictureKey]) -> tuple[Inputs, list[list[int]]]:
        """Return the model's inputs for the pictures, and each picture's placeholder ids. Pictures from prompts with several pictures must
        come last in ``opened`` and ``keys``.

        Raises Unprocessable for the first picture that the processor cannot process. The error names neither the file nor the group.
        """
        return self._processed(list(opened), sum(together for _, together in keys))

    def num_placeholders(self, size: Size, together: bool) -> tuple[int, int]:
        """Return the number of placeholder ids for a picture of this size, and the number of visual tokens among them. The processor is run
        to count them, because every family has its own rules.

        ``together`` is True if the prompt has other pictures. Raises Unprocessable if the processor fails on a picture of this size.
        """
        together = together and self.family.tiles_alone
        if (size, together) not in self._counted:
            ids = self._processed([Image.new("RGB", size)] * (1 + together), 2 * together)[1][0]
            self._counted[size, together] = len(ids), ids.count(self.config.image_token_id)
        return self._counted[size, together]

    def _processed(self, opened: list[Image.Image], together: int) -> tuple[Inputs, list[list[int]]]:
        """Run the processor, with the last ``together`` pictures in one prompt. Return the tower's inputs and each picture's placeholder
        ids.
        """
        token, tokenizer = self.processor.image_token, self.processor.tokenizer
        alone = len(opened) - together
        samples = [[picture] for picture in opened[:alone]] + ([opened[alone:]] if together else [])
        try:
            inputs = self.processor(images=samples, text=[token * len(pictures) for pictures in samples], padding=True, return_tensors="pt")
        except MemoryError:
            raise
        except BaseException as error:  # processors raise nearly anything on unusual sizes
            if not is_failure(error):
                raise
            if any(picture is not opened[0] for picture in opened):
                for k, picture in enumerate(opened):
                    self._processed([picture] * (1 + (k >= alone)), 2 * (k >= alone))
            raise Unprocessable(opened[0].size, error) from error
        bare = tokenizer(token.join(self.family.around)).input_ids
        before = bare.index(placeholder_id(self.processor))
        after = len(bare) - before - 1
        placeholders: list[list[int]] = []
        for pictures, ids, mask in zip(samples, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            kept = ids[mask][before:].tolist()
            kept = kept[: len(kept) - after]
            length = len(kept) // len(pictures)  # pictures shown together are not tiled, so their lengths are equal
            placeholders += [kept[k * length : (k + 1) * length] for k in range(len(pictures))]
        image_inputs: Inputs = {name: inputs[name] for name in self.family.image_inputs}
        if self.family.grid and self.family.from_grids:
            image_inputs |= self.family.from_grids(self.config, image_inputs[self.family.grid])
        return image_inputs, placeholders
