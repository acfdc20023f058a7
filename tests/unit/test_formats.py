"""Data as other projects publish it: every row becomes the group that it says, wherever its pictures are, and bad rows are named."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_json
from public_data import PUBLIC, lines, llava_row, picture, preference_trl_row, trl_row, write_pictures

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import PICTURE, Candidate, Turn
from cfvlm_ds.data import check_manifest, open_groups, read_manifest, sound_groups
from cfvlm_ds.data.cfgroup import from_row, to_row
from cfvlm_ds.data.convert import convert
from cfvlm_ds.data.formats import FORMATS, format_named

ROWS = 80  # more than a batch of rows, and than a part of a Parquet file


def contents(path: Path) -> bytes:
    """The bytes of a picture, naively."""
    file, at, place = str(path).partition("#")
    whole = Path(file).read_bytes()
    start, _, length = place.partition("+")
    return whole[int(start) : int(start) + int(length)] if at else whole


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_are_groups(name, tmp_path, monkeypatch):
    """Rows in the order of the file; ``auto`` takes the same format where columns have the usual names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write, said = PUBLIC[name]
    (tmp_path / "data").mkdir()
    path, format = write(tmp_path / "data", ROWS)
    groups = read_manifest(path, format=format)
    assert len(groups) == ROWS == len({group.id for group in groups})
    known = [picture(k) for k in range(12)]
    for k, group in enumerate(groups):
        shown = tuple(tuple(known.index(contents(each)) for each in image) for image in group.images)
        found = shown, tuple(each.prompt for each in group.candidates), tuple(each.text for each in group.candidates), group.match
        assert found == said(k), f"row {k}"
    if ":" not in format or ":label=" in format:
        assert open_groups(path, format="auto").format == format and read_manifest(path, format="auto") == groups
    again = [from_row(json.loads(json.dumps(to_row(group, Path("/")))), Path("/")) for group in groups]
    assert again == groups, "as cfgroup they are the same groups"


@pytest.mark.parametrize("format", ["llava", "messages"])
def test_a_group_for_every_answer(format, tmp_path):
    """Behind what was said before, with the pictures that were shown by then."""
    write_pictures(tmp_path)
    pictures = [f"images/00{k}.png" for k in range(3)]
    said = ["<image>first?", "one", "<image>and <image>?", "two", "third?", "three"]
    who = ("human", "gpt") if format == "llava" else ("user", "assistant")
    keys = ("from", "value") if format == "llava" else ("role", "content")
    turns = [dict(zip(keys, (who[k % 2], text), strict=True)) for k, text in enumerate(said)]
    row = {"id": "a", "images": pictures, ("conversations" if format == "llava" else "messages"): turns}
    path = lines(tmp_path / "rows.jsonl", [row, row | {"id": "b"}])
    groups = read_manifest(path, format=f"{format}:per_turn=true")
    assert [len(group.images[0]) for group in groups] == [1, 3, 3] * 2
    assert [group.candidates[0].text for group in groups] == ["one", "two", "three"] * 2
    assert groups[0].candidates[0].prompt == "first?"
    second = (Turn("user", (PICTURE, "first?")), Turn("assistant", ("one",)), Turn("user", (PICTURE, "and ", PICTURE, "?")))
    assert groups[1].candidates[0].prompt == second and len({group.id for group in groups}) == 6
    (last,) = [group for group in read_manifest(path, format=format) if '"b"' in group.meta or group.id.startswith("b")]
    assert last.candidates == groups[5].candidates and last.images == groups[5].images
    assert format_named(f"{format}:per_turn=true", "x").parts(row) == 3 and format_named(format, "x").parts is None  # type: ignore[attr-defined]


def example(name: str) -> dict[str, Any]:
    """The row that ``data formats`` prints for a format."""
    described = sys.modules[FORMATS[name].__module__].__doc__ or ""
    return json.JSONDecoder().raw_decode(described[described.index("{") :])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FORMATS)
def test_the_printed_example_of_a_format_is_recognised_by_its_keys(name, tmp_path):
    """Behind a broken row, and one that is not an object, each of which is a problem of its own."""
    if name == "hf":
        (format,) = re.findall(r"hf:image\S+", sys.modules[FORMATS[name].__module__].__doc__ or "")
        (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [example(name)]), format=format)
        assert group.match == ((1, 0, 0),)
        return
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id"\n7\n' + json.dumps(example(name)) + "\n")
    said = []
    store = open_groups(path, progress=said.append)
    assert store.format == name and said == [f"{path}: read as jsonl, format {name}"] * (name != "cfgroup")
    assert [isinstance(entry, DataError) for _, entry in store.entries()] == [True, True, False]
    assert store[2] == read_manifest(lines(path, [example(name)]), format=name)[0] and store[2].match[0][0] == 1


