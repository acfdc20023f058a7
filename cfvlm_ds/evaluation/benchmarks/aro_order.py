"""ARO, COCO-Order and Flickr30k-Order: a caption and shuffled copies of it, which this module generates.

The authors' code shuffles differently in every run and needs a part-of-speech tagger. In a test of that code, 19 % of 150 captions had a
copy equal to the caption. Here, a hash of the caption determines the order, and a word list replaces the tagger. A copy that equals the
caption or another copy is shuffled again, and dropped after four attempts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, by
from cfvlm_ds.evaluation.benchmarks.source import File, Row, one_hot

MAX_WORDS = 30
_TRIES = 4
_WORDS = (
    "a an the this that these those some any no each every all both its his her their my your our and or but nor so as if while than "
    "of in on at by with from to into onto over under above below behind beside between near next through across along around off out up "
    "down for about against inside outside toward towards is are was were be been being am do does did has have had it he she they there "
    "who which what where when not very"
)
_FUNCTION_WORDS = frozenset(_WORDS.split())


def cleaned(caption: str) -> str:
    """Normalise a caption as the authors' loader does: lower case, without most punctuation, at most MAX_WORDS words."""
    plain = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(plain.rstrip("\n").split()[:MAX_WORDS])


def shuffles(caption: str) -> list[str]:
    """Return up to four shuffled copies of a cleaned caption, different from the caption and from each other."""
    words, orders = caption.split(), list[str]()
    for name, make in _KINDS.items():
        for attempt in range(_TRIES):
            order = " ".join(make(words, f"{name}\0{attempt}\0{caption}"))
            if order != caption and order not in orders:
                orders.append(order)
                break
    return orders


def shuffled(values: Sequence[str], seed: str) -> list[str]:
    """Return the values in an order that depends only on ``seed``."""

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{place}\0{seed}".encode("utf-8", "surrogatepass")).digest()

    return [values[place] for place in sorted(range(len(values)), key=key)]


def _some(chosen: Callable[[str], bool]) -> Callable[[Sequence[str], str], list[str]]:
    """Return a function that shuffles the words for which ``chosen`` is True and leaves all other words in place."""

    def make(words: Sequence[str], seed: str) -> list[str]:
        moved = iter(shuffled([word for word in words if chosen(word)], seed))
        return [next(moved) if chosen(word) else word for word in words]

    return make


def _threes(words: Sequence[str]) -> list[list[str]]:
    return [list(words[start : start + 3]) for start in range(0, len(words), 3)]


def _within(words: Sequence[str], seed: str) -> list[str]:
    return [word for number, three in enumerate(_threes(words)) for word in shuffled(three, f"{number}\0{seed}")]


def _between(words: Sequence[str], seed: str) -> list[str]:
    threes = _threes(words)
    order = shuffled([str(number) for number in range(len(threes))], seed)
    return [word for number in order for word in threes[int(number)]]


_KINDS: dict[str, Callable[[Sequence[str], str], list[str]]] = {
    "content words": _some(lambda word: word not in _FUNCTION_WORDS),
    "function words": _some(lambda word: word in _FUNCTION_WORDS),
    "within trigrams": _within,
    "trigrams": _between,
}


def _items(*folders: str) -> Callable[[Row], list[Item]]:
    def items(row: Row) -> list[Item]:
        picture, captions = row.picture(row["image"], *folders), row["caption"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise row.error("'caption' must be a list of texts")
        orders = [(cleaned(caption), *shuffles(cleaned(caption))) for caption in captions]
        return [
            single(f"{row.number}/{number}", picture, texts, str(row["image"]), one_hot(0, len(texts)), options=str(len(texts)))
            for number, texts in enumerate(orders)
            if len(texts) > 1  # a one-word caption cannot be shuffled
        ]

    return items


_UNOFFICIAL = "the shuffles: drawn once with a hash; a word list, not a tagger, selects the content words; repeated shuffles are dropped"


def _benchmark(title: str, name: str, rows: int, folder: str) -> Benchmark:
    return Benchmark(
        title=title,
        files=(File(name, rows=rows),),
        item=_items("", "images", folder),
        metrics=by("options", accuracy),
        headline="accuracy",
        probes=("match", "caption"),
        unofficial=_UNOFFICIAL,
    )


COCO_ORDER = _benchmark("ARO, COCO-Order", "coco_karpathy_test.json", 5000, "../coco")
FLICKR_ORDER = _benchmark("ARO, Flickr30k-Order", "flickr30k_test.json", 1000, "../flickr30k")
