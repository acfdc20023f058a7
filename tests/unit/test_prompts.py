"""Prompts and answers as ids: what the model's own processor and tokenizer give for the same conversation, for every family."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.batching.prompts import Prompts
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import PICTURE, Candidate, CounterfactualGroup, Prompt, Turn
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.demo.family_checkpoints import SMALL
from cfvlm_ds.models import family_of

PROMPT, TEXT = "describe the image.", "a red circle"
SIZES = [(60, 40), (90, 30)]


def make(model_type: str) -> Collator:
    config, processor = SMALL[model_type](model_type)
    return Collator(processor, family_of(config), config, 4096, MAX_PIXELS, None)


@pytest.fixture(params=list(SMALL))
def collator(request):
    return make(request.param)


def adds(tokenizer: Any, bos: str) -> None:
    """Have the tokenizer put ``bos`` before every text, as Llama's does."""
    tokenizer.bos_token = bos
    post = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))])
    tokenizer.backend_tokenizer.post_processor = post


def librarys(processor: Any, images: list[Image.Image], *answer: str, **options: Any) -> list[int]:
    """The ids of the processor's own apply_chat_template, placeholders of images expanded."""
    asked = spoken((Turn("user", (*[PICTURE] * len(images), PROMPT)),), images, *answer)
    found = processor.apply_chat_template(
        asked, add_generation_prompt=not answer, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    return found["input_ids"][0].tolist()


def ours(
    collator: Collator, images: list[Image.Image], folder: Path, text: str = TEXT, prompt: Prompt = PROMPT
) -> tuple[list[int], list[int], list[int]]:
    """Prompt, text and end-of-turn of the row that the collator builds."""
    files = [folder / f"{k}.png" for k in range(len(images))]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    batch = collator([CounterfactualGroup("g", (tuple(files),), (Candidate(prompt, text),), ((1,),))])
    prefix, branch = batch.model_inputs["forest"].lengths
    ids = batch.model_inputs["input_ids"][0].tolist()
    assert len(ids) == prefix + branch and batch.model_inputs["targets"].tolist() == ids[prefix:]
    ends = int(batch.is_end.sum())
    return ids[:prefix], ids[prefix : len(ids) - ends], ids[len(ids) - ends :]


def begins(processor: Any, whole: list[int], row: list[int]) -> bool:
    """Whether a conversation begins with a row; one that ends with its answer, as GLM's do, lacks the row's end of turn."""
    return whole[: len(row)] == row or [*whole, processor.tokenizer.eos_token_id] == row


@pytest.mark.parametrize("bos", ["as the family has it", "added", "written and added"])
def test_ids_are_those_of_the_library(bos, collator, tmp_path):
    """With no image, one, and two in one prompt; whatever of template and tokenizer gives the conversation its first token."""
    processor = collator.processor
    if bos != "as the family has it":
        first = processor.tokenizer.bos_token or "<|endoftext|>"
        processor.chat_template = first * (bos == "written and added") + processor.chat_template.removeprefix(first)
        adds(processor.tokenizer, first)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in SIZES]
    for shown in ([], images[:1], images):
        prompt, text, end = ours(collator, shown, tmp_path)
        assert prompt == librarys(processor, shown)
        whole = librarys(processor, shown, TEXT)
        row = [*prompt, *text, *end]
        assert begins(processor, whole, row) and processor.tokenizer.decode(whole[len(row) :]).strip() == ""
        assert processor.tokenizer.decode(text).strip() == TEXT
        if bos != "as the family has it":
            assert prompt.count(processor.tokenizer.bos_token_id) == 1 == [*prompt, *text].count(processor.tokenizer.bos_token_id)
        if bos == "written and added" and not shown:
            messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
            options = {"chat_template": processor.chat_template, "add_generation_prompt": True, "return_dict": False}
            assert prompt == processor.tokenizer.apply_chat_template(messages, tokenize=True, **options)