USER, GOOD_ANSWER, BAD_ANSWER = ({"role": who, "content": said} for who, said in (("user", "a?"), ("assistant", "b"), ("assistant", "c")))
ASKED = (("user", ("a?",)),)
CHATS = [
    ("messages", {"prompt": "a?", "completion": "b"}, 0, ASKED, ["b"]),
    ("messages", {"prompt": [USER], "completion": [GOOD_ANSWER]}, 0, ASKED, ["b"]),
    ("preference", {"chosen": [USER, GOOD_ANSWER], "rejected": [USER, BAD_ANSWER]}, 0, ASKED, ["b", "c"]),
    ("preference", {"prompt": [USER], "chosen": [USER, GOOD_ANSWER], "rejected": [BAD_ANSWER]}, 0, ASKED, ["b", "c"]),
    ("preference", {"instruction": "a?", "input": "", "chosen": "b", "rejected": "c"}, 0, ASKED, ["b", "c"]),
    ("preference", {"messages": [USER, GOOD_ANSWER], "rejected_messages": [USER, BAD_ANSWER]}, 0, ASKED, ["b", "c"]),
    # TRL and ms-swift need no <image>
    ("messages", {"messages": [{"role": "system", "content": "s"}, USER, GOOD_ANSWER]}, 2,
     (("system", ("s",)), ("user", (PICTURE, PICTURE, "a?"))), ["b"]),
    ("messages", {"query": "c?", "response": "d", "history": [["a?", "b"]], "system": "s"}, 1,
     (("system", ("s",)), ("user", (PICTURE, "a?")), ("assistant", ("b",)), ("user", ("c?",))), ["d"]),
    # LLaMA-Factory's own demo file
    ("messages", {"messages": [USER | {"content": "<image>a?"}, GOOD_ANSWER, USER | {"content": "c?<image>"}, BAD_ANSWER]}, 2,
     (("user", (PICTURE, "a?")), ("assistant", ("b",)), ("user", ("c?", PICTURE))), ["c"]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CHATS)))
def test_a_chat_row_is_its_turns_and_answers(case, tmp_path):
    format, row, pictures, turns, answers = CHATS[case]
    write_pictures(tmp_path)
    path = lines(tmp_path / "rows.jsonl", [row | ({"images": [IMAGE] * pictures} if pictures else {})])
    store = open_groups(path)
    (group,) = store
    prompt = "a?" if turns == ASKED else tuple(Turn(*turn) for turn in turns)
    assert store.format == format and [*group.candidates] == [Candidate(prompt, answer) for answer in answers] and not group.meta
    assert group.images == ((tmp_path / IMAGE,) * pictures,) and from_row(to_row(group, tmp_path), tmp_path) == group


def test_a_conversation_shows_the_picture_of_any_usual_column(tmp_path):
    """As captions do; pictures that a message names itself are shown, and the column is metadata."""
    write_pictures(tmp_path)
    for row in (talk("a?", "b"), CHAT | {"messages": [{"role": "user", "content": "a?"}, *CHAT["messages"][1:]]}, CHOICE):
        said = {key: value for key, value in row.items() if key not in ("image", "images")}
        for column in ("file_name", "image_path"):
            (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [said | {column: IMAGE}]))
            assert group.images == ((tmp_path / IMAGE,),) and column not in group.meta
    named = parts({"type": "image", "image": IMAGE}, {"type": "text", "text": "a?"}) | {"file_name": "images/001.png"}
    (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [named]))
    assert group.images == ((tmp_path / IMAGE,),) and json.loads(group.meta) == {"file_name": "images/001.png"}


# ---- labels


def vsr_row(k: int, said: str, label: object) -> dict[str, Any]:
    return {
        "image": f"images/{k:03d}.png", "image_link": f"http://images.cocodataset.org/train2017/{k}.jpg", "caption": said, "label": label,
        "relation": f"relation {said[-1]}", "annotator_id": 1, "vote_true_validator_id": [1], "vote_false_validator_id": [],
    }  # fmt: skip


def test_labelled_captions_are_groups_of_a_picture(tmp_path):
    """As VSR has them, in any order: true texts first, every text under its own label, an empty picture and a contradiction by name."""
    write_pictures(tmp_path)
    said = {(k, f"The cat is here {j}"): (k + j) % 3 != 0 for k in range(12) for j in range(k % 4 + 1)}
    rows = [vsr_row(k, text, int(label)) for (k, text), label in said.items()]
    random.Random(0).shuffle(rows)
    path = lines(tmp_path / "vsr.jsonl", rows + rows[:5])
    with pytest.raises(DataError, match=r"vsr.jsonl:1: .*'label'.* label=label .* ignore=label"):
        read_manifest(path, format="auto")
    assert all(group.match == ((1,),) for group in read_manifest(lines(tmp_path / "i.jsonl", rows), format="captions:ignore=label"))
    store = open_groups(path, format="captions:label=label,edit=relation")
    order = list(dict.fromkeys(row["image"] for row in rows))
    assert len(store) == len(order) == 12
    for image, (index, group) in zip(order, store.entries(), strict=True):
        expected = {text: int(label) for (k, text), label in said.items() if f"images/{k:03d}.png" == image}
        if not any(expected.values()):
            first = next(n for n, row in enumerate(rows, 1) if row["image"] == image)
            assert isinstance(group, DataError) and re.match(
                rf"{path}:{first}: .*{image} .*[(]{sum(row['image'] == image for row in rows + rows[:5])} rows?[)]", str(group)
            )
            continue
        assert group.images == ((tmp_path / image,),) and store.where(index) == f"{path}:{1 + [row['image'] for row in rows].index(image)}"
        texts = [each.text for each in group.candidates]
        assert dict(zip(texts, group.match[0], strict=True)) == expected and list(group.match[0]) == sorted(group.match[0], reverse=True)
        assert {each.prompt for each in group.candidates} == {"Describe the image."}
        assert [(each.type, each.text) for each in group.edits] == [
            (f"relation {text[-1]}", c) for c, text in enumerate(texts) if not expected[text]
        ]
    report = check_manifest(path, format="captions:label=label", progress=str)
    assert report.num_false_cells == sum(group.match[0].count(0) for _, group in store.entries() if not isinstance(group, DataError)) > 0
    twice = lines(tmp_path / "twice.jsonl", [vsr_row(0, "a", 1), vsr_row(0, "a", 0)])
    with pytest.raises(DataError, match=r"twice.jsonl:1 and .*twice.jsonl:2 label 'a' differently"):
        read_manifest(twice, format="captions:label=label")


