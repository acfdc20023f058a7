"""Groups to one batch of rows: the only place that knows how cells are laid out as tokens.

A row is the chat template's prompt with one image and, behind that prefix, every text the image is scored with: each text is a branch that
sees the prefix and itself. (Where the attention cannot branch, a row has one text.) Each distinct image is encoded once.
Shapes: G groups, I images, C candidates, R rows, T tokens, N scored tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.config import ModelConfig
from cfvlm_ds.data.images import MAX_PIXELS, open_image
from cfvlm_ds.data.scores import StoredScores
from cfvlm_ds.groups import NO_IMAGE, Cells, CounterfactualGroup, DataError, GroupLayout
from cfvlm_ds.likelihood import Scores, score_matrix
from cfvlm_ds.models import Family, attention, family_of, load_config, load_processor

BLANK = Path("<blank image>")
"""Stands for a mid-grey image: what the blind control shows instead of a picture."""

_CACHED_TEXTS = 100_000  # token ids of texts seen before; bounded, because a data set may have millions


def blinded(group: CounterfactualGroup) -> CounterfactualGroup:
    """The group with its images replaced by one blank image; every text but the first is neither true nor false of it."""
    return replace(group, images=(BLANK if group.pictured else NO_IMAGE,), match=((1, *[None] * (len(group.candidates) - 1)),), edits=())


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``model_inputs`` goes to the engine unchanged and returns one log-prob per scored token.

    ``cell`` [N] is each scored token's flat index in [G, I, C]; ``is_end`` [N] marks end-of-turn tokens; ``num_tokens`` counts the tokens
    of all rows, padding excluded.
    """

    model_inputs: dict[str, Any]
    cell: Tensor
    is_end: Tensor
    layout: GroupLayout
    reference: Tensor | None
    prior: Tensor | None
    num_tokens: int
    num_images: int

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(item) for name, item in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(
            self,
            model_inputs=move(self.model_inputs),
            cell=move(self.cell),
            is_end=move(self.is_end),
            layout=self.layout.to(device),
            reference=move(self.reference),
            prior=move(self.prior),
        )

    def scores(self, token_logp: Tensor) -> Scores:
        """The score matrix of the batch from the engine's output."""
        logp, end_logp = score_matrix(token_logp, self.cell, self.is_end, self.layout)
        return Scores(self.layout, logp, end_logp, self.reference, self.prior)


@dataclass(frozen=True)
class _Text:
    """Token ids of a candidate: its prompt with one placeholder per image, its response, its end-of-turn."""

    prompt: str
    prompt_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    end_ids: tuple[int, ...]


