"""Our side of the comparison with TRL, without TRL: its step equals DPO by the library's own forwards, and sides that differ are named."""

from __future__ import annotations

import math

import pytest
import trl_dpo

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.long
def test_our_side_computes_dpo_of_the_librarys_own_forwards(tmp_path):
    """Two images with two rejected texts each; transformers scores every text by itself, in a process that does not know this package."""
    settings = trl_dpo.Settings(rejected=2, pairs=4, visual=16, vocabulary=512, batch=4)
    trl_dpo.prepare(tmp_path / "data", settings, SIZE)
    ours = trl_dpo.Ours(tmp_path / "data", settings)
    tokens = ours.tokens()
    decoded = [ours.collator.processor.tokenizer.decode(each["scored"]) for each in tokens]
    texts = [[candidate.text for candidate in group.candidates] for group in ours.groups]
    pairs = [(first, other) for first, *others in texts for other in others]
    assert decoded == [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    assert all(chosen["prompt"] == rejected["prompt"] for chosen, rejected in zip(tokens[:4], tokens[4:], strict=True))
    plain, found = trl_dpo.unaided(tmp_path / "data", ours.groups, settings.beta), ours.step(0)
    assert (found["chosen"], found["rejected"]) == pytest.approx((plain["chosen"], plain["rejected"]), rel=1e-6)
    # A margin is a difference of four such sums of 440 nats, and beta / 2 is about the loss's derivative.
    assert found["loss"] == pytest.approx(plain["loss"], abs=settings.beta / 2 * 4 * 1e-6 * abs(plain["rejected"]))
    assert abs(plain["loss"] - math.log(2)) > 1e-3, "the reference is another model"
