"""Proposing edits: the rules against a table judged by hand, the language model against a server that misbehaves, pairs that are there."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, draw, read_json, read_rows, write_rows

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.counterfactuals.audit.shortcuts import by_words
from cfvlm_ds.counterfactuals.chat_server import CallFailed, check_url, post
from cfvlm_ds.counterfactuals.options import TYPES, EditOptions, ProposeOptions, SelectOptions, VerifyOptions
from cfvlm_ds.counterfactuals.plan import read_plan
from cfvlm_ds.counterfactuals.propose import PROPOSERS, balance, english, mine, vocabulary
from cfvlm_ds.counterfactuals.propose.base import Proposal, Rejected
from cfvlm_ds.counterfactuals.propose.english import Caption
from cfvlm_ds.counterfactuals.propose.rules import Edit, edits_of
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.counterfactuals.propose.word_difference import defect
from cfvlm_ds.counterfactuals.work_folder import WorkFolder
from cfvlm_ds.data import open_groups


def quiet(line: str) -> None:
    pass


def proposing(path: Path, out: Path, shard: int = 0, shards: int = 1, **options: Any) -> dict[str, Any]:
    """Propose edits for a shard of some captions."""
    return propose(open_groups(path, None, "auto"), out, ProposeOptions(**options), shard, quiet, shards)


def every(caption: str, types: str = ",".join(TYPES)) -> list[Proposal]:
    """All that the rules allow of a caption."""
    found = edits_of(caption, types.split(","))
    return [] if isinstance(found, Rejected) else [proposal for edit in found if (proposal := edit.proposal())]


# --- rules ------------------------------------------------------------------------------------------------------------------------------


def table() -> tuple[dict[str, list[str]], list[tuple[str, list[tuple[str, bool, set[str]]]]]]:
    """The lists of the table by name, and its rows: a caption with its edits, each a type, whether it must be found, and its texts."""
    lists = {}
    rows = []
    for line in (REPO / "tests" / "golden" / "rule_edits.txt").read_text().splitlines():
        if line.startswith("! "):
            name, _, words = line[2:].partition(" = ")
            lists[name] = words.split()
        elif line and not line.startswith("#"):
            caption, _, listed = (part.strip() for part in line.partition("=>"))
            rows.append((caption, [read_edit(caption, part.strip(), lists) for part in listed.split("; ") if part]))
    return lists, rows


def read_edit(caption: str, part: str, lists: dict[str, list[str]]) -> tuple[str, bool, set[str]]:
    kind, _, change = part.partition(" ")
    if "<>" in change:
        one, other = change.split("<>")
        marked = swapped(swapped(caption, one, "\0"), other, one).replace("\0", other)
        texts = {with_articles(marked)}
    else:
        old, _, listed = change.partition(">")
        new = [word for name in listed.split("|") for word in lists.get(name, [name])]
        texts = {with_articles(swapped(caption, old, word)) for word in new} - {caption}
    return kind.removesuffix("?"), not kind.endswith("?"), texts


def swapped(caption: str, old: str, new: str) -> str:
    """Another word in place of the first or second one."""
    word, _, number = old.partition("#")
    found = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", caption))
    assert found, (caption, old)
    place = found[int(number or 1) - 1]
    return caption[: place.start()] + new + caption[place.end() :]


def with_articles(text: str) -> str:
    """a or an by the letter that follows, as it is right for every word of the table."""
    return re.sub(r"\b(a)n?(?= (\w))", lambda m: m[1] + ("n" if m[2] in "aeiou" else "N" if m[2] in "AEIOU" else ""), text, flags=re.I)


TABLE = table()[1]


def test_the_rules_propose_what_is_right_and_most_of_it():
    """All that they may propose of each caption, against a table written by hand: 1 % may be wrong, and three fifths are found."""
    wrong, proposed, wanted, found = [], 0, 0, 0
    for caption, edits in TABLE:
        texts = {(each.type, each.text) for each in every(caption)}
        wrong += [text for text in texts if not any(text[0] == kind and text[1] in right for kind, _, right in edits)]
        listed = [any((kind, text) in texts for text in right) for kind, must, right in edits if must]
        proposed, wanted, found = proposed + len(texts), wanted + len(listed), found + sum(listed)
    assert len(TABLE) >= 300 and proposed > 2000
    assert len(wrong) <= 0.01 * proposed and found >= 0.6 * wanted, (wrong, found, wanted)


def test_the_lists_of_words_hold_words_and_name_listed_nouns():
    """A name that is mistyped would hold of nothing, and YAML takes a bare "on" for true."""
    strings = [vocabulary.LISTS]
    while strings:
        value = strings.pop()
        assert isinstance(value, (dict, list, str)), value
        strings += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    ones = {one for _, one, _ in vocabulary.NOUNS.values()}
    for one, others in vocabulary.by_word("instead").items():
        assert {one, *others} <= ones and {*others} - {one}, one
    for table in ("kept_beside", "never_beside", "only_beside", "governed"):
        assert vocabulary.by_word(table).keys() <= ones | vocabulary.LISTS["nouns"].keys(), table
    assert all(other in vocabulary.ACTIONS for others in vocabulary.ACTIONS.values() for other in others)
    for colours in vocabulary.by_word("colours_of").values():
        assert {*colours} <= {*vocabulary.COLOURS}
    for materials in vocabulary.by_word("made_of").values():
        assert {*materials} <= {*vocabulary.MATERIALS}


def test_no_word_is_found_within_another_one():
    """Every listed word with letters before or after it is another word, of which nothing is proposed."""
    listed = {*vocabulary.COLOURS, *vocabulary.SIZES, *vocabulary.NUMBERS, "sitting", "left"} | {*sorted(vocabulary.NOUNS)[::9]}
    for word in sorted(listed):
        for made in (f"x{word}", f"pre-{word}", f"{word}-like"):
            assert every(f"the {made} of wuppertal") == [], made


def test_no_caption_breaks_the_rules():
    """Words of the lists in any order, with marks, numbers and capitals between them."""
    chance = random.Random(11)
    plain = "a an the two one 3 ٣ left of to , . “ - of and is are with sitting Fuji hydrants wooden several group"
    listed = [*plain.split(" "), "the right of", "a group of", *vocabulary.LISTS["after_an_action"].split()]
    listed += [*vocabulary.NOUNS, *vocabulary.COLOURS, *vocabulary.SIZES, *vocabulary.ACTIONS]
    proposals = 0
    for _ in range(150):
        caption = " ".join(chance.choices(listed, k=chance.randrange(1, 9)))
        for each in every(caption):
            assert defect(caption, each.text, each.type) is None and each.text != caption and each.instruction.isprintable()
            proposals += 1
    assert proposals > 20


def test_what_cannot_be_edited_has_a_reason():
    for caption in ("no dog", "fog", "a dog\x1b[31m", "a " * 2000):
        found = edits_of(caption, TYPES)
        assert isinstance(found, Rejected) and found.reason, caption
    words = ("apple", "hour", "unicorn", "one", "useful", "European", "dog")
    assert [english.article(word) for word in words] == ["an", "an", *["a"] * 5]


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch, tmp_path):
    for absent, remedy in (
        (lambda: monkeypatch.setattr("spacy.util.get_installed_models", lambda: []), "python -m spacy download en_core_web_sm"),
        (lambda: monkeypatch.setitem(sys.modules, "spacy", None), r"cfvlm-ds\[counterfactuals\]"),
    ):
        english.parser.cache_clear()
        absent()
        with pytest.raises(ConfigError, match=f"--with rules: .*{remedy}"):
            proposed(tmp_path, ["a red car"])
    monkeypatch.undo()
    assert proposed(tmp_path, ["a red car"]) != {}


# --- which of them are proposed -----------------------------------------------------------------------------------------------------------


def proposed(folder: Path, captions: Sequence[str], shards: int = 1, **options: Any) -> dict[str, list[dict[str, Any]]]:
    """Source -> edits of the step, of captions in a file, in so many shards."""
    folder.mkdir(exist_ok=True)
    path = folder / "captions.jsonl"
    (folder / "0.png").touch()
    write_rows(path, ({"id": f"r{k}", "caption": said, "image": f"{k}.png"} for k, said in enumerate(captions)))
    for shard in range(shards):
        proposing(path, folder / "W", shard=shard, shards=shards, **options)
    records = [json.loads(line) for file in sorted((folder / "W" / "propose").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {record["source"]: record["edits"] for record in records}


def test_a_word_is_kept_as_often_as_the_ones_that_come_for_it(tmp_path):
    """Worked by hand: 10 rights become lefts; of 30 lefts so many become rights, m, that m - 10 is the root of m + 10: 15, one half."""
    captions = [f"a cup to the {side} of a plate" for side in 30 * ["left"] + 10 * ["right"]]
    edits = proposed(tmp_path, captions, types="relation")
    prices = read_json(tmp_path / "W" / "prices.json")["prices"]["relation"]
    assert prices["to the right of"] / prices["to the left of"] == pytest.approx(0.5, abs=0.01)
    assert sum(len(edits[f"r{k}"]) for k in range(30)) < 30 and all(len(edits[f"r{k}"]) == 1 for k in range(30, 40))


def test_an_edit_is_drawn_with_its_share_and_no_caption_has_too_many():
    """Of edits with shares 1, 1/2 and 1/4 each is drawn so often, less where one at most stays, against 4 standard deviations."""
    edits = [Edit("colour", Caption("a red car"), {1: target}, "", "red", target) for target in ("blue", "green", "gold")]
    prices = {"colour": {"red": 1.0, "blue": 2.0, "green": 0.5, "gold": 0.25}}
    for most, expected in ((1, (4 / 7, 2 / 7, 1 / 7)), (2, (1.0, 0.5, 0.25))):
        found = [balance.drawn(edits, prices, most, seed) for seed in range(4000)]
        shares = [sum(edit in drawn for drawn in found) / len(found) for edit in edits]
        assert shares == pytest.approx(expected, abs=0.032) and max(map(len, found)) == most
    assert found == [balance.drawn(edits, prices, 2, seed) for seed in range(4000)]
    assert balance.drawn([replace(edits[0], come="cyan")], prices, 1, 0) == []  # a word without a price


def skewed(number: int) -> list[str]:
    """Captions as people write them: some words far more often than others."""
    chance = random.Random(number)

    def one(*words):
        return chance.choices(words, [2 ** (len(words) - k) for k in range(len(words))])[0]

    return [
        f"a {one('man', 'woman')} {one('standing', 'sitting')} {one('in front of', 'behind')} a {one('fence', 'gate')} with a "
        f"{one('red', 'blue', 'white', 'green', 'black')} {one('hat', 'bag', 'umbrella')} near {one('two', 'three', 'four')} "
        f"{one('large', 'small')} {one('boxes', 'rocks')}"
        for _ in range(number)
    ]


def test_the_words_of_a_set_do_not_tell_its_edits(tmp_path):
    """By the audit's own measure, where edits drawn of all that are possible are told; no word comes much oftener than it goes."""
    captions = skewed(300)
    edits = proposed(tmp_path, captions)
    pairs = [(captions[int(source[1:])], edit["text"]) for source, listed in edits.items() for edit in listed]
    halves = [int(source[1:]) % 2 == 0 for source, listed in edits.items() for _ in listed]
    at_random = [(said, random.Random(k).choice(every(said)).text) for k, said in enumerate(captions)]
    assert by_words(pairs, halves).auc < 0.55 and by_words(at_random, [k % 2 == 0 for k in range(300)]).auc > 0.6
    kinds = Counter(edit["type"] for listed in edits.values() for edit in listed)
    assert min(kinds[kind] for kind in ("colour", "object", "count", "action", "relation", "size")) > 120
    assert max(Counter((source, edit["type"]) for source, listed in edits.items() for edit in listed).values()) == 1
    for kind in ("colour", "action", "relation", "size"):
        goes, comes = Counter(), Counter()
        for listed in edits.values():
            for edit in listed:
                if edit["type"] == kind:
                    goes[edit["from"]] += 1
                    comes[edit["to"]] += 1
        for word in goes | comes:  # one standard deviation by design, and what the draw adds
            assert abs(goes[word] - comes[word]) <= 4 * math.sqrt(goes[word] + comes[word]), word


