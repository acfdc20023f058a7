"""Data files of any size in the exact formats of other projects, and the expected contents of each row, computed naively.

``PUBLIC[name]`` has two functions. The first writes a file and its pictures into a folder, and returns the file's path and format. The
second returns the contents of row k: the pictures of each image (by number), prompts, texts and truth table.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cfvlm_ds.core.groups import PICTURE, Prompt, Turn

PICTURES = 12
DESCRIBE = "Describe the image."
SYSTEM = "You are a careful assistant."


Row = dict[str, Any]
Written = tuple[Path, str]
"""Path of a file and name of its format."""


class Said(NamedTuple):
    """Expected contents of a row."""

    images: tuple[tuple[int, ...], ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    match: tuple[tuple[int | None, ...], ...]


def said_of(k: int, prompt: Prompt, *texts: str, match: tuple[tuple[int | None, ...], ...] = ((1, 0),), others: bool = False) -> Said:
    """Build the contents of row k: texts that answer one prompt about the row's picture and, with ``others``, about another picture."""
    images = ((numbered(k),), (other(k),)) if others else ((numbered(k),),)
    return Said(images, (prompt,) * len(texts), texts, tuple(line[: len(texts)] for line in match))


def picture(k: int) -> bytes:
    """Return the bytes of a small picture. It is different for every k below PICTURES."""
    file = io.BytesIO()
    Image.new("RGB", (40 + 2 * k, 36), (20 * k, 255 - 20 * k, 90)).save(file, "PNG")
    return file.getvalue()


def numbered(k: int) -> int:
    return k % PICTURES


def other(k: int) -> int:
    return (k + 5) % PICTURES


def file_of(k: int) -> str:
    return f"images/{k:03d}.png"


def write_pictures(folder: Path, name: Callable[[int], str] = file_of) -> None:
    for k in range(PICTURES):
        (folder / name(k)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name(k)).write_bytes(picture(k))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


Writer = Callable[[Path, int], Written]


def of_rows(row: Callable[[int], Row], format: str, listed: bool = False) -> Writer:
    """Return a function that writes pictures, and a file of the rows ``row(k)`` as JSON lines or, with ``listed``, as one JSON list."""

    def write(folder: Path, rows: int) -> Written:
        write_pictures(folder)
        made = [row(k) for k in range(rows)]
        if not listed:
            return lines(folder / "rows.jsonl", made), format
        (folder / "rows.json").write_text(json.dumps(made, indent=2))
        return folder / "rows.json", format

    return write


def asked(k: int) -> str:
    return f"How many dogs are on lawn {k}?"


def right(k: int) -> str:
    return f"There are {k} dogs."


def wrong(k: int) -> str:
    return f"There are {k + 1} dogs."


# ---- conversations


def shown(k: int) -> str:
    """Return the path of row k's picture."""
    return file_of(numbered(k))


def turn(who: str, said: Any, keys: tuple[str, str] = ("role", "content")) -> Row:
    return dict(zip(keys, (who, said), strict=True))


def human(*said: str) -> list[Row]:
    """Build ShareGPT turns, alternately from human and gpt."""
    return [turn(("human", "gpt")[k % 2], text, ("from", "value")) for k, text in enumerate(said)]


def part(text: str | None) -> Row:
    """Build a part of a TRL message: a text or, for None, a picture."""
    return {"type": "image" if text is None else "text", "text": text}


def llava_row(k: int) -> Row:
    """Build a row like llava_v1_5_mix665k.json: one or two questions. Every tenth row has only text, and ids repeat."""
    alone = k % 10 == 9
    more = ["Is it day?", f"Yes, at {k % 24} o'clock."] if k % 3 else []
    row = {"id": f"text_{k}", "model": ""} if alone else {"id": f"{k // 2:012d}", "image": shown(k)}
    return row | {"conversations": human(("" if alone else "<image>\n") + asked(k), right(k), *more)}


def llava_said(k: int) -> Said:
    pictures = () if k % 10 == 9 else (numbered(k),)
    if not k % 3:
        return Said((pictures,), (asked(k),), (right(k),), ((1,),))
    first = Turn("user", ((PICTURE,) if pictures else ()) + (asked(k),))
    prompt = (first, Turn("assistant", (right(k),)), Turn("user", ("Is it day?",)))
    return Said((pictures,), (prompt,), (f"Yes, at {k % 24} o'clock.",), ((1,),))


def sharegpt_row(k: int) -> Row:
    """Build a row like LLaMA-Factory's sharegpt, with ``system`` and several pictures within the text."""
    said = human(f"Compare <image> and <image>: {asked(k)}", right(k), "<image>And here?", wrong(k))
    return {"conversations": said, "system": SYSTEM, "images": [shown(k + j) for j in range(3)]}


