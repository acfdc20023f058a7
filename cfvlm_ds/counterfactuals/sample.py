"""Step ``sample``: a model writes texts about pictures, something else judges them, and true texts against false ones become groups.

The journal holds the texts without verdicts. They are judged when all shards are finished, so a corrected judge needs no model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import spelled
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError, first_line
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, normalised, normalised_prompt
from cfvlm_ds.core.named import imported
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.text import one_line, quoted
from cfvlm_ds.counterfactuals.edit.base import sha256_of
from cfvlm_ds.counterfactuals.options import SampleOptions
from cfvlm_ds.counterfactuals.select import outside_of
from cfvlm_ds.counterfactuals.work_folder import SAMPLE, ShardStep, WorkFolder, seed_of
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.decoding import MAX_BYTES
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.evaluation.generation import write_several

GROUPS, COUNTS = "groups.jsonl", "counts.json"
_LONGEST_ANSWER = 3  # words

Judge = Callable[[str, Mapping[str, Any]], "bool | None"]
"""Function from a text and the ``cfgroup/1`` row of its picture to whether the text is true, or None if that cannot be decided. The row has
one picture, the prompt, its known true texts and the metadata of the source.
"""


class Question(NamedTuple):
    """A picture with a prompt and its true texts, and the location of its first row."""

    group: CounterfactualGroup
    where: str


class Sampled(NamedTuple):
    """Result of a call: the completion record of its shard and, if all shards are finished, the counts of all texts and the folders of the
    pictures.
    """

    done: Mapping[str, Any]
    counts: Mapping[str, int] | None
    roots: Sequence[Path]


def sample(
    store: GroupStore,
    out: Path,
    options: SampleOptions,
    model: Mapping[str, str],
    load: Callable[[], tuple[Any, Collator, World]],
    shard: int,
    say: Say,
    of: int = 1,
) -> Sampled:
    """Generate texts for shard number ``shard`` of ``of`` and, if it is the last one to finish, write OUT/groups.jsonl and OUT/counts.json.

    ``model`` identifies the model that ``load`` returns as scorer, collator and world. Texts of an earlier call are not generated again.
    Raises ConfigError for options that differ from those of the folder, and for a judge that decides nothing or leaves no group; DataError
    for a judge that fails on a text.
    """
    source = _Source(store, options, judge_named(options.judge), out.absolute())
    places = source.places(say)
    if all(source.verdict(question.group.candidates[0].text, question) is None for question in map(source.question, places.items())):
        raise ConfigError(f"--judge {options.judge} decides on no true text with a picture in {store.path}; use another judge or prompt")
    work = WorkFolder.begin(out, store, of, (SAMPLE,))
    done = work.finished(SAMPLE, shard, of, options, say)
    work.settle(SAMPLE, options, **model)
    if done is None:
        own = list(places.items())[shard :: work.shards]
        with ShardStep(work, SAMPLE, shard) as step:
            scorer, collator, world = load()
            for question in step.remaining(map(source.question, own), _named, say, len(own), "prompts"):
                step.add(_named(question) | source.asked(question, scorer.model, collator, world.device))
            done = step.finish(_counted, say)
    return Sampled(done, *((None, ()) if work.missing(SAMPLE) else _write_groups(work, source, places, say)))


def judge_named(name: str) -> Judge:
    """Return the judge that ``--judge`` names. Raises ConfigError."""
    judge = answers if name == "answers" else imported(name, "--judge", "answers or MODULE:FUNCTION")
    if not callable(judge):
        raise ConfigError(f"--judge: {name!r} is not a function; name a function of a text and a row")
    return judge  # type: ignore[no-any-return]


def answers(text: str, row: Mapping[str, Any]) -> bool | None:
    """Judge a short answer: it is true if it equals a true text of the row, ignoring case, white space and a final full stop.

    Return None if a true text has more than three words, and for a longer text that contains a true one, such as "Yes, it is".
    """
    given, *true = (normalised(each).casefold().rstrip(" .") for each in (text, *(known["text"] for known in row["texts"])))
    if any(len(each.split()) > _LONGEST_ANSWER for each in true):
        return None
    return given in true or (None if any(re.search(rf"\b{re.escape(each)}\b", given) for each in true) else False)


@dataclass(frozen=True)
class _Source:
    """Pictures and prompts of a data set, and the judge of texts about them. Paths in rows are relative to ``folder`` or absolute."""

    store: GroupStore
    options: SampleOptions
    judge: Judge
    folder: Path

    def places(self, say: Say) -> dict[int, list[int]]:
        """Return the rows of each different picture and prompt, by their hash, in the order of the data."""
        found: dict[int, list[int]] = {}
        progress = Progress(say, "listing pictures", len(self.store), "rows")
        for place, group in enumerate(progress.over(self.store)):
            for key in self._true(group):
                found.setdefault(key, []).append(place)
        return found

    def question(self, entry: tuple[int, Sequence[int]]) -> Question:
        """Return the question of an entry of ``places``."""
        key, rows = entry
        first, true = self.store[rows[0]], self._true(self.store[rows[0]])
        prompt, texts = true[key][0][0].prompt, dict[str, tuple[Candidate, str]]()
        for row in rows:
            for candidate, text_key in self._true(self.store[row])[key]:
                texts.setdefault(normalised(candidate.text), (Candidate(prompt, candidate.text), text_key))
        candidates, keys = zip(*texts.values(), strict=True)
        number = list(true).index(key)
        group = replace(
            first,
            id=f"{first.id}#{number + 1}" if number else first.id,
            images=first.images[:1],
            candidates=candidates,
            match=((1,) * len(candidates),),
            edits=(),
            keys=keys if any(keys) else (),
        )
        return Question(group, self.store.where(rows[0]))

    def _true(self, group: CounterfactualGroup) -> dict[int, list[tuple[Candidate, str]]]:
        """Return the true texts of a group's first image and their keys, by a hash of the image and the prompt."""
        asked, found = self.options.prompt, dict[int, list[tuple[Candidate, str]]]()
        for truth, candidate, key in zip(group.match[0], group.candidates, group.keys or ("",) * len(group.candidates), strict=True):
            if truth == 1 and group.num_pictures and not (asked and candidate.prompt != group.candidates[0].prompt):
                candidate = Candidate(asked or candidate.prompt, candidate.text)
                found.setdefault(seed_of(*group.images[0], normalised_prompt(candidate.prompt)), []).append((candidate, key))
        return found

    def verdict(self, text: str, question: Question) -> bool | None:
        """Judge a text. Raises DataError, naming the row, if the judge raises an exception or returns something else."""
        about = f"{question.where}: --judge {self.options.judge}, called with {quoted(text, 80)},"
        try:
            verdict = self.judge(text, to_row(question.group, self.folder))
        except Exception as error:  # a function of the user's may raise anything
            raise DataError(f"{about} raises {first_line(error)}; correct the function") from error
        if not (verdict is None or isinstance(verdict, bool)):
            raise DataError(f"{about} returns {quoted(verdict, 80)}; return True, False or None")
        return verdict

    def asked(self, question: Question, model: Any, collator: Collator, device: torch.device) -> dict[str, Any]:
        """Generate the texts of a question, and return what its record holds about them."""
        options, shown, first = self.options, question.group.images[0], question.group.candidates[0]
        if (verdict := self.verdict(first.text, question)) is None:
            return {"problem": "not asked, because the judge does not decide on the true text"}
        try:
            digests = [sha256_of(picture_bytes(picture, MAX_BYTES)) for picture in shown]
            torch.manual_seed(seed_of(options.seed, *digests, first.prompt))
            written = write_several(
                model, collator, device, shown, first.prompt, options.max_new_tokens, do_sample=True, temperature=options.temperature,
                top_p=options.top_p, top_k=0, num_return_sequences=options.n,
            )  # fmt: skip
        except (DataError, OSError) as error:
            return {"problem": "not asked, because the model cannot process it", "detail": one_line(str(error), 300)}
        ended = [each.text.strip() for each in written if each.ended]
        texts = [text for text in ended if text and _is_accepted(collator, Candidate(first.prompt, text), len(shown))]
        return {"texts": texts, "cut": len(written) - len(ended), "refused": len(ended) - len(texts), "agrees": verdict}

    def judged(self, question: Question, texts: Sequence[str], counts: Counter[str]) -> CounterfactualGroup | None:
        """Return the group of a question with its true and false texts, or None without a false text, and count all texts."""
        group, different = question.group, dict[str, str]()
        for text in texts:
            different.setdefault(normalised(text), text)
        known = {normalised(candidate.text) for candidate in group.candidates}
        new = [text for form, text in different.items() if form not in known]
        verdicts = [self.verdict(text, question) for text in new]
        true, false = ([text for text, verdict in zip(new, verdicts, strict=True) if verdict is truth] for truth in (True, False))
        kept = false[: self.options.most_false]
        counts.update({
            "different texts": len(different), "true, known from the data": len(different) - len(new), "true by the judge": len(true),
            "false": len(false), "false, left out by --most_false": len(false) - len(kept), "not judged": verdicts.count(None),
            "prompts without a false text": not kept, "groups": bool(kept),
        })  # fmt: skip
        candidates = (*group.candidates, *(Candidate(group.candidates[0].prompt, text) for text in (*true, *kept)))
        num_true = len(candidates) - len(kept)
        edits = tuple(Edit("sampled", text=place) for place in range(num_true, len(candidates)))
        keys = (*group.keys, *[""] * (len(candidates) - len(group.keys))) if group.keys else ()
        match = ((1,) * num_true + (0,) * len(kept),)
        return replace(group, candidates=candidates, match=match, edits=edits, keys=keys) if kept else None


