"""benchmarks/retrieval.py by hand: which captions are asked of a picture, and what recall at 1 is of a small matrix."""

from __future__ import annotations

from typing import Any

import pytest
import retrieval as bench

from cfvlm_ds.data.cfgroup import from_row


def row(name: str, key: str, *exclude: str, text: str = "") -> dict[str, Any]:
    images = [{"id": "i0", "path": f"{name}.png"}, {"id": "i1", "path": "other.png"}]
    return {"id": name, "prompt": f"What is {name}?", "images": images, "texts": [{"text": text or key, "key": key}], "exclude": [*exclude]}


def test_rows_with_a_caption_of_their_own_become_groups_of_all_captions(tmp_path):
    rows = bench.chosen([row("a", "x"), row("b", "x"), row("c", "y", text="x"), row("d", "z"), row("e", "w"), row("f", "v")], 3)
    assert [each["id"] for each in rows] == ["a", "d", "e"]
    groups = [from_row(each, tmp_path) for each in bench.groups(rows)]
    assert [[candidate.text for candidate in group.candidates] for group in groups] == [["x", "z", "w"], ["z", "x", "w"], ["w", "x", "z"]]
    assert all(group.match == ((1, None, None),) and {each.prompt for each in group.candidates} == {"What is a?"} for group in groups)
    for place, texts in enumerate(["xzw", "zxw", "wxz"]):
        assert "".join(bench.ordered([list(texts)], place)) == "xzw" == "".join(bench.ordered(list(texts), place))


def test_recall_by_hand():
    """Of three pictures: one is won but for language's wish for caption 1; a tie is wrong; another row's true caption is not asked."""
    logp = [[-5.0, -4.0, -9.0], [-8.0, -3.0, -3.0], [-6.0, -2.0, -2.5]]
    blank = [[-6.0, -1.0, -9.0]] * 3
    everything = [[True] * 3] * 3
    # texts: 0 loses to 1, 1 ties with 2, 2 loses to 1; less blank 1, -3, 0 | -2, -2, 6 | 0, -1, 6.5
    # images: -5 is first, -3 behind -2, -2.5 first
    assert bench.recalls(logp, blank, everything) == pytest.approx((0, 2 / 3, 2 / 3))
    asked = bench.takes_part([row("a", "x", "y"), row("b", "y"), row("c", "z", "y", "z")])
    assert asked == [[True, False, True], [True, True, True], [True, False, True]]
    assert bench.recalls(logp, blank, asked) == pytest.approx((2 / 3, 2 / 3, 1))