def sharegpt_said(k: int) -> Said:
    prompt = (
        Turn("system", (SYSTEM,)), Turn("user", ("Compare ", PICTURE, " and ", PICTURE, f": {asked(k)}")), Turn("assistant", (right(k),)),
        Turn("user", (PICTURE, "And here?")),
    )  # fmt: skip
    return Said(((numbered(k), numbered(k + 1), numbered(k + 2)),), (prompt,), (wrong(k),), ((1,),))


def trl_row(k: int) -> Row:
    """Build a row like TRL's vision data sets: messages of parts, and a list of pictures."""
    parts = {"system": [part(SYSTEM)], "user": [part(None), part(asked(k))], "assistant": [part(right(k))]}
    return {"images": [shown(k)], "messages": [turn(*each) for each in parts.items()]}


def trl_said(k: int) -> Said:
    return said_of(k, (Turn("system", (SYSTEM,)), Turn("user", (PICTURE, asked(k)))), right(k))


def openai_row(k: int) -> Row:
    """Build a row like OpenAI's fine-tuning files, with pictures given as file paths."""
    parts = [part(asked(k)), {"type": "image_url", "image_url": {"url": shown(k), "detail": "low"}}]
    return {"messages": [turn("user", parts), turn("assistant", right(k)) | {"weight": 1}]}


def openai_said(k: int) -> Said:
    return said_of(k, (Turn("user", (asked(k), PICTURE)),), right(k))


# ---- preferences


def answers(k: int) -> Row:
    return {"chosen": right(k), "rejected": wrong(k)}


def preference_plain(k: int) -> Row:
    """Build a row like RLHF-V and RLAIF-V: question, chosen, rejected, image."""
    return {"idx": k, "image": shown(k), "question": asked(k), **answers(k), "ds_name": "RLHF-V"}


def preference_trl_row(k: int) -> Row:
    """Build a row like rlaif-v_formatted: three lists of messages with parts."""
    lists = {name: [turn("assistant", [part(text)])] for name, text in answers(k).items()}
    return {"prompt": [turn("user", [part(None), part(asked(k))])], "images": [shown(k)], **lists}


def preference_factory(k: int) -> Row:
    """Build a row like LLaMA-Factory's ranking data: a conversation and two separate answers."""
    said = {name: human("", text)[1] for name, text in answers(k).items()}
    return {"conversations": human("<image>" + asked(k)), **said, "images": [shown(k)]}


def rlhfv_json(k: int) -> Row:
    """Build a row like RLHF-V on the hub: JSON answers in ``text``, and the picture's original path as a separate field."""
    texts = {"text": json.dumps({"question": asked(k), **answers(k)}), "origin_split": '{"model": "Muffin"}'}
    return {"ds_name": "RLHF-V", "image": shown(k), "idx": k, "image_path": f"coco/{k}.jpg", **texts}


def preference_query(k: int) -> Row:
    """Build a row like ms-swift's query and response."""
    return {"query": asked(k), "response": right(k), "rejected_response": wrong(k), "images": [shown(k)], "history": []}


def preference_v1(k: int) -> Row:
    """Build a row like LLaMA-Factory's v1 samples: whole conversations of weighted messages, which consist of parts."""
    parts = [{"type": "image_url", "value": shown(k)}, {"type": "text", "value": asked(k)}]
    return {
        f"{name}_messages": [
            turn("user", parts) | {"loss_weight": 0.0},
            turn("assistant", [{"type": "text", "value": text}]) | {"loss_weight": 1.0},
        ]
        for name, text in answers(k).items()
    }


def kto(row: Callable[[int, str], Row], label: str) -> Writer:
    """Return a function that writes KTO rows (answer and label). A question's two answers are not adjacent, and some rows occur twice."""

    def write(folder: Path, rows: int) -> Written:
        write_pictures(folder)

        def labelled(k: int, good: bool) -> Row:
            return row(k, right(k) if good else wrong(k)) | {label: good, "images": [shown(k)]}

        first = [labelled(k, not k % 2) for k in range(rows)]
        second = [labelled(k, bool(k % 2)) for k in reversed(range(rows))]
        return lines(folder / "kto.jsonl", first + second + second[:3]), f"messages:label={label}"

    return write


def kto_trl(k: int, answer: str) -> Row:
    return {"prompt": [turn("user", asked(k))], "completion": [turn("assistant", answer)]}


def kto_factory(k: int, answer: str) -> Row:
    return {"instruction": asked(k), "input": "", "output": answer}


def kto_swift(k: int, answer: str) -> Row:
    return {"messages": [turn("user", f"<image>{asked(k)}"), turn("assistant", answer)]}


def preference_said(k: int) -> Said:
    return said_of(k, asked(k), right(k), wrong(k))


