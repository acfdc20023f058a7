"""Texts that a model writes, judged and grouped: against transformers' own generate, a naive twin, kills, and real trainings."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    PROMPT,
    contents,
    draw,
    environment,
    plain_logp,
    printed,
    read_json,
    read_rows,
    refused,
    wait_for,
    write_json,
    write_rows,
)
from PIL import Image
from test_propose import Server
from transformers import AutoModelForImageTextToText, AutoProcessor

from cfvlm_ds.cli import models
from cfvlm_ds.cli.main import main
from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.counterfactuals.sample import answers
from cfvlm_ds.data import read_manifest
from cfvlm_ds.demo.habits import build_habits, is_true
from cfvlm_ds.evaluation.probes import variants

N, LONGEST, ROWS = 8, 24, 9
QUESTION = "Is it a circle?"
JUDGES = '''
import hashlib

NUMBER = 3
CALLED = []


def is_known(text, row):
    return text in [each["text"] for each in row["texts"]]


def by_hash(text, row):
    """Undecided on every question; of captions, those of the data are true."""
    if row["prompt"] == "Is it a circle?":
        return None
    return is_known(text, row) or {0: True, 1: False, 2: False, 3: None}[hashlib.sha256(text.encode()).digest()[0] % 4]


def fails(text, row):
    return is_known(text, row) or 1 / 0


def returns_one(text, row):
    return 1


def undecided(text, row):
    return None
'''


@pytest.fixture(scope="module", autouse=True)
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    (folder / "my_judges.py").write_text(JUDGES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def speaker(model_dir, tmp_path_factory):
    """The random test model with one token of 16 as an end, so that most of its texts have one, and beams, which sampling has not."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("speaker") / "llava")
    tokenizer = AutoProcessor.from_pretrained(model_dir).tokenizer
    ends = {"eos_token_id": [tokenizer.eos_token_id, *range(8, len(tokenizer), 16)], "num_beams": 2}
    write_json(folder / "generation_config.json", ends)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows that share pictures, with a question, a second picture, a false text and none: of each kind at least one."""
    folder = tmp_path_factory.mktemp("source")
    shapes = [[("red", "circle"), ("blue", "square")], [("green", "circle"), ("green", "square")], [("blue", "circle"), ("red", "circle")]]
    pictures = [draw(folder / f"{k}.png", shapes[k % 3]) for k in range(ROWS)]
    rows = []
    for k, picture in enumerate(pictures):
        texts = [{"id": "a", "text": f"a {shapes[k % 3][0][0]} circle"}, {"id": "b", "text": "a yellow square"}]
        asked = [{"id": "c", "text": "Yes", "prompt": QUESTION}, {"id": "d", "text": "No", "prompt": QUESTION}] if k % 3 == 0 else []
        images = [{"id": "i", "path": picture.name}] + [{"id": "j", "path": pictures[k - 1].name}] * (k == 4)
        match = [["i", "a", 1], ["i", "b", 0], *([["i", "c", 1], ["i", "d", 0]] if asked else [])]
        rows.append({"id": f"r{k}", "prompt": PROMPT, "images": images, "texts": texts + asked, "match": match, "meta": {"k": k}})
    again = {"id": "again", "prompt": PROMPT, "images": [{"id": "i", "path": "1.png"}], "meta": {}}
    again |= {
        "texts": [{"id": "a", "text": "Two green shapes."}, {"id": "b", "text": "a green  circle"}],
        "match": [["i", "a", 1], ["i", "b", 1]],
    }
    text_only = {
        "id": "words",
        "images": [{"id": "i", "path": None}],
        "texts": [{"id": "a", "text": "a circle is round"}],
        "match": [["i", "a", 1]],
    }
    return write_rows(folder / "rows.jsonl", [*rows, again, text_only])


def command(model: Path | str, manifest: Path, out: Path, judge: str = "my_judges:by_hash", *more: str) -> list[str]:
    sizes = ["--n", str(N), "--max_new_tokens", str(LONGEST), "--temperature", "0.9", "--top_p", "0.95", "--seed", "3"]
    return ["data", "sample", str(model), str(manifest), "--out", str(out), "--judge", judge, *sizes, *more]


@pytest.fixture(scope="module")
def whole(speaker, source, tmp_path_factory):
    """A folder made in one shard and without a disturbance."""
    out = tmp_path_factory.mktemp("whole") / "W"
    main(command(speaker, source, out))
    return out


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may load a model."""

    def loaded(*given: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_scorer", loaded)


def test_texts_are_those_of_plain_generate(whole, speaker, source):
    """Of the library's own model and template, with the seed that the picture and the prompt have."""
    model, processor = AutoModelForImageTextToText.from_pretrained(speaker).eval(), AutoProcessor.from_pretrained(speaker)
    record = next(record for record in read_rows(whole / "sample" / "shard-00000.jsonl") if record["id"] == "r4")
    picture = source.parent / "4.png"
    words = "\0".join(["3", hashlib.sha256(picture.read_bytes()).hexdigest(), PROMPT])
    torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=[f"USER: <image>\n{PROMPT} ASSISTANT:"], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **inputs, do_sample=True, temperature=0.9, top_p=0.95, top_k=0, num_return_sequences=N, max_new_tokens=LONGEST,
            pad_token_id=processor.tokenizer.eos_token_id, num_beams=1,
        )[:, inputs.input_ids.shape[1] :]  # fmt: skip
    ended = [row.tolist() for row in ids if not {*model.generation_config.eos_token_id}.isdisjoint(row.tolist())]
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ended]
    assert 0 < len(texts) < N, "some are cut off; the test needs both kinds"
    assert record["texts"] == texts
    assert (record["counts"]["sampled"], record["counts"]["cut off by --max_new_tokens"]) == (N, N - len(texts))


