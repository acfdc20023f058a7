"""Captions that nobody here wrote: what the rules propose of them, against verdicts of readers."""

from __future__ import annotations

import subprocess

import pytest
from stamps import JUDGED, captions, digest, edits, judged

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
