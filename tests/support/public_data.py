"""Files in the exact form in which other projects publish and read them, of any number of rows, and what each row says, naively.

``PUBLIC[name]`` is a function that writes one into a folder, with its pictures, and returns its path and the format's name; and one that
says what the k-th row is: pictures of each image (by number), prompts, texts and truth table.
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


class Said(NamedTuple):
    """What a row says."""

    images: tuple[tuple[int, ...], ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    match: tuple[tuple[int | None, ...], ...]


def picture(k: int) -> bytes:
    """The bytes of a small picture; another one for every k up to PICTURES."""
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


Writer = Callable[[Path, int], tuple[Path, str]]


def of_rows(row: Callable[[int], dict[str, Any]], format: str, listed: bool = False) -> Writer:
    """A file of a row for each k, JSON lines or a list, with its pictures beside it."""

    def write(folder: Path, rows: int) -> tuple[Path, str]:
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


def llava_row(k: int) -> dict[str, Any]:
    """As llava_v1_5_mix665k.json: conversations of one to three questions, every tenth row of text alone; ids occur several times."""
    turns = [("human", "<image>\n" + asked(k)), ("gpt", right(k))]
    if k % 3:
        turns += [("human", "Is it day?"), ("gpt", f"Yes, at {k % 24} o'clock.")]
    if k % 10 == 9:
        turns[0] = ("human", asked(k))
    row: dict[str, Any] = {"id": f"{k // 2:012d}", "image": file_of(numbered(k))}
    if k % 10 == 9:
        row = {"id": f"text_{k}", "model": ""}
    return row | {"conversations": [{"from": who, "value": said} for who, said in turns]}


def llava_said(k: int) -> Said:
    shown = () if k % 10 == 9 else (numbered(k),)
    if not k % 3:
        return Said((shown,), (asked(k),), (right(k),), ((1,),))
    first = Turn("user", ((PICTURE,) if shown else ()) + (asked(k),))
    prompt = (first, Turn("assistant", (right(k),)), Turn("user", ("Is it day?",)))
    return Said((shown,), (prompt,), (f"Yes, at {k % 24} o'clock.",), ((1,),))


def sharegpt_row(k: int) -> dict[str, Any]:
    """As LLaMA-Factory's sharegpt with ``system`` and several pictures at their places."""
    return {
        "conversations": [
            {"from": "human", "value": f"Compare <image> and <image>: {asked(k)}"}, {"from": "gpt", "value": right(k)},
            {"from": "human", "value": "<image>And here?"}, {"from": "gpt", "value": wrong(k)},
        ],
        "system": SYSTEM, "images": [file_of(numbered(k + j)) for j in range(3)],
    }  # fmt: skip


def sharegpt_said(k: int) -> Said:
    prompt = (
        Turn("system", (SYSTEM,)), Turn("user", ("Compare ", PICTURE, " and ", PICTURE, f": {asked(k)}")), Turn("assistant", (right(k),)),
        Turn("user", (PICTURE, "And here?")),
    )  # fmt: skip
    return Said(((numbered(k), numbered(k + 1), numbered(k + 2)),), (prompt,), (wrong(k),), ((1,),))