def preference_swift(k: int) -> Row:
    """Build a row like ms-swift's: a conversation that ends with the chosen answer, and a rejected response, rejected pictures, or both."""
    contents = {"system": SYSTEM, "user": f"<image>{asked(k)}", "assistant": right(k)}
    row: Row = {"messages": [turn(*each) for each in contents.items()], "images": [shown(k)]}
    row |= {"rejected_response": wrong(k)} if k % 3 != 1 else {}
    return row | ({"rejected_images": [file_of(other(k))]} if k % 3 else {})


def swift_said(k: int) -> Said:
    prompt = trl_said(k).prompts[0]
    if k % 3 == 1:
        return said_of(k, prompt, right(k), match=((1,), (0,)), others=True)
    return said_of(k, prompt, right(k), wrong(k), match=((1, None), (None, 0)) if k % 3 else ((1, 0),), others=bool(k % 3))


# ---- captions


def coco(folder: Path, rows: int) -> Written:
    """Write a file like captions_val2017.json: images and annotations, with five non-adjacent captions per image and one duplicate."""
    write_pictures(folder, lambda k: f"{k:012d}.png")
    images = [{"license": 4, "file_name": f"{numbered(k):012d}.png", "flickr_url": "http://x/y.jpg", "id": 1000 + k} for k in range(rows)]
    annotations = [
        {"image_id": 1000 + k, "id": 5 * k + j, "caption": right(k) if j == 4 else f"{right(k)} ({j})"}
        for j in range(5)
        for k in range(rows)
    ]
    annotations += [{"image_id": 1000, "id": 5 * rows, "caption": right(0)}]
    path = folder / "captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "licenses": [{"id": 4}], "images": images, "annotations": annotations}))
    return path, "captions"


def coco_said(k: int) -> Said:
    return said_of(k, DESCRIBE, *(f"{right(k)} ({j})" for j in range(4)), right(k), match=((1,) * 5,))


def table(folder: Path, name: str, header: list[str], rows: list[list[Any]]) -> Path:
    """Write a CSV or TSV file with a byte order mark."""
    write_pictures(folder)
    with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",").writerows([header, *rows])
    return folder / name


def own_table(folder: Path, rows: int) -> Written:
    """Write a user's CSV: texts with quotes, commas and line breaks, and unusual column names."""
    made = [[shown(k), f'{right(k)}\n"quoted", é', wrong(k), file_of(other(k)) if k % 2 else "", k] for k in range(rows)]
    path = table(folder, "mine.csv", ["file_name", "text", "not true", "edited", "note"], made)
    return path, "captions:image=file_name,caption=text,negative_caption=not true,negative_image=edited"


def own_table_said(k: int) -> Said:
    match = ((1, 0), (0, 1)) if k % 2 else ((1, 0),)
    return said_of(k, DESCRIBE, f'{right(k)}\n"quoted", é', wrong(k), match=match, others=bool(k % 2))


def negclip(folder: Path, rows: int) -> Written:
    """Write a file like NegCLIP's TSV: lists as Python literals, and row numbers of negative pictures as metadata."""
    made = [[k, right(k), shown(k), str([wrong(k), f"It's {k} cats."]), str([k + 1])] for k in range(rows)]
    return table(folder, "negclip.tsv", ["", "title", "filepath", "neg_caption", "neg_image"], made), "captions"


def sugarcrepe(folder: Path, rows: int) -> Written:
    """Write a file like SugarCrepe's: an object with numbers as keys."""
    write_pictures(folder)
    path = folder / "swap_obj.json"
    path.write_text(json.dumps({k: {"filename": shown(k), "caption": right(k), "negative_caption": wrong(k)} for k in range(rows)}))
    return path, "captions"


# ---- pairs


def winoground_row(k: int, picture_of: Callable[[str, int], Any]) -> Row:
    pictures = {f"image_{j}": picture_of(f"ex_{k}_img_{j}", which) for j, which in enumerate((numbered(k), other(k)))}
    return {
        "id": k,
        "caption_0": right(k),
        "caption_1": wrong(k),
        "tag": "Noun",
        "secondary_tag": "",
        "num_main_preds": 1,
        "collapsed_tag": "Object",
        **pictures,
    }


def winoground(folder: Path, rows: int) -> Written:
    """Write a file like examples.jsonl of facebook/winoground on the hub, with unpacked pictures."""

    def unpacked(name: str, which: int) -> str:
        (folder / f"{name}.png").write_bytes(picture(which))
        return name

    return lines(folder / "examples.jsonl", [winoground_row(k, unpacked) for k in range(rows)]), "pairs"


def winoground_said(k: int) -> Said:
    return said_of(k, DESCRIBE, right(k), wrong(k), match=((1, 0), (0, 1)), others=True)


