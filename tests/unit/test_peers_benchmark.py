"""The comparison with other trainers, without them: our step is DPO by the library's own forwards, formats say the same pairs, the table is
right by hand, and differences are named."""

from __future__ import annotations

import math
from typing import Any

import peers
import pytest


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
    ours = result("ours", [1.0, 1.0], [0.70009, 0.6])
    assert peers.disagreements([ours]) == []
    differing = {"trl": [0.7002, 0.6], "ms-swift": [float("nan"), 0.6], "llamafactory": [0.7, 0.6], "prefix-grouper": [0.7, 0.6002]}
    found = [result(peer, [1.0, 1.0], losses) for peer, losses in differing.items()]
    found[2]["rows"] = [{"prompt": [1, 2], "scored": [3, 4]}]
    found.append(result("trl", [1.0, 1.0], [0.7, 0.6]))
    found[-1]["steps"][0]["grad_norm"] = 3.001
    off = peers.disagreements([ours, *found])
    assert [line.split(" with")[0] for line in off] == [*differing, "trl"]
    assert all(word in line for word, line in zip(("0.7002", "nan", "sequence 0", "0.6002", "grad_norm"), off, strict=True))
