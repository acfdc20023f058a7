"""A run's samples: at each evaluation, the texts that the model generates for a few images, and the candidate texts that it prefers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import Prompt, readable
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import write_if_possible
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.journal import records
from cfvlm_ds.core.reading import MALFORMED
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.data import open_image
from cfvlm_ds.evaluation.generation import write
from cfvlm_ds.training.evaluator import Evaluator, Splits
from cfvlm_ds.training.results import harmless

_MAX_NEW_TOKENS, _SIDE = 64, 160
_LONGEST = 400
"""Maximum number of characters per text in results.md. samples.jsonl contains the whole text."""
_MEANING = (
    'Step 0 is the model before training. It writes greedily, without sampling, and prefers the likeliest text of the group: "right" if '
    'this text is true, "wrong" if it is false. The margin is the log-likelihood of the likeliest true text minus that of the likeliest '
    "false one. What the model writes may be false even if it prefers a true text."
)


@dataclass
class Samples:
    """Greedily decoded texts about the first images of ``number`` groups, which are taken from the evaluation sets in turn.

    Each text is recorded together with the group's likeliest candidate text for that image, and the margin of the likeliest true candidate
    over the likeliest false one.

    Every rank generates all texts, because under ZeRO-3 the ranks gather weights together. Rank 0 writes the texts to samples.jsonl.
    """

    number: int
    splits: Splits
    engine: Any
    collator: Collator
    world: World
    run_dir: Path
    max_pixels: int
    evaluator: Evaluator
    _lines: list[dict[str, Any]] = field(default_factory=list)

    def resume(self, step: int) -> None:
        """Read earlier texts from samples.jsonl, up to the step that the run continues from. An unreadable file causes a warning and is
        replaced.
        """
        if self.number and self.world.is_main:
            try:
                self._lines = [line for line in records(self._file, "its texts are dropped") if line["step"] <= step]
            except MALFORMED as error:
                self.world.say(f"warning: {self._file}: earlier samples cannot be read ({error})")

    def write(self, step: int) -> None:
        """Generate the texts and write them to samples.jsonl. Texts already recorded there for this or a later step, for example before the
        run was resumed from a checkpoint, are dropped. If any rank cannot read a picture, the error message is written instead of the text.
        """
        if next(self._groups(), None) is None:
            return
        lines, scored = list[dict[str, Any]](), list[tuple[int, CounterfactualGroup]]()
        self.engine.eval()
        for name, group in self._groups():
            prompt, pictures = group.candidates[0].prompt, group.images[0]
            problem = next(filter(None, gather_objects(self._unreadable(pictures), self.world)), "")
            if not problem:
                scored.append((len(lines), replace(group, images=group.images[:1], match=group.match[:1], edits=())))
            true = [each.text for each, truth in zip(group.candidates, group.match[0], strict=True) if truth == 1]
            text = problem or self._text(prompt, pictures)
            lines.append({"step": step, "set": name, "group": group.id, "prompt": readable(prompt), "true": true, "text": text})
        self.engine.train()
        if scored:
            _, scores = self.evaluator({"samples": [group for _, group in scored]})
            for (place, group), score in zip(scored, scores["samples"], strict=True):
                lines[place] |= _preferred(group, score.logp[0].tolist())
        if self.world.is_main:
            self._lines = [line for line in self._lines if line["step"] < step] + lines
            write_if_possible(self._file, "".join(json.dumps(line) + "\n" for line in self._lines), self.world.say)

    def report(self) -> tuple[str, list[Path]]:
        """Save small copies of the pictures in ``samples/``. Return a section for results.md, and the list of files to upload. If this
        fails, print a warning and return an empty section.
        """
        if next(self._groups(), None) is not None:
            with harmless(self.run_dir / "samples", self.world.say):
                return self._report()
        return "", []

    def _report(self) -> tuple[str, list[Path]]:
        (self.run_dir / "samples").mkdir(exist_ok=True)
        parts, files = ["## Samples", _MEANING], [self._file] * self._file.is_file()
        for number, (name, group) in enumerate(self._groups()):
            shown = []
            for place, picture in enumerate(group.images[0]):
                file = self.run_dir / "samples" / f"{number}{f'-{place}' * (place > 0)}.png"
                try:
                    image = open_image(picture, self.max_pixels)
                except DataError as error:
                    shown.append(f"({in_cell(str(error), _LONGEST)})")
                    continue
                image.thumbnail((_SIDE, _SIDE))
                image.save(file)
                files.append(file)
                shown.append(f"![{in_cell(group.shown_name)}](samples/{file.name})")
            texts = [line for line in self._lines if (line["set"], line["group"]) == (name, group.id)]
            prompt = group.candidates[0].prompt
            truths = {each.text: truth for each, truth in zip(group.candidates, group.match[0], strict=True) if each.prompt == prompt}
            rows = []
            for line in texts:
                preferred, margin = line.get("preferred", ""), line.get("margin")
                mark = {1: "right: ", 0: "wrong: ", None: ""}[truths.get(preferred)]
                cells = [in_cell(line["text"], _LONGEST), mark + in_cell(preferred, _LONGEST), "" if margin is None else f"{margin:+.1f}"]
                rows.append(f"| {line['step']} | {' | '.join(cells)} |")
            true = " / ".join(in_cell(text, _LONGEST) for text, truth in truths.items() if truth == 1) or "none of the texts"
            asked = f"{in_cell(name)}, {in_cell(group.shown_name)}: {in_cell(readable(prompt), _LONGEST)} True: {true}"
            parts.append(" ".join([*shown, asked]))
            parts.append("\n".join(["| step | writes | prefers | margin, nats |", "|---:|---|---|---:|", *rows]))
        return "\n\n".join(parts), files

    @property
    def _file(self) -> Path:
        return self.run_dir / "samples.jsonl"

    def _unreadable(self, pictures: Pictures) -> str:
        """Return the error message if this rank cannot read a picture, otherwise ""."""
        try:
            for picture in pictures:
                self.collator.files.open((picture, False))
        except DataError as error:
            return str(error)
        return ""

    def _text(self, prompt: Prompt, pictures: Pictures) -> str:
        model, ranks = self.engine.module.model, self.world.size
        options = {"do_sample": False, "synced_gpus": ranks > 1}  # a rank that finishes its text early joins the others' forward passes
        try:
            return write(model, self.collator, self.world.device, pictures, prompt, _MAX_NEW_TOKENS, **options)
        except DataError as error:
            return str(error)

    def _groups(self) -> Iterator[tuple[str, CounterfactualGroup]]:
        """Yield at most ``number`` groups, taken from the sets in turn. Groups whose first image has no true text are skipped."""
        found = 0
        for index in range(max(map(len, self.splits.values()), default=0)):
            for name, groups in self.splits.items():
                if index < len(groups) and found < self.number and 1 in (group := groups[index]).match[0]:
                    found += 1
                    yield name, group
            if found >= self.number:
                return


def _preferred(group: CounterfactualGroup, logp: Sequence[float]) -> dict[str, Any]:
    """Return the likeliest answer to the first prompt, and the margin of the likeliest true answer over the likeliest false one. The margin
    is None if there is no true or no false answer.
    """
    texts = [c for c, prompt in enumerate(group.prompt_ids) if prompt == group.prompt_ids[0]]
    best = {truth: max((logp[c] for c in texts if group.match[0][c] == truth), default=None) for truth in (0, 1)}
    margin = None if best[0] is None or best[1] is None else best[1] - best[0]
    return {"preferred": group.candidates[max(texts, key=lambda c: logp[c])].text, "margin": margin}