def test_words_of_ones_own_are_what_edits_lead_to(tmp_path):
    (tmp_path / "words.yaml").write_text("colour: [cyan, white]\nobject: [van]\n")
    edits = proposed(tmp_path / "own", 9 * ["a red car in a park"], words=str(tmp_path / "words.yaml"))
    texts = {edit["text"] for listed in edits.values() for edit in listed}
    assert texts == {"a cyan car in a park", "a white car in a park"} and all(len(listed) == 1 for listed in edits.values())
    for line, named in (("relation: [left]", "relation"), ("object: [dragon]", "'dragon'")):
        (tmp_path / "words.yaml").write_text(line)
        with pytest.raises(ConfigError, match=named):
            proposed(tmp_path / line[:3], ["a red car"], words=str(tmp_path / "words.yaml"))


# --- what differs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, kind, said",
    [
        ("a blue car near two dogs", "colour", ""),
        ("a red car near three dogs", "count", ""),
        ("two red dogs near a car", "swap_object", ""),
        ("two red cats near a car", "swap_object", "words differ"),
        ("a blue car near three dogs", "colour", "more than one"),
        ("a red car near three cats", "count", "more than one"),
        ("a red automobile near two dogs", "object", "paraphrase"),
        ("the red car near two dogs", "object", "visible"),
        ("A red car near two dogs.", "object", "punctuation"),
        ("a red car near two dogs", "object", "nothing changed"),
        ("near two dogs a red car", "object", "order"),
        ("", "object", "no text"),
        ("a red car near two\ndogs", "object", "printable"),
        ("a red car without two dogs", "relation", "negation"),
        ("a red car near the " + "very " * 9 + "old dogs", "object", "more than one"),
    ],
)
def test_a_text_is_judged_by_its_words(text, kind, said):
    found = defect("a red car near two dogs", text, kind)
    assert said in (found or "") and bool(found) == bool(said)