def test_control_tokens_are_refused_in_prompts_and_texts(collator):
    """All that the tokenizer knows, those included that it does not list among its own special ones."""
    tokenizer = collator.processor.tokenizer
    tokenizer.add_tokens([AddedToken("<|start_header_id|>", special=True)], special_tokens=True)
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {tokenizer.unk_token}
    assert len(tokens) > 3
    prompts = Prompts(collator.processor, 4096)
    for token in sorted(tokens):
        for prompt, text, what in (
            (f"Is it {token} red?", "yes", "its prompt"),
            (token, "yes", "its prompt"),
            (PROMPT, f"yes {token}.", ""),
        ):
            with pytest.raises(DataError) as raised:
                prompts.encoded(prompt, text, 1, "group 'g': text 0")
            if token != collator.processor.image_token:
                assert f"{token!r}" in str(raised.value) and what in str(raised.value)
    prompts.encoded(f"{PROMPT} <end> [INST_] < s > <|im|>", "yes", 1, "g")
    for pictures in (0, 1, 2):  # a string is the one turn of the user that says so
        turn = Turn("user", (PICTURE,) * pictures + (PROMPT,))
        assert prompts.encoded(PROMPT, TEXT, pictures, "g") == prompts.encoded((turn,), TEXT, pictures, "g")


def test_a_prompt_opens_no_turn_of_its_own():
    """Nor has it a token that the model does not know, as of a tokenizer to which words were added, and to the model none."""
    prompts = make("qwen2_5_vl").prompts
    for place in range(4):
        turns = list(CHATS["a picture in every turn"])
        turns[place] = Turn(turns[place].role, (*turns[place].parts, "no<|im_end|>"))
        with pytest.raises(DataError, match=r"its prompt \('no<\|im_end\|>'\)"):
            prompts.encoded(tuple(turns), TEXT, 4, "g")
    number = len(prompts.processor.tokenizer)
    prompts.processor.tokenizer.add_tokens(["zyzzyva"])
    prompts.encoded(PROMPT, "a cat", 0, "text 0")
    with pytest.raises(DataError, match=rf"^text 0 \('a zyzzyva'\) .*'zyzzyva' has id {number} in .* has only {number} tokens; "):
        prompts.encoded(PROMPT, "a zyzzyva", 0, "text 0")


# ---- conversations

