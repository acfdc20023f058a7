"""Collator, which converts groups to batches: it encodes texts, opens pictures, packs both into rows of tokens, and drops unreadable groups
(recording the reasons).

Shapes: G groups, I images, C candidates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.batching.batch import BLANK, BLANK_SIZE, STAND_IN, Batch, Inputs, MicroBatch, shown
from cfvlm_ds.batching.batch_layout import (
    group_layout,
    in_batch_texts,
    stored_scores,
    with_blank_picture,
    with_changed_tokens,
    with_in_batch_negatives,
    without_broken_negatives,
)
from cfvlm_ds.batching.image_source import ImageFiles, Unprocessable, with_names
from cfvlm_ds.batching.packing import Material, PromptLength, Tree, compared, divide, num_tokens, pack
from cfvlm_ds.batching.prompts import Encoded, Prompts, placeholder_id
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import Cells, CounterfactualGroup, Groups, Prompt
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.data.decoding import MAX_PIXELS, Size
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.data.stored_scores import ScoresById
from cfvlm_ds.models import Family, family_of, load_config, load_processor
from cfvlm_ds.models.model_files import explained


class GroupTokens(NamedTuple):
    """Token counts of a group: ``whole`` for all images and texts, ``least`` for the longest pair of an image and a text."""

    whole: int
    least: int


class Collator:
    """Converts groups to batches.

    Args:
        family: the model's family record.
        max_length: the model's context window in tokens; a longer sequence raises DataError and is never truncated.
        max_pixels: maximum number of pixels per picture.
        checked: picture properties recorded by the data check; a picture is compared with its entry when it is opened.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        model_config: PreTrainedConfig,
        max_length: int,
        max_pixels: int,
        checked: PictureTable | None,
    ) -> None:
        self.processor = processor
        self.family = family
        self.model_config = model_config
        self.cells: Cells = "full"
        self.max_length = max_length
        self.stored: ScoresById | None = None
        self.prompts = Prompts(processor, max_length, family.around, model_config.get_text_config().vocab_size)
        self.files = ImageFiles(processor, family, model_config, max_pixels, checked)
        self.packs_again = self.tokens = self.blank = False
        self.divergences: tuple[Divergence, ...] = ()

    def scoring_everything(self) -> Collator:
        """Return a copy of the collator for evaluation. It scores all cells and has no stored scores."""
        return self._changed(cells="full", stored=None, blank=False, divergences=())

    def building(self, cells: Cells, stored: ScoresById | None) -> Collator:
        """Return a copy of the collator that scores ``cells`` and uses the ``stored`` scores."""
        return self._changed(cells=cells, stored=stored)

    def of_run(
        self,
        cells: Cells,
        stored: ScoresById | None,
        checked: PictureTable | None,
        packs_again: bool = False,
        tokens: bool = False,
        blank: bool = False,
        divergences: tuple[Divergence, ...] = (),
    ) -> Collator:
        """Return a copy of the collator for a training run.

        Args:
            cells: the set of cells to score.
            stored: reference and blind scores by group id, for objectives that need them.
            checked: as for the constructor.
            packs_again: keep the data that ``packed_again`` needs.
            tokens: mark the tokens in which a group's texts differ.
            blank: also score texts on the blank image.
            divergences: divergences to compute; if there are any, micro-batches must not be divided.
        """
        files = replace(self.files, checked=checked)
        changes = {"packs_again": packs_again, "tokens": tokens, "blank": blank, "divergences": divergences}
        return self._changed(cells=cells, stored=stored, files=files, **changes)

    def _changed(self, **changes: Any) -> Collator:
        other = copy.copy(self)  # shares the cached tokens
        vars(other).update(changes)
        return other

    def __call__(self, groups: Groups) -> Batch:
        """Collate groups into one batch.

        Raises DataError naming the file if a picture cannot be opened, and DataError naming the group if a text does not fit the context
        window or the chat template.
        """
        return self.parts(groups)[0]

    def parts(self, groups: Groups, max_tokens: int | None = None) -> list[Batch]:
        """Collate groups into batches of at most ``max_tokens`` tokens each.

        A tree (a prefix and the texts that branch from it) that exceeds the limit is split at text boundaries; no text is cut. A single
        text that exceeds the limit gets its own batch. Every batch has the layout of the whole micro-batch, whose score matrix is the sum
        of the batches' score matrices. Raises the same DataErrors as ``__call__``.
        """
        groups = [without_broken_negatives(group, self.prompts) for group in groups]
        layout = self._layout(groups)
        trees = self._trees(groups, layout)
        opened: dict[Any, Any] = {key: self.files.open(key) for key in dict.fromkeys(key for tree in trees for key in tree.pictures)}
        reference, prior = (None, None) if self.stored is None else stored_scores(self.stored, groups, layout)
        batches = []

        def prompt_length(tree: Tree, text: Encoded) -> int:
            return self._prefix_length(text, tuple(opened[key].size for key in tree.pictures))

        try:
            trees = _without_long_negatives(layout, trees, prompt_length, self.max_length)
            for part in divide(trees, prompt_length, max_tokens):
                # Under ZeRO-3 the tower must run on every rank, even on a rank whose groups have no picture.
                keys = sorted(dict.fromkeys(key for tree in part for key in tree.pictures), key=lambda key: key[1]) or [(BLANK, False)]
                image_inputs, placeholders = self.files.model_inputs(
                    [opened[key] if key in opened else self.files.open(key) for key in keys], keys
                )
                material = Material(tuple(part), tuple(keys), tuple(placeholders))
                batches.append(self._packed(material, image_inputs, layout, reference, prior))
                _check_window(groups, part, prompt_length, layout.valid.shape, self.max_length)
        except Unprocessable as error:
            raise DataError(with_names(error, groups, {key[0]: picture.size for key, picture in opened.items()})) from error
        return batches

    def _packed(
        self, material: Material, image_inputs: Inputs, layout: GroupLayout, reference: Tensor | None, prior: Tensor | None
    ) -> Batch:
        row = pack(material, image_inputs, self.family, self.model_config, placeholder_id(self.processor))
        if self.divergences:
            row.model_inputs["compared"] = {kind: compared(row, layout, kind.against) for kind in self.divergences}
        num_images = len({picture for tree in material.trees for picture in tree.pictures})
        kept = material if self.packs_again else None
        return Batch(row.model_inputs, row.cell, row.is_end, layout, reference, prior, row.num_tokens, row.num_scored, num_images, kept)

    def packed_again(self, micro_batch: MicroBatch, cells: Tensor) -> MicroBatch:
        """Pack a micro-batch again with a subset of its cells, reusing its pictures and encoded texts. ``cells`` [G, I, C] is a mask that
        selects at least one cell per group.

        Batches without selected cells are omitted. Pictures that no cell needs are removed from the model's inputs if every input has one
        row per picture; otherwise, the vision tower still runs on them.
        """
        layout = replace(micro_batch.layout, valid=micro_batch.layout.valid & cells)
        wanted, forwards = layout.valid.flatten().tolist(), []
        for batch in micro_batch.forwards:
            if all(wanted[cell] for cell in batch.cell.unique().tolist()):
                forwards.append(replace(batch, layout=layout))
                continue
            inputs = batch.model_inputs["image_inputs"]
            material, left = batch.material.only(wanted)
            if not all(isinstance(value, Tensor) and len(value) == len(batch.material.keys) for value in inputs.values()):
                material = replace(material, keys=batch.material.keys, placeholders=batch.material.placeholders)
            elif len(left) < len(batch.material.keys):
                inputs = {name: value[left] for name, value in inputs.items()}
            if material.trees:
                packed = self._packed(material, inputs, layout, batch.reference, batch.prior)
                forwards.append(packed.to(batch.cell.device))
        return replace(micro_batch, forwards=tuple(forwards))

    def readable(self, groups: Groups) -> tuple[list[CounterfactualGroup], tuple[tuple[str, str], ...]]:
        """Return the groups that can be collated, and (id, reason) for every other group."""
        kept, dropped = [], []
        for group in groups:
            try:
                self([group])
                kept.append(group)
            except DataError as error:
                dropped.append((group.id, str(error)))
        return kept, tuple(dropped)

    def without_unreadable(self, groups: Sequence[CounterfactualGroup | DataError], max_tokens: int | None = None) -> MicroBatch:
        """Collate the readable groups into a micro-batch, divided as in ``parts``. Its ``dropped`` lists the groups and manifest
        rows that cannot be read.

        If no group is readable, the micro-batch is a stand-in that contributes nothing to the loss, its denominators or the metrics. It is
        needed because under ZeRO-3 the other ranks wait for this rank's forward and backward pass.
        """
        groups_read = [group for group in groups if not isinstance(group, DataError)]
        unread = tuple((str(entry).partition(": ")[0], str(entry)) for entry in groups if isinstance(entry, DataError))
        try:
            if not unread:
                return MicroBatch(tuple(self.parts(groups_read, max_tokens)))
        except DataError:
            pass
        kept, dropped = self.readable(groups_read)
        dropped = (*unread, *dropped)
        if kept:
            return MicroBatch(tuple(self.parts(kept, max_tokens)), dropped)
        batch = self.building("full", None)([STAND_IN])
        layout = replace(batch.layout, weight=torch.zeros_like(batch.layout.weight), ids=())
        reference, prior = (None, None) if self.stored is None else (torch.zeros(layout.valid.shape), torch.zeros(1, 1))
        return MicroBatch((replace(batch, layout=layout, reference=reference, prior=prior),), dropped)

    def row_length(self, prompt: Prompt, text: str, sizes: tuple[Size, ...]) -> int:
        """Count the tokens of a row that holds a prompt, its pictures of these ``sizes`` (width, height), and one text with its end-of-turn
        token.

        Raises the same DataErrors as ``__call__``.
        """
        encoded = self.prompts.encoded(prompt, text, len(sizes), "text")
        return self._prefix_length(encoded, sizes) + encoded.length

    def group_tokens(self, group: CounterfactualGroup, sizes: Mapping[Path, Size]) -> GroupTokens:
        """Count the tokens that the collator packs for the group. ``sizes`` maps each picture to (width, height).

        Raises DataError naming the group and file of a picture whose size the model's processor cannot process.
        """

        def prompt_length(tree: Tree, text: Encoded) -> int:
            pictures = [key[0] for key in tree.pictures]
            return self._prefix_length(
                text, tuple(BLANK_SIZE if picture.parent == BLANK.parent else sizes[picture] for picture in pictures)
            )

        trees = self._trees([group], self._layout([group]))
        try:
            lengths = [prompt_length(tree, text) + text.length for tree in trees for _, text in tree.branches]
            return GroupTokens(sum(num_tokens(tree, prompt_length) for tree in trees), max(lengths))
        except Unprocessable as error:
            raise DataError(with_names(error, [group], sizes)) from error

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """Count the visual tokens in a prompt with pictures of these ``sizes`` (width, height).

        Raises DataError if the model's processor cannot process a picture of one of these sizes.
        """
        return sum(self.files.num_placeholders(size, len(sizes) > 1)[1] for size in sizes)

    def _prefix_length(self, text: Encoded, sizes: tuple[Size, ...]) -> int:
        """Count the tokens of a text's prompt after its placeholders are expanded for pictures of these sizes."""
        return len(text.prompt_ids) + sum(self.files.num_placeholders(size, len(sizes) > 1)[0] - 1 for size in sizes)

    def _layout(self, groups: Groups) -> GroupLayout:
        texts = [[self._text(group, c) for c in range(len(group.candidates))] for group in groups]
        layout = group_layout(groups, texts, self.cells)
        layout = with_in_batch_negatives(layout, groups, [in_batch_texts(group, self.prompts) for group in groups])
        layout = with_blank_picture(layout, groups) if self.blank else layout
        return with_changed_tokens(layout, groups, texts) if self.tokens else layout

    def _trees(self, groups: Groups, layout: GroupLayout) -> list[Tree]:
        num_images, num_texts = layout.valid.shape[1:]
        trees: dict[tuple[Any, ...], Tree] = {}
        in_batch, own = [in_batch_texts(group, self.prompts) for group in groups], layout.num_own
        for g, i, c in layout.valid.nonzero().tolist():
            text, pictures = self._text(groups[g], c) if c < own else in_batch[g][c - own], self.files.keys(shown(groups[g], i))
            cell = (g * num_images + i) * num_texts + c
            key = _tree_of(pictures, text, g, placeholder_id(self.processor))
            trees.setdefault(key, Tree(pictures, [])).branches.append((cell, text))
        return list(trees.values())

    def _text(self, group: CounterfactualGroup, c: int) -> Encoded:
        candidate = group.candidates[c]
        return self.prompts.encoded(candidate.prompt, candidate.text, group.num_pictures, f"group {group.id!r}: text {c}")


