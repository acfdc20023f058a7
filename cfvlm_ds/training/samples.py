"""Samples of a run: texts that the model writes about a few evaluation pictures at each evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import readable
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import write_if_possible
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.journal import append, records
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.data import open_image
from cfvlm_ds.evaluation.generation import write
from cfvlm_ds.training.evaluator import Splits

_MAX_NEW_TOKENS, _SIDE = 64, 160


@dataclass(frozen=True)
class Samples:
    """Greedy texts about the first picture of ``number`` groups, taken from the evaluation sets in turn.

    Every rank writes all of them: under ZeRO-3 the ranks gather weights together in each forward.
    """

    number: int
    splits: Splits
    engine: Any
    collator: Collator
    world: World
    run_dir: Path
    max_pixels: int

    def write(self, step: int) -> None:
        """Write the texts, and append them to samples.jsonl (rank 0). For a picture that cannot be read, the text is the error."""
        if not self.number:
            return
        lines = []
        self.engine.eval()
        for name, group in self._groups():
            prompt = group.candidates[0].prompt
            try:
                model = self.engine.module.model
                text = write(model, self.collator, self.world.device, group.images[0], prompt, _MAX_NEW_TOKENS, do_sample=False)
            except DataError as error:
                text = str(error)
            true = [each.text for each, truth in zip(group.candidates, group.match[0], strict=True) if truth == 1]
            lines.append({"step": step, "set": name, "group": group.id, "prompt": readable(prompt), "true": true, "text": text})
        self.engine.train()
        if self.world.is_main:
            if not step:
                write_if_possible(self._file, "", self.world.say)  # of an earlier run
            for line in lines:
                append(self._file, json.dumps(line), self.world.say)

    def report(self) -> tuple[str, list[Path]]:
        """Return a section for results.md, and the files to track; small copies of the pictures are saved in ``samples/``. A failure is a
        warning, and the section is empty.
        """
        if not self.number:
            return "", []
        try:
            return self._report()
        except (OSError, DataError) as error:
            self.world.say(f"warning: no samples in results.md ({error})")
            return "", []

    def _report(self) -> tuple[str, list[Path]]:
        (self.run_dir / "samples").mkdir(exist_ok=True)
        texts: dict[tuple[str, str], dict[int, str]] = {}
        for line in records(self._file, "remove the file"):
            texts.setdefault((line["set"], line["group"]), {})[line["step"]] = line["text"]
        parts, files = ["## Samples"], [self._file]
        for number, (name, group) in enumerate(self._groups()):
            try:
                image = open_image(group.images[0][0], self.max_pixels)
            except (DataError, IndexError):  # unreadable, or a prompt without a picture
                continue
            image.thumbnail((_SIDE, _SIDE))
            files.append(self.run_dir / "samples" / f"{number}.png")
            image.convert("RGB").save(files[-1])
            rows = [f"| {step} | {in_cell(text)} |" for step, text in sorted(texts.get((name, group.id), {}).items())]
            true = next(each.text for each, truth in zip(group.candidates, group.match[0], strict=True) if truth == 1)
            parts.append(f"![{in_cell(group.id)}](samples/{number}.png) {in_cell(name)}, true: {in_cell(true)}")
            parts.append("\n".join(["| step | text |", "|---:|---|", *rows]))
        return "\n\n".join(parts), files

    @property
    def _file(self) -> Path:
        return self.run_dir / "samples.jsonl"

    def _groups(self) -> Iterator[tuple[str, CounterfactualGroup]]:
        """Yield the groups whose first picture has a true text, from each set in turn."""
        found = 0
        for index in range(max(map(len, self.splits.values()), default=0)):
            for name, groups in self.splits.items():
                if index < len(groups) and 1 in groups[index].match[0] and found < self.number:
                    found += 1
                    yield name, groups[index]
            if found == self.number:
                return
