"""Step ``sample``: a model writes texts about pictures, a separate judge decides which of them are true, and the texts about a picture form
a group.

The journal holds the texts and, for the judge ``match``, their scores, but no verdicts. The texts are judged after all shards are finished,
so they can be judged again with a corrected judge or another margin.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cfvlm_ds.core.conversation import texts_of
from cfvlm_ds.core.errors import ConfigError, DataError, first_line
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, normalised
from cfvlm_ds.core.named import imported
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import one_line, quoted
from cfvlm_ds.counterfactuals.authors import Author
from cfvlm_ds.counterfactuals.judge import log_odds
from cfvlm_ds.counterfactuals.options import SampleOptions
from cfvlm_ds.counterfactuals.verify import Score, rounded
from cfvlm_ds.counterfactuals.work_folder import SAMPLE, ShardStep, WorkFolder, row_line, seed_of
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.picture_file import picture_stat
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.evaluation.benchmarks.base import Item
from cfvlm_ds.evaluation.probes import Match

GROUPS, COUNTS = "groups.jsonl", "counts.json"
_LONGEST_ANSWER = 3  # words
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

Judge = Callable[[str, Mapping[str, Any]], "bool | None"]
"""Function that takes a text and the ``cfgroup/1`` row of its picture, and returns True, False or None (undecided). The row holds one
picture, the prompt, the known true texts and the source's metadata.
"""


class Question(NamedTuple):
    """A picture, a prompt and the known true texts. ``false`` holds the comparable forms of the known false texts, and ``where`` is the
    location of the first row with this picture and prompt.
    """

    group: CounterfactualGroup
    false: frozenset[str]
    where: str

    def named(self) -> dict[str, Any]:
        """Return what identifies the question in a record: its id, and a hash of the prompt, the true texts and the picture's size."""
        try:
            size = picture_stat(self.group.images[0][0])[0]
        except (OSError, DataError):  # the author reports the picture
            size = 0
        candidates = self.group.candidates
        return {"id": self.group.id, "asked": seed_of(size, candidates[0].prompt, *(each.text for each in candidates))}


def sample(
    store: GroupStore,
    out: Path,
    options: SampleOptions,
    model: Mapping[str, str],
    load: Callable[[], tuple[Author, Score | None]],
    shards: Sequence[int],
    say: Say,
    of: int | None = 1,
) -> tuple[list[dict[str, Any]], Counter[str] | None]:
    """Generate the texts of ``shards`` (indices from 0 to ``of`` - 1), reusing those of earlier calls. Once all shards are finished, judge
    the texts, and write OUT/groups.jsonl and OUT/counts.json.

    ``load`` returns the author of the texts and, for the judge ``match``, the function that scores them; ``model`` identifies the models.
    Return the completion records of ``shards``, and the counts if all shards are finished, otherwise None.

    Raises ConfigError if options differ from those recorded in OUT, if the judge returns None for the first known true text of every
    picture and prompt, or if no generated text is false. Raises DataError if the judge fails on a text.
    """
    judges: dict[str, Judge | None] = {"answers": answers, "match": None}
    known = options.judge in judges
    judge = judges[options.judge] if known else imported(options.judge, "judge", "answers, match or MODULE:FUNCTION")
    source = _Source(store, options, judge, out.absolute())
    places = source.places(say)
    questions = map(source.question, places.items())
    if judge and all(source.verdict(question.group.candidates[0].text, question) is None for question in questions):
        raise ConfigError(f"the judge {options.judge} decides on no true text with a picture in {store.path}; use another judge or prompt")
    work = WorkFolder.begin(out, store, of, (SAMPLE,))
    finished = [work.finished(SAMPLE, shard, of, options) for shard in shards]
    if None not in finished:
        say(f"{out}: {SAMPLE} has already finished {len(finished)} of {work.shards} shards")
    work.settle(SAMPLE, options, **model)
    records = list[dict[str, Any]]()
    for shard, done in zip(shards, finished, strict=True):
        if done is None:
            own = list(places.items())[shard :: work.shards]
            with ShardStep(work, SAMPLE, shard) as step:
                author, score = load()
                left = step.remaining(map(source.question, own), Question.named, say, len(own), "prompts")
                failed = list[dict[str, Any]]()  # since the last success: asked again if the author gives up
                for question, record in source.written(left, author):
                    failed.append(question.named() | (source.scored(question, record, score) if score else record))
                    if "detail" not in record:
                        while failed:
                            step.add(failed.pop(0))
                for each in failed:
                    step.add(each)
                done = step.finish(lambda record, counts: counts.update(record["counts"]), say)
        records.append(done)
    return records, None if work.missing(SAMPLE) else _write_groups(work, source, places, say)