@dataclass
class _Row:
    """A prompt with its image (None without one), and behind it one branch per text: (flat cell index, text).

    ``positions`` [P], or [axes, P], are the position ids of the prompt.
    """

    image: int | None
    prompt: str
    branches: list[tuple[int, _Text]]
    prompt_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + sum(len(text.text_ids) + len(text.end_ids) for _, text in self.branches)


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
        share_prefix: lay all texts of an image behind one prefix; needs an attention that takes a mask (sdpa).
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
    ) -> None:
        self.processor = processor
        self.family = family
        self.model_config = model_config
        self.cells = cells
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.stored = stored
        self.share_prefix = share_prefix
        self._texts: dict[tuple[str, str, bool], _Text] = {}
        self._heads: dict[tuple[str, bool], tuple[str, list[int]]] = {}
        self._ends: dict[str, tuple[int, ...]] = {}
        self._images: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, groups: Sequence[CounterfactualGroup]) -> Batch:
        """Raises DataError naming the file of an image that cannot be opened, or the group whose text does not fit window or template."""
        layout = self._layout(groups)
        images: dict[Path, int] = {}
        rows: dict[tuple[int | None, str, int | None], _Row] = {}
        num_images, num_texts = layout.valid.shape[1:]
        for g, i, c in layout.valid.nonzero().tolist():
            text = self._text(groups[g], c)
            cell = (g * num_images + i) * num_texts + c
            image = images.setdefault(groups[g].images[i], len(images)) if groups[g].pictured else None
            row = rows.setdefault((image, text.prompt, None if self.share_prefix else cell), _Row(image, text.prompt, []))
            row.branches.append((cell, text))
        wanted = [(row.image, row.prompt) for row in rows.values() if row.image is not None]
        # The tower runs on every rank, also on one whose groups are text alone: ZeRO-3 waits for all of them.
        paths, wanted = (list(images), wanted) if images else ([BLANK], [(0, self._head("", True)[0])])
        image_inputs, prompts = self._processed([self._open(path) for path in paths], wanted)
        for row in rows.values():
            self._place(row, prompts, image_inputs)
        self._check_lengths(groups, list(rows.values()), num_images * num_texts, num_texts)
        visual_tokens = [0] * len(paths)
        for (image, _), ids in prompts.items():
            visual_tokens[image] = int(self._visual(ids).sum())
        return self._batch(list(rows.values()), image_inputs, visual_tokens, layout, groups)

    def scoring_everything(self) -> Collator:
        """The same collator building every cell, without stored scores: what evaluation needs."""
        other = copy.copy(self)  # shares the cached tokens
        other.cells, other.stored = "full", None
        return other

    def row_length(self, prompt: str, text: str, size: tuple[int, int] | None) -> int:
        """Tokens of the row that a text makes behind an image of ``size`` (width, height; None without an image), end-of-turn included.

        Raises DataError as __call__ does.
        """
        encoded = self._remembered(prompt, text, size is not None, "text")
        expansion = self._image_tokens(size)[0] if size else 0
        return len(encoded.prompt_ids) + expansion + len(encoded.text_ids) + len(encoded.end_ids)

    def visual_tokens(self, size: tuple[int, int]) -> int:
        """How many visual tokens an image of ``size`` (width, height) becomes."""
        return self._image_tokens(size)[1]

    def _image_tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens that an image of this size adds to a prompt, visual tokens); measured, for every family has rules of its own."""
        if size not in self._images:
            head, head_ids = self._head("", True)
            _, prompts = self._processed([Image.new("RGB", size)], [(0, head)])
            ids = prompts[0, head]
            self._images[size] = len(ids) - len(head_ids), int(self._visual(ids).sum())
        return self._images[size]

    def _visual(self, ids: Tensor) -> Tensor:
        return ids == self.processor.image_token_id

    def _place(self, row: _Row, prompts: dict[tuple[int, str], Tensor], image_inputs: dict[str, Tensor]) -> None:
        """Give a row its prompt's token ids and positions."""
        if row.image is None:
            row.prompt_ids, grid = torch.tensor(row.branches[0][1].prompt_ids), None
        else:
            row.prompt_ids = prompts[row.image, row.prompt]
            grid = image_inputs[self.family.grid][row.image] if self.family.grid else None
        row.positions = self.family.positions(self.model_config, self._visual(row.prompt_ids), grid)

    def _layout(self, groups: Sequence[CounterfactualGroup]) -> GroupLayout:
        shape = (len(groups), max(len(g.images) for g in groups), max(len(g.candidates) for g in groups))
        match = torch.full(shape, -1, dtype=torch.int8)
        tokens, end_tokens = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        exists = torch.zeros(shape, dtype=torch.bool)
        for g, group in enumerate(groups):
            size = (len(group.images), len(group.candidates))
            match[g, : size[0], : size[1]] = torch.tensor([[-1 if m is None else m for m in row] for row in group.match], dtype=torch.int8)
            exists[g, : size[0], : size[1]] = True
            texts = [self._text(group, c) for c in range(size[1])]
            tokens[g, : size[0], : size[1]] = torch.tensor([len(t.text_ids) for t in texts])
            end_tokens[g, : size[0], : size[1]] = torch.tensor([len(t.end_ids) for t in texts])
        valid = exists & _wanted(match, self.cells)
        weight = torch.tensor([group.weight for group in groups], dtype=torch.float32)
        return GroupLayout(valid, match, tokens, end_tokens, weight, tuple(group.id for group in groups))

    def _batch(
        self,
        rows: list[_Row],
        image_inputs: dict[str, Tensor],
        visual_tokens: list[int],
        layout: GroupLayout,
        groups: Sequence[CounterfactualGroup],
    ) -> Batch:
        size = (len(rows), max(row.length for row in rows))
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.full(size, pad if pad is not None else 0)
        position_ids, branch = torch.zeros(*rows[0].positions.shape[:-1], *size, dtype=torch.int64), torch.full(size, -2)
        predicts: list[int] = []
        targets: list[int] = []
        cell: list[int] = []
        is_end: list[bool] = []
        for r, row in enumerate(rows):
            prompt = len(row.prompt_ids)
            input_ids[r, :prompt], branch[r, :prompt] = row.prompt_ids, -1
            position_ids[..., r, :prompt] = row.positions
            start, first = prompt, int(row.positions.max()) + 1
            for b, (index, text) in enumerate(row.branches):
                response = [*text.text_ids, *text.end_ids]
                stop = start + len(response)
                input_ids[r, start:stop], branch[r, start:stop] = torch.tensor(response), b
                position_ids[..., r, start:stop] = torch.arange(first, first + len(response))
                # A branch's first token is predicted at the end of the prompt, every other one at the token before it.
                predicts += [r * size[1] + t for t in (prompt - 1, *range(start, stop - 1))]
                targets += response
                cell += [index] * len(response)
                is_end += [False] * len(text.text_ids) + [True] * len(text.end_ids)
                start = stop
        positions, predicted_by = torch.tensor(predicts).unique(return_inverse=True)
        model_inputs = {
            "input_ids": input_ids,
            "attention_mask": _tree_mask(branch) if self.share_prefix else (branch >= -1).long(),
            "position_ids": position_ids,
            "scored": torch.zeros(size, dtype=torch.bool).view(-1).index_fill(0, positions, True).view(size),
            "predicted_by": predicted_by,
            "targets": torch.tensor(targets),
            "image_of_row": [row.image for row in rows],
            "visual_tokens": visual_tokens,
            "image_inputs": image_inputs,
        }
        reference, prior = self._stored(groups, layout)
        num_tokens, num_images = sum(row.length for row in rows), len({row.image for row in rows} - {None})
        return Batch(model_inputs, torch.tensor(cell), torch.tensor(is_end), layout, reference, prior, num_tokens, num_images)

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

    def _text(self, group: CounterfactualGroup, c: int) -> _Text:
        candidate = group.candidates[c]
        return self._remembered(candidate.prompt, candidate.text, group.pictured, f"group {group.id!r}: text {c}")

    def _remembered(self, prompt: str, text: str, pictured: bool, where: str) -> _Text:
        key = (prompt, text, pictured)
        if key not in self._texts:
            if len(self._texts) >= _CACHED_TEXTS:
                self._texts.clear()
            self._texts[key] = self._encode(*key, where)
        return self._texts[key]

    def _head(self, prompt: str, pictured: bool) -> tuple[str, list[int]]:
        """The chat template's text up to where the answer begins, and its token ids with one placeholder for an image."""
        if (prompt, pictured) not in self._heads:
            if len(self._heads) >= _CACHED_TEXTS:
                self._heads.clear()
            head = self.processor.apply_chat_template([_user(prompt, pictured)], add_generation_prompt=True)
            self._heads[prompt, pictured] = head, self.processor.tokenizer(head).input_ids
        return self._heads[prompt, pictured]

    def _encode(self, prompt: str, text: str, pictured: bool, where: str) -> _Text:
        """Token ids of a text behind its prompt, through the chat template; the scored ids are exactly the text's."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        head, head_ids = self._head(prompt, pictured)
        full = self.processor.apply_chat_template([_user(prompt, pictured), answer])
        start = full.find(text, len(head)) if full.startswith(head) else -1
        if start < 0:
            raise DataError(
                f"{where} ({text!r}) does not follow its prompt unchanged in the model's chat template; strip white space at its ends, or "
                "repair the template"
            )
        tokenizer = self.processor.tokenizer
        ids = tokenizer(full[: start + len(text)]).input_ids
        if ids[: len(head_ids)] != head_ids:
            raise DataError(
                f"{where} ({text!r}) changes the tokens of its prompt: the model's chat template must end the prompt at a token border; "
                "repair the template"
            )
        if ids.count(self.processor.image_token_id) != pictured:
            raise DataError(f"{where}: {self.processor.image_token!r} in a prompt or text stands for an image; reword it")
        special = set(tokenizer.all_special_ids)
        if control := special.intersection(ids[len(head_ids) :]):
            raise DataError(f"{where} ({text!r}) contains the control token {tokenizer.convert_ids_to_tokens(min(control))!r}; reword it")
        return _Text(head, tuple(head_ids), tuple(ids[len(head_ids) :]), self._end_of_turn(full[start + len(text) :]))

    def _end_of_turn(self, tail: str) -> tuple[int, ...]:
        """The control token with which the template ends an answer."""
        if tail not in self._ends:
            tokenizer = self.processor.tokenizer
            special = set(tokenizer.all_special_ids)
            found = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
            end = found[0] if found else tokenizer.eos_token_id
            self._ends[tail] = () if end is None else (end,)
        return self._ends[tail]

    def _open(self, path: Path) -> Image.Image:
        return Image.new("RGB", (336, 336), (128, 128, 128)) if path == BLANK else open_image(path, self.max_pixels)

    def _processed(
        self, opened: list[Image.Image], wanted: list[tuple[int, str]]
    ) -> tuple[dict[str, Tensor], dict[tuple[int, str], Tensor]]:
        """The images as the model takes them, each once, and the token ids of every wanted (image, prompt), placeholders expanded."""
        first: dict[int, tuple[int, str]] = {}
        for pair in wanted:
            first.setdefault(pair[0], pair)
        again = [pair for pair in dict.fromkeys(wanted) if first[pair[0]] != pair]  # a second prompt of an image: its token ids only
        image_inputs: dict[str, Tensor] = {}
        prompts: dict[tuple[int, str], Tensor] = {}
        for pairs in ([first[i] for i in range(len(opened))], again):
            if pairs:
                inputs = self.processor(
                    images=[[opened[i]] for i, _ in pairs], text=[prompt for _, prompt in pairs], padding=True, return_tensors="pt"
                )
                image_inputs = image_inputs or {name: inputs[name] for name in self.family.image_inputs}
                kept = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
                prompts |= {pair: ids[mask] for pair, (ids, mask) in zip(pairs, kept, strict=True)}
        return image_inputs, prompts

    def _check_lengths(self, groups: Sequence[CounterfactualGroup], rows: list[_Row], group_cells: int, num_texts: int) -> None:
        for row in rows:
            for cell, text in row.branches:
                length = len(row.prompt_ids) + len(text.text_ids) + len(text.end_ids)
                if length > self.max_length:
                    raise DataError(
                        f"group {groups[cell // group_cells].id!r}: text {cell % num_texts} makes a row of {length} tokens, the model's "
                        f"window is {self.max_length}; shorten the text or its prompt"
                    )


def _user(prompt: str, pictured: bool) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * pictured + [{"type": "text", "text": prompt}]}


def _tree_mask(branch: Tensor) -> Tensor:
    """[R, 1, T, T] bool, true where a query may see a key: ``branch`` [R, T] is -1 for the prompt, b for branch b, -2 for padding.

    A token sees the prompt and its own branch, never a sibling. Padding sees itself, because a row of nothing is NaN.
    """
    query, key = branch.unsqueeze(2), branch.unsqueeze(1)
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    return ((causal & ((key == -1) | (key == query)) & (key >= -1)) | torch.eye(branch.shape[1], dtype=torch.bool)).unsqueeze(1)


def _wanted(match: Tensor, cells: Cells) -> Tensor:
    """[G, I, C] bool: the cells of ``cells``; unknown cells only under ``full``, since no objective uses them."""
    anchor, star = torch.zeros_like(match, dtype=torch.bool), torch.zeros_like(match, dtype=torch.bool)
    anchor[:, 0, 0] = True
    star[:, 0, :] = True
    star[:, :, 0] = True
    wanted = {"anchor": anchor, "matched": match == 1, "star": (match == 1) | (star & (match >= 0)), "full": torch.ones_like(star)}
    return wanted[cells]


def load_collator(
    model: ModelConfig, cells: Cells, max_pixels: int = MAX_PIXELS, stored: Mapping[str, StoredScores] | None = None
) -> Collator:
    """The collator of a model: its own processor, family and window, and rows that its attention can take."""
    config = load_config(model.name_or_path)
    processor = load_processor(model.name_or_path)
    window = min(config.get_text_config().max_position_embeddings, processor.tokenizer.model_max_length)
    # eager adds a mask instead of selecting by it, and flash-attn takes none: both would be wrong without an error.
    share_prefix = attention(model.attn_implementation) == "sdpa"
    return Collator(processor, family_of(config), config, cells, window, max_pixels, stored, share_prefix)