def naive(source: Path, records: list[dict[str, Any]], most: int = 4) -> tuple[dict[str, Any], Counter[str]]:
    """The groups and counts again, from plain rows and the texts of the journal."""
    from my_judges import by_hash

    def plain(text: str) -> str:
        return " ".join(text.split()).lower().removesuffix(".")

    labelled: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for row in read_rows(source):
        truth = {cell[1]: cell[2] for cell in row["match"] if cell[0] == "i"}
        for text in row["texts"]:
            if row["images"][0]["path"] and text["id"] in truth:
                of = labelled.setdefault((row["images"][0]["path"], text.get("prompt", row.get("prompt"))), ([], []))
                of[not truth[text["id"]]].extend([text["text"]] * (plain(text["text"]) not in map(plain, of[0])))
    groups, counts = dict[str, Any](), Counter[str]()
    for ((picture, prompt), (known, wrong)), record in zip(labelled.items(), records, strict=True):
        about = {"prompt": prompt, "texts": [{"text": text} for text in known]}
        different = {plain(text): text for text in reversed(record["texts"])}
        order = dict.fromkeys(map(plain, record["texts"]))
        verdicts = [(text, plain(text) not in map(plain, wrong) and by_hash(text, about)) for text in map(different.get, order)
                    if plain(text) not in map(plain, known)]  # fmt: skip
        true, false = ([text for text, verdict in verdicts if verdict is truth] for truth in (True, False))
        counts.update({"different": len(different), "true": len(true), "false": len(false), "left out": len(false[most:])})
        counts.update({"not judged": len(verdicts) - len(true) - len(false)})
        if false:
            groups[record["id"]] = (picture, prompt, [*known, *true], false[:most])
    return groups, counts


@pytest.fixture(params=["sampled", "planted"])
def judged(request, whole, speaker, source, tmp_path, capsys):
    """The folder as it is, or judged again with other texts in its journal: repeated ones, those of the data, and many false ones."""
    if request.param == "sampled":
        return whole
    out, chance = shutil.copytree(whole, tmp_path / "W"), random.Random(0)
    journal = out / "sample" / "shard-00000.jsonl"
    known = ["a red circle", "a green circle.", "A Green circle", "two green\nshapes", "a blue circle", "A Yellow square."]
    some = [*known, *(f"a{' ' * (1 + k // 12)}shape {k % 12}." for k in range(24))]
    rows = [record | ({"texts": chance.sample(some, 16)} if record["texts"] else {}) for record in read_rows(journal)]
    write_rows(journal, rows)
    printed(capsys, *command(speaker, source, out))
    return out


