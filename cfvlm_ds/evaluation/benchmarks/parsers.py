"""From generated text to an answer: the index of an item's text, or None for what is no answer, which counts as wrong.

Where the authors of a benchmark have a rule of their own, it is here under the benchmark's name. The others are strict: an article is no
option A, and a sentence that begins with The is no option T.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Item

Parser = Callable[[str, Item], "int | None"]

_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])\)?(?=$|[.:,)\n])")
_ANSWER = re.compile(r"(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*\(?(?P<letter>[A-Z])\)?(?=$|[\s.:,)])", re.IGNORECASE)


def answer(said: str, item: Item) -> int | None:
    """The rule where the authors have none: yes or no as the first word, or a letter alone, in brackets, or after "the answer is"."""
    return yes_or_no(said) if item.texts == YES_NO else letter(said, item)


def yes_or_no(said: str) -> int | None:
    first = re.match(r"\W*(yes|no)\b", said, re.IGNORECASE)
    return None if first is None else [text.lower() for text in YES_NO].index(first[1].lower())


def letter(said: str, item: Item) -> int | None:
    """The place of an option, by its letter."""
    said = said.strip()
    found = _LETTER.match(said) or _ANSWER.match(said)
    place = -1 if found is None else ord(found["letter"].upper()) - ord("A")
    return place if 0 <= place < len(item.texts) else None


def pope(said: str, item: Item) -> int | None:
    """POPE's evaluate.py: no if the first sentence has the word No, no or not, and yes otherwise, also for an empty answer."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return 1 if {"No", "no", "not"} & set(words) else 0


def naturalbench(said: str, item: Item) -> int | None:
    """NaturalBench's extract_answer: of yes and no, or of the letters A and B, the word that comes first, wherever it stands."""
    first = re.search(rf"\b({'|'.join(item.texts)})\b", said, re.IGNORECASE)
    return None if first is None else [text.lower() for text in item.texts].index(first[1].lower())


def mme(said: str, item: Item) -> int | None:
    """MME's rule: yes or no alone, or within the first four characters."""
    plain = said.lower().strip().replace(".", "")
    if len(plain) == 1:
        return {"y": 0, "n": 1}.get(plain)
    start = plain[:4]
    return 0 if "yes" in start else 1 if "no" in start else None


def amber(said: str, item: Item) -> int | None:
    """AMBER's inference.py: exactly Yes or No."""
    return YES_NO.index(said) if said in YES_NO else None


def mmstar(said: str, item: Item) -> int | None:
    """MMStar's rule: the letter first, in brackets, or after "option" or "the answer is"."""
    plain = said.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        rest = plain.removeprefix(start)
        if plain.startswith(start) and rest[:1] in (known := [text.lower() for text in item.texts]) and rest:
            return known.index(rest[0])
    return None


PARSERS: dict[str, Parser] = {"pope": pope, "naturalbench": naturalbench, "mme": mme, "amber": amber, "mmstar": mmstar}
"""Name of a benchmark -> its authors' rule."""
