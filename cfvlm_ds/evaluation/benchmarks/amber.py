"""AMBER (Wang et al. 2023, arXiv 2311.07397): descriptions, and yes/no questions about existence, attributes and relations.

The metrics of descriptions are those of the authors' inference.py, but words are matched by a simpler rule. The authors count the words in
relation.json that NLTK tags as nouns. They also match a noun to any object with a similar word vector (spaCy's large model, cosine above
0.8). This module counts every word in relation.json, whatever its part of speech, except "hot", and "can" unless it follows "a", "the" or a
word such as "trash". A word matches only the objects that relation.json lists it with, so a synonym that the authors' code accepts can
count as false here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Source, Values, single
from cfvlm_ds.evaluation.benchmarks.descriptions import counted, named, names_of, share, tally
from cfvlm_ds.evaluation.benchmarks.metrics import by, yes_no

QUERIES = File("data/query/query_discriminative.json", rows=14_216)
TRUTH = File("data/annotations.json")
ASK = " Please answer Yes or No."


def item(row: Row) -> Item:
    known = _annotation(row)
    kind = str(known["type"]).removeprefix("discriminative-").split("-")[0]
    return single(
        str(row["id"]),
        row.picture(row["image"], "image", "images"),
        YES_NO,
        str(row["image"]),
        known.truth("truth", YES_NO),
        row.text("query") + ASK,
        type={"hallucination": "existence"}.get(kind, kind),
    )


def _annotation(row: Row) -> Row:
    truth, broken = _truth(row.source)
    if (known := truth.get(str(row["id"]))) is None:
        raise broken or row.error(f"id {row['id']!r} is not in {row.source.root / TRUTH.name}", "get both files from the same revision")
    return known


@lru_cache(1)
def _truth(source: Source) -> tuple[dict[str, Row], DataError | None]:
    rows = list(source.rows(TRUTH))
    truth = {str(row.values.get("id")): row for row in rows if isinstance(row, Row)}
    return truth, next((row for row in rows if isinstance(row, DataError)), None)


AMBER = Benchmark(
    title="AMBER (discriminative)",
    files=(QUERIES,),
    item=item,
    metrics=by("type", partial(yes_no, positive=1)),  # the positive class is no, so F1 measures the detection of absent things
    headline="f1",
    beside="yes_ratio",
    probes=("yes_no", "generate"),
    unofficial=f"the instruction {ASK.strip()!r}",
)


DESCRIBE = File("data/query/query_generative.json", rows=1004)
RELATION, SAFE = File("data/relation.json"), File("data/safe_words.txt", ("", "word"))
_CAN = re.compile(r"(?<!\ba )(?<!\bthe )(?<!\btrash )(?<!\bgarbage )(?<!\bsoda )(?<!\bbeer )(?<!\btin )\bcan\b|\bhot\b", re.IGNORECASE)
"""Words of relation.json that are rarely nouns: "hot", and "can" unless it follows an article or a word such as "trash"."""
_OTHERS = 2
"""Number of texts at the end of an item whose words count as mentions but do not belong to any of the item's objects."""


def description(row: Row) -> Item:
    """Return an item with one text per object in the picture, one per object that models often hallucinate there, one for the safe words,
    and one for all other words.

    Each word belongs to one text. All safe words belong to the text for safe words. Any other word belongs to the first of the item's
    objects with which relation.json lists it, or else to the object with this name; objects in the picture take precedence. An object whose
    words all belong to other texts never counts as mentioned.
    """
    known, (relation, safe) = _annotation(row), _words(row.source)
    there, imagined = known["truth"], known.values.get("hallu")
    if not isinstance(there, list) or not isinstance(imagined, list):
        raise known.error("'truth' and 'hallu' must be lists of objects")
    if unknown := [name for name in (*there, *imagined) if name not in relation]:
        raise known.error(f"object {unknown[0]!r} is not in {row.source.root / RELATION.name}", "get both files from the same revision")
    imagined_at, safe_at = len(there), len(there) + len(imagined)
    owners = [(word, safe_at) for word in safe]
    for start, objects in ((0, there), (imagined_at, imagined)):
        owners += [(word, number) for number, name in enumerate(objects, start) for word in relation[name]]
        owners += [(name, number) for number, name in enumerate(objects, start)]
    owner = dict(reversed(owners))  # a word's first owner counts
    texts: list[list[str]] = [[] for _ in range(safe_at + _OTHERS)]
    for word in dict.fromkeys(word for name, words in relation.items() for word in (name, *words)):
        texts[owner.get(word, safe_at + 1)].append(word)
    labels, truth = (*there, *imagined, "safe words", "other words"), (*(1 for _ in there), *(0 for _ in imagined), 1, 0)
    described = [f"{label}: {', '.join(words)}" for label, words in zip(labels, texts, strict=True)]
    picture = row.picture(row["image"], "image", "images")
    return single(str(row["id"]), picture, described, str(row["image"]), truth, row.text("query"))


@lru_cache(1)
def _words(source: Source) -> tuple[dict[str, list[str]], list[str]]:
    """Return the words that relation.json lists for each object, and the safe words, which never count as hallucinated."""
    rows = [row.values for row in source.sound_rows(RELATION)]
    listed = [words if isinstance(words, list) else [None] for row in rows for words in row.values()]
    if len(rows) != 1 or not all(isinstance(word, str) for words in listed for word in words):
        raise DataError(f"{source.root / RELATION.name}: it must be one object with a list of words for each name; get the file again")
    return rows[0], [row.text("word") for row in source.sound_rows(SAFE)]


def nouns(text: str, item: Item) -> tuple[float, ...]:
    """Count how often a description mentions the words of each of the item's texts."""
    names = names_of(item.texts)
    return tally(named(_CAN.sub(" . ", text), names), names, len(item.texts))


def generative(table: Sequence[Judged]) -> Values:
    """Return four metrics in %. CHAIR: share of mentions that name nothing in the picture. Cover: share of the picture's objects that are
    mentioned. Hal: share of descriptions with a false mention. Cog: share of often-hallucinated objects that are mentioned.
    """
    if not table:
        return {}
    every, objects = counted(table), counted(table, _OTHERS)
    return {
        "chair": share(every.false_mentions, every.mentions),
        "cover": share(objects.true_mentioned, objects.true),
        "hal": share(every.inventing, len(table)),
        "cog": share(objects.false_mentioned, objects.false),
    }


AMBER_GENERATIVE = Benchmark(
    title="AMBER (generative)",
    files=(DESCRIBE,),
    item=description,
    metrics=generative,
    headline="chair",
    beside="cover",
    probes=("write",),
    mentions=nouns,
    unofficial="words are recognised without a tagger and word vectors",
)