def _tree_of(pictures: tuple[Any, ...], text: Encoded, group: int, image_token: int) -> tuple[Any, ...]:
    """Return the key of a text's tree: the pictures, and the prompt up to the last picture. Without pictures, all texts of a group form one
    tree.
    """
    if not pictures:
        return (group,)
    ids = text.prompt_ids
    return pictures, ids[: len(ids) - ids[::-1].index(image_token)]


def _without_long_negatives(layout: GroupLayout, trees: list[Tree], prompt_length: PromptLength, window: int) -> list[Tree]:
    """Return the trees without the in-batch negatives that exceed the context window together with their prompt. Mark the cells of these
    negatives as invalid in ``layout``.
    """
    if layout.in_batch is None:
        return trees
    kept = []
    for tree in trees:
        fits = {
            cell: cell % layout.valid.shape[2] < layout.num_own or prompt_length(tree, text) + text.length <= window
            for cell, text in tree.branches
        }
        layout.valid.view(-1)[[cell for cell, fitting in fits.items() if not fitting]] = False
        kept.append(Tree(tree.pictures, [branch for branch in tree.branches if fits[branch[0]]]))
    return [tree for tree in kept if tree.branches]


def _check_window(groups: Groups, trees: Sequence[Tree], prompt_length: PromptLength, shape: Sequence[int], window: int) -> None:
    for tree in trees:
        for cell, text in tree.branches:
            if (length := prompt_length(tree, text) + text.length) > window:
                group = groups[cell // (shape[1] * shape[2])].id
                raise DataError(
                    f"group {group!r}: text {cell % shape[2]} needs a row of {length} tokens, more than the model's window of {window}; "
                    "shorten the text or its prompt"
                )


def load_collator(model: ModelConfig, max_pixels: int = MAX_PIXELS, checked: PictureTable | None = None) -> Collator:
    """Load a model's processor and configuration, and build a collator that scores all image-text pairs of a group. Raises ConfigError if
    the chat template or tokenizer cannot be used.
    """
    config = load_config(model.name_or_path)
    processor = load_processor(model)
    with explained(
        f"the window of {model.name_or_path!r} is not known", "compare its config.json and tokenizer_config.json with the published ones"
    ):
        window = int(min(config.get_text_config().max_position_embeddings, processor.tokenizer.model_max_length))
    if window < 1:
        raise ConfigError(f"the window of {model.name_or_path!r} is {window} tokens; correct its config.json or tokenizer_config.json")
    collator = Collator(processor, family_of(config), config, window, max_pixels, checked)
    collator.prompts.check(model.name_or_path)
    return collator
