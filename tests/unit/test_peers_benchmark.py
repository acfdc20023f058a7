"""The comparison with other trainers, without them: our step is DPO by the library's own forwards, formats say the same pairs, the table is
right by hand, and differences are named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peers
import pytest

TEXTS = {"0.png": ["a", "b", "c"], "1.png": ["d", "e", "f"]}
PAIRS = [
    {"image": image, "question": "What?", "prompt": "<user>What?<assistant>", "chosen": chosen, "rejected": other}
    for image, (chosen, *others) in TEXTS.items()
    for other in others
]


@pytest.mark.long
def test_our_side_computes_dpo_of_the_librarys_own_forwards(tmp_path, monkeypatch):
    """An image with three rejected texts; transformers scores every text by itself, in a process that does not know this package."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(peers, "SIZE", sizes)
    settings = peers.Settings(batch=3, steps=1, visual=16, vocabulary=512)
    plain = peers.prepare(tmp_path / "data", settings)
    ours = peers.Ours(tmp_path / "data", settings)
    tokens, [group] = ours.tokens(), ours.groups
    first, *others = [candidate.text for candidate in group.candidates]
    assert [ours.collator.processor.tokenizer.decode(each["scored"]) for each in tokens] == [first] * 3 + others
    assert len({tuple(each["prompt"]) for each in tokens}) == 1
    found = ours.step(0)
    assert (found["chosen"], found["rejected"]) == pytest.approx((plain["chosen"], plain["rejected"]), rel=1e-6)
    # A margin is a difference of four such sums of 440 nats, and beta / 2 is about the loss's derivative.
    assert found["loss"] == pytest.approx(plain["loss"], abs=settings.beta / 2 * 4 * 1e-6 * abs(plain["rejected"]))
    assert abs(plain["loss"] - math.log(2)) > 1e-3, "the reference is another model"


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


FIRST = {"chosen": -40.0, "rejected": -50.0, "grad_norm": 3.0}


def result(peer: str, seconds: list[float], losses: list[float], **more: Any) -> dict[str, Any]:
    steps = [
        {"seconds": second, "reference_seconds": second / 4, "loss": loss, "peak": 500.0 + at, **FIRST}
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
    found.append(result("trl", [1.0, 1.0], [0.7, 0.6]))
    found[-1]["steps"][0]["grad_norm"] = 3.001
    off = peers.disagreements([ours, *found])
    assert [line.split(" with")[0] for line in off] == [*differing, "trl"]
    assert all(word in line for word, line in zip(("0.7002", "nan", "sequence 0", "0.6002", "grad_norm"), off, strict=True))