LABELS = {
    "a list": ("captions:label=ok", {"caption": ["a", "b"], "ok": ["yes", "no"]}, [("a", 1), ("b", 0)]),
    "words": ("captions:label=gold_label", {"caption": ["a", "b", "c"], "gold_label": ["entailment", "contradiction", "neutral"]},
              [("a", 1), ("b", 0), ("c", None)]),
    "other values": ("captions:label=foil,true=false,false=true", {"caption": ["a", "b"], "foil": [True, False]}, [("b", 1), ("a", 0)]),
    "JSON in a text": ("captions:caption=text.a", {"text": '{"a": "b"}'}, [("b", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_what_the_user_says_a_column_is(case, tmp_path):
    format, row, expected = LABELS[case]
    write_pictures(tmp_path)
    (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [{"image": IMAGE} | row]), format=format)
    assert list(zip([each.text for each in group.candidates], group.match[0], strict=True)) == expected


def test_marks_of_coco_files_and_of_samples(tmp_path):
    """FOIL's annotations say which caption is false; a tar's ``cls`` and its json say it of a sample."""
    write_pictures(tmp_path)
    notes = [{"image_id": 7, "id": k, "caption": f"c{k}", "foil": k == 1, "foil_word": "ORIG"} for k in range(3)]
    coco = {"info": {}, "images": [{"id": 7, "file_name": IMAGE}], "annotations": notes}
    write_json(tmp_path / "foil.json", coco)
    with pytest.raises(DataError, match="'foil'"):
        read_manifest(tmp_path / "foil.json", format="auto")
    (group,) = read_manifest(tmp_path / "foil.json", format="captions:label=foil,true=false,false=true,ignore=foil_word")
    assert [each.text for each in group.candidates] == ["c0", "c2", "c1"] and group.match == ((1, 1, 0),)
    for beside in ({"cls": "0"}, {"json": {"is_match": False}}):
        samples = [{"__key__": str(k), "jpg": IMAGE, "txt": f"c{k}"} for k in range(2)]
        path = lines(tmp_path / "rows.jsonl", [samples[0] | beside, samples[1] | {"cls": "1", "json": {"is_match": True}}])
        name = "cls" if "cls" in beside else "is_match"
        with pytest.raises(DataError, match=rf"add label={name} "):
            read_manifest(path, format="webdataset")
        (group,) = read_manifest(path, format=f"webdataset:label={name},ignore={'is_match' if name == 'cls' else 'cls'}")
        assert [each.text for each in group.candidates] == ["c1", "c0"] and group.match == ((1, 0),)


def test_questions_and_their_answers_are_no_labelled_captions(tmp_path):
    """POPE's rows: the sentence says what to map, and that is then the group."""
    path = lines(tmp_path / "pope.jsonl", [{"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}])
    with pytest.raises(DataError, match="captions:prompt=text,caption=label"):
        read_manifest(path, format="captions:label=label")
    (group,) = read_manifest(path, format="captions:prompt=text,caption=label")
    assert [(each.prompt, each.text) for each in group.candidates] == [("Is there a dog?", "no")]
    for text, label in (("Is there a dog?", 0), ("A dog?", 1), ("有狗吗\uff1f", "yes")):
        path = lines(tmp_path / "asks.jsonl", [{"image": "a.png", "text": text, "label": label}])
        with pytest.raises(DataError, match=r"asks.jsonl:1: .* is a question, .*captions:prompt=text,caption=label .* ask=\.\.\."):
            read_manifest(path, format="captions:label=label")
    path = lines(tmp_path / "asked.jsonl", [{"image": "a.png", "text": f"Who is {who}?", "label": who == "he"} for who in ("he", "she")])
    (group,) = read_manifest(path, format='captions:label=label,ask="Ask something."')
    assert group.match == ((1, 0),), "what answers something may be a question"


def test_a_row_without_a_prompt_is_asked_what_it_will_be_asked_later(tmp_path):
    write_pictures(tmp_path)
    rows = [CAPTION, CAPTION | {"caption": "b", "prompt": "Who?"}, CAPTION | {"caption": "c", "prompt": ""}]
    path = lines(tmp_path / "rows.jsonl", rows)
    prompts = [group.candidates[0].prompt for group in read_manifest(path, format="captions")]
    assert prompts == ["Describe the image.", "Who?", "Describe the image."]
    assert check_manifest(path, format="captions", progress=str).prompts == {"'Describe the image.'": 2, "others": 1}
    (group,) = read_manifest(lines(tmp_path / "a.jsonl", rows[:1]), format='captions:ask=""')
    assert group.candidates[0].prompt == ""
    (group,) = read_manifest(lines(tmp_path / "b.jsonl", [{"said": "x"}]), format="hf:caption=said")
    assert group.images == ((),) and group.candidates[0].prompt == "", "nothing is shown that could be described"


# ---- bad rows

IMAGE = "images/000.png"
TALK = [{"from": "human", "value": "<image>\na?"}, {"from": "gpt", "value": "b"}]
LLAVA = {"id": "a", "image": IMAGE, "conversations": TALK}
CHAT = {"images": [IMAGE], "messages": [{"role": "user", "content": "<image>a?"}, {"role": "assistant", "content": "b"}]}
CHOICE = {"image": IMAGE, "prompt": "a?", "chosen": "b", "rejected": "c"}
CAPTION = {"image": IMAGE, "caption": "a dog"}


def talk(*said: str) -> dict[str, Any]:
    return LLAVA | {"conversations": [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]}


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "b"}]}


def shown(k: int) -> dict[str, Any]:
    return {"type": "image", "image": f"images/{k:03d}.png"}


SAYS_C = {"role": "assistant", "content": "c"}
BAD = {
    "ends with the user": ("llava", talk("<image>a?", "b", "c?"), "ends with the user"),
    "no question": ("llava", LLAVA | {"conversations": TALK[1:]}, "1 pictures|has no turn"),
    "more places than pictures": ("llava", talk("<image><image>a?", "b"), "2 marks .* 1 pictures"),
    "pictures in two columns": ("llava", LLAVA | {"images": [IMAGE]}, "'image' and 'images'"),
    "picture in an answer": ("llava", talk("a?", "<image>b"), "picture"),
    "picture of the system": ("messages",
        CHAT | {"messages": [{"role": "system", "content": "<image>x"}, CHAT["messages"][1], CHAT["messages"][0], CHAT["messages"][1]]},
        "system",
    ),
    "wrong column": ("llava", {"image": IMAGE, "conversation_": TALK}, "'conversations'"),
    "message without text": ("llava", LLAVA | {"conversations": [{"from": "human"}]}, "message 1: key 'value'"),
    "unknown role": ("llava", LLAVA | {"conversations": [{"from": "robot", "value": "x"}]}, "'robot'"),
    "tool": ("llava", LLAVA | {"conversations": [{"from": "observation", "value": "x"}]}, "tool"),
    "video": ("llava", {"id": "a", "video": "a.mp4", "conversations": TALK}, "'video'"),
    "two systems": ("llava", LLAVA | {"system": "x", "conversations": [{"from": "system", "value": "y"}, *TALK]}, "system"),
    "address": ("llava", LLAVA | {"image": "https://x/a.jpg"}, "download"),
    "tool calls": ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool"),
    "part of another kind": ("messages", parts({"type": "video"}), "'video'"),
    "picture within the row": ("messages", parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "download"),
    "pictures in both": ("messages", parts({"type": "image", "image": IMAGE}) | {"images": [IMAGE]}, "outside them"),
    "nothing chosen": ("preference", {"prompt": "a?", "rejected": "c"}, "'chosen'"),
    "nothing rejected": ("preference", {"prompt": "a?", "chosen": "b"}, "'rejected'"),
    "nothing asked": ("preference", {"chosen": "b", "rejected": "c"}, "'prompt'"),
    "asked twice": ("preference", CHOICE | {"question": "b?"}, "'prompt' and 'question'"),
    "other number of pictures": ("preference", CHOICE | {"rejected_images": [IMAGE, "images/001.png"]}, "2 rejected"
    ),
    "several turns": ("preference", CHOICE | {"chosen": [USER | {"content": "x"}, GOOD_ANSWER]}, "2 turns"),
    "chosen of the user": ("preference", CHOICE | {"chosen": {"role": "user", "content": "x"}}, "user"),
    "no picture column": ("captions", {"img": IMAGE, "caption": "x"}, "image=COLUMN"),
    "empty caption": ("captions", CAPTION | {"caption": ""}, "'caption'"),
    "equal negative": ("captions", CAPTION | {"negative_caption": "a  dog"}, "text 1 equals text 0"),
    "two prompts": ('captions:ask="Describe, please."', CAPTION | {"prompt": "x"}, "'prompt' and ask="),
    "unmapped": ("hf", CAPTION, "'image', 'caption'.*hf:caption="),
    "pictures of the rejected": ("preference",
        {"chosen": parts(shown(0))["messages"], "rejected": [parts(shown(1))["messages"][0], SAYS_C]}, "different pictures"
    ),
    "members by case": ("webdataset", {"__key__": "a", "jpg": IMAGE, "JPG": IMAGE, "txt": "x"}, "case"),
    "caption of JSON": ("captions", CAPTION | {"caption": '{"q": "a"}'}, "caption=caption.KEY"),
    "another label": ("captions:label=l", CAPTION | {"l": "perhaps"}, "'perhaps'"),
    "no label": ("captions:label=l", CAPTION, "'l'"),
    "place of the right choice": ("captions:label=l", CAPTION | {"caption": ["a", "b"], "l": 1}, "1 labels"),
    "list as numpy prints it": ("captions", CAPTION | {"caption": "['a dog'\n 'a cat']"}, "json=true"),
    "answer to nothing": ("messages", {"response": "b"}, "'response'"),
    "sample without a picture": ("webdataset", {"__key__": "a", "txt": "x"}, "'a' .*picture"),
    "sample without a text": ("webdataset", {"__key__": "a", "jpg": IMAGE}, "'a' .*text"),
    "sample with two pictures": ("webdataset", {"__key__": "a", "jpg": IMAGE, "png": IMAGE, "txt": "x"}, "'jpg' and 'png'"),
    "winoground": ("pairs", {"image_0": "ex_1_img_0", "image_1": 7, "caption_0": "a", "caption_1": "b"}, "'image_1'"),
    "pair with one caption": ("pairs", {"image_0": IMAGE, "image_1": "b.png", "caption_0": "a", "caption_1": ""}, "1 captions"),
    "pair with one picture": ("pairs", {"image_0": IMAGE, "image_1": "", "caption_0": "a", "caption_1": "b"}, "1 images"),
}  # fmt: skip
GOOD = {
    "llava": talk("<image>good?", "b"), "messages": CHAT, "preference": CHOICE, "captions": CAPTION | {"id": "good"},
    "webdataset": {"__key__": "good", "jpg": IMAGE, "txt": "x"}, "captions:caption=cap": {"image": IMAGE, "cap": "x"},
    "captions:label=l": CAPTION | {"l": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_sentence(case, tmp_path):
    format, bad, said = BAD[case]
    write_pictures(tmp_path)
    good = [GOOD[format]] if format in GOOD else []
    path = lines(tmp_path / "rows.jsonl", [*good, bad])
    with pytest.raises(DataError) as raised:
        read_manifest(path, format=format)
    message = str(raised.value)
    assert message.startswith(f"{path}:{len(good) + 1}: ") and message.isprintable() and re.search(said, message), message
    assert check_manifest(path, format=format, progress=str).problems == [message]


def of(column: str, *values: Any) -> list[dict[str, Any]]:
    """Rows of captions, each with a value of a column, which may be within others."""
    first, *rest = column.split(".")
    return [CAPTION | {"caption": f"text {k}", first: {rest[0]: value} if rest else value} for k, value in enumerate(values)]


def told(texts: str, *beside: dict[str, Any]) -> list[dict[str, Any]]:
    """Chat rows of a text each, whose answer has something beside."""
    asks = {"role": "user", "content": "a?", "weight": 0}
    says = [{"role": "assistant", "content": text, **more} for text, more in zip(texts, beside, strict=True)]
    return [{"messages": [asks, each]} for each in says]


SAID = {"image": "a.png", "caption": "x"}
MARKS = {
    "answer": ("captions:caption=question", [{"image": "a.png", "question": "A dog?", "answer": "Yes"}], ["answer"]),
    "lists of a table": ("captions", [SAID | {"caption": ["a", "b"], "ok": "[True, False]"}], ["ok"]),
    "weight of an answer": ("messages", [CHAT | {"messages": [USER, GOOD_ANSWER | {"weight": 0}]}], ["messages.weight"]),
    "sample of CF-VLM": ("cfvlm", [example("cfvlm") | {"cf_samples": [example("cfvlm")["cf_samples"][0] | {"verdict": "wrong"}]}],
                         ["cf_samples.verdict"]),
    "within another": ("captions", of("meta.is_correct", True, False), ["meta.is_correct"]),
    "within JSON": ("captions", of("info", '{"ok": 1}', '{"ok": 0}', '{"ok": 0}'), ["info.ok"]),
    "beside what is read": ("hf:caption=qa.said", [{"qa": {"said": str(v), "valid": v}} for v in (True, False)],
                            ["qa.valid"]),
    "of a message": ("messages", told("xy", {"metadata": {"label": 0}}, {"metadata": {"label": 1}}), ["messages.metadata.label"]),
    "of turns": ("messages:per_turn=true", told("xy", {"ok": False}, {"ok": True}), ["messages.ok"]),
    "of every caption": (
        "hf:image=image,caption=of.said",
        [{"image": "a.png", "of": [{"said": f"{said} {k}", "label": said} for said in ("contradiction", "entailment")]} for k in (0, 1)],
        ["of.label"],
    ),
    "grades": ("captions", of("human_label", 1.0, 4.0, 5.0, float("nan")), ["human_label"]),
    "grades that no word means": ("captions", of("human_label", 2, 4, 5), ["human_label"]),
    "another language": ("captions", of("verdict", "richtig", "falsch"), ["verdict"]),
    "a verdict of many words": ("captions", of("verdict", "true", "false", *"abcdefg"), ["verdict"]),
    "with a third word": ("captions", of("is_correct", True, False, "partly"), ["is_correct"]),
    "rarely": ("captions", of("ok", *[None] * 90, False, *[None] * 9), ["ok"]),
    "beside notations of gaps": ("captions", of("ok", "nan", "n/a", "-", "?", "none", "null", "na", False), ["ok"]),
    "by its values alone": ("captions", of("status", "right", "wrong", "right", None), ["status"]),
    "a weight of 0 among many": ("captions", of("weight", *(k / 10 for k in range(9))), ["weight"]),
    "places among many": ("captions", of("correct_choice_idx", *range(2, 12)), ["correct_choice_idx"]),
    "false texts of noise": ("captions", of("noisy_caption", "a cat on a mat"), ["noisy_caption"]),
    "places of the right one": ("captions", of("correct_choice_idx", 2, 0, 1, 3, 2), ["correct_choice_idx"]),
    "all at once": ("captions:caption=caption", [row | {"label": 1} for row in of("meta.ok", True, False)], ["label", "meta.ok"]),
    "false pictures": ("captions", of("wrong_image", "images/001.png", "images/002.png"), ["wrong_image"]),
    "false pictures of a container": ("captions", of("wrong_image", "rows.tar#512+60", "rows.tar#1024+60"), ["wrong_image"]),
    "false texts beside a label": ("captions:label=ok", [CAPTION | {"ok": 1, "wrong_caption": "a b c"}], ["wrong_caption"]),
    "false texts of another script": ("captions", of("wrong_caption", "\u72d7", "x"), ["wrong_caption"]),
    "lists of false texts": ("captions", of("hard_negatives", ["a cat", "a bus"], []), ["hard_negatives"]),
    "false message": ("llava", [talk("a?", "b") | {"negative": {"from": "gpt", "value": "a bad one"}}], ["negative.value"]),
    "false members": ("webdataset", [GOOD["webdataset"] | {"foil.txt": "a cat on a mat"}], ["foil.txt"]),
    "pictures that no row shows": ("messages", [row | {"img": IMAGE} for row in told("x", {})], ["img"]),
}  # fmt: skip
OTHER_VALUES = (
    "of turns", "of a message", "all at once", "grades", "grades that no word means", "another language", "a verdict of many words",
    "with a third word", "rarely", "beside notations of gaps",
    "by its values alone", "a weight of 0 among many", "places among many",
)  # fmt: skip


@pytest.mark.parametrize("case", MARKS)
def test_a_column_that_may_mark_or_hold_false_texts_is_refused_until_it_is_named(case, tmp_path):
    """Wherever it is, by every command; both options that the sentence offers work as given."""
    format, rows, names = MARKS[case]
    write_pictures(tmp_path)
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as raised:
        open_groups(path, tmp_path, format)
    said = str(raised.value)
    assert re.findall(r"(?<!\w)'([\w.]+)' \(", said) == names
    with pytest.raises(DataError, match=re.escape(names[0])):
        convert(path, None, format, tmp_path / "out.jsonl", "skip")
    assert not (tmp_path / "out.jsonl").exists() and check_manifest(path, format=format, progress=str).problems == [said]
    (ignore,) = re.findall(r"ignore=[\w.+]+", said)
    named = format + (":" if ":" not in format else ",")
    assert len(open_groups(path, format=named + ignore)) == len(rows) * (2 if "turn" in format and "ok" not in names[0] else 1)
    labels = re.findall(r"add (label=\S+) to", said)
    if labels and len(rows) > 1 and case not in OTHER_VALUES:
        store = open_groups(path, format=named + labels[0])
        assert any(0 in group.match[0] for _, group in store.entries() if not isinstance(group, DataError))


METADATA = {
    "public data": [
        SAID | {"label": 37, "score": 0.31, "split": "valid", "nsfw": "UNLIKELY", "width": 1, "answer_type": "yes/no", "weight": 1.0},
        SAID | {"image": "b.png", "vote_true_validator_id": [1, 1], "matches": ["x"], "truth": "", "labels": [], "correct": None},
        SAID | {"image": "c.png", "answers": [{"answer": "a dog"}]},
    ],
    "ids": of("annotator_id", 0, 1, 0, 1),
    "free answers": of("reply", "yes", "no", "red", "two", "a bus", "on top", "none"),
    "classes": of("label", *range(8)),
    "a word of FOIL": of("foil_word", "ORIG", "dog"),
    "a verdict among other words": of("status", "blue", "nan", "hallucinated"),
    "another picture of a row that shows one": of("depth_map", "images/001.png"),
    "counts": of("num_errors", 0, 1, 2, 1),
    "times": of("last_modified", "2026-11-30 10:00:00", "2026-12-01 10:00:00", "2026-12-01 10:00:01"),
}


@pytest.mark.parametrize("case", METADATA)
def test_other_columns_are_metadata(case, tmp_path):
    rows = METADATA[case]
    for row, group in zip(rows, read_manifest(lines(tmp_path / "rows.jsonl", rows), format="captions"), strict=True):
        assert json.loads(group.meta) == {key: value for key, value in row.items() if key not in SAID and value is not None}


def test_a_label_far_behind_is_found(tmp_path):
    """The rows that are looked at lie all over a large file: one that is sorted hides nothing."""
    path = lines(tmp_path / "rows.jsonl", [CAPTION | {"caption": str(k), "ok": int(k < 2100)} for k in range(2200)])
    with pytest.raises(DataError, match="'ok' "):
        open_groups(path, format="captions")


def test_what_messages_and_samples_say_beside_is_kept(tmp_path):
    """Scores of answers, an ``input`` that belongs to no instruction, a sample's members beside its conversation."""
    write_pictures(tmp_path)
    said = CHOICE | {"chosen": [{"role": "assistant", "content": "b", "score": 5}], "rejected": SAYS_C | {"score": 1}, "input": "x"}
    (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [said]), format="preference")
    assert json.loads(group.meta) == {"input": "x", "chosen": [{"score": 5}], "rejected": [{"score": 1}]}
    row = {"__key__": "a", "png": IMAGE, "txt": "x", "json": {"image": "coco/1.jpg", "conversations": TALK}}
    (group,) = read_manifest(lines(tmp_path / "rows.jsonl", [row]), format="webdataset")
    assert group.images == ((tmp_path / IMAGE,),)
    assert json.loads(group.meta) == {"id": "a", "sample.txt": "x", "json.image": "coco/1.jpg"}


@pytest.mark.parametrize("column", ["foil", "isfoil", "not_true", "has_error", "hallucinates", "contradictory", "mismatches", "noisy"])
def test_a_column_that_marks_false_texts_needs_its_values(column, tmp_path):
    """Its 1 means false, and a label's 1 means true; a table with gaps writes 1.0."""
    write_pictures(tmp_path)
    rows = [{"image": IMAGE, "caption": text, column: mark} for text, mark in (("a dog", "0.0"), ("a cat", "1.0"))]
    manifest = lines(tmp_path / "rows.jsonl", rows)
    for format in ("captions", f"captions:label={column}", f"captions:label={column},true=0+1,false=1"):
        with pytest.raises(DataError):
            read_manifest(manifest, format=format)
    (group,) = read_manifest(manifest, format=f"captions:label={column},true=0,false=1")
    assert [each.text for each in group.candidates] == ["a dog", "a cat"] and group.match == ((1, 0),)


COLUMNS = [
    {"image": IMAGE, "caption": "a dog"},
    {"image": IMAGE, "caption": "a cat", "edited": "a dog", "of": {"kind": "swap"}, "asked": None},
]


@pytest.mark.parametrize("option", ["negative_caption", "label", "ignore"])
def test_a_column_that_is_named_and_in_no_row_is_refused_by_every_reader(option, tmp_path):
    write_pictures(tmp_path)
    path = lines(tmp_path / "rows.jsonl", COLUMNS)
    said = rf"rows.jsonl: no row has the column 'captoin', which the option {option} names; did you mean 'caption'\?"
    for column in ("captoin", "caption+captoin"):
        for reader in (read_manifest, sound_groups):
            with pytest.raises(DataError, match=said):
                reader(path, format=f"captions:{option}={column}")
        with pytest.raises(DataError, match=said):
            convert(path, None, f"captions:{option}={column}", tmp_path / "out.jsonl", "skip")
        (problem,) = check_manifest(path, format=f"captions:{option}={column}", progress=str).problems
        assert re.search(said, problem)
    # A column that one row has is there, and so is one that is null.
    good = read_manifest(path, format="captions:negative_caption=edited,edit=of.kind,prompt=asked")
    assert [[each.text for each in group.candidates] for group in good] == [["a dog"], ["a cat", "a dog"]]


def test_columns_that_every_format_s_options_name_are_looked_for(tmp_path):
    """Those within others, of messages and of a sample's json too."""
    write_pictures(tmp_path)
    chat = {**CHAT, "meta": {"ok": 1}, "messages": [CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0}]}
    rows = {
        "messages": chat, "preference": CHOICE | {"good": False},
        "webdataset": {"__key__": "a", "png": IMAGE, "txt": "x", "json": {"ok": 1}},
        "pairs": example("pairs") | {"good": True}, "cfvlm": example("cfvlm") | {"good": True},
    }  # fmt: skip
    good = {"messages": "messages.weight+meta.ok", "webdataset": "ok"}
    for format, row in rows.items():
        path = lines(tmp_path / "rows.jsonl", [row])
        named = good.get(format, "good")
        open_groups(path, format=f"{format}:ignore={named}")
        with pytest.raises(
            DataError, match=r"rows.jsonl: no row has the column '\S+x', which the option ignore names; (did you mean|the columns are) '"
        ):
            open_groups(path, format=f"{format}:ignore={named}x")
    with pytest.raises(DataError, match="'captoin', which the option label names; did you mean 'caption'"):
        open_groups(lines(tmp_path / "rows.jsonl", [row | {"caption": 1}]), format="messages:label=captoin")


def test_negatives_beside_labels_are_not_left_out(tmp_path):
    rows = [CAPTION | {"label": 1, "negative_caption": "a cat"}, CAPTION | {"caption": "a bus", "label": 0}]
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"'negative_caption' .* ignore=negative_caption"):
        read_manifest(path, format="captions:label=label")
    (group,) = read_manifest(path, format="captions:label=label,ignore=negative_caption")
    assert group.match == ((1, 0),)


def test_false_texts_that_a_refusal_names_are_read_by_what_it_says(tmp_path):
    """Beside those that are read already."""
    row = CAPTION | {"negative_caption": "a cat", "m": {"neg": "a red bus"}}
    path = lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"add negative_caption=m\.neg to --format captions:\.\.\. \(join it with \+ to the columns"):
        read_manifest(path, format="captions")
    (group,) = read_manifest(path, format="captions:negative_caption=negative_caption+m.neg")
    assert {each.text for each in group.candidates} == {"a dog", "a cat", "a red bus"} and group.match == ((1, 0, 0),)
    path = lines(tmp_path / "rows.jsonl", [CAPTION | {"edited_image": IMAGE.replace("000", "001")}])
    with pytest.raises(DataError, match=r"add negative_image=edited_image to"):
        read_manifest(path)
    path = lines(
        tmp_path / "both.jsonl", [CAPTION | {"edited_image": IMAGE.replace("000", "001"), "edited_caption": "a cat", "neg": "a bus"}]
    )
    with pytest.raises(DataError, match=r"add negative_image=edited_image,negative_caption=edited_caption\+neg to"):
        read_manifest(path)


@pytest.mark.parametrize("first", [None, 0])
def test_rows_for_kto_are_recognised_whatever_the_first_says(first, tmp_path):
    """A row without its label is a problem of its own."""
    rows = [{"prompt": "a?", "completion": text, "label": label} for text, label in (("x", first), ("b", 1), ("c", 0))]
    store = open_groups(lines(tmp_path / "kto.jsonl", rows))
    assert store.format == "messages:label=label"
    found = [store.entry(k) for k in range(len(store))]
    assert len(found) == 1 + (first is None) and isinstance(found[0], DataError) == (first is None)
    texts = {each.text: truth for each, truth in zip(store[-1].candidates, store[-1].match[0], strict=True)}
    assert texts == {"b": 1, "c": 0} | ({} if first is None else {"x": int(bool(first))})


@pytest.mark.parametrize("change", [{}, {"x": None}, {"videos": [], "audios": None, "tools": None}])
def test_columns_that_are_null_are_not_there(change, tmp_path):
    """As Parquet fills rows that lack what others have."""
    write_pictures(tmp_path)
    none = {"system": None, "rejected_images": None, **change}
    rows = [
        ("llava", llava_row(1)), ("messages", trl_row(1)), ("preference", preference_trl_row(1)), ("captions", CAPTION),
    ]  # fmt: skip
    for format, row in rows:
        one, other = (read_manifest(lines(tmp_path / "rows.jsonl", [each]), format=format) for each in (row, row | none))
        assert one == other, format


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lava", "'llava'"), ("captions:imag=x", "'image'"), ("captions:image=a,image=b", "twice"),
        ("captions:paired=maybe", "'maybe'"), ("llava:keys=x", "per_turn, label, true, false, ignore"), ("cfgroup:x=y", "no options"),
        ("captions:label=l,negative_caption=n", "negative_caption="),
        ("captions:label=l,paired=false", "paired="), ("messages:per_turn=true,label=l", "per_turn="),
        ("captions:true=a", "label=COLUMN"), ("webdataset:true=a,false=b", "label=COLUMN"),
        ("captions:label=l,true=0+1,false=1", "'1'"), ("messages:label=isFoil", "'isFoil'"),
    ],
)  # fmt: skip
def test_a_format_that_is_not_understood(spec, said, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [CAPTION])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{re.escape(said)}"):
        read_manifest(path, format=spec)