def test_judging_and_grouping_are_those_of_a_naive_twin(judged, whole, source):
    records, counted = read_rows(judged / "sample" / "shard-00000.jsonl"), read_json(judged / "counts.json")
    groups, counts = naive(source, records)
    found = {}
    for group in read_manifest(judged / "groups.jsonl", [judged, source.parent]):
        ((picture,),), (match,), texts = group.images, group.match, [each.text for each in group.candidates]
        (prompt,) = {each.prompt for each in group.candidates}
        num_true = match.count(1)
        assert match == (1,) * num_true + (0,) * (len(texts) - num_true)
        assert [(edit.type, edit.image, edit.text) for edit in group.edits] == [("sampled", None, c) for c in range(num_true, len(texts))]
        assert json.loads(group.meta) == {"k": int(group.id[1:].partition("#")[0])}
        found[group.id] = (picture.name, prompt, texts[:num_true], texts[num_true:])
    assert found == groups and len(found) > 3
    assert found["r1"][2][:2] == ["a green circle", "Two green shapes."], "of both rows of the picture"
    assert counted["different"] == sum(counted[n] for n in ("equal to a true text of the data", "true", "false", "not judged"))
    names = {
        name: counts[{"false, left out by --most_false": "left out"}.get(name, name)]
        for name in counted
        if name in counts or "left" in name
    }
    assert names.items() <= counted.items() and min(counts["true"], counts["false"], counts["not judged"]) > 0
    asked = ROWS * N
    assert counted["sampled"] == asked and counted["prompts"] == ROWS + ROWS // 3 == len(records)
    assert counted["rows without a picture"] == 1 and counted["not asked, because the judge does not decide on the true text"] == ROWS // 3
    texts = sum(len(record["texts"]) for record in read_rows(whole / "sample" / "shard-00000.jsonl"))
    assert counted["cut off by --max_new_tokens"] + counted["empty, filtered or with a control token"] + texts == asked
    if judged != whole:
        assert counted["equal to a true text of the data"] > 3 and counted["false, left out by --most_false"] > 3
    assert counted["groups"] == len(found) == counted["prompts"] - counted["prompts without a false text"]


