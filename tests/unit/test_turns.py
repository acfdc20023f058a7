"""A conversation with a group for every answer: what was said before is in a row once, and scores are those of each answer alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import caption, draw
from PIL import Image
from public_data import lines

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.conversation import messages
from cfvlm_ds.data import MAX_PIXELS, open_groups
from cfvlm_ds.models.forest_attention import stock_attention

SCENE = [("red", "circle"), ("blue", "square")]
SAID = [("what is in the image?", caption(SCENE)), ("which is red?", "a circle"), ("and blue?", "a square"), ("is it green?", "no")]


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa"), MAX_PIXELS).building("matched", None)


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """Four groups of one LLaVA row."""
    folder = tmp_path_factory.mktemp("turns")
    draw(folder / "a.png", SCENE)
    said = [{"from": who, "value": text} for turn in SAID for who, text in zip(("human", "gpt"), turn, strict=True)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    path = lines(folder / "rows.jsonl", [{"id": "a", "image": "a.png", "conversations": said}])
    groups = open_groups(path, format="llava:per_turn=true")
    assert len(groups) == len(SAID)
    return list(groups)


def test_what_was_said_before_is_in_a_row_once(collator, turns):
    """A row of all four has the last prompt and the four answers; in rows of their own the beginning is there four times."""
    batch, (size,) = collator(turns), {Image.open(turns[0].images[0][0]).size}
    encoded = [collator.prompts.encoded(each.candidates[0].prompt, each.candidates[0].text, 1, "x") for each in turns]
    for before, after in itertools.pairwise(encoded):
        assert after.prompt_ids[: len(before.prompt_ids)] == before.prompt_ids
    prompts = [collator.row_length(each.candidates[0].prompt, each.candidates[0].text, (size,)) for each in turns]
    answers = [each.length for each in encoded]
    assert batch.num_tokens == prompts[-1] - answers[-1] + sum(answers)
    alone = [collator([each]).num_tokens for each in turns]
    assert alone == prompts and sum(alone) > 2 * batch.num_tokens and batch.num_images == 1
    shown = batch.model_inputs["input_ids"].eq(collator.processor.image_token_id).sum()
    assert int(shown) == collator.visual_tokens((size,)), "the picture is there once"


def test_scores_are_those_of_each_answer_after_its_conversation(collator, turns, scorer):
    """Against the library's own forward of the whole conversation, rendered by the model's template: any order of the groups."""
    processor, image = collator.processor, Image.open(turns[0].images[0][0]).convert("RGB")
    expected = []
    for each in turns:
        prompt, text = each.candidates[0].prompt, each.candidates[0].text
        asked: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        asked = asked if isinstance(prompt, str) else messages(prompt)
        head = processor.apply_chat_template(asked, add_generation_prompt=True)
        start = processor(images=[image], text=[head], return_tensors="pt").input_ids.shape[1]
        inputs = processor(images=[image], text=[f"{head} {text}</s>"], return_tensors="pt")
        tokens = inputs.input_ids[0, start:]
        with stock_attention(scorer.model), torch.no_grad():
            logits = scorer.model(**inputs).logits
        logp = logits[0, start - 1 : -1].float().log_softmax(-1)[range(len(tokens)), tokens]
        expected.append(float(logp[:-1].sum()))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch = collator([turns[k] for k in order])
        with torch.no_grad():
            found = batch.scores(scorer(**batch.model_inputs)).logp[:, 0, 0]
        assert found.tolist() == pytest.approx([expected[k] for k in order], rel=1e-4)


def test_a_picture_at_two_places_is_shown_twice(collator, tmp_path, scorer):
    """One picture in the batch, and the score of the library's own forward, which is given it twice; between them another one."""
    draw(tmp_path / "a.png", SCENE)
    draw(tmp_path / "b.png", SCENE[::-1])
    said = ["<image>what is this?", "a circle", "and <image> here?", "a square", "and <image>?", "a circle"]
    talk = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
    row = {"images": ["a.png", "b.png", "a.png"], "messages": talk}
    (group,) = open_groups(lines(tmp_path / "rows.jsonl", [row]), format="messages")
    batch = collator([group])
    with torch.no_grad():
        found = batch.scores(scorer(**batch.model_inputs)).logp.item()
    processor, prompt = collator.processor, group.candidates[0].prompt
    assert not isinstance(prompt, str) and batch.num_images == 2
    head = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
    shown = [Image.open(picture).convert("RGB") for picture in group.images[0]]
    start = processor(images=shown, text=[head], return_tensors="pt").input_ids.shape[1]
    inputs = processor(images=shown, text=[f"{head} a circle</s>"], return_tensors="pt")
    tokens = inputs.input_ids[0, start:-1]
    with stock_attention(scorer.model), torch.no_grad():
        logp = scorer.model(**inputs).logits[0, start - 1 :].float().log_softmax(-1)
    assert found == pytest.approx(float(logp[range(len(tokens)), tokens].sum()), rel=1e-4)