def trl_row(k: int) -> dict[str, Any]:
    """As TRL's vision data sets: parts, and the pictures beside them."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": asked(k)}]
    said = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": right(k)}]},
    ]
    return {"images": [file_of(numbered(k))], "messages": said}


def trl_said(k: int) -> Said:
    return Said(((numbered(k),),), ((Turn("system", (SYSTEM,)), Turn("user", (PICTURE, asked(k)))),), (right(k),), ((1,),))


def openai_row(k: int) -> dict[str, Any]:
    """As OpenAI's fine-tuning files, pictures by the path of a file."""
    parts = [{"type": "text", "text": asked(k)}, {"type": "image_url", "image_url": {"url": file_of(numbered(k)), "detail": "low"}}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": right(k), "weight": 1}]}


def openai_said(k: int) -> Said:
    return Said(((numbered(k),),), ((Turn("user", (asked(k), PICTURE)),),), (right(k),), ((1,),))


# ---- preferences


def preference_plain(k: int) -> dict[str, Any]:
    """As RLHF-V's and RLAIF-V's rows: question, chosen, rejected, image."""
    return {"idx": k, "image": file_of(numbered(k)), "question": asked(k), "chosen": right(k), "rejected": wrong(k), "ds_name": "RLHF-V"}


def preference_trl_row(k: int) -> dict[str, Any]:
    """As rlaif-v_formatted: three lists of messages with parts."""
    asked_parts = [{"text": None, "type": "image"}, {"text": asked(k), "type": "text"}]
    answers = {
        name: [{"role": "assistant", "content": [{"text": text, "type": "text"}]}]
        for name, text in (("chosen", right(k)), ("rejected", wrong(k)))
    }
    return {"prompt": [{"role": "user", "content": asked_parts}], "images": [file_of(numbered(k))], **answers}


def preference_factory(k: int) -> dict[str, Any]:
    """As LLaMA-Factory's ranking data: the answers beside the conversation."""
    return {
        "conversations": [{"from": "human", "value": "<image>" + asked(k)}],
        "chosen": {"from": "gpt", "value": right(k)}, "rejected": {"from": "gpt", "value": wrong(k)}, "images": [file_of(numbered(k))],
    }  # fmt: skip


def rlhfv_json(k: int) -> dict[str, Any]:
    """As RLHF-V's rows on the hub: the answers as JSON in ``text``, the picture beside the path that it had elsewhere."""
    return {
        "ds_name": "RLHF-V", "image": file_of(numbered(k)), "origin_dataset": "LCS-558K", "idx": k, "image_path": f"coco/{k}.jpg",
        "text": json.dumps({"question": asked(k), "chosen": right(k), "rejected": wrong(k)}),
        "origin_split": json.dumps({"model": "Muffin", "type": "question_answering"}),
    }  # fmt: skip


def preference_query(k: int) -> dict[str, Any]:
    """As ms-swift's query and response."""
    return {"query": asked(k), "response": right(k), "rejected_response": wrong(k), "images": [file_of(numbered(k))], "history": []}


def preference_v1(k: int) -> dict[str, Any]:
    """As LLaMA-Factory's v1 samples: whole conversations of parts with values, and weights of messages."""

    def messages(answer: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "value": file_of(numbered(k))}, {"type": "text", "value": asked(k)}]
        said = [{"type": "text", "value": answer}]
        return [
            {"role": "user", "content": parts, "loss_weight": 0.0},
            {"role": "assistant", "content": said, "loss_weight": 1.0},
        ]

    return {"chosen_messages": messages(right(k)), "rejected_messages": messages(wrong(k))}


def kto(row: Callable[[int, str], dict[str, Any]], label: str) -> Writer:
    """Rows for KTO: an answer and whether it is good; the good and the bad ones to a question lie anywhere, some are there twice."""

    def write(folder: Path, rows: int) -> tuple[Path, str]:
        write_pictures(folder)
        first = [row(k, wrong(k) if k % 2 else right(k)) | {label: not k % 2} for k in range(rows)]
        second = [row(k, right(k) if k % 2 else wrong(k)) | {label: bool(k % 2)} for k in reversed(range(rows))]
        return lines(folder / "kto.jsonl", first + second + second[:3]), f"messages:label={label}"

    return write


def kto_trl(k: int, answer: str) -> dict[str, Any]:
    said = {"prompt": [{"role": "user", "content": asked(k)}], "completion": [{"role": "assistant", "content": answer}]}
    return {"images": [file_of(numbered(k))], **said}


def kto_factory(k: int, answer: str) -> dict[str, Any]:
    return {"instruction": asked(k), "input": "", "output": answer, "images": [file_of(numbered(k))]}


def kto_swift(k: int, answer: str) -> dict[str, Any]:
    said = [{"role": "user", "content": f"<image>{asked(k)}"}, {"role": "assistant", "content": answer}]
    return {"messages": said, "images": [file_of(numbered(k))]}


def preference_said(k: int) -> Said:
    return Said(((numbered(k),),), (asked(k),) * 2, (right(k), wrong(k)), ((1, 0),))


def preference_swift(k: int) -> dict[str, Any]:
    """As ms-swift's: the chosen answer ends the conversation; a rejected response, rejected pictures, or both."""
    contents = {"system": SYSTEM, "user": f"<image>{asked(k)}", "assistant": right(k)}
    row: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in contents.items()]}
    row["images"] = [file_of(numbered(k))]
    row |= {"rejected_response": wrong(k)} if k % 3 != 1 else {}
    return row | ({"rejected_images": [file_of(other(k))]} if k % 3 else {})


def swift_said(k: int) -> Said:
    prompt = (Turn("system", (SYSTEM,)), Turn("user", (PICTURE, asked(k))))
    mine, others = (numbered(k),), (other(k),)
    if k % 3 == 0:
        return Said((mine,), (prompt,) * 2, (right(k), wrong(k)), ((1, 0),))
    if k % 3 == 1:
        return Said((mine, others), (prompt,), (right(k),), ((1,), (0,)))
    return Said((mine, others), (prompt,) * 2, (right(k), wrong(k)), ((1, None), (None, 0)))