def winoground_parquet(folder: Path, rows: int) -> Written:
    """Write Winoground as the hub's Parquet conversion, with pictures as bytes."""
    made = [winoground_row(k, lambda name, which: {"bytes": picture(which), "path": f"{name}.png"}) for k in range(rows)]
    return parquet(folder / "test-00000-of-00001.parquet", made), "pairs"


def parquet(path: Path, rows: list[Row]) -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    return path


# ---- Hugging Face data sets, tars


def saved(folder: Path, rows: int) -> Written:
    """Write a folder like save_to_disk: two Arrow files in the streaming format, with pictures as bytes and nested columns."""
    import pyarrow

    made = [
        {"picture": {"bytes": picture(numbered(k)), "path": None}, "qa": {"question": asked(k), "answers": [right(k)]}, "wrong": [wrong(k)]}
        for k in range(rows)
    ]
    (vqa := folder / "vqa").mkdir()
    schema = pyarrow.Table.from_pylist(made).schema
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (made[: rows // 2], made[rows // 2 :]), strict=True):
        with pyarrow.OSFile(str(vqa / name), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema), max_chunksize=33)
    files = [{"filename": name} for name in names]
    (vqa / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "f", "_split": "train"}))
    (vqa / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return vqa, "hf:image=picture,prompt=qa.question,caption=qa.answers,negative_caption=wrong"


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member(tar, name, content)
    return path


def webdataset(folder: Path, rows: int) -> Written:
    """Write a folder of two shards like img2dataset and webdataset: KEY.png, KEY.txt, KEY.json."""
    for number, ks in enumerate((range(rows // 2), range(rows // 2, rows))):
        members = {"README": b"no sample"}
        for key, k in ((f"{k:09d}", k) for k in ks):
            said = json.dumps({"key": key, "negative_caption": wrong(k), "status": "success"}).encode()
            members |= {f"{key}.png": picture(numbered(k)), f"{key}.txt": right(k).encode() + b"\n", f"{key}.json": said}
        tar_of(folder / "shards" / f"{number:05d}.tar", members)
    return folder / "shards", "webdataset"


def triplets(folder: Path, rows: int) -> Written:
    """Write a shard like TripletData's: members image, neg_image, caption, neg_caption. Long folder names make tar add headers."""
    members = {}
    for k in range(rows):
        sample = {
            "image": picture(numbered(k)),
            "neg_image": picture(other(k)),
            "caption": right(k).encode(),
            "neg_caption": wrong(k).encode(),
        }
        members |= {f"{'long' * 30}/{k}.{name}": content for name, content in sample.items()}
    return tar_of(folder / "shard-0.tar", members), "webdataset"


def negative_said(k: int) -> Said:
    return said_of(k, DESCRIBE, right(k), wrong(k))


PREFERENCES = {
    "RLHF-V": preference_plain, "TRL preferences": preference_trl_row, "RLHF-V with JSON": rlhfv_json,
    "ms-swift query and response": preference_query, "LLaMA-Factory v1 preferences": preference_v1,
}  # fmt: skip
KTO = {"TRL KTO": (kto_trl, "label"), "LLaMA-Factory KTO": (kto_factory, "kto_tag"), "ms-swift KTO": (kto_swift, "label")}
PUBLIC: dict[str, tuple[Writer, Callable[[int], Said]]] = {
    "LLaVA": (of_rows(llava_row, "llava", listed=True), llava_said),
    "ShareGPT": (of_rows(sharegpt_row, "llava"), sharegpt_said),
    "TRL messages": (of_rows(trl_row, "messages"), trl_said),
    "OpenAI messages": (of_rows(openai_row, "messages"), openai_said),
    **{name: (of_rows(row, "preference"), preference_said) for name, row in PREFERENCES.items()},
    "LLaMA-Factory preferences": (of_rows(preference_factory, "preference", listed=True), preference_said),
    "ms-swift preferences": (of_rows(preference_swift, "preference"), swift_said),
    **{name: (kto(*each), preference_said) for name, each in KTO.items()},
    "COCO captions": (coco, coco_said),
    "CSV": (own_table, own_table_said),
    "NegCLIP": (negclip, lambda k: said_of(k, DESCRIBE, right(k), wrong(k), f"It's {k} cats.", match=((1, 0, 0),))),
    "SugarCrepe": (sugarcrepe, negative_said),
    "Winoground": (winoground, winoground_said),
    "Winoground Parquet": (winoground_parquet, winoground_said),
    "saved data set": (saved, preference_said),
    "WebDataset": (webdataset, negative_said),
    "TripletData": (triplets, winoground_said),
}
"""Name -> (writer of the file, function that returns the expected contents of a row)."""
