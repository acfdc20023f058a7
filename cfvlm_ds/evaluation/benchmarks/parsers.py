"""Parsers of generated text. A parser returns the index of the item text that the model chose, or None, which counts as wrong.

If a benchmark's authors published a rule, the parser is named after the benchmark. The other parsers are strict: they do not mistake the
article "A" for option A, or an initial "The" for option T.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Item

Parser = Callable[[str, Item], "int | None"]

_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])\)?(?=$|[.:,)\n])")
_ANSWER = re.compile(r"(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*\(?(?P<letter>[A-Z])\)?(?=$|[\s.:,)])", re.IGNORECASE)


def answer(text: str, item: Item) -> int | None:
    """Parse an answer for a benchmark whose authors published no parsing rule. A yes/no answer must begin with yes or no. A multiple-choice
    answer must begin with a letter (alone or in brackets), or with "the answer is" and a letter.
    """
    return yes_or_no(text) if item.texts == YES_NO else letter(text, item)


def yes_or_no(text: str) -> int | None:
    first = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if first is None else [answer.lower() for answer in YES_NO].index(first[1].lower())


def letter(text: str, item: Item) -> int | None:
    """Return the index of the option whose letter the text states, or None."""
    text = text.strip()
    match = _LETTER.match(text) or _ANSWER.match(text)
    place = -1 if match is None else ord(match["letter"].upper()) - ord("A")
    return place if 0 <= place < len(item.texts) else None


def pope(text: str, item: Item) -> int | None:
    """Parse by the rule of POPE's evaluate.py: no if the first sentence contains "No", "no" or "not", else yes (even for an empty text)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return 1 if {"No", "no", "not"} & set(words) else 0


def naturalbench(text: str, item: Item) -> int | None:
    """Parse by the rule of NaturalBench's extract_answer: accept the first "yes" or "no", or the first "A" or "B", anywhere in the text."""
    first = re.search(rf"\b({'|'.join(item.texts)})\b", text, re.IGNORECASE)
    return None if first is None else [option.lower() for option in item.texts].index(first[1].lower())


def mme(text: str, item: Item) -> int | None:
    """Parse by MME's rule: accept "y" or "n" as the whole text, or "yes" or "no" within the first four characters."""
    plain = text.lower().strip().replace(".", "")
    if len(plain) == 1:
        return {"y": 0, "n": 1}.get(plain)
    start = plain[:4]
    return 0 if "yes" in start else 1 if "no" in start else None


def amber(text: str, item: Item) -> int | None:
    """Parse by the rule of AMBER's inference.py: the text must be exactly "Yes" or "No"."""
    return YES_NO.index(text) if text in YES_NO else None


def mmstar(text: str, item: Item) -> int | None:
    """Parse by MMStar's rule: accept the letter at the beginning, or after an initial "(", "option " or "the answer is "."""
    plain = text.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        rest = plain.removeprefix(start)
        if plain.startswith(start) and rest[:1] in (known := [option.lower() for option in item.texts]) and rest:
            return known.index(rest[0])
    return None


PARSERS: dict[str, Parser] = {"pope": pope, "naturalbench": naturalbench, "mme": mme, "amber": amber, "mmstar": mmstar}
"""Benchmark name -> parser that follows the authors' rule."""