# ---- captions


def coco(folder: Path, rows: int) -> tuple[Path, str]:
    """As captions_val2017.json: pictures and annotations apart, five captions of a picture, in any order, some of them the same."""
    write_pictures(folder, lambda k: f"{k:012d}.png")
    images = [
        {"license": 4, "file_name": f"{numbered(k):012d}.png", "height": 427, "width": 640, "flickr_url": "http://x/y.jpg", "id": 1000 + k}
        for k in range(rows)
    ]
    annotations = [
        {"image_id": 1000 + k, "id": 5 * k + j, "caption": right(k) if j == 4 else f"{right(k)} ({j})"}
        for j in range(5)
        for k in range(rows)
    ]
    annotations += [{"image_id": 1000, "id": 5 * rows, "caption": right(0)}]
    info = {"description": "COCO 2017 Dataset", "year": 2017}
    path = folder / "captions_val2017.json"
    path.write_text(json.dumps({"info": info, "licenses": [{"id": 4}], "images": images, "annotations": annotations}))
    return path, "captions"


def coco_said(k: int) -> Said:
    texts = (*(f"{right(k)} ({j})" for j in range(4)), right(k))
    return Said(((numbered(k),),), (DESCRIBE,) * 5, texts, ((1,) * 5,))


def table(folder: Path, rows: int) -> tuple[Path, str]:
    """A CSV of one's own: quotes, commas and line breaks in texts, columns of one's own names."""
    write_pictures(folder)
    path = folder / "mine.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "not true", "edited", "note"])
        for k in range(rows):
            writer.writerow([file_of(numbered(k)), f'{right(k)}\n"quoted", é', wrong(k), file_of(other(k)) if k % 2 else "", k])
    return path, "captions:image=file_name,caption=text,negative_caption=not true,negative_image=edited"


def table_said(k: int) -> Said:
    images = ((numbered(k),), (other(k),)) if k % 2 else ((numbered(k),),)
    return Said(images, (DESCRIBE,) * 2, (f'{right(k)}\n"quoted", é', wrong(k)), ((1, 0), (0, 1)) if k % 2 else ((1, 0),))


def negclip(folder: Path, rows: int) -> tuple[Path, str]:
    """As NegCLIP's TSV: lists as Python writes them, negative pictures by row numbers, which are metadata."""
    write_pictures(folder)
    path = folder / "negclip.tsv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["", "title", "filepath", "neg_caption", "neg_image"])
        for k in range(rows):
            writer.writerow([k, right(k), file_of(numbered(k)), str([wrong(k), f"It's {k} cats."]), str([k + 1])])
    return path, "captions"


def sugarcrepe(folder: Path, rows: int) -> tuple[Path, str]:
    """As SugarCrepe's files: an object whose keys are numbers."""
    write_pictures(folder)
    path = folder / "swap_obj.json"
    made = {str(k): {"filename": file_of(numbered(k)), "caption": right(k), "negative_caption": wrong(k)} for k in range(rows)}
    path.write_text(json.dumps(made, indent=4))
    return path, "captions"


# ---- pairs


def winoground_row(k: int) -> dict[str, Any]:
    return {
        "id": k, "caption_0": right(k), "caption_1": wrong(k), "tag": "Noun", "secondary_tag": "", "num_main_preds": 1,
        "collapsed_tag": "Object",
    }  # fmt: skip


def winoground(folder: Path, rows: int) -> tuple[Path, str]:
    """As examples.jsonl of the hub's facebook/winoground with its pictures unpacked."""
    for k in range(rows):
        for j, which in enumerate((numbered(k), other(k))):
            (folder / f"ex_{k}_img_{j}.png").write_bytes(picture(which))
    made = [winoground_row(k) | {"image_0": f"ex_{k}_img_0", "image_1": f"ex_{k}_img_1"} for k in range(rows)]
    return lines(folder / "examples.jsonl", made), "pairs"


def winoground_said(k: int) -> Said:
    return Said(((numbered(k),), (other(k),)), (DESCRIBE,) * 2, (right(k), wrong(k)), ((1, 0), (0, 1)))


def winoground_parquet(folder: Path, rows: int) -> tuple[Path, str]:
    """The same as the hub converts it, pictures as bytes."""
    made = [
        winoground_row(k)
        | {f"image_{j}": {"bytes": picture(which), "path": f"ex_{k}_img_{j}.png"} for j, which in enumerate((numbered(k), other(k)))}
        for k in range(rows)
    ]
    return parquet(folder / "test-00000-of-00001.parquet", made), "pairs"


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    return path