# --- a language model -------------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A real HTTP server that answers as it is told; what was asked is kept."""

    answers: Callable[[dict[str, Any], int], tuple[int, bytes | Callable[[Any], None], dict[str, str]]]
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0

    @contextmanager
    def running(self) -> Iterator[Server]:
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.asked)
                    outer.asked.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.add(self.path)
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    status, content, more = outer.answers(body, number)
                    self.send_response(status)
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.end_headers()
                    if callable(content):
                        content(self.wfile)
                    else:
                        self.wfile.write(content)
                except OSError:
                    pass  # the client has had enough
                finally:
                    with lock:
                        outer._now -= 1

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def reply(edits: Any, **more: Any) -> bytes:
    content = edits if isinstance(edits, str) else json.dumps({"edits": edits})
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}} | more
    return json.dumps({"model": "served/model-1", "choices": [choice], "usage": {"total_tokens": 100}}).encode()


def edit(kind: str, text: str, told: str = "Do it.") -> dict[str, str]:
    return {"type": kind, "text": text, "instruction": told}


@pytest.fixture
def captions(tmp_path):
    rows = []
    for k, caption in enumerate(["a red car near two dogs", "a cup on a table", "a man on a bench", "fog"]):
        draw(tmp_path / f"{k}.png", [("red", "circle"), ("blue", "square")])
        rows.append({"id": f"c{k}", "image": f"{k}.png", "caption": caption, "license": "CC0"})
    path = tmp_path / "captions.jsonl"
    write_rows(path, rows)
    return path