SYSTEM, USER = Turn("system", ("answer in one word.",)), Turn("user", ("a",))
CHATS = {
    "one turn, pictures among the words": (Turn("user", ("left:", PICTURE, "and right:", PICTURE, "which is red?")),),
    "system": (SYSTEM, Turn("user", (PICTURE, PROMPT))),
    "earlier turns": (Turn("user", (PICTURE, PROMPT)), Turn("assistant", ("a circle",)), Turn("user", ("is it red?",))),
    "a picture in every turn": (
        SYSTEM, Turn("user", (PICTURE, PROMPT)), Turn("assistant", ("a circle",)), Turn("user", ("and this?", PICTURE)),
        Turn("assistant", ("a square",)), Turn("user", (PICTURE, "two", PICTURE)),
    ),
    "no picture": (Turn("user", (PROMPT,)), Turn("assistant", ("no.",)), Turn("user", ("why?",))),
}  # fmt: skip
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def spoken(turns: tuple[Turn, ...], images: list[Image.Image], *answer: str) -> list[dict[str, Any]]:
    left = iter(images)
    said = [
        {"role": role, "content": [{"type": "image", "image": next(left)} if p is PICTURE else {"type": "text", "text": p} for p in parts]}
        for role, parts in turns
    ]
    return [*said, *({"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answer)]


@pytest.mark.parametrize("case", CHATS)
def test_a_conversation_has_the_ids_of_the_library(case, collator, tmp_path):
    """Prompt, answer and pictures of the row that the collator builds; pictures of other sizes, so that their order shows."""
    processor, turns = collator.processor, CHATS[case]
    sizes = [(60, 40), (90, 30), (40, 60), (28, 84)][: sum(part is PICTURE for turn in turns for part in turn.parts)]
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    prompt, text, end = ours(collator, images, tmp_path, prompt=turns)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template(spoken(turns, images), add_generation_prompt=True, **options)
    whole = processor.apply_chat_template(spoken(turns, images, TEXT), **options)
    row = [*prompt, *text, *end]
    assert prompt == asked["input_ids"][0].tolist() and begins(processor, whole["input_ids"][0].tolist(), row)
    assert processor.tokenizer.decode(text).strip() == TEXT and len(end) == 1
    assert collator.row_length(turns, TEXT, tuple(sizes)) == len(row)
    if images:
        files = [tmp_path / f"{k}.png" for k in range(len(images))]
        batch = collator([CounterfactualGroup("g", (tuple(files),), (Candidate(turns, TEXT),), ((1,),))])
        shown, expected = (found[found != 0] for found in (batch.model_inputs["image_inputs"]["pixel_values"], asked["pixel_values"]))
        assert torch.equal(shown, expected), "the pictures in the order in which they are named, padding aside"


def test_a_later_turn_goes_on_from_the_earlier_ones(tmp_path):
    """A group may ask several things of a picture, each after what was said before: the picture and its first question are there once."""
    collator = make("qwen2_5_vl")
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "a.png")
    first = CHATS["earlier turns"][:1]
    asked = (Candidate(first, "a circle"), Candidate(CHATS["earlier turns"], "yes"), Candidate(CHATS["earlier turns"], "no"))
    batch = collator([CounterfactualGroup("g", ((tmp_path / "a.png",),), asked, ((1, 1, 0),))])
    assert batch.num_images == 1 and batch.model_inputs["forest"].parents == (-1, 0, 0, 2, 2)


def test_a_template_that_takes_no_system_says_so_in_one_sentence(collator):
    collator.processor.chat_template = REFUSES_SYSTEM + collator.processor.chat_template
    with pytest.raises(DataError) as raised:
        collator.prompts.encoded(CHATS["system"], TEXT, 1, "group 'g': text 0")
    assert str(raised.value).startswith("group 'g': text 0 ('a red circle')") and "(System role not supported)" in str(raised.value)
    assert collator.prompts.encoded(CHATS["system"][1:], TEXT, 1, "g").text_ids


def test_a_template_that_is_silent_about_a_turn_is_refused():
    """What the data say and the model never sees is no small thing."""
    collator = make("llava_onevision")
    collator.processor.chat_template = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + str(
        collator.processor.chat_template
    )
    with pytest.raises(DataError, match=r"system turn 'answer in one word.'"):
        collator.prompts.encoded(CHATS["system"], TEXT, 1, "g")
    collator.processor.chat_template = "{% set messages = messages[-2:] %}" + collator.processor.chat_template
    with pytest.raises(DataError, match=r"0 of 1 pictures|the user turn"):
        collator.prompts.encoded(CHATS["earlier turns"], TEXT, 1, "g")


@pytest.mark.parametrize(
    ("turns", "pictures", "said"),
    [
        ((), 0, "no turn"),
        ((USER, Turn("assistant", ("b",))), 0, "the assistant"),
        ((Turn("tool", ("a",)), USER), 0, "turn 1 .*'tool'"),
        ((USER, SYSTEM, USER), 0, "turn 2 .* system"),
        ((USER, Turn("assistant", (" ",)), USER), 0, "turn 2 .* empty"),
        ((Turn("user", (PICTURE, "a", PICTURE)),), 1, "2 pictures"),
        ((USER,), 1, "0 pictures"),
        ((USER, Turn("assistant", ("b",))) * 600 + (USER,), 0, "1201 turns.*1024"),
    ],
)
def test_a_conversation_that_cannot_be_answered(turns, pictures, said):
    with pytest.raises(DataError, match=f"group 'g': .*{said}"):
        CounterfactualGroup("g", ((Path("a.png"),) * pictures,), (Candidate(turns, "x"),), ((1,),))


# ---- models that think

TURNS = """{%- macro said(content) %}{% for part in content %}{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' }}
{{- part.text if part.type == 'text' }}{% endfor %}{% endmacro %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}THOUGHT{% endif %}
{{- said(message.content) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}ASKED{% endif %}"""
EMPTY, OPEN = "{{- '<think>\\n\\n</think>\\n\\n' }}", "{{- '<think>\\n' }}"
SWITCHED = "{%- if enable_thinking is defined and enable_thinking is false %}" + EMPTY
THINKING = {
    "always, empty where an answer is given": (EMPTY, OPEN),  # as Qwen3-VL-Thinking
    "always, unless told": ("", SWITCHED + "{%- else %}" + OPEN + "{%- endif %}"),  # as Qwen3.5
    "by itself, unless told": (EMPTY, SWITCHED + "{%- endif %}"),  # as Qwen3
    "by itself, and answers keep none": ("", SWITCHED + "{%- endif %}"),
}


def thinking(thought: str, asked: str) -> Collator:
    collator = make("qwen3_vl")
    collator.processor.tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    collator.prompts = Prompts(collator.processor, 4096, collator.family.around)  # of a model that has them
    collator.processor.chat_template = TURNS.replace("THOUGHT", thought).replace("ASKED", asked)
    return collator


@pytest.mark.parametrize("case", THINKING)
def test_a_model_that_thinks_answers_after_an_empty_thought(case, tmp_path):
    """The prompt ends with it, as the model's own mode without thinking writes it, and what is scored is the text and nothing else."""
    collator = thinking(*THINKING[case])
    processor, tokenizer = collator.processor, collator.processor.tokenizer
    images = [Image.effect_noise(SIZES[0], 90).convert("RGB")]
    for text in (TEXT, "think", "yes", "a", "\u00e9 <b>"):
        prompt, answer, end = ours(collator, images, tmp_path, text)
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(end) == "<|im_end|>"
        if "told" in case or "itself" in case:
            assert prompt == librarys(processor, images, enable_thinking=False)
        if THINKING[case][0] == EMPTY:
            whole = librarys(processor, images, text)
            assert whole[: len(prompt) + len(answer) + 1] == [*prompt, *answer, *end]
    collator.prompts.check("m")
    assert collator.row_length(PROMPT, TEXT, tuple(SIZES[:1])) == sum(map(len, ours(collator, images, tmp_path)))


def test_a_switch_that_writes_no_empty_thought_is_not_used(tmp_path):
    collator = thinking("", "{%- if enable_thinking is defined and enable_thinking is false %}{{- '/no_think' }}{%- endif %}")
    assert ours(collator, [], tmp_path)[0] == librarys(collator.processor, [])


def test_thoughts_of_earlier_turns_are_what_the_template_makes_of_them(tmp_path):
    """As for every user of that model: here, as in Qwen3's, a thought of an earlier turn is dropped, and the answer has an empty one."""
    collator = thinking(*THINKING["by itself, unless told"])
    collator.processor.chat_template = collator.processor.chat_template.replace(
        "said(message.content) +", "(said(message.content)).split('</think>')[-1] +"
    )
    turns = (Turn("user", (PROMPT,)), Turn("assistant", ("<think>hm</think>a circle",)), Turn("user", ("red?",)))
    prompt, _, _ = ours(collator, [], tmp_path, prompt=turns)
    expected = collator.processor.apply_chat_template(
        spoken(turns, []), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", enable_thinking=False
    )
    assert prompt == expected["input_ids"][0].tolist() and "hm" not in collator.processor.tokenizer.decode(prompt)
    collator.prompts.encoded(PROMPT, TEXT, 1, "text 0")
    with pytest.raises(DataError, match="does not follow its prompt"):
        collator.prompts.encoded(PROMPT, "a thought </think> a circle", 1, "text 0")


def test_a_thought_that_cannot_be_left_out_is_named(tmp_path):
    """Once for the model, and for a group."""
    collator = thinking("", OPEN)
    with pytest.raises(ConfigError, match=r"model 'm': .*<think>"):
        collator.prompts.check("m")
    with pytest.raises(DataError, match=r"text 0 .*<think>"):
        collator.prompts.encoded(PROMPT, TEXT, 1, "group 'g': text 0")


# ---- pictures that a processor cannot take


@pytest.mark.parametrize(("model_type", "max_tokens"), [("qwen2_5_vl", None), ("llava_onevision", 4096)])
def test_what_a_processor_raises_names_file_and_group(model_type, max_tokens, tmp_path, monkeypatch):
    """The processor's own limit, here one that is lower than that of the data; under ``skip`` the rest of the batch is used."""
    collator = make(model_type)
    take = type(collator.processor.image_processor).preprocess

    def narrow(self, images, *args, **options):
        flat = [image for sample in images for image in (sample if isinstance(sample, list) else [sample])]
        for image in flat:
            if max(image.size) > 20 * min(image.size):
                raise ValueError(f"absolute aspect ratio must be smaller than 20, got {max(image.size) / min(image.size)}")
        return take(self, images, *args, **options)

    monkeypatch.setattr(type(collator.processor.image_processor), "preprocess", narrow)
    files = [tmp_path / name for name in ("good.png", "long.png", "other.png")]
    for file, size in zip(files, ((60, 40), (630, 30), (40, 60)), strict=True):
        Image.effect_noise(size, 90).convert("RGB").save(file)
    texts = (Candidate(PROMPT, "a red circle"), Candidate(PROMPT, "two blue squares"))
    good = CounterfactualGroup("good", ((files[0],), (files[2],)), texts, ((1, 0), (0, 1)))
    bad = replace(good, id="bad", images=((files[2],), (files[1],)))
    together = replace(good, id="together", images=((files[0], files[1]), (files[2], files[1])))
    for group in (bad, together):
        with pytest.raises(DataError) as raised:
            collator.parts([good, group], max_tokens)
        assert re.match(f"group {group.id!r}: {files[1]}: .*630x30 .*ValueError: absolute aspect", str(raised.value))
        found = collator.without_unreadable([good, group], max_tokens)
        assert found.dropped == ((group.id, str(raised.value)),) and found.layout.ids == ("good",) and len(found.forwards) == 1
        expected = collator.parts([good], max_tokens)[0]
        assert torch.equal(found.forwards[0].model_inputs["input_ids"], expected.model_inputs["input_ids"])
        sizes = {files[0]: (60, 40), files[1]: (630, 30), files[2]: (40, 60)}
        with pytest.raises(DataError, match=f"group '{group.id}': {files[1]}: .*630x30"):
            collator.group_tokens(group, sizes)
    with pytest.raises(DataError, match="630x30"):
        collator.visual_tokens(((630, 30),))


def test_a_text_that_brings_the_tokenizer_down_is_named(monkeypatch):
    """What libraries in Rust raise is no Exception, and would pass every handler of one."""

    class PanicException(BaseException):
        pass

    class Fragile:
        def __init__(self, whole):
            self.whole = whole

        def __getattr__(self, name):
            return getattr(self.whole, name)

        def __call__(self, text, **options):
            if "red" in text:
                raise PanicException("index out of bounds")
            return self.whole(text, **options)

    collator = make("llava")
    monkeypatch.setattr(collator.processor, "tokenizer", Fragile(collator.processor.tokenizer))
    prompts = Prompts(collator.processor, collator.max_length)
    assert prompts.encoded(PROMPT, "a blue square", 1, "group 'g': text 0").text_ids
    for prompt, text in ((PROMPT, "a red circle"), ("Is it red?", "a blue square")):
        with pytest.raises(DataError, match=r"^group 'g': text 1 \('a .*'\) .*PanicException"):
            prompts.encoded(prompt, text, 1, "group 'g': text 1")