def test_values_within_values_by_the_hundred_are_one_sentence(tmp_path):
    """As deep as can be read, and a little less and more: it is written as metadata, and read again, from where the stack is deeper."""
    write_pictures(tmp_path)
    for name in ("rows.jsonl", "rows.json"):
        path, found = tmp_path / name, set[bool]()
        for depth in (100, *range(700, 1000, 20)):
            row = json.dumps(CAPTION)[:-1] + f', "x": {"[" * depth}{"]" * depth}}}'
            path.write_text(row if name == "rows.jsonl" else f"[{row}]")
            (tmp_path / "out.jsonl").unlink(missing_ok=True)
            try:
                problems = check_manifest(path, format="captions", progress=str).problems
                convert(path, None, "captions", tmp_path / "out.jsonl")
            except DataError as error:
                problems = [str(error)]
            found.add(not problems)
            assert all(re.match(rf"{path}:.*JSON.*; ", problem) for problem in problems), problems
        assert found == {True, False}


def test_rows_of_no_format_are_shown(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"img": "a.png", "words": "x"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*'img', 'words'.*--format"):
        read_manifest(path, format="auto")


def test_columns_by_options(tmp_path):
    """Nested, several, literal prompts with a comma, counterfactuals that do not belong together."""
    write_pictures(tmp_path)
    row = {
        "a.b": {"c": IMAGE},
        "t": "one",
        "n": {"first": "two", "second": "three"},
        "e": ["images/001.png", "images/002.png"],
        "k": "count",
    }
    spec = 'captions:image=a.b.c,caption=t,negative_caption=n.first+n.second,negative_image=e,edit=k,ask="Describe it, please."'
    path = lines(tmp_path / "rows.jsonl", [row | {"a": {"b": {"c": IMAGE}}}])
    (group,) = read_manifest(path, format=spec)
    assert [each.text for each in group.candidates] == ["one", "two", "three"] and {e.prompt for e in group.candidates} == {
        "Describe it, please."
    }
    assert group.match == ((1, 0, 0), (0, 1, None), (0, None, 1)) and [(e.type, e.image, e.text) for e in group.edits] == [
        ("count", 1, 1), ("count", 2, 2),
    ]  # fmt: skip
    (group,) = read_manifest(path, format=spec + ",paired=false")
    assert group.match == ((1, 0, 0), (0, None, None), (0, None, None)) and len(group.edits) == 4