def asked_model(captions: Path, out: Path, server: Server, **options: Any) -> dict[str, Any]:
    given = {"back_ends": "llm", "llm_url": server.url, "llm_model": "m", "llm_timeout_s": 60.0, "llm_attempts": 3} | options
    return proposing(captions, out, **given)


def lines_of(out: Path, step: str = "propose") -> list[dict[str, Any]]:
    return read_rows(out / step / "shard-00000.jsonl")


@pytest.fixture
def at_once(monkeypatch):
    """Pauses between calls are noted and not waited for."""
    pauses = []
    monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.pause", pauses.append)
    return pauses


def test_what_a_model_says_is_judged_and_kept(captions, tmp_path, monkeypatch, at_once):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    said = [
        edit("colour", "a blue car near two dogs"),
        edit("count", "a red car near three cats"),  # two things
        edit("object", "a red automobile near two dogs"),  # the same thing
        edit("age", "an old red car near two dogs"),  # nobody asked
        edit("relation", "a red car <img src=x onerror=alert(1)> two dogs", "told\nmore"),
        {"type": "size", "text": 7, "instruction": ""},
        edit("colour", "a green car near two dogs"),  # one of its type is there
        "prose",
    ]
    server = Server(lambda body, number: (200, reply(said if "red car" in json.dumps(body) else []), {}))
    with server.running():
        done = asked_model(captions, tmp_path / "W", server, llm_see=True)
    first = lines_of(tmp_path / "W")[0]
    assert [(each["type"], each["text"], each["from"], each["to"]) for each in first["edits"]] == [
        ("colour", "a blue car near two dogs", "red", "blue")
    ]
    assert first["edits"][0]["id"] == "c0/0" and first["license"] == "CC0"
    assert [each["reason"] for each in first["rejected"]] == [
        "more than one thing changed", "a paraphrase", "its type was not requested", "its instruction is not one printable line",
        "type, text or instruction is missing", "an earlier edit has its type or text", "type, text or instruction is missing",
    ]  # fmt: skip
    assert done["counts"]["edits"] == 1 and len(server.asked) == 4
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    body = server.asked[0]
    assert body["response_format"]["type"] == "json_schema" and body["messages"][1]["content"][0]["image_url"]["url"].startswith(
        "data:image/jpeg"
    )
    kept = b"".join(path.read_bytes() for path in (tmp_path / "W").rglob("*") if path.is_file())
    assert b"secret" not in kept