def answers(text: str, row: Mapping[str, Any]) -> bool | None:
    """Judge a short answer: it is true if its comparable form is that of a true text of the row, otherwise false.

    Return None if a true text has more than three words (six characters of a script without spaces), if the answer contains a true text
    (as in "Yes, it is") or is part of one, or if they cannot be compared: a word with a number, an option's letter with a word.
    """
    given, *true = (comparable(each) for each in (text, *(known["text"] for known in row["texts"])))
    if any(len(each.split()) > _LONGEST_ANSWER or sum(map(_is_wide, each)) > 2 * _LONGEST_ANSWER for each in true):
        return None
    return given in true or (None if any(_overlap(given, each) for each in true) else False)


def comparable(text: str) -> str:
    """Return a text without differences of case, white space, width, quotes, emphasis and final punctuation, with "two" as 2."""
    text = " ".join(unicodedata.normalize("NFKC", text).translate({0x2019: "'", 0x2212: "-"}).casefold().split())
    text = text.lstrip(" *_`'\"\u201c\u2018").rstrip(" .!\u3002*_`'\"\u201d")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return str(_NUMBERS.index(text)) if text in _NUMBERS else text


def _overlap(one: str, other: str) -> bool:
    """Return whether one answer may say the same as another, different one."""
    numbers = [{*re.findall(r"\d+(?:\.\d+)?", each)} for each in (one, other)]
    if any(numbers):
        return not all(numbers) or not numbers[0].isdisjoint(numbers[1])
    if not (one + other).isascii():  # some scripts have no spaces
        return one in other or other in one
    within = any(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole) for part, whole in ((one, other), (other, one)))
    return within or (len(one) < 2) != (len(other) < 2)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