def _named(question: Question) -> dict[str, Any]:
    return {"id": question.group.id, "prompt": spelled(question.group.candidates[0].prompt)}


def _is_accepted(collator: Collator, candidate: Candidate, num_pictures: int) -> bool:
    """Return whether a model can be trained on a text, which then has no control token, for instance."""
    try:
        collator.prompts.encoded(candidate.prompt, candidate.text, num_pictures, "a text")
    except DataError:
        return False
    return True


def _counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Add a record to the counts."""
    counts.update(["prompts", *([record["problem"]] if "problem" in record else [])])
    texts, cut, refused = len(record.get("texts", ())), record.get("cut", 0), record.get("refused", 0)
    counts.update({"sampled texts": texts + cut + refused, "cut off by --max_new_tokens": cut, "empty or with a control token": refused})
    counts["prompts whose true text the judge calls false"] += record.get("agrees") is False


def _write_groups(
    work: WorkFolder, source: _Source, places: Mapping[int, Sequence[int]], say: Say
) -> tuple[Mapping[str, int], Sequence[Path]]:
    """Judge the texts of all shards, write the groups and the counts, and return the counts and the folders of the pictures."""
    counts, settings, roots = Counter[str](), work.settings(SAMPLE), set[Path]()
    counts["rows without a picture"] = len(source.store) - len({row for rows in places.values() for row in rows})
    further = [root for root in work.roots if not root.is_relative_to(source.folder)]
    journals: list[Iterator[dict[str, Any]]] = [work.records(SAMPLE, shard) for shard in range(work.shards)]
    with whole_file(work.path / GROUPS, shared=True) as file:
        for number, entry in enumerate(Progress(say, "judge", len(places), "prompts").over(places.items())):
            question, record = source.question(entry), next(journals[number % work.shards], {})
            if record.items() < _named(question).items():
                shard = number % work.shards
                raise DataError(f"{work.file(SAMPLE, shard)} does not belong to {source.store.path}; {work.again(SAMPLE, shard)}")
            _counted(record, counts)
            if "texts" in record and (group := source.judged(question, record["texts"], counts)):
                own = json.loads(group.meta or "{}")
                row = to_row(group, source.folder, {**(own if isinstance(own, dict) else {"meta": own}), "sample": settings})
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                roots.update(outside_of(row, further))
        write_whole(work.path / COUNTS, json.dumps(counts, indent=1).encode() + b"\n", shared=True)
        if not counts["groups"]:
            raise ConfigError(f"{work.path}: no picture has a false text: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return counts, [source.folder, *sorted(roots)]
