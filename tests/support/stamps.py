"""Proposed edits, for people to judge, of captions from other sources: Tux Paint's stamps (GPL-2) or a file.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python tests/support/stamps.py stamps --seed 11 > fresh.txt              # edits that have not been judged yet
    python tests/support/stamps.py captions.txt --per_type 2 > fresh.txt     # the same for other captions, one per line
    python tests/support/stamps.py --judged fresh.txt                        # lines for tests/golden/*_judged.txt

Draws 200 of the edits that the rules propose, at most three of each type for a caption, and none that has been judged before. A line is
VERDICT | TYPE | CAPTION | TEXT. Replace the question mark with "right" or "wrong: why". The stored lists have digests instead of captions,
because the captions may not be copied.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from pathlib import Path

from cfvlm_ds.counterfactuals.options import TYPES
from cfvlm_ds.counterfactuals.propose.base import Rejected
from cfvlm_ds.counterfactuals.propose.rules import edits_of

NUMBER, PER_TYPE = 200, 3
JUDGED = Path(__file__).resolve().parent.parent / "golden" / "stamps_judged.txt"
PHOTOGRAPHS = JUDGED.with_name("photographs_judged.txt")
COCO = JUDGED.with_name("coco_judged.txt")


def captions(source: Path) -> list[str]:
    """Return the first line of each picture's text file, or the lines of a file, without duplicates."""
    if source.is_file():
        return sorted({line.strip() for line in source.read_text("utf-8").splitlines() if line.strip()})
    files = (source / "usr/share/tuxpaint/stamps").rglob("*.txt")
    return sorted({file.read_text("utf-8", "replace").split("\n")[0].strip() for file in files})


def edits(listed: list[str], seed: int, per_type: int = PER_TYPE) -> list[tuple[str, str, str]]:
    """Return (type, caption, text) of the edits that the rules allow, at most ``per_type`` of each type for a caption."""
    listed_edits = []
    for caption in listed:
        allowed = edits_of(caption, TYPES)
        every = [] if isinstance(allowed, Rejected) else [found for edit in allowed if (found := edit.proposal())]
        random.Random(f"{seed} {caption}").shuffle(every)
        for kind in TYPES:
            listed_edits += [(kind, caption, each.text) for each in every if each.type == kind][:per_type]
    return listed_edits


def digest(caption: str, text: str) -> str:
    return hashlib.sha256(f"{caption}\n{text}".encode()).hexdigest()[:16]


def judged(file: Path) -> list[tuple[str, str, str]]:
    """Return (verdict, type, digest) of each line of a list."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return [(verdict, kind, known) for verdict, kind, known in (line.split(" | ") for line in lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="what the package was unpacked to, or a file of captions, one a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_type", type=int, default=PER_TYPE, help="edits of a type for each caption at most")
    parser.add_argument("--judged", type=Path, help="a list with verdicts: print what of it is kept")
    arguments = parser.parse_args()
    if arguments.judged:
        lines = [line for line in arguments.judged.read_text().splitlines() if line and not line.startswith("#")]
        for verdict, kind, caption, text in (line.split(" | ") for line in lines):
            print(f"{verdict} | {kind} | {digest(caption, text)}")
        return
    if arguments.source is None:
        parser.error("name the captions")
    before = {known for file in (JUDGED, PHOTOGRAPHS, COCO) for _, _, known in judged(file)}
    listed = edits(captions(arguments.source), arguments.seed, arguments.per_type)
    found = [each for each in listed if digest(*each[1:]) not in before]
    random.Random(arguments.seed).shuffle(found)
    for kind, caption, text in sorted(found[:NUMBER], key=lambda each: each[1:]):
        print(f"? | {kind} | {caption} | {text}")


if __name__ == "__main__":
    main()
