"""The comparison with other trainers, without them: formats say the same pairs, results are kept, failures and differences are named."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

TEXTS = {"0.png": ["a", "b", "c"], "1.png": ["d", "e", "f"]}
PAIRS = [
    {"image": image, "question": "What?", "prompt": "<user>What?<assistant>", "chosen": chosen, "rejected": other}
    for image, (chosen, *others) in TEXTS.items()
    for other in others
]


@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "benchmarks"))
        return importlib.import_module("peers")


def test_every_format_says_the_same_pairs(peers):
    wanted = [(pair["image"], pair["question"], pair["chosen"], pair["rejected"]) for pair in PAIRS]
    found = []
    for row in peers.swift_rows(PAIRS, Path("/data")):
        [user, answer], [image] = row["messages"], row["images"]
        assert (user["role"], answer["role"], image[:6]) == ("user", "assistant", "/data/")
        found.append((image[6:], user["content"].removeprefix("<image>"), answer["content"], row["rejected_response"]))
    assert found == wanted

    files = peers.llamafactory_files(PAIRS)
    info, found = files["dataset_info.json"]["pairs"], []
    named = {name: info["columns"][name] for name in ("messages", "chosen", "rejected", "images")}
    for row in files[info["file_name"]]:
        [turn], [image] = row[named["messages"]], row[named["images"]]
        answers = [row[named[name]] for name in ("chosen", "rejected")]
        assert [each["from"] for each in (turn, *answers)] == ["human", "gpt", "gpt"] and turn["value"].startswith("<image>")
        found.append((image, turn["value"].removeprefix("<image>"), *(each["value"] for each in answers)))
    assert found == wanted and info["ranking"] and info["formatting"] == "sharegpt"

    scores = [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]
    rows = peers.prefix_rows(PAIRS, scores)
    assert {row["image"]: row["texts"] for row in rows} == TEXTS and [row["reference"] for row in rows] == scores
    assert {row["prompt"] for row in rows} == {PAIRS[0]["prompt"]}


def result(peer: str, seconds: list[float], losses: list[float], **more: Any) -> dict[str, Any]:
    steps = [
        {"seconds": second, "reference_seconds": second / 4, "loss": loss, "peak": 500.0 + at}
        for at, (second, loss) in enumerate(zip(seconds, losses, strict=True))
    ]
    rows = [{"prompt": [1, 2], "scored": [3]}]
    found = {"peer": peer, "texts": 2, "plain": {"loss": 0.7}, "versions": {peer: "1.2"}, "memory": 400.0, "rows": rows, "steps": steps}
    return {**found, **more}


def test_the_table_leaves_the_warm_up_out_and_names_what_does_not_run(peers):
    results = [
        result("trl", [90.0, 8.0, 4.0, 6.0], [0.70001, 0.6, 0.5, 0.4]),
        {"peer": "ms-swift", "texts": 2, "error": "OSError: no a|b", "versions": {"ms-swift": "4.6.0"}},
        result("ours", [9.0, 2.0, 3.0, 1.0], [0.7, 0.6, 0.503, 0.4], versions={}),
        result("trl", [1.0, 1.0], [0.7, 0.7], texts=4),
    ]
    head, under, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in peers.table(results))
    assert {len(row) for row in (head, under, *rows)} == {len(head)}
    shown = dict(zip(head, rows[0], strict=True))
    assert list(shown.values()) == ["2", "trl 1.2", "6.00", "1.50", "3.00", "2.25", "503", "400", "0.700010", "1.0e-05", "3.0e-03"]
    assert rows[1][:3] == ["2", "ms-swift 4.6.0", "does not run: OSError: no a/b"]
    assert rows[2][1:5] == ["ours", "2.00", "0.50", "1.00"] and rows[3][4] == rows[3][5] == rows[3][-1] == ""


def test_losses_and_tokens_that_differ_are_named(peers):
    ours = result("ours", [1.0, 1.0], [0.70009, 0.6])
    failed = {"peer": "trl", "texts": 2, "error": "E", "versions": {}}
    other = [{"prompt": [1, 2], "scored": [3, 4]}]
    assert peers.disagreements([ours, failed]) == []
    off = peers.disagreements(
        [
            ours,
            result("trl", [1.0, 1.0], [0.7002, 0.6]),
            result("ms-swift", [1.0, 1.0], [float("nan"), 0.6]),
            result("llamafactory", [1.0, 1.0], [0.7, 0.6], rows=other),
            result("prefix-grouper", [1.0, 1.0], [0.7, 0.6002]),
        ]
    )
    assert [line.split(": ")[:2] for line in off] == [
        ["trl with 2 texts", "0.7002, but 0.7 with transformers only"],
        ["ms-swift with 2 texts", "nan, but 0.7 with transformers only"],
        ["llamafactory with 2 texts", "token ids of sequence 0"],
        ["prefix-grouper with 2 texts", "[0.7, 0.6002], but [0.70009, 0.6] with this package"],
    ]


def test_what_is_there_is_kept_and_a_failure_ends_nothing(peers, tmp_path, monkeypatch, capsys):
    asked = []

    def run(peer: str, *_: Any) -> dict[str, Any]:
        asked.append(peer)
        found = result(peer, [1.0, 1.0], [0.7, 0.6])
        return (
            {"error": "gone", "versions": {}} if peer == "trl" else {name: found[name] for name in ("versions", "memory", "rows", "steps")}
        )

    monkeypatch.setattr(peers, "run", run)
    monkeypatch.setattr(peers, "prepare", lambda *_: {"loss": 0.7})
    monkeypatch.setattr(sys, "argv", ["peers.py", "--texts", "2", "--out", str(tmp_path), "--peers", "trl", "ours"])
    peers.main()
    assert asked == ["trl", "ours"] and json.loads((tmp_path / "trl-2.json").read_text())["error"] == "gone"
    (tmp_path / "trl-2.json").unlink()
    peers.main()
    assert asked == ["trl", "ours", "trl"] and capsys.readouterr().out.count("does not run: gone") == 4


def test_a_trainer_that_is_not_there_says_so_by_itself(peers, tmp_path, monkeypatch):
    """In this environment, which has no ms-swift."""
    (tmp_path / "settings.json").write_text("{}")
    monkeypatch.setattr(peers.trl_dpo, "environment", lambda *_: sys.executable)
    found = peers.run("ms-swift", tmp_path, tmp_path, None)
    assert found["error"] == "ModuleNotFoundError: No module named 'swift'" and "torch" in found["versions"]

    def refuse(*_: Any) -> None:
        raise peers.trl_dpo.SideError("pip install: ERROR: no matching distribution")

    monkeypatch.setattr(peers.trl_dpo, "environment", refuse)
    assert peers.run("trl", tmp_path, tmp_path, None) == {"error": "pip install: ERROR: no matching distribution", "versions": {}}