def drip(part: bytes, times: int, pause_s: float) -> Callable[[Any], None]:
    def write(file):
        for _ in range(times):
            file.write(part)
            file.flush()
            time.sleep(pause_s)

    return write


FAULTS = {
    "too many calls": (429, b"{}", {"Retry-After": "7"}),
    "server error": (500, b"boom", {}),
    "no JSON": (200, b"<html>login</html>", {}),
    "prose": (200, reply("Sure! Here are some edits: a blue car."), {}),
    "white space": (200, reply(" \n" * 3000, finish_reason="length"), {}),
    "no choices": (200, b'{"choices": []}', {}),
    "duplicate keys": (200, reply('{"edits": [], "edits": [1]}'), {}),
    "nested": (200, b"[" * 100_000, {}),
    "flood": (200, b" " * (1 << 21), {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried(fault, captions, tmp_path, at_once):
    good = reply([edit("colour", "a blue car near two dogs")])
    seen = Counter()

    def answers(body, number):
        caption = json.dumps(body["messages"][1])
        seen[caption] += 1
        return FAULTS[fault] if seen[caption] == 1 else (200, good if "red car" in caption else reply([]), {})

    server = Server(answers)
    with server.running():
        done = asked_model(captions, tmp_path / "W", server, llm_calls=1)
    assert len(server.asked) == 8 and len(at_once) == 4 and done["counts"]["edits"] == 1 and "without a reply" not in done["counts"]
    assert all(0 < pause <= 60 for pause in at_once)
    if fault == "too many calls":
        assert all(pause >= 7 for pause in at_once)


def test_a_reply_that_never_ends_is_left():
    slow = {"body": (200, drip(b" ", 100, 0.1), {}), "nothing": (200, drip(b"", 40, 0.1), {"Content-Length": "5"})}
    for name, answer in slow.items():
        server = Server(lambda body, number, answer=answer: answer)
        with server.running():
            started = time.monotonic()
            with pytest.raises(CallFailed, match=r"no complete reply within 0\.4 s"):
                post(server.url, {}, timeout_s=0.4, most_bytes=1000)
            assert time.monotonic() - started < 1.5, name


def test_a_source_without_a_reply_is_a_named_failure_and_a_server_that_is_down_ends_it(captions, tmp_path, at_once, monkeypatch):
    server = Server(lambda body, number: (500, b"boom", {}))
    with server.running():
        done = asked_model(captions, tmp_path / "W", server, llm_calls=1)
        assert done["counts"]["without a reply"] == 4 and len(server.asked) == 12
        assert "status 500: boom" in lines_of(tmp_path / "W")[0]["rejected"][0]["reason"]
        monkeypatch.setattr("cfvlm_ds.counterfactuals.chat_server.IN_A_ROW", 3)
        with pytest.raises(ConfigError, match="3 requests"):
            asked_model(captions, tmp_path / "V", server, llm_calls=1)
    for status, text in ((404, "bad model"), (302, "bad model"), (422, "no such option")):
        server = Server(lambda body, number, status=status, text=text: (status, text.encode(), {"Location": "http://elsewhere/"}))
        with server.running(), pytest.raises(ConfigError, match=f"{status}.*{text}"):
            asked_model(captions, tmp_path / f"U{status}", server, llm_calls=1)
    # A caption that is too long for a server must not end the step at every start.
    server = Server(lambda body, number: (422, b"too long", {}) if "red car" in json.dumps(body) else (200, reply([]), {}))
    with server.running():
        done = asked_model(captions, tmp_path / "W422", server, llm_calls=1)
    assert done["counts"]["without a reply"] == 1 and len(server.asked) == 4
    assert "too long" in lines_of(tmp_path / "W422")[0]["rejected"][0]["reason"]


def test_a_restart_asks_of_no_caption_that_has_its_record(captions, tmp_path, at_once):
    def answers(body, number):
        threading.Event().wait(0.1)  # so that calls meet
        return 200, reply([edit("colour", "a blue car near two dogs")]), {}

    server, out = Server(answers), tmp_path / "W"
    with server.running():
        asked_model(captions, out, server, llm_calls=3)
        assert len(server.asked) == 4 and 1 < server.most_at_once <= 3
        whole = {path.name: path.read_bytes() for path in (out / "propose").iterdir()}
        (out / "propose" / "shard-00000.jsonl").write_bytes(whole["shard-00000.jsonl"][:-100])  # a kill in the midst of a line
        (out / "propose" / "shard-00000.done.json").unlink()
        asked_model(captions, out, server, llm_calls=3)
        assert len(server.asked) == 5 and "fog" in json.dumps(server.asked[4])
        assert {path.name: path.read_bytes() for path in (out / "propose").iterdir()} == whole
        with pytest.raises(ConfigError, match="llm_model: 'm'"):
            (out / "propose" / "shard-00000.done.json").unlink()
            asked_model(captions, out, server, llm_model="n")


@pytest.mark.parametrize(
    "section, name, value",
    [
        (ProposeOptions, "llm_timeout_s", math.nan),
        (EditOptions, "threads", -1),
        (VerifyOptions, "batch_size", 0),
        (SelectOptions, "margin", math.nan),
    ],
)
def test_numbers_that_say_nothing_are_refused_by_the_name_of_their_option(section, name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"^--{name} {value} "):
        section(**{name: value})
    key = section.__name__.removesuffix("Options").lower()
    (tmp_path / "plan.yaml").write_text(f"data: x\nout: W\n{key}: {{{name}: {'.' if value != value else ''}{value}}}\n")
    with pytest.raises(ConfigError, match=rf"plan\.yaml: {key}\.{name} "):
        read_plan(str(tmp_path / "plan.yaml"))


def test_a_server_that_is_not_there_is_said_at_once(captions, tmp_path, at_once):
    server = Server(lambda body, number: (200, reply([]), {}))
    with server.running():
        pass
    with pytest.raises(ConfigError, match="ConnectionRefusedError"):
        asked_model(captions, tmp_path / "W", server)
    with server.running():  # at another address: nothing was done with the first
        asked_model(captions, tmp_path / "W", server)


def test_addresses():
    assert check_url("https://node:8000/v1/", "--x") == "https://node:8000/v1"
    for url in ("", "file:///etc/passwd", "node:8000", "http://", "http://a b/", "http://u:p@node/", "http://x:99999999/"):
        with pytest.raises(ConfigError, match="--x"):
            check_url(url, "--x")


# --- pairs that are there ---------------------------------------------------------------------------------------------------------------


def mined(tmp_path: Path, **options: Any) -> set[tuple[str, str, str]]:
    rows = [
        ("a", "a red car in a street", "0.png"), ("b", "a blue car in a street", "1.png"), ("c", "A red bus in a street.", "2.png"),
        ("d", "a red car in a street", "3.png"), ("e", "a crimson automobile in a street", "4.png"),
        ("f", "a red house in a street", "5.png"),
        ("g", "two red cars in a street", "6.png"), ("h", "a grey car in a street", "7.png"), ("i", "a gray car in a street", "8.png"),
        ("j", "a blue car in a street", "0.png"),
    ]  # fmt: skip
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "mine.jsonl"
    (tmp_path / "0.png").touch()
    write_rows(path, ({"id": i, "caption": c, "image": p} for i, c, p in rows))
    propose(open_groups(path, None, "auto"), tmp_path / "M", ProposeOptions(back_ends="mine", per_type=9, **options), 0, quiet)
    records = read_rows(tmp_path / "M" / "propose" / "shard-00000.jsonl")
    return {(record["source"], each["type"], Path(each["picture"]).name) for record in records for each in record["edits"]}


def test_real_pairs_are_found_once(tmp_path):
    """Against all pairs by hand: a word of one list in place of another one of it, pictures that are not the same, synonyms left out."""
    pairs = "a1 a7 a8 b3 b7 b8 d7 d8 d0 h0 i0"  # d3 says what a0 says, and j0 is a's own picture; grey is gray
    expected = {(pair[0], "colour", f"{pair[1]}.png") for pair in pairs.split()}
    assert mined(tmp_path) == expected
    wider = mined(tmp_path / "wider", types="colour,other")
    assert wider - expected == {("a", "other", "5.png"), ("d", "other", "5.png")}  # a house in place of a car


def test_one_shard_and_seven_find_the_same_pairs_whoever_makes_the_index(tmp_path, monkeypatch):
    """With more pairs than are looked at or kept, shards in any order, and an index and words' prices that some shards make anew."""
    monkeypatch.setattr(mine, "_LOOKED_AT", 8)
    chance = random.Random(9)
    texts = ["red", "green", "blue", "black"], ["car", "bus", "truck", "dog", "cat"], ["street", "park"]
    rows = [
        {"id": f"r{k}", "caption": "a {} {} in a {}".format(*(chance.choice(words) for words in texts)), "image": f"{k}.png"}
        for k in range(120)
    ]
    (tmp_path / "0.png").touch()
    write_rows(tmp_path / "c.jsonl", rows)
    made = {}
    for shards in (1, 7):
        out = tmp_path / f"W{shards}"
        for shard in chance.sample(range(shards), shards):
            if shard % 3 == 0:
                for file in (out / "mine" / "slots.bin", out / "prices.json"):
                    file.unlink(missing_ok=True)
            options = ProposeOptions(back_ends="mine,rules", types="colour,object,other", per_type=2)
            propose(open_groups(tmp_path / "c.jsonl", None, "auto"), out, options, shard, quiet, shards)
        records = [json.loads(line) for file in sorted((out / "propose").glob("*.jsonl")) for line in file.read_text().splitlines()]
        made[shards] = {record["source"]: record for record in records}
    pairs = [edit for record in made[1].values() for edit in record["edits"] if edit["back_end"] == "mine"]
    assert made[1] == made[7] and len(made[1]) == 120 and len(pairs) > 100


def indexed(path: Path, captions: list[tuple[int, str]]) -> mine.SlotIndex:
    mine._write(path, captions)
    return mine.SlotIndex(path)


def test_the_index_of_open_slots_is_that_of_a_dictionary(tmp_path):
    """Of every key the rows with another word in its place, from any start; where more are there than are asked for, of all words."""
    draw_word = random.Random(3)
    captions = [(row, " ".join(draw_word.choice("abcd") for _ in range(4))) for row in range(400)]
    expected = {}
    for row, caption in captions:
        for key, _, word in mine.slots(caption):
            expected.setdefault(key, {}).setdefault(word, []).append(row)
    index = indexed(tmp_path / "i.bin", captions)
    assert {len(of_word) > 1 for of_word in expected.values()} == {True, False}
    for key, of_word in expected.items():
        for word in "abcd":
            others = [row for other, rows in of_word.items() if other != word for row in rows]
            assert sorted(index.rows(key, word, 1000, draw_word.getrandbits(64))) == sorted(others)
            some = index.rows(key, word, 2, draw_word.getrandbits(64))
            assert len(some) == len(set(some)) == min(2, len(others)) and set(some) <= set(others)
    assert index.rows(b"\xff" * 8, "a", 10, 0) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "i.bin"]
    assert indexed(tmp_path / "none.bin", []).rows(b"key of 8", "a", 5, 0) == []


def test_registered_back_ends_are_called_by_name(captions, tmp_path, monkeypatch):
    class Own:
        threads = 1

        def __init__(self, context):
            pass

        def settings(self):
            return {"version": 3}

        def propose(self, source):
            return [Proposal("other", f"{source.caption} at night", "", "at night", "Make it night.", "own")]

    monkeypatch.setitem(PROPOSERS, "own", Own)
    store = open_groups(captions, None, "auto")
    done = propose(store, tmp_path / "W", ProposeOptions(back_ends="rules,own"), 0, quiet)
    assert done["counts"]["back end: own"] == 4 and WorkFolder.open(tmp_path / "W").settings("propose")["settings"]["own"] == {"version": 3}
    for options, named in (({"back_ends": "rulez"}, "--with rulez: .*'rules'"), ({"types": "color"}, "--types color")):
        with pytest.raises(ConfigError, match=named):
            propose(store, tmp_path / "V", ProposeOptions(**options), 0, quiet)
    write_rows(tmp_path / "c.jsonl", [{"image": "a.png", "caption": 7}] * 3)
    with pytest.raises(DataError, match=r"c\.jsonl:1: .* 3 groups"):
        propose(open_groups(tmp_path / "c.jsonl", None, "captions"), tmp_path / "V", ProposeOptions(), 0, quiet)
    assert not (tmp_path / "V").exists()


def test_a_caption_said_of_many_pictures_does_not_hide_the_others(tmp_path):
    """Two thousand pictures say the same; the one that differs in a word is found by all that come before it, and few rows are read."""
    rows = [{"id": f"r{k:04}", "caption": "a red car in a street", "image": f"{k}.png"} for k in range(2000)]
    rows.append({"id": "s", "caption": "a blue car in a street", "image": "s.png"})
    (tmp_path / "0.png").touch()
    write_rows(tmp_path / "c.jsonl", rows)
    proposing(tmp_path / "c.jsonl", tmp_path / "W", back_ends="mine")
    records = read_rows(tmp_path / "W" / "propose" / "shard-00000.jsonl")
    assert [[each["text"] for each in record["edits"]] for record in records] == [["a blue car in a street"]] * 2000 + [[]]
