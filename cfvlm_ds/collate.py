"""Groups to one packed row: the only place that knows how cells are laid out as tokens.

The row is a sequence of trees. A tree is the chat template's prompt with its image and, behind that prefix, every text the image is scored
with: each text is a branch that sees the prefix and itself. Nothing is padded, and each distinct image is encoded once.
Shapes: G groups, I images, C candidates, T tokens, N scored tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.attention import Forest
from cfvlm_ds.config import ConfigError, ModelConfig
from cfvlm_ds.data.features import FeatureCache, Features
from cfvlm_ds.data.images import MAX_BYTES, MAX_PIXELS, open_image
from cfvlm_ds.data.pictures import PictureTable
from cfvlm_ds.data.scores import StoredScores
from cfvlm_ds.errors import is_failure
from cfvlm_ds.groups import Candidate, Cells, CounterfactualGroup, DataError, GroupLayout, Pictures
from cfvlm_ds.likelihood import Scores, score_matrix
from cfvlm_ds.models import Family, family_of, load_config, load_processor
from cfvlm_ds.models.stored import explained
from cfvlm_ds.prompts import Encoded, Prompts
from cfvlm_ds.reading import read_bytes
from cfvlm_ds.templates import TemplateBound, try_out

BLANK = Path("\0/<blank image>")
"""Stands for a mid-grey image, which the blind control shows in place of a picture. A suffix tells several apart; no file is named so."""
_BLANK_SIZE = (336, 336)

STAND_IN = CounterfactualGroup("", ((BLANK,),), (Candidate("Describe the image.", "a"),), ((1,),))
"""What a rank computes whose groups cannot be read."""

Size = tuple[int, int]
"""Width and height in pixels."""


def blinded(group: CounterfactualGroup) -> CounterfactualGroup:
    """The group with its images replaced by one blank image; every text but the first is neither true nor false of it."""
    blank = tuple(BLANK.with_suffix(f".{k}") for k in range(group.num_pictures))
    return replace(group, images=(blank,), match=((1, *[None] * (len(group.candidates) - 1)),), edits=())


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``model_inputs`` goes to the engine unchanged and returns one log-prob per scored token.

    ``cell`` [N] is each scored token's flat index in [G, I, C]; ``is_end`` [N] marks end-of-turn tokens; ``num_tokens`` counts the
    tokens of the row, ``num_scored`` those that something is predicted from; ``dropped`` are groups left out of it, (id, reason) each.
    """

    model_inputs: dict[str, Any]
    cell: Tensor
    is_end: Tensor
    layout: GroupLayout
    reference: Tensor | None
    prior: Tensor | None
    num_tokens: int
    num_scored: int
    num_images: int
    dropped: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        return _mapped(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes; a DataLoader calls it."""
        return _mapped(self, Tensor, Tensor.pin_memory)

    def __reduce__(self) -> Any:
        """All tensors travel from process to process as one: each of them would cost a handshake of its own."""
        tensors: dict[int, Tensor] = {}
        stop = 0

        def place(tensor: Tensor) -> _Place:
            nonlocal stop
            start, stop = stop, stop + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            tensors[start] = tensor
            return _Place(start, tensor.dtype, tensor.shape)

        skeleton = {part.name: _mapped(getattr(self, part.name), Tensor, place) for part in fields(self)}
        joined = torch.empty(stop, dtype=torch.uint8)
        for start, tensor in tensors.items():
            joined[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        return _rejoined, (skeleton, joined)

    def scores(self, token_logp: Tensor) -> Scores:
        """The score matrix of the batch from the engine's output."""
        logp, end_logp = score_matrix(token_logp, self.cell, self.is_end, self.layout)
        return Scores(self.layout, logp, end_logp, self.reference, self.prior)


_ALIGNMENT = 16  # bytes


class _Place(NamedTuple):
    """Where in the joined bytes a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


def _rejoined(skeleton: dict[str, Any], joined: Tensor) -> Batch:
    def cut(place: _Place) -> Tensor:
        size = place.dtype.itemsize * place.shape.numel()
        return joined[place.start : place.start + size].view(place.dtype).view(place.shape)

    return Batch(**_mapped(skeleton, _Place, cut))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with everything of ``kind`` in it changed, through dicts and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, kind, change) for name, item in value.items()}
    if isinstance(value, Batch | GroupLayout):
        return replace(value, **{part.name: _mapped(getattr(value, part.name), kind, change) for part in fields(value)})
    return value


PictureKey = tuple[Path, bool]
"""What tells the pictures of a batch apart: the file, and whether the model takes it differently for not being alone."""


@dataclass
class _Tree:
    """A prompt with its pictures and behind it one branch per text: (flat cell index, text).

    ``positions`` [P], or [axes, P], are the position ids of the prompt.
    """

    pictures: tuple[PictureKey, ...]
    branches: list[tuple[int, Encoded]]
    prompt_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class TreeTokens(NamedTuple):
    """Tokens of a tree, and of its prompt with its longest text alone: what is left when it is cut as often as it can be."""

    whole: int
    least: int


class _Unprocessable(DataError):
    """The model's processor raised an error for pictures of this size."""

    def __init__(self, size: Size, error: BaseException) -> None:
        self.size = size
        super().__init__(
            f"the model's processor cannot take an image of {size[0]}x{size[1]} pixels ({type(error).__name__}: {error}); crop or resize "
            "it, or drop the row"
        )


def _named(error: _Unprocessable, groups: Sequence[CounterfactualGroup], sizes: Mapping[Path, Size]) -> str:
    """The error with the group and the file that have such a picture."""
    for group in groups:
        for picture in (picture for pictures in group.images for picture in pictures):
            if sizes.get(picture) == error.size:
                return f"group {group.id!r}: {picture}: {error}"
    return str(error)


class Collator:
    """Turns a list of groups into a Batch.

    Args:
        processor: the model's own processor.
        family: the model's family record.
        model_config: the model's configuration, for the family's position rules.
        cells: which cells to build.
        max_length: the model's window in tokens; a longer row is a DataError, never truncated.
        max_pixels: limit on the size of an image.
        stored: reference and blind scores by group id, for objectives that need them.
        features: what the vision tower gives for every picture, which is then not opened; None where the tower runs.
        share_prefix: lay all texts of an image behind one prefix; without it a tree has one text, which costs more and scores the same.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        model_config: PreTrainedConfig,
        cells: Cells,
        max_length: int,
        max_pixels: int = MAX_PIXELS,
        stored: Mapping[str, StoredScores] | None = None,
        share_prefix: bool = True,
        features: FeatureCache | None = None,
    ) -> None:
        self.processor = processor
        self.family = family
        self.model_config = model_config
        self.cells = cells
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.stored = stored
        self.share_prefix = share_prefix
        self.features = features
        self.checked: PictureTable | None = None
        """What the check of the data found in the pictures: one with other contents by now is a DataError. None for no such comparison."""
        self.prompts = Prompts(processor, max_length)
        self._images: dict[tuple[Size, bool], tuple[int, int]] = {}

    def __call__(self, groups: Sequence[CounterfactualGroup]) -> Batch:
        """Raises DataError naming the file of an image that cannot be opened, or the group whose text does not fit window or template."""
        return self.parts(groups)[0]

    def parts(self, groups: Sequence[CounterfactualGroup], max_tokens: int | None = None) -> list[Batch]:
        """The groups' trees in batches of at most ``max_tokens`` tokens each; a tree that is larger is cut between its texts, and one of a
        single text is a batch of its own.

        All have the layout of the whole, and their score matrices add up to its. Raises DataError as ``__call__`` does.
        """
        layout = self._layout(groups)
        num_images, num_texts = layout.valid.shape[1:]
        trees: dict[tuple[tuple[PictureKey, ...], str, int | None], _Tree] = {}
        for g, i, c in layout.valid.nonzero().tolist():
            text, pictures = self._text(groups[g], c), self._keys(groups[g].images[i])
            cell = (g * num_images + i) * num_texts + c
            tree = trees.setdefault((pictures, text.prompt, None if self.share_prefix else cell), _Tree(pictures, []))
            tree.branches.append((cell, text))
        opened = {key: self._shown(key) for key in dict.fromkeys(key for tree in trees.values() for key in tree.pictures)}
        try:
            return self._laid_out(groups, layout, list(trees.values()), opened, max_tokens)
        except _Unprocessable as error:
            raise DataError(_named(error, groups, {key[0]: picture.size for key, picture in opened.items()})) from error

    def _laid_out(
        self,
        groups: Sequence[CounterfactualGroup],
        layout: GroupLayout,
        trees: list[_Tree],
        opened: Mapping[PictureKey, Image.Image | Features],
        max_tokens: int | None,
    ) -> list[Batch]:
        num_images, num_texts = layout.valid.shape[1:]
        batches = []
        for part in self._divided(trees, opened, max_tokens):
            # The tower runs on every rank, also on one whose groups are text alone: ZeRO-3 waits for all of them.
            keys = sorted(dict.fromkeys(key for tree in part for key in tree.pictures), key=lambda key: key[1]) or [(BLANK, False)]
            image_inputs, stands = self._taken([opened[key] if key in opened else self._shown(key) for key in keys], keys)
            for tree in part:
                self._place(tree, [keys.index(key) for key in tree.pictures], stands, image_inputs)
            self._check_lengths(groups, part, num_images * num_texts, num_texts)
            batches.append(self._batch(part, keys, stands, image_inputs, layout, groups))
        return batches

    def _divided(
        self, trees: list[_Tree], opened: Mapping[PictureKey, Image.Image | Features], max_tokens: int | None
    ) -> list[list[_Tree]]:
        if max_tokens is None:
            return [trees]
        parts: list[list[_Tree]] = []
        room = 0
        for tree in sorted(trees, key=lambda tree: tree.pictures):  # a picture whose trees are neighbours is encoded once
            prefix = self._prefix_length(tree.branches[0][1], tuple(opened[key].size for key in tree.pictures))
            for piece in _pieces(tree, max_tokens - prefix):
                tokens = prefix + sum(text.length for _, text in piece.branches)
                if tokens > room:
                    parts.append([])
                    room = max_tokens
                parts[-1].append(piece)
                room -= tokens
        return parts

    def readable(self, groups: Sequence[CounterfactualGroup]) -> tuple[list[CounterfactualGroup], tuple[tuple[str, str], ...]]:
        """The groups that can be collated, and (id, reason) of each of the others."""
        kept, dropped = [], []
        for group in groups:
            try:
                self([group])
                kept.append(group)
            except DataError as error:
                dropped.append((group.id, str(error)))
        return kept, tuple(dropped)

    def without_unreadable(self, groups: Sequence[CounterfactualGroup], max_tokens: int | None = None) -> list[Batch]:
        """The ``parts`` of the groups that can be collated; the first one names the others. Without any, it is a stand-in of weight 0 that
        counts no group: ZeRO-3 waits for this rank's forward and backward in any case."""
        try:
            return self.parts(groups, max_tokens)
        except DataError:
            kept, dropped = self.readable(groups)
        if kept:
            first, *more = self.parts(kept, max_tokens)
            return [replace(first, dropped=dropped), *more]
        batch = self.scoring_everything()([STAND_IN])
        layout = replace(batch.layout, weight=torch.zeros_like(batch.layout.weight), ids=())
        reference, prior = (None, None) if self.stored is None else (torch.zeros(layout.valid.shape), torch.zeros(1, 1))
        return [replace(batch, layout=layout, reference=reference, prior=prior, dropped=dropped)]

    def scoring_everything(self) -> Collator:
        """The same collator building every cell, without stored scores: what evaluation needs."""
        return self.building("full", None)

    def building(self, cells: Cells, stored: Mapping[str, StoredScores] | None) -> Collator:
        """The same collator for other cells and stored scores."""
        other = copy.copy(self)  # shares the cached tokens
        other.cells, other.stored = cells, stored
        return other

    def row_length(self, prompt: str, text: str, sizes: tuple[Size, ...]) -> int:
        """Tokens of the row that a text makes behind pictures of ``sizes`` (width, height), end-of-turn included.

        Raises DataError as __call__ does.
        """
        encoded = self.prompts.encoded(prompt, text, len(sizes), "text")
        return self._prefix_length(encoded, sizes) + encoded.length

    def tree_tokens(self, group: CounterfactualGroup, sizes: Mapping[Path, Size]) -> list[TreeTokens]:
        """Each tree of the group, for the cells that this collator builds; ``sizes`` (width, height) of its pictures.

        Raises DataError naming group and file where the model's processor cannot take a picture of that size.
        """
        trees: dict[tuple[Pictures, str], tuple[int, list[int]]] = {}
        for _, i, c in self._layout([group]).valid.nonzero().tolist():
            text, pictures = self._text(group, c), group.images[i]
            if (pictures, text.prompt) not in trees:
                shown = tuple(_BLANK_SIZE if picture.parent == BLANK.parent else sizes[picture] for picture in pictures)
                try:
                    trees[pictures, text.prompt] = self._prefix_length(text, shown), []
                except _Unprocessable as error:
                    raise DataError(_named(error, [group], sizes)) from error
            trees[pictures, text.prompt][1].append(text.length)
        return [TreeTokens(prefix + sum(texts), prefix + max(texts)) for prefix, texts in trees.values()]

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """How many visual tokens pictures of ``sizes`` (width, height) become when they are shown together.

        Raises DataError where the model's processor cannot take one of that size.
        """
        return sum(self._image_tokens(size, len(sizes) > 1)[1] for size in sizes)

    def _prefix_length(self, text: Encoded, sizes: tuple[Size, ...]) -> int:
        """Tokens of a text's prompt with pictures of these sizes in place of its placeholders."""
        return len(text.prompt_ids) + sum(self._image_tokens(size, len(sizes) > 1)[0] - 1 for size in sizes)

    def _image_tokens(self, size: Size, together: bool) -> tuple[int, int]:
        """(tokens that stand for a picture of this size, visual tokens among them); measured, for every family has rules of its own."""
        together = together and self.family.tiles_alone
        if (size, together) not in self._images:
            ids = self._processed([Image.new("RGB", size)] * (1 + together), 2 * together)[1][0]
            self._images[size, together] = len(ids), ids.count(self.processor.image_token_id)
        return self._images[size, together]

    def _keys(self, pictures: Pictures) -> tuple[PictureKey, ...]:
        return tuple((picture, self.family.tiles_alone and len(pictures) > 1) for picture in pictures)

    def _place(self, tree: _Tree, shown: list[int], stands: list[list[int]], image_inputs: dict[str, Any]) -> None:
        """Give a tree its prompt's token ids, placeholders expanded, and their positions; ``shown`` are its pictures in the batch."""
        pictures, ids = iter(shown), []
        for token in tree.branches[0][1].prompt_ids:
            ids += stands[next(pictures)] if token == self.processor.image_token_id else [token]
        tree.prompt_ids = torch.tensor(ids)
        grids = image_inputs[self.family.grid][shown] if self.family.grid else torch.empty(0)
        tree.positions = self.family.positions(self.model_config, tree.prompt_ids == self.processor.image_token_id, grids)

    def _layout(self, groups: Sequence[CounterfactualGroup]) -> GroupLayout:
        shape = (len(groups), max(len(g.images) for g in groups), max(len(g.candidates) for g in groups))
        match = torch.full(shape, -1, dtype=torch.int8)
        tokens, end_tokens = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        exists = torch.zeros(shape, dtype=torch.bool)
        prompt = torch.full(shape[::2], -1, dtype=torch.int64)
        for g, group in enumerate(groups):
            size = (len(group.images), len(group.candidates))
            match[g, : size[0], : size[1]] = torch.tensor([[-1 if m is None else m for m in row] for row in group.match], dtype=torch.int8)
            exists[g, : size[0], : size[1]] = True
            prompt[g, : size[1]] = torch.tensor(group.prompt_ids)
            texts = [self._text(group, c) for c in range(size[1])]
            tokens[g, : size[0], : size[1]] = torch.tensor([len(t.text_ids) for t in texts])
            end_tokens[g, : size[0], : size[1]] = torch.tensor([len(t.end_ids) for t in texts])
        valid = exists & _wanted(groups, match, prompt, self.cells)
        weight = torch.tensor([group.weight for group in groups], dtype=torch.float32)
        return GroupLayout(valid, match, tokens, end_tokens, weight, tuple(group.id for group in groups), prompt)

    def _batch(
        self,
        trees: list[_Tree],
        keys: list[PictureKey],
        stands: list[list[int]],
        image_inputs: dict[str, Tensor],
        layout: GroupLayout,
        groups: Sequence[CounterfactualGroup],
    ) -> Batch:
        input_ids: list[Tensor] = []
        positions: list[Tensor] = []
        predicts: list[int] = []
        targets: list[int] = []
        cell: list[int] = []
        is_end: list[bool] = []
        start = 0
        for tree in trees:
            last = start + len(tree.prompt_ids) - 1
            start, first = last + 1, int(tree.positions.max()) + 1
            input_ids.append(tree.prompt_ids)
            positions.append(tree.positions)
            for index, text in tree.branches:
                response = [*text.text_ids, *text.end_ids]
                stop = start + len(response)
                input_ids.append(torch.tensor(response))
                positions.append(torch.arange(first, first + len(response)).expand(*tree.positions.shape[:-1], -1))
                # A branch's first token is predicted at the end of the prompt, every other one at the token before it.
                predicts += [last, *range(start, stop - 1)]
                targets += response
                cell += [index] * len(response)
                is_end += [False] * len(text.text_ids) + [True] * len(text.end_ids)
                start = stop
        places, predicted_by = torch.tensor(predicts).unique(return_inverse=True)
        model_inputs = {
            "input_ids": torch.cat(input_ids).unsqueeze(0),
            "position_ids": torch.cat(positions, -1).unsqueeze(-2),
            "forest": Forest(
                tuple(len(tree.prompt_ids) for tree in trees),
                tuple(tuple(text.length for _, text in tree.branches) for tree in trees),
            ),
            "scored": torch.zeros(1, start, dtype=torch.bool).index_fill(1, places, True),
            "predicted_by": predicted_by,
            "targets": torch.tensor(targets),
            "images_of_tree": [tuple(keys.index(key) for key in tree.pictures) for tree in trees],
            "visual_tokens": [ids.count(self.processor.image_token_id) for ids in stands],
            "image_inputs": image_inputs,
        }
        reference, prior = self._stored(groups, layout)
        num_images = len({picture for tree in trees for picture in tree.pictures})
        return Batch(model_inputs, torch.tensor(cell), torch.tensor(is_end), layout, reference, prior, start, len(places), num_images)

    def _stored(self, groups: Sequence[CounterfactualGroup], layout: GroupLayout) -> tuple[Tensor | None, Tensor | None]:
        if self.stored is None:
            return None, None
        reference = torch.zeros(layout.valid.shape)
        prior = torch.zeros(layout.valid.shape[0], layout.valid.shape[2])
        for g, group in enumerate(groups):
            scores = self.stored[group.id]
            reference[g, : len(group.images), : len(group.candidates)] = torch.tensor(scores.logp)
            prior[g, : len(group.candidates)] = torch.tensor(scores.blank)
        return reference, prior

    def _text(self, group: CounterfactualGroup, c: int) -> Encoded:
        candidate = group.candidates[c]
        return self.prompts.encoded(candidate.prompt, candidate.text, group.num_pictures, f"group {group.id!r}: text {c}")

    def pictures(self, groups: Iterable[CounterfactualGroup]) -> list[PictureKey]:
        """Every picture of the groups once, and the blank ones; in the same order on every rank."""
        blank = [(BLANK, False), *[(BLANK, True)] * self.family.tiles_alone]
        return list(dict.fromkeys([*blank, *(key for group in groups for pictures in group.images for key in self._keys(pictures))]))

    def content(self, key: PictureKey) -> bytes:
        """The bytes of a picture's file. Raises DataError naming it where it cannot be read."""
        try:
            if key[0] == BLANK:
                return BLANK.name.encode()
            if self.checked is not None:
                self.checked.verify(key[0])
            return read_bytes(key[0], MAX_BYTES)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{key[0]}: image cannot be read ({reason}); restore it, or correct its path in the manifest") from error

    def before_tower(self, key: PictureKey) -> tuple[dict[str, Tensor], Features]:
        """What the model's ``get_image_features`` takes of one picture, and its features but for what the tower gives.

        A picture that is not alone in its prompt stands there beside itself. Raises DataError naming a file that cannot be opened.
        """
        picture, together = self._open(key[0]), key[1]
        try:
            inputs, stands = self._processed([picture] * (1 + together), 2 * together)
        except _Unprocessable as error:
            raise DataError(f"{key[0]}: {error}") from error
        return inputs, Features(picture.size, stands[0], {}, {name: inputs[name][:1] for name in self.family.per_image})

    def _shown(self, key: PictureKey) -> Image.Image | Features:
        if self.features is None:
            return self._open(key[0])
        return self.features.of((BLANK, key[1]) if key[0].parent == BLANK.parent else key)

    def _taken(self, shown: Sequence[Any], keys: Sequence[PictureKey]) -> tuple[dict[str, Any], list[list[int]]]:
        """The pictures as the model takes them, those of several in a prompt last, and the token ids that stand for each."""
        if self.features is None:
            return self._processed(list(shown), sum(together for _, together in keys))
        tower = {name: torch.cat([picture.tower[name] for picture in shown]) for name in shown[0].tower}
        inputs = {name: torch.cat([picture.inputs[name] for picture in shown]) for name in shown[0].inputs}
        rows = [len(next(iter(picture.tower.values()))) for picture in shown]
        return {"tower_features": tower, "rows": rows, **inputs}, [picture.stands for picture in shown]

    def _open(self, path: Path) -> Image.Image:
        if path.parent == BLANK.parent:
            return Image.new("RGB", _BLANK_SIZE, (128, 128, 128))
        if self.checked is not None:
            self.checked.verify(path)
        return open_image(path, self.max_pixels)

    def _processed(self, opened: list[Image.Image], together: int) -> tuple[dict[str, Tensor], list[list[int]]]:
        """The pictures as the model takes them, and the token ids that stand for each in a prompt.

        The last ``together`` of them are given to the processor as the pictures of one prompt. Raises DataError, without file and group,
        for the first that the processor cannot take.
        """
        token, tokenizer = self.processor.image_token, self.processor.tokenizer
        alone = len(opened) - together
        samples = [[picture] for picture in opened[:alone]] + ([opened[alone:]] if together else [])
        try:
            inputs = self.processor(images=samples, text=[token * len(pictures) for pictures in samples], padding=True, return_tensors="pt")
        except MemoryError:
            raise
        except BaseException as error:  # processors raise nearly anything on sizes that they were not made for
            if not is_failure(error):
                raise
            if any(picture is not opened[0] for picture in opened):
                for k, picture in enumerate(opened):
                    self._processed([picture] * (1 + (k >= alone)), 2 * (k >= alone))
            raise _Unprocessable(opened[0].size, error) from error
        bare = tokenizer(token).input_ids
        before = bare.index(self.processor.image_token_id)
        behind = len(bare) - before - 1
        stands: list[list[int]] = []
        for pictures, ids, mask in zip(samples, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            kept = ids[mask][before:].tolist()
            kept = kept[: len(kept) - behind]
            each = len(kept) // len(pictures)  # pictures shown together are not cut into tiles, and so are of one length
            stands += [kept[k * each : (k + 1) * each] for k in range(len(pictures))]
        return {name: inputs[name] for name in self.family.image_inputs}, stands

    def _check_lengths(self, groups: Sequence[CounterfactualGroup], trees: list[_Tree], group_cells: int, num_texts: int) -> None:
        for tree in trees:
            for cell, text in tree.branches:
                length = len(tree.prompt_ids) + text.length
                if length > self.max_length:
                    raise DataError(
                        f"group {groups[cell // group_cells].id!r}: text {cell % num_texts} makes a row of {length} tokens, the model's "
                        f"window is {self.max_length}; shorten the text or its prompt"
                    )


def _pieces(tree: _Tree, room: int) -> list[_Tree]:
    """The tree's texts in as few trees as keep to ``room`` tokens behind the prefix; a text that is longer is alone."""
    pieces = [_Tree(tree.pictures, [])]
    left = room
    for branch in tree.branches:
        if branch[1].length > left and pieces[-1].branches:
            pieces.append(_Tree(tree.pictures, []))
            left = room
        pieces[-1].branches.append(branch)
        left -= branch[1].length
    return pieces


def _wanted(groups: Sequence[CounterfactualGroup], match: Tensor, prompt: Tensor, cells: Cells) -> Tensor:
    """[G, I, C] bool: the cells of ``cells``; unknown cells only under ``full``, since no objective uses them."""
    wanted = torch.full_like(match, cells == "full", dtype=torch.bool)
    wanted[:, 0, 0] = True
    if cells in ("matched", "star"):
        wanted |= match == 1
    if cells == "star":
        star = torch.zeros_like(wanted)
        star[:, 0, :] = True
        for g, group in enumerate(groups):
            for number, (i, c) in group.anchors.items():
                star[g, i] |= prompt[g] == number
                star[g, :, c] = True
        wanted |= star & (match >= 0)
    return wanted


def load_collator(
    model: ModelConfig, cells: Cells, max_pixels: int = MAX_PIXELS, stored: Mapping[str, StoredScores] | None = None
) -> Collator:
    """The collator of a model: its own processor, family and window. Raises ConfigError for a chat template that cannot be used, and for a
    tokenizer or processor that takes too much for a sentence or a picture."""
    config = load_config(model.name_or_path)
    processor = load_processor(model)
    with explained(
        f"the window of {model.name_or_path!r} is not known", "compare its config.json and tokenizer_config.json with the published"
    ):
        window = int(min(config.get_text_config().max_position_embeddings, processor.tokenizer.model_max_length))
    if window < 1:
        raise ConfigError(f"the window of {model.name_or_path!r} is {window} tokens; compare its config.json and tokenizer_config.json")
    collator = Collator(processor, family_of(config), config, cells, window, max_pixels, stored)
    collator.prompts.check(model.name_or_path)

    def stands() -> int:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        return len(collator._processed([Image.new("RGB", _BLANK_SIZE)], 0)[1][0])

    try:
        try_out(stands, "one picture")
    except TemplateBound as error:
        raise ConfigError(f"model {model.name_or_path!r}: its processor {error}; get its files again or name another model") from error
    return collator
