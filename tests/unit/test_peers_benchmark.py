"""The comparison with other trainers, without them: formats say the same pairs, the table is right by hand, differences are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers

TEXTS = {"0.png": ["a", "b", "c"], "1.png": ["d", "e", "f"]}
PAIRS = [
    {"image": image, "question": "What?", "prompt": "<user>What?<assistant>", "chosen": chosen, "rejected": other}
    for image, (chosen, *others) in TEXTS.items()
    for other in others
]


def test_every_format_says_the_same_pairs():
    wanted = [("/data/" + pair["image"], "<image>What?", pair["chosen"], pair["rejected"]) for pair in PAIRS]
    rows = peers.swift_rows(PAIRS, Path("/data"))
    assert all([each["role"] for each in row["messages"]] == ["user", "assistant"] for row in rows)
    assert [(*row["images"], *(each["content"] for each in row["messages"]), row["rejected_response"]) for row in rows] == wanted

    files = peers.llamafactory_files(PAIRS)
    info, found = files["dataset_info.json"]["pairs"], []
    for row in files[info["file_name"]]:
        [turn], chosen, rejected, [image] = (row[info["columns"][name]] for name in ("messages", "chosen", "rejected", "images"))
        assert [each["from"] for each in (turn, chosen, rejected)] == ["human", "gpt", "gpt"]
        found.append((f"/data/{image}", turn["value"], chosen["value"], rejected["value"]))
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


def test_losses_and_tokens_that_differ_are_named():
    ours, failed = result("ours", [1.0, 1.0], [0.70009, 0.6]), {"peer": "trl", "texts": 2, "error": "E", "versions": {}}
    assert peers.disagreements([ours, failed]) == []
    differing = {"trl": [0.7002, 0.6], "ms-swift": [float("nan"), 0.6], "llamafactory": [0.7, 0.6], "prefix-grouper": [0.7, 0.6002]}
    found = [result(peer, [1.0, 1.0], losses) for peer, losses in differing.items()]
    found[2]["rows"] = [{"prompt": [1, 2], "scored": [3, 4]}]
    off = peers.disagreements([ours, *found])
    assert [line.split(" with")[0] for line in off] == list(differing)
    assert all(word in line for word, line in zip(("0.7002", "nan", "sequence 0", "0.6002"), off, strict=True))