# ---- Hugging Face data sets, tars


def saved(folder: Path, rows: int) -> tuple[Path, str]:
    """A folder of save_to_disk: two Arrow files in the streaming form, pictures as bytes, nested columns."""
    import pyarrow

    made = [
        {"picture": {"bytes": picture(numbered(k)), "path": None}, "qa": {"question": asked(k), "answers": [right(k)]}, "wrong": [wrong(k)]}
        for k in range(rows)
    ]
    (folder / "vqa").mkdir()
    schema = pyarrow.Table.from_pylist(made).schema
    half = rows // 2
    for number, part in enumerate((made[:half], made[half:])):
        with (
            pyarrow.OSFile(str(folder / "vqa" / f"data-{number:05d}-of-00002.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, schema) as writer,
        ):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema), max_chunksize=33)
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "vqa" / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "f", "_split": "train"}))
    (folder / "vqa" / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder / "vqa", "hf:image=picture,prompt=qa.question,caption=qa.answers,negative_caption=wrong"


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def webdataset(folder: Path, rows: int) -> tuple[Path, str]:
    """As img2dataset and webdataset write shards: KEY.png, KEY.txt, KEY.json; a folder of two."""
    (folder / "shards").mkdir()
    for number, part in enumerate((range(rows // 2), range(rows // 2, rows))):
        with tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as tar:
            member(tar, "README", b"no sample")
            for k in part:
                member(tar, f"{k:09d}.png", picture(numbered(k)))
                member(tar, f"{k:09d}.txt", right(k).encode() + b"\n")
                member(tar, f"{k:09d}.json", json.dumps({"key": f"{k:09d}", "negative_caption": wrong(k), "status": "success"}).encode())
    return folder / "shards", "webdataset"


def triplets(folder: Path, rows: int) -> tuple[Path, str]:
    """As TripletData's shards: members image, neg_image, caption, neg_caption; long folder names, as tar has extra headers for."""
    path = folder / "shard-0.tar"
    with tarfile.open(path, "w") as tar:
        for k in range(rows):
            key = f"{'long' * 30}/{k}"
            member(tar, f"{key}.image", picture(numbered(k)))
            member(tar, f"{key}.neg_image", picture(other(k)))
            member(tar, f"{key}.caption", right(k).encode())
            member(tar, f"{key}.neg_caption", wrong(k).encode())
    return path, "webdataset"


def negative_said(k: int) -> Said:
    return Said(((numbered(k),),), (DESCRIBE,) * 2, (right(k), wrong(k)), ((1, 0),))


PUBLIC: dict[str, tuple[Writer, Callable[[int], Said]]] = {
    "LLaVA": (of_rows(llava_row, "llava", listed=True), llava_said),
    "ShareGPT": (of_rows(sharegpt_row, "llava"), sharegpt_said),
    "TRL messages": (of_rows(trl_row, "messages"), trl_said),
    "OpenAI messages": (of_rows(openai_row, "messages"), openai_said),
    "RLHF-V": (of_rows(preference_plain, "preference"), preference_said),
    "TRL preferences": (of_rows(preference_trl_row, "preference"), preference_said),
    "LLaMA-Factory preferences": (of_rows(preference_factory, "preference", listed=True), preference_said),
    "ms-swift preferences": (of_rows(preference_swift, "preference"), swift_said),
    "RLHF-V with JSON": (of_rows(rlhfv_json, "preference"), preference_said),
    "ms-swift query and response": (of_rows(preference_query, "preference"), preference_said),
    "LLaMA-Factory v1 preferences": (of_rows(preference_v1, "preference"), preference_said),
    "TRL KTO": (kto(kto_trl, "label"), preference_said),
    "LLaMA-Factory KTO": (kto(kto_factory, "kto_tag"), preference_said),
    "ms-swift KTO": (kto(kto_swift, "label"), preference_said),
    "COCO captions": (coco, coco_said),
    "CSV": (table, table_said),
    "NegCLIP": (negclip, lambda k: Said(((numbered(k),),), (DESCRIBE,) * 3, (right(k), wrong(k), f"It's {k} cats."), ((1, 0, 0),))),
    "SugarCrepe": (sugarcrepe, negative_said),
    "Winoground": (winoground, winoground_said),
    "Winoground Parquet": (winoground_parquet, winoground_said),
    "saved data set": (saved, preference_said),
    "WebDataset": (webdataset, negative_said),
    "TripletData": (triplets, winoground_said),
}
"""Name -> what writes it, and what a row says."""