@dataclass(frozen=True)
class _Source:
    """The pictures and prompts of a data set, and the judge, which is None if recorded scores decide. In the rows that are passed to the
    judge or written to groups.jsonl, picture paths are relative to ``folder``, or absolute for pictures outside it.
    """

    store: GroupStore
    options: SampleOptions
    judge: Judge | None
    folder: Path

    def places(self, say: Say) -> dict[int, list[int]]:
        """Map a hash of each distinct (picture, prompt) pair to the indices of the rows with this pair, in the order of the data."""
        found: dict[int, list[int]] = {}
        for place, group in enumerate(Progress(say, "listing pictures", len(self.store), "rows").over(self.store)):
            for key, texts in self._texts(group).items():
                if any(truth for truth, _ in texts):
                    found.setdefault(key, []).append(place)
        return found

    def question(self, entry: tuple[int, Sequence[int]]) -> Question:
        """Build the question for an entry of ``places``, with the texts of all its rows."""
        key, rows = entry
        first, texts, false = self.store[rows[0]], dict[str, Candidate](), set[str]()
        for row in rows:
            for truth, candidate in self._texts(self.store[row])[key]:
                if truth:
                    texts.setdefault(normalised(candidate.text), candidate)
                else:
                    false.add(comparable(candidate.text))
        number = [each for each, labelled in self._texts(first).items() if any(truth for truth, _ in labelled)].index(key)
        name = f"{first.id}#{number + 1}" if number else first.id
        candidates, match = tuple(texts.values()), ((1,) * len(texts),)
        group = replace(first, id=name, images=first.images[:1], candidates=candidates, match=match, edits=(), keys=())
        return Question(group, frozenset(false), self.store.where(rows[0]))

    def _texts(self, group: CounterfactualGroup) -> dict[int, list[tuple[int, Candidate]]]:
        """Return the true and false texts of a group's first image, each with its truth, keyed by a hash of the image and the prompt."""
        asked, found = self.options.prompt, dict[int, list[tuple[int, Candidate]]]()
        for truth, candidate in zip(group.match[0], group.candidates, strict=True):
            if truth is not None and group.num_pictures and not (asked and candidate.prompt != group.candidates[0].prompt):
                prompt = asked or candidate.prompt
                found.setdefault(seed_of(*group.images[0], prompt), []).append((truth, Candidate(prompt, candidate.text)))
        return found

    def verdict(self, text: str, question: Question) -> bool | None:
        """Judge a text. Raises DataError naming the row if the judge fails or returns anything but True, False or None."""
        about = f"{question.where}: the judge {self.options.judge}, called with {quoted(text, 80)},"
        assert self.judge is not None
        try:
            verdict = self.judge(text, to_row(question.group, self.folder))
        except Exception as error:  # a user's function may raise anything
            raise DataError(f"{about} raises {first_line(error)}; correct the function") from error
        if not (verdict is None or isinstance(verdict, bool)):
            raise DataError(f"{about} returns {quoted(verdict, 80)}; return True, False or None")
        return verdict

    def written(self, questions: Iterator[Question], author: Author) -> Iterator[tuple[Question, dict[str, Any]]]:
        """Yield each question with the author's texts, and the counts of sampled and discarded ones. User functions are called in this
        thread only.
        """
        decided = ((each, not self.judge or self.verdict(each.group.candidates[0].text, each) is not None) for each in questions)
        answered = partial(self._answered, author)
        if author.threads == 1:  # torch generates in this thread
            results: Iterator[Any] = ((entry, answered(entry)) for entry in decided)
        else:
            results = side_by_side(answered, decided, author.threads, author.threads)
        return ((question, record) for (question, _), record in results)

    def _answered(self, author: Author, entry: tuple[Question, bool]) -> dict[str, Any]:
        question, decided = entry
        if not decided:
            return _unasked("not asked, because the judge does not decide on the true text")
        try:
            written = author.write(question.group.images[0], question.group.candidates[0].prompt, self.options)
        except DataError as error:
            return _unasked("not asked, because of an error", error)
        ended = [each.text.strip() for each in written if each.ended]
        texts = [text for text in ended if text]
        cut, refused = len(written) - len(ended), len(ended) - len(texts)
        counts = {"sampled": len(written), "cut off by --max_new_tokens": cut, "empty, filtered or with a control token": refused}
        return {"texts": texts, "counts": counts}

    def scored(self, question: Question, record: dict[str, Any], score: Score) -> dict[str, Any]:
        """Add the log-odds of "yes, the picture shows it" to a record, in nats, for the first known true text and each generated text.

        Texts that the scorer refuses get none. They are counted, and the record names the first reason.
        """
        if not record["texts"]:
            return record
        group, prompt = question.group, " ".join(texts_of(question.group.candidates[0].prompt))
        probe, texts = Match(self.options.template.replace("{prompt}", prompt)), dict.fromkeys([group.candidates[0].text, *record["texts"]])

        def odds(*texts: str) -> dict[str, float | None]:
            item = Item(group.id, group.images, texts, ((1,) * len(texts),))
            (scores,) = score([CounterfactualGroup.to_score(group.id, group.images, probe.cells(item))])
            shares = probe.row(item, tuple(scores.logp[0].tolist()), (), ())
            return {text: rounded(log_odds(share)) for text, share in zip(texts, shares, strict=True)}

        try:
            return record | {"log_odds": odds(*texts)}
        except DataError:  # of one text at least: the others are scored without it
            found, errors = dict[str, float | None](), list[str]()
            for text in texts:
                try:
                    found |= odds(text)
                except DataError as error:
                    errors.append(one_line(str(error), 300))
            counts = record["counts"] | {"not scored, because of an error": len(errors)}
            return record | {"log_odds": found, "counts": counts} | ({"detail": errors[0]} if errors else {})

    def judged(self, question: Question, record: Mapping[str, Any], counts: Counter[str]) -> CounterfactualGroup | None:
        """Judge the texts in a question's record, and add the verdicts to ``counts``. Return a group of the true and false texts, or None
        if no text is false.
        """
        group, most, odds = question.group, self.options.most_false, record.get("log_odds", {})

        def verdict(text: str) -> bool | None:
            if comparable(text) in question.false:
                return False
            if self.judge:
                return self.verdict(text, question)
            value = odds.get(text)
            return None if value is None or abs(value) <= self.options.margin else value > 0

        known = {comparable(candidate.text) for candidate in group.candidates}
        different = dict[str, str]()
        for text in record["texts"]:
            different.setdefault(comparable(text), text)
        found: dict[bool | None, list[Candidate]] = {True: [], False: [], None: []}
        new = [text for form, text in different.items() if form not in known]
        for text in new:
            found[verdict(text)].append(Candidate(group.candidates[0].prompt, text))
        true, false, undecided = found.values()
        counts.update({
            "different": len(different), "equal to a true text of the data": len(different) - len(new), "true": len(true),
            "false": len(false), "not judged": len(undecided), "false, left out by --most_false": len(false[most:]),
            "prompts without a false text": not false, "groups": bool(false),
            "true texts of the data that the judge calls false": verdict(group.candidates[0].text) is False,
        })  # fmt: skip
        candidates, num_true = (*group.candidates, *true, *false[:most]), len(group.candidates) + len(true)
        edits = tuple(Edit("sampled", text=place) for place in range(num_true, len(candidates)))
        match = ((1,) * num_true + (0,) * len(edits),)
        return replace(group, candidates=candidates, match=match, edits=edits) if false else None