def test_kills_and_shards_give_the_same_bytes(whole, speaker, source, judges, tmp_path, capsys):
    """Killed within a shard, torn in the midst of a line, in shards out of order: texts and groups are those of one process."""
    out, variables = tmp_path / "W", environment() | {"PYTHONPATH": f"{judges}:{os.environ.get('PYTHONPATH', '')}"}
    said = printed(capsys, *command(speaker, source, out, "my_judges:by_hash", "--shard", "2/3"))
    assert "other shards are not finished" in said and not (out / "groups.jsonl").exists()
    journal = out / "sample" / "shard-00000.jsonl"
    run = "import sys; from cfvlm_ds.cli.main import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", run, *command(speaker, source, out, "my_judges:by_hash", "--shard", "0/3")]
    killed = subprocess.Popen(words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (journal.exists() and journal.stat().st_size) or killed.poll() is not None)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "missing: --array=0-1" in printed(capsys, "data", "status", out)
    (out / "sample" / "shard-00000.done.json").unlink(missing_ok=True)
    os.truncate(journal, journal.stat().st_size - 9)
    for shard in ("0/3", "1"):  # the folder knows the number
        said = printed(capsys, *command(speaker, source, out, "my_judges:by_hash", "--shard", shard))
    assert "wrote" in said
    alone = read_rows(whole / "sample" / "shard-00000.jsonl")
    assert [read_rows(out / "sample" / f"shard-{k % 3:05d}.jsonl")[k // 3] for k in range(len(alone))] == alone
    named = [(folder / "groups.jsonl").read_text().replace(str(folder), "W") for folder in (whole, out)]
    assert named[0] == named[1] and read_json(whole / "counts.json") == read_json(out / "counts.json")
    before = contents(out)
    printed(capsys, *command(speaker, source, out, "my_judges:by_hash", "--shard", "1/3"))
    assert contents(out) == before


def test_another_start_in_a_folder(whole, speaker, source, tmp_path, capsys, no_model):
    """Without a model where only the judging is done again; refused where the texts would be others, or the folder is another's."""
    out = shutil.copytree(whole, tmp_path / "W")
    printed(capsys, *command(speaker, source, out, "my_judges:by_hash", "--most_false", "1"))
    kept = [sum(cell[2] == 0 for cell in row["match"]) for row in read_rows(out / "groups.jsonl")]
    assert set(kept) == {1} and len(kept) == len(read_rows(whole / "groups.jsonl"))
    other_model, other_writing = (shutil.copytree(speaker, tmp_path / name) for name in ("model", "copy"))
    (other_model / "config.json").write_text((other_model / "config.json").read_text() + "\n")
    write_json(other_writing / "generation_config.json", {"eos_token_id": 2, "repetition_penalty": 1.5})
    propose = ["data", "propose", str(source), "--out", str(out)]
    before = contents(out)
    for words, named in (
        (command(speaker, source, out, "my_judges:by_hash", "--n", "7"), "n: 8 then, 7 now"),
        (command(speaker, source, out, "answers"), "judge"),
        (command(speaker, source, out, "my_judges:by_hash", "--shard", "0/2"), "shards"),
        (command(other_model, source, out), "weights"),
        (command(other_writing, source, out), "writing: "),
        (propose, "steps"),
        (["data", "select", str(out), "--out", str(tmp_path / "g.jsonl")], "verify"),
    ):
        assert named in refused(capsys, *words), words
        assert contents(out) == before
    made = tmp_path / "proposed"
    (made / "proposed").mkdir(parents=True)
    assert "not a work folder" in refused(capsys, *command(speaker, source, made))


@pytest.mark.parametrize(
    ("judge", "more", "named"),
    [
        ("my_judges:returns_one", (), r"rows\.jsonl:1: .*returns_one.*returns 1;"),
        ("my_judges:undecided", (), r"undecided decides on no true text .*rows\.jsonl"),
        ("my_judges:absent", (), "my_judges:absent"),
        ("my_judges", (), "'my_judges'"),
        ("my_judges:NUMBER", (), "my_judges:NUMBER"),
        ("answers", ("--prompt", "What is it?"), "--prompt"),
        ("answers", ("--temperature", "0"), "--temperature"),
    ],
)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(judge, more, named, speaker, source, tmp_path, capsys, no_model):
    assert re.search(named, refused(capsys, *command(speaker, source, tmp_path / "W", judge, *more)))
    assert not (tmp_path / "W").exists()


def test_a_bad_row_is_refused_and_a_bad_picture_is_counted(speaker, source, tmp_path, capsys, monkeypatch):
    rows, folder = read_rows(source)[:2], tmp_path / "my data"
    folder.mkdir()
    shutil.copy(source.parent / "0.png", folder)
    (folder / "1.png").write_bytes(b"no picture")
    out, data = tmp_path / "W", write_rows(folder / "rows.jsonl", [rows[0], {**rows[1], "match": []}])
    assert "rows.jsonl:2" in refused(capsys, *command(speaker, data, out)) and not out.exists()
    write_rows(data, rows)
    monkeypatch.chdir(tmp_path)
    said = printed(capsys, *command(speaker, Path("my data/rows.jsonl"), out, "my_judges:is_known"))
    assert "--root 'my data'" in said
    assert {group.images for group in read_manifest(out / "groups.jsonl", "my data")} == {((folder / "0.png",),)}
    assert "1 not asked, because of an error" in said and "1.png" in json.dumps(read_rows(out / "sample" / "shard-00000.jsonl")[-1])


def test_a_judge_that_fails_late_costs_no_text(speaker, source, judges, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "W", command(speaker, source, tmp_path / "W", "my_judges:fails", "--prompt", "What is there?")
    assert re.search(r"rows\.jsonl:\d+: .*my_judges:fails.* raises ZeroDivisionError", refused(capsys, *words))
    texts = contents(out / "sample")
    import my_judges

    monkeypatch.setattr(my_judges, "fails", my_judges.is_known)
    monkeypatch.setattr(models, "load_scorer", None)
    assert "wrote" in printed(capsys, *words) and contents(out / "sample") == texts
    contradicted, rows = "true texts of the data that the judge calls false", read_rows(out / "groups.jsonl")
    assert read_json(out / "counts.json")[contradicted] == 0
    monkeypatch.setattr(my_judges, "fails", lambda text, row: False)
    assert re.search(rf"\b{ROWS} {contradicted}", printed(capsys, *words)), "counted anew"
    assert {row["prompt"] for row in rows} == {"What is there?"} and not [
        row for row in rows if any(t["text"] == "Yes" for t in row["texts"])
    ]


def told(*texts: Any, ended: str = "stop") -> tuple[int, bytes, dict[str, str]]:
    """A server's reply with these texts."""
    choices = [{"index": k, "finish_reason": ended, "message": {"role": "assistant", "content": text}} for k, text in enumerate(texts)]
    return 200, json.dumps({"choices": choices}).encode(), {}


def asked(url: str, manifest: Path, out: Path, *more: str) -> list[str]:
    return command(url, manifest, out, "my_judges:is_known", "--served_model", "m", *more)


def texts_about(body: dict[str, Any]) -> list[str]:
    """What a pretended model writes about a picture and prompt: some texts repeat, as those of a model do."""
    chance = random.Random(json.dumps(body["messages"]) + str(body["seed"]))
    return [f" a shape {chance.randrange(9)} " for _ in range(N)]


@pytest.mark.parametrize("heeds_n", [True, False])
def test_a_server_writes_the_texts(heeds_n, source, tmp_path, capsys):
    """One that returns n texts and one that returns one at a time: each text is in the journal, in order, also after a kill."""

    def answers_to(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(0.05)  # so that calls meet
        return told(*texts_about(body)[: body["n"] if heeds_n else 1])

    server, out = Server(answers_to), tmp_path / "W"
    with server.running():
        printed(capsys, *asked(server.url, source, out))
        records = read_rows(out / "sample" / "shard-00000.jsonl")
        prompts, calls = ROWS + ROWS // 3, 1 if heeds_n else N
        assert len(records) == prompts and len(server.asked) == prompts * calls and 1 < server.most_at_once <= 8
        whole = contents(out)
        journal = out / "sample" / "shard-00000.jsonl"
        os.truncate(journal, journal.stat().st_size - 9)
        (out / "sample" / "shard-00000.done.json").unlink()
        printed(capsys, *asked(server.url, source, out, "--calls", "1"))
        assert contents(out) == whole and len(server.asked) == (prompts + 1) * calls
        assert "served_model" in refused(capsys, *asked(server.url, source, out, "--served_model", "other"))
    body = next(body for body in server.asked if body["messages"][0]["content"][1]["text"] == PROMPT)
    wanted = {"model": "m", "temperature": 0.9, "top_p": 0.95, "max_tokens": LONGEST, "n": N}
    assert wanted.items() <= body.items() and len(body["messages"]) == 1
    kind, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), float)
    pictures = [np.asarray(Image.open(source.parent / f"{k}.png").convert("RGB"), float) for k in range(3)]
    assert kind == "data:image/jpeg" and min(abs(sent - picture).mean() for picture in pictures) < 8
    bodies = {json.dumps(each["messages"]) + str(each["seed"]): each for each in server.asked}.values()
    possible = {tuple(text.strip() for text in texts_about(each)) for each in bodies if each["n"] == N}
    found = {tuple(record["texts"]) for record in records}
    assert found == possible if heeds_n else {each[0] for each in found} == {each[0] for each in possible}
    assert all(len(record["texts"]) == N == record["counts"]["sampled"] for record in records)


FAULTS = {
    "cut off": (told(*["a shape"] * N, ended="length"), {"sampled": N, "cut off by --max_new_tokens": N}, ""),
    "empty": (told(None, *[" "] * (N - 1)), {"sampled": N, "empty, filtered or with a control token": N}, ""),
    "filtered": (told(*["a sha"] * N, ended="content_filter"), {"sampled": N, "empty, filtered or with a control token": N}, ""),
    "surrogate": (told("a \ud800 shape"), {"not asked, because of an error": 1}, "surrogate"),
    "no choices": (told(), {"not asked, because of an error": 1}, "no choices"),
    "number": (told(7), {"not asked, because of an error": 1}, "choices"),
    "too long": ((400, b"too many tokens", {}), {"not asked, because of an error": 1}, "too many tokens"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_cannot_be_used_costs_its_prompt_alone(fault, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.pause", lambda seconds: None)
    bad, counts, reason = FAULTS[fault]
    server = Server(lambda body, number: bad if QUESTION in json.dumps(body) else told("a green hat", *["a cup"] * (N - 1)))
    with server.running():
        said = printed(capsys, *asked(server.url, source, tmp_path / "W", "--attempts", "2"))
    records = read_rows(tmp_path / "W" / "sample" / "shard-00000.jsonl")
    failed = [record for record in records if record["id"].endswith("#2")]
    assert len(failed) == ROWS // 3 and all(counts.items() <= record["counts"].items() and not record["texts"] for record in failed)
    assert all(reason in record.get("detail", "") for record in failed) and (not reason or reason in said)
    rest = [record["texts"] for record in records if record not in failed]
    assert rest == [["a green hat", *["a cup"] * (N - 1)]] * ROWS


def test_prompts_that_a_failing_server_did_not_answer_are_asked_again(source, tmp_path, capsys, monkeypatch):
    """After the command has given up, or as its warning says if it has not: nothing is answered that would not have been."""
    monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.pause", lambda seconds: None)
    monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.IN_A_ROW", 4)
    out, again, up = tmp_path / "W", ("--calls", "1", "--attempts", "1"), list[bool]()
    server = Server(lambda body, number: told(*["a cup", "a hat"] * N) if up or number == 3 else (503, b"", {}))
    with server.running():
        assert "4 requests in a row" in refused(capsys, *asked(server.url, source, out, *again))
        records, before = read_rows(out / "sample" / "shard-00000.jsonl"), len(server.asked)
        assert ["detail" in record for record in records] == [True, True, True, False], "those before an answer stay"
        up.append(True)
        said = printed(capsys, *asked(server.url, source, out, *again))
        assert len(server.asked) - before == ROWS + ROWS // 3 - len(records) and f"3 of {ROWS + ROWS // 3} records" in said
        assert f"{out / 'sample'}/shard-00000.*" in said
        for path in (out / "sample").iterdir():
            path.unlink()
        printed(capsys, *asked(server.url, source, out, *again))
        printed(capsys, *asked(server.url, source, tmp_path / "whole", *again))
    assert contents(out / "sample") == contents(tmp_path / "whole" / "sample")


@pytest.mark.parametrize("change", ["prompt", "text", "picture"])
@pytest.mark.parametrize("finished", [True, False])
def test_texts_about_other_rows_are_not_used(finished, change, tmp_path, capsys):
    """Of a folder, which has no hash, or with another picture under the same name."""
    data, out = tmp_path / "data", tmp_path / "W"
    data.mkdir()
    draw(data / "0.png", [("red", "circle")] * 2)

    def write(prompt: str, text: str) -> None:
        row = {"id": "r", "prompt": prompt, "image": (data / "0.png").read_bytes(), "caption": text}
        pq.write_table(pa.Table.from_pylist([row]), data / "a.parquet")

    write("What colour?", "red")
    server = Server(lambda body, number: told(*["blue", "green"] * N))
    with server.running():
        words = command(server.url, data, out, "answers", "--served_model", "m")
        printed(capsys, *words)
        if not finished:
            (out / "sample" / "shard-00000.done.json").unlink()
        printed(capsys, *words)
        draw(data / "0.png", [("red", "circle"), ("blue", "square")] if change == "picture" else [("red", "circle")] * 2)
        write("What shade?" if change == "prompt" else "What colour?", "crimson" if change == "text" else "red")
        said = refused(capsys, *words)
    assert "shard-00000" in said and len(server.asked) == 1


def test_no_groups_of_an_earlier_judge_stay(whole, speaker, source, judges, tmp_path, capsys, monkeypatch):
    import my_judges

    out = shutil.copytree(whole, tmp_path / "W")
    monkeypatch.setattr(my_judges, "by_hash", lambda text, row: True)
    assert "no picture has a false text" in refused(capsys, *command(speaker, source, out))
    assert not (out / "groups.jsonl").exists() and not (out / "counts.json").exists()


def test_a_server_that_is_not_there_ends_the_command(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.pause", lambda seconds: None)
    out = tmp_path / "W"
    assert "cannot be reached" in refused(capsys, *asked("http://127.0.0.1:9/v1", source, out))
    assert not (out / "groups.jsonl").exists() and not (out / "sample").exists()
    for url, more, named in (
        ("http://127.0.0.1:9/v1", ("--served_model", ""), "--served_model"),
        ("http://me:secret@127.0.0.1:9/v1", (), "user name or password"),
        ("http://127.0.0.1:9/v1", ("--max_tiles", "3"), "--max_tiles"),
    ):
        assert named in refused(capsys, *asked(url, source, tmp_path / "V", *more)) and not (tmp_path / "V").exists()


@pytest.fixture(scope="module")
def other(speaker, tmp_path_factory):
    """Another model than the one that writes, with weights drawn wide: it knows its opinion."""
    folder = shutil.copytree(speaker, tmp_path_factory.mktemp("other") / "llava")
    model, generator = AutoModelForImageTextToText.from_pretrained(folder), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def test_a_scorer_judges_as_plain_forwards_do(speaker, other, source, tmp_path, capsys, monkeypatch):
    """The share of yes is summed by hand from the library's own forwards; another margin needs no model."""
    out, template = tmp_path / "W", "{prompt} Is {text} right?"
    words = command(speaker, source, out, "match", "--scorer", str(other), "--template", template)
    printed(capsys, *words)
    model, processor = AutoModelForImageTextToText.from_pretrained(other).eval(), AutoProcessor.from_pretrained(other)
    record = next(record for record in read_rows(out / "sample" / "shard-00000.jsonl") if record["id"] == "r4")
    assert list(record["log_odds"]) == list(dict.fromkeys(["a green circle", *record["texts"]]))
    for text, odds in record["log_odds"].items():
        total = dict[str, float]()
        for answer in ("Yes", "No"):
            with torch.no_grad():
                each = [
                    plain_logp(model, processor, (source.parent / "4.png",), template.format(prompt=PROMPT, text=text), spelling)[0].sum()
                    for spelling in variants(answer)
                ]
            total[answer] = float(torch.stack(each).logsumexp(0))
        assert odds == pytest.approx(total["Yes"] - total["No"], abs=2e-3), text
    monkeypatch.setattr(models, "load_scorer", None)
    every = sorted(abs(odds) for each in read_rows(out / "sample" / "shard-00000.jsonl") for odds in each.get("log_odds", {}).values())
    for margin in (0.0, every[len(every) // 2]):
        printed(capsys, *words, "--margin", str(margin), "--most_false", "99")
        counts, by_id = read_json(out / "counts.json"), {row["id"]: row for row in read_rows(out / "groups.jsonl")}
        seen = Counter[str]()
        for each in read_rows(out / "sample" / "shard-00000.jsonl"):
            row = by_id.get(each["id"], {"texts": [], "match": []})
            truth = {text["text"]: cell[2] for text in row["texts"] for cell in row["match"] if cell[1] == text["id"]}
            for text in dict.fromkeys(each["texts"]):
                odds = each["log_odds"][text]
                verdict = "not judged" if abs(odds) <= margin else "true" if odds > 0 else "false"
                seen[verdict] += 1
                assert row["texts"] == [] or truth.get(text) == {"not judged": None, "true": 1, "false": 0}[verdict]
        assert all(counts[name] == seen[name] for name in ("true", "false", "not judged")) and seen["false"] and seen["true"]
        assert bool(seen["not judged"]) == bool(margin)
    assert "template" in refused(capsys, *words, "--template", "Is {text} right?")


def test_a_text_that_the_scorer_refuses_costs_no_other_text(other, source, tmp_path, capsys):
    """The other texts have the scores of a run without it, and the refused one is counted, named, and in no group."""
    said, bad = [], "a <image> shape"
    for folder, first in (("plain", "a cup"), ("refused", bad)):
        texts = {True: ["a cup", "a hat", "a green hat"], False: [first, "a hat", "a green hat"]}
        server = Server(lambda body, number, texts=texts: told(*texts[QUESTION in json.dumps(body)]))
        with server.running():
            words = command(server.url, source, tmp_path / folder, "match", "--scorer", str(other), "--served_model", "m", "--n", "3")
            said.append(printed(capsys, *words))
    plain, records = (read_rows(tmp_path / folder / "sample" / "shard-00000.jsonl") for folder in ("plain", "refused"))
    failed = [record for record in records if bad in record["texts"]]
    assert len(failed) == ROWS < len(records)
    for before, after in zip(plain, records, strict=True):
        kept = {text: odds for text, odds in before["log_odds"].items() if after not in failed or text != "a cup"}
        assert after["log_odds"] == pytest.approx(kept, abs=1e-4), "scored one at a time"
    assert all(record["counts"]["not scored, because of an error"] == 1 and "<image>" in record["detail"] for record in failed)
    counts = read_json(tmp_path / "refused" / "counts.json")
    assert counts["not scored, because of an error"] == counts["not judged"] == ROWS
    assert "<image>" in said[1] and "not scored" not in said[0] and bad not in (tmp_path / "refused" / "groups.jsonl").read_text()


@pytest.mark.parametrize(
    ("judge", "more", "named"),
    [
        ("match", (), "--scorer"),
        ("answers", ("--scorer", "other"), "--judge match"),
        ("match", ("--scorer", "no such model"), "no such model"),
        ("match", ("--scorer", "other", "--template", "Is it right?"), "--template"),
        ("match", ("--scorer", "other", "--margin", "-1"), "--margin"),
        ("match", ("--scorer", "speaker"), "the model that writes"),
        ("answers", ("--served_model", "m"), "--served_model"),
    ],
)
def test_a_wrong_scorer_or_server_is_one_sentence(judge, more, named, speaker, other, source, tmp_path, capsys, no_model):
    names = {"other": str(other), "speaker": str(speaker)}
    more = [names.get(word, word) for word in more]
    assert named in refused(capsys, *command(speaker, source, tmp_path / "W", judge, *more)) and not (tmp_path / "W").exists()


def test_short_answers_by_hand():
    def judged(text: str, *true: str) -> bool | None:
        return answers(text, {"texts": [{"text": each} for each in true]})

    assert [judged(text, "Yes") for text in ("yes.", " YES", "No", "Yes, it is", "yesterday")] == [True, True, False, None, False]
    assert [judged(text, "a dog") for text in ("A dog!", "dog", "a dogma", "a", "_A dog_", "3 dogs")] == [
        True,
        None,
        False,
        None,
        True,
        None,
    ]
    assert [judged(text, "+3") for text in ("It is +3", "+3.", "-3", "+4", "13")] == [None, True, None, False, False]
    assert [judged(text, "5 cm") for text in ("5cm", "five centimetres", "15 cm", "3 cm")] == [None, None, False, False]
    assert [judged(text, "5") for text in (".5", "0.5", "'5'.", "\u201cfive.\u201d")] == [None, False, True, True]
    assert [judged(text, "1000") for text in ("1,000", "\uff11\uff10\uff10\uff10", "100,0", "2,000")] == [True, True, False, False]
    assert [judged(text, "don't know") for text in ("Don\u2019t know", "yes", "...")] == [True, False, None]
    assert [judged(text, "B") for text in ("b.", "(B)", "C", "a cat")] == [True, None, False, None]
    assert [judged(text, "\u732b") for text in ("\u4e00\u53ea\u732b", "\u72d7", "\u732b\u3002")] == [None, False, True], "a cat, dog, cat"
    assert judged("\u9ed2\u3044\u732b", "\u30bd\u30d5\u30a1\u3067\u5bdd\u3066\u3044\u308b\u9ed2\u732b") is None, "a long text"
    assert [judged(text, "two", "2") for text in ("2", "Two", "three", "twenty-two")] == [True, True, False, None]
    assert [judged(text, "a dog on the lawn") for text in ("a dog on the lawn", "a cat")] == [None, None]


def test_the_grammar_of_the_demo_judges_its_training_rows(tmp_path):
    world = build_habits(HabitsConfig(str(tmp_path / "world"), num_train=30, num_test=1, num_questions=1), lambda line: None)
    seen = Counter[bool | None]()
    for row in read_rows(world / "train.jsonl"):
        truth = {text: value for image, text, value in row["match"] if image == "i0"}
        for text in row["texts"]:
            verdict = is_true(text["text"], row)
            assert verdict is (None if "prompt" in text and text["prompt"] != row["texts"][0]["prompt"] else bool(truth[text["id"]])), text
            seen[verdict] += 1
    assert min(seen[True], seen[False], seen[None]) > 5
    assert is_true("It flies.", row) is None and is_true("", row) is None
