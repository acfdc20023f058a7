"""Captions that nobody here wrote: what the rules propose of them, against verdicts of readers."""

from __future__ import annotations

import re
import subprocess

import pytest
from stamps import COCO, JUDGED, PHOTOGRAPHS, captions, digest, edits, judged

PACKAGE = "tuxpaint-stamps-default"


@pytest.mark.long
def test_of_captions_that_nobody_here_wrote_what_is_proposed_is_right(tmp_path):
    """95 % of what was judged and is still proposed. The rules were mended with the list, so it guards against change: what they are worth
    is the share of a fresh list. Downloads 80 MB."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    (package,) = tmp_path.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), "stamps"], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    found = {(kind, digest(caption, text)) for kind, caption, text in edits(captions(tmp_path / "stamps"), 0, per_type=99)}
    still = [verdict for verdict, kind, known in judged(JUDGED) if (kind, known) in found]
    right = sum(verdict == "right" for verdict in still)
    print(f"{right} of {len(still)} that are still proposed are right")
    assert len(still) >= 200 and right / len(still) >= 0.95


@pytest.mark.parametrize("file", [PHOTOGRAPHS, COCO], ids=lambda file: file.stem)
def test_what_is_said_of_a_list_is_what_it_holds(file):
    """Of each list of photographs' captions, how many edits were right, and that no edit was judged twice."""
    lists = re.split(r"^# List \d+, ", file.read_text(), flags=re.MULTILINE)[1:]
    for text in lists:
        head, *lines = text.splitlines()
        said = re.fullmatch(r"of .+: (\d+) of (\d+) right \((.+) %\)\.", head)
        assert said is not None and len(lines) == int(said[2]) >= 200, head
        assert sum(line.startswith("right | ") for line in lines) == int(said[1]), head
        assert f"{100 * int(said[1]) / int(said[2]):.1f}" == said[3], head
    known = [edit for other in (PHOTOGRAPHS, COCO) for _, _, edit in judged(other)]
    assert len(lists) == {PHOTOGRAPHS: 7, COCO: 4}[file] and len(known) == len(set(known))