def _unasked(reason: str, error: DataError | None = None) -> dict[str, Any]:
    return {"texts": [], "counts": {reason: 1}} | ({"detail": one_line(str(error), 300)} if error else {})


def _write_groups(work: WorkFolder, source: _Source, places: Mapping[int, Sequence[int]], say: Say) -> Counter[str]:
    pictured = {row for rows in places.values() for row in rows}
    counts = Counter({"prompts": len(places), "rows without a picture": len(source.store) - len(pictured)})
    journals = [work.records(SAMPLE, shard) for shard in range(work.shards)]
    for shard in range(work.shards):
        counts.update((work.done(SAMPLE, shard) or {"counts": {}})["counts"])
    with whole_file(work.path / GROUPS, shared=True) as file:
        for number, entry in enumerate(Progress(say, "judge", len(places), "prompts").over(places.items())):
            shard, question = number % work.shards, source.question(entry)
            record = next(journals[shard], {})
            if not question.named().items() <= record.items():
                raise DataError(
                    f"{work.file(SAMPLE, shard)}: the record of {question.group.id!r} is about another prompt, text or picture than "
                    f"{question.where}; {work.again(SAMPLE, shard)}"
                )
            if group := source.judged(question, record, counts):
                file.write(row_line(to_row(group, source.folder)))
        if not counts["groups"]:
            (work.path / GROUPS).unlink(missing_ok=True)  # of an earlier judge
            (work.path / COUNTS).unlink(missing_ok=True)
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ConfigError(
                f"{work.path}: no picture has a false text: {found}; raise n or temperature, or use other pictures or another judge"
            )
    write_whole(work.path / COUNTS, json.dumps(counts, indent=1).encode() + b"\n", shared=True)
    return counts
