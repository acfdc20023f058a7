"""Pages of groups and statistics of data: what is written is parsed, and drawn by a browser where one is here."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from conftest import write_json, write_rows
from PIL import Image, ImageDraw
from stores import preparing
from test_data import row

from cfvlm_ds import page as pages
from cfvlm_ds.cli.main import main
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.data import MAX_PIXELS, check_manifest, open_groups
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, write_scores
from cfvlm_ds.evaluation import view
from cfvlm_ds.evaluation.metrics import content_hash
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.evaluation.view import score_table, view_worst
from cfvlm_ds.page import MAX_TEXT, Item, ScoreTable, Text, changed_words, runs, write_page
from cfvlm_ds.page import Image as Shown
from cfvlm_ds.page.pictures import difference, reduced
from cfvlm_ds.page.report import write_report_page

HOSTILE = (
    '</script><script>document.title = "owned"</script>',
    "</pre></details></table><img src=x onerror=\"document.title='owned'\">",
    "a \u202edesrever\u202c dog & cat\u2028\u2029 \"quoted\" 'too' \\u003c &lt; `${1}` {{ 7 * 7 }} {% raw %} \x1b[31m \x00",
    "__proto__",
    "javascript:document.title='owned'//",
)


def group(name: str, **changes: Any) -> dict[str, Any]:
    texts = [{"id": "t0", "text": "two red dogs"}, {"id": "t1", "text": "three red dogs"}]
    return row(name, **{"texts": texts, "source": "lawn", **changes})


def manifest(folder: Path, *rows: dict[str, Any], name: str = "groups.jsonl") -> Path:
    return write_rows(folder / name, rows)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two pictures that differ in one square, one of another size."""
    picture = Image.effect_noise((120, 80), 40).convert("RGB")
    picture.save(tmp_path / "a.png")
    ImageDraw.Draw(picture).rectangle((30, 20, 49, 39), fill="red")
    picture.save(tmp_path / "b.png")
    picture.resize((60, 40)).save(tmp_path / "c.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Elements(HTMLParser):
    """Every element of some HTML: tag, attributes, texts in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.open: list[Any] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.open += self.found[-1:] * (tag not in ("meta", "link", "img", "input"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for each in self.open:
            each[2].append(data)

    def __getitem__(self, name: str) -> list[str]:
        """The texts of the elements that have this tag or class."""
        return ["".join(texts) for tag, attrs, texts in self.found if name in (tag, *attrs.get("class", "").split())]

    def all(self, name: str) -> list[str]:
        """The values of an attribute."""
        return [attrs[name] for _, attrs, _ in self.found if name in attrs]


def templates(page: Path) -> list[str]:
    """The groups of a page, each with its card, in their order."""
    return re.findall(r"<template .*?</template>", (page / "index.html").read_text(), re.DOTALL)


def drawn(page: Path) -> list[Elements]:
    """The groups alone."""
    return [Elements(re.findall(r"<article>.*</article>", each, re.DOTALL)[0]) for each in templates(page)]


def names(page: Path) -> list[str]:
    return [name for each in drawn(page) for name in each["h2"]]


def index(page: Path) -> Elements:
    """The document without its groups."""
    return Elements(re.sub(r"<template .*</template>", "", (page / "index.html").read_text(), flags=re.DOTALL))


# ---- the page


def test_a_page_has_what_its_groups_have(folder):
    rows = [group("g", weight=2, meta={"by": "hand"}), group("h", prompt="", match=[["i0", "t0", 1]], edits=[], source="")]
    written = view(manifest(folder, *rows), folder / "page")
    assert (written.num_items, written.num_pictures, written.problems) == (2, 2, {})
    first, second = drawn(folder / "page")
    assert first["truth"] == ["true", "unknown", "false", "true"] and len(second["unknown"]) == 3
    assert first["words"] == ["Describe.", "two red dogs", "three red dogs"] and first["mark"] == ["two", "three"]
    assert first["dd"] == ["lawn", "2"] and json.loads(first["pre"][0]) == {"by": "hand"} and not second["prompt"]
    assert first["li"] == ["count: two \u2192 three (image 1, text 1)"] and first.all("alt")[1].endswith("true text: three red dogs")
    assert first["label"] == ["image 0: factual", "image 1: count", "prompt", "text 0: factual", "text 1: count"]
    assert index(folder / "page")["option"] == ["all", "count (1)", "unlabelled (1)", "all", "lawn (1)", "(none) (1)"]
    about = Elements(templates(folder / "page")[1]).found[0][1]
    assert json.loads(about.pop("data-filters")) == {"edit type": ["unlabelled"], "source": ["(none)"]}
    assert about == {"data-searched": "h two red dogs three red dogs", "data-worst": "Infinity"}


def hostile_rows() -> list[dict[str, Any]]:
    return [
        group(
            f"{k} {text}",
            prompt=text,
            texts=[{"id": "t0", "text": text}, {"id": "t1", "text": f"not {text}"}],
            edits=[{"type": text, "image": "i1", "text": "t1", "from": text, "to": text}],
            source=text,
            meta={text: text, "__proto__": {"polluted": 1}},
        )
        for k, text in enumerate(HOSTILE)
    ]


def test_whatever_the_data_say_is_text(folder):
    """It adds no element and no attribute, and is no address; only the page's own scripts and styles may load."""
    name = '"><img src=x onerror=alert(1)>.png'
    (folder / "c.png").rename(folder / name)
    rows = [*hostile_rows(), group("i", images=[{"id": "i0", "path": name}, {"id": "i1", "path": "b.png"}])]
    title = "<script>alert(1)<" + "img src=x onerror=alert(1)>.jsonl"
    page = view(manifest(folder, *rows, name=title), folder / "page").folder
    plain = view(manifest(folder, group("g", meta={"by": "hand"}), group("h", edits=[], source="")), folder / "plain").folder
    ordinary = drawn(plain)[0].found
    for text, each in zip([*HOSTILE, ""], drawn(page), strict=True):
        assert {tag for tag, _, _ in each.found} <= {tag for tag, _, _ in ordinary} | {"code"}  # which has characters that cannot be seen
        assert {a for _, attrs, _ in each.found for a in attrs} <= {a for _, attrs, _ in ordinary for a in attrs}
        assert all(re.fullmatch(r"pictures/[0-9a-fx-]+\.png", address) for address in each.all("src") + each.all("href"))
        written = re.sub("[\x00\x1b\u2028-\u202e]", lambda c: f"U+{ord(c[0]):04X}", text)
        assert not text or (each["words"][0] == written and written in each["h2"][0] and written in each["li"][0])
    assert each["file"][0] == name
    document, other = index(page), index(plain)
    for each, text in zip(map(Elements, templates(page)), [*HOSTILE, ""], strict=True):
        assert not text or json.loads(each.all("data-filters")[0])["source"] == [pages.printable(text)]
        assert [list(attrs) for tag, attrs, _ in each.found if tag == "template"] == [["data-filters", "data-searched", "data-worst"]]
    assert document["title"] == document["h1"] == [title]
    assert [tag for tag, _, _ in document.found if tag != "option"] == [tag for tag, _, _ in other.found if tag != "option"]
    assert document.all("src") + document.all("href") == ["page.js", "page.css"]
    assert not [name for _, attrs, _ in document.found for name in attrs if name.startswith("on") or name == "style"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'" in document.all(
        "content"
    )


@pytest.mark.parametrize(
    "text, hidden",
    [
        ("plain\ttext\nof two lines, caf\u00e9 \u3000", []),
        ("zero\u200bwidth and\ufeff more\xad", ["U+200B", "U+FEFF", "U+00AD"]),
        ("\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e a\u200db", ["U+200D"]),
        ("tag \U000e0041 half \ud800 \u2066isolate", ["U+E0041", "U+D800", "U+2066"]),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, hidden):
    found = list(runs(text))
    assert [part for _, is_hidden, part in found if is_hidden] == hidden
    assert "".join(chr(int(part[2:], 16)) if is_hidden else part for _, is_hidden, part in found) == text


def test_a_text_of_megabytes_says_how_much_is_left_out():
    assert list(runs("x" * MAX_TEXT + "\u202e" * 1_000_000)) == [(False, False, "x" * MAX_TEXT), (False, True, "(1000000 more characters)")]


# ---- words


def test_changed_words():
    for one, other, expected in (
        ("two dogs on a lawn", "three dogs on a lawn", (["two"], ["three"])),
        ("a dog bites a man", "a man bites a dog", (["dog", "man"], ["man", "dog"])),
        ("a  dog.", "a big brown dog.", ([], ["big brown"])),
        ("\u4e24\u53ea\u72d7", "\u4e09\u53ea\u72d7", (["\u4e24"], ["\u4e09"])),
        ("left-hand", "right-hand", (["left"], ["right"])),
    ):
        found = changed_words(one, other)
        assert tuple([text[a:b] for a, b in spans] for text, spans in zip((one, other), found, strict=True)) == expected


def test_what_is_not_marked_is_equal_and_a_hostile_pair_takes_no_time(monkeypatch):
    draw, started = random.Random(0), time.process_time()
    changed_words("a b " * 20_000, "x " + "b a " * 20_000 + "x")
    changed_words("a " * 200, "x " + "a b " * 100 + "x")
    assert time.process_time() - started < 2
    for k in range(400):
        monkeypatch.setattr(pages, "MAX_COMPARED", 10_000 * (k % 2))
        texts, left = [" ".join(draw.choice("abc") for _ in range(draw.randrange(9))) for _ in range(2)], []
        for text, spans in zip(texts, changed_words(*texts), strict=True):
            for a, b in reversed(spans):
                text = text[:a] + text[b:]
            left.append(text.split())
        assert left[0] == left[1]


# ---- pictures


CHANGED_CELLS = """
..............
.######...#...
.#....#.......
.#....#.......
.#....#.......
.#....#.......
.######....##.
..............
.............."""


def test_an_outline_goes_around_what_differs_and_what_that_encloses(folder):
    mask = np.array([[cell == "#" for cell in line] for line in CHANGED_CELLS.split()])
    path, share = difference(np.zeros((9, 14, 3), np.uint8), mask[..., None] * np.full(3, 255, np.uint8))
    lines = "M0 0h8 M0 8h8 M0 0v8 M8 0v8 M9 0h3 M9 3h3 M9 0v3 M12 0v3 M10 5h4 M10 8h4 M10 5v3 M14 5v3"
    assert share == pytest.approx(23 / 126) and sorted(path.replace("M", " M").split()) == sorted(lines.split())
    photo = Image.effect_mandelbrot((640, 400), (-2, -1, 1, 1), 50).convert("RGB")
    photo.save(folder / "again.jpg", quality=60)
    again = Image.open(folder / "again.jpg")  # saving again is no edit
    assert difference(reduced(photo), reduced(again))[0] == ""
    assert difference(reduced(photo), reduced(Image.new("RGB", (640, 400), "red")))[0] == ""  # nor is another picture
    ImageDraw.Draw(again).ellipse((300, 200, 340, 240), fill="red")  # 6 x 6 cells
    path, share = difference(reduced(photo), reduced(again))
    corners = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)", path)]
    assert corners and all(43 < x < 54 and 28 < y < 39 for x, y in corners) and 0 < share < 0.02


def test_pictures_are_compared_where_they_can_be_and_what_is_missing_is_named(folder, capsys):
    (folder / "same.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    images = [{"id": f"i{k}", "path": f"{name}.png"} for k, name in enumerate(("a", "b", "c", "same", "gone", "broken"))]
    main(["data", "view", str(manifest(folder, group("g", images=images))), "--out", "page"])
    (shown,) = drawn(folder / "page")
    assert shown["note"] == ["differs from image 0 in 4 % of its area", "image 0 has another size, 120 x 80", "the same pixels as image 0"]
    gone, broken = shown["missing"]
    assert gone.endswith("gone.png") and "broken.png" in broken and len(shown["outline"]) == 1
    printed = capsys.readouterr().out
    assert "1 groups, 3 pictures" in printed and "2 pictures" in printed and "gone.png" in printed


def test_copies_are_small_and_hold_the_pixels_alone(folder):
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    Image.new("RGB", (3000, 1000), "green").save(folder / "a.png", exif=exif)
    Image.new("RGB", (3000, 1000), "blue").save(folder / "b.png", "JPEG", exif=exif, comment=b"secret")
    assert view(manifest(folder, group("g")), folder / "page").num_pictures == 2
    for each in (folder / "page" / "pictures").iterdir():
        assert b"secret" not in each.read_bytes() and b"taken" not in each.read_bytes() and each.stat().st_size < 20_000
        assert each.suffix == ".jpg" and Image.open(each).size == (768, 256)


def test_groups_share_pictures_and_those_beyond_the_most_are_said(folder, monkeypatch):
    monkeypatch.setattr(pages, "MOST", 60)
    page = view(manifest(folder, *(group(f"g{k}") for k in range(70))), folder / "page").folder
    assert len(list((page / "pictures").iterdir())) == 2 and names(page) == [f"g{k}" for k in range(60)]
    assert any(each.startswith("the first 60 of 70") for each in index(page)["dd"])


# ---- the folder


@pytest.mark.parametrize("kind", ["a file", "a link", ".", "..", "another folder", "notes in a page"])
def test_what_is_no_page_is_not_replaced(folder, kind, monkeypatch):
    page = view(path := manifest(folder, group("g")), folder / "page").folder
    out = Path(kind) if "." in kind else page if "page" in kind else folder / "out"
    if kind == "a file":
        out.write_text("x")
    elif kind == "a link":
        out.symlink_to(page)
    elif "." in kind:
        (folder / "here").mkdir()
        monkeypatch.chdir(folder / "here")
    else:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
    before = sorted(str(each) for each in folder.rglob("*"))
    with pytest.raises(ConfigError, match="--out"):
        view(path, out)
    assert sorted(str(each) for each in folder.rglob("*")) == before


def test_a_page_is_replaced_as_a_whole_or_not_at_all(folder):
    def some() -> Iterator[Item]:
        yield Item("a", [Shown([folder / "a.png"], "")], [Text("x")], [[1]])
        raise KeyboardInterrupt

    path = manifest(folder, *(group(f"g{k}") for k in range(70)))
    view(path, folder / "page")
    assert len(names(view(path, folder / "page", sample=1).folder)) == 1
    with pytest.raises(KeyboardInterrupt):
        write_page("second", some(), 2, folder / "page")
    assert index(folder / "page")["title"] == ["groups.jsonl"] and sorted(p.name for p in folder.glob("page*")) == ["page"]


def test_in_a_notebook_the_page_shows_itself(folder):
    written = view(manifest(folder, group("g")), 'a "page" <b>')
    assert Elements(written._repr_html_()).all("src") == ['a "page" <b>/index.html']


# ---- which groups


def test_a_sample_is_drawn_by_its_seed_and_ids_choose(folder):
    path = manifest(folder, *(group(f"g{k}") for k in range(50)))

    def shown(**options: Any) -> list[str]:
        return names(view(path, folder / "page", **options).folder)

    first = shown(sample=5)
    assert len(first) == 5 and first == sorted(first, key=lambda name: int(name[1:]))
    assert first == shown(sample=5) != shown(sample=5, seed=1)
    assert "5 of 50 (drawn with seed 1)" in index(folder / "page")["dd"]
    (folder / "ids.txt").write_text("g30\n\ng2\r\n")
    assert shown(ids=folder / "ids.txt") == ["g30", "g2"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("g1\ng_1\n", "ids.txt:2: .* no group 'g_1'; correct or remove the line"),
        ("", "contains no id"),
        ("\xff", "UTF-8"),
    ],
)
def test_ids_that_are_not_there_are_named(folder, text, expected):
    (folder / "ids.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=expected):
        view(manifest(folder, group("g1"), group("g2")), folder / "page", ids=folder / "ids.txt")
    assert not (folder / "page").exists()


def test_margins_by_hand():
    def table(match: Any, logp: Any, prompts: str = "pp") -> ScoreTable:
        texts = tuple(Candidate(prompt, f"text {c}") for c, prompt in enumerate(prompts))
        return score_table(
            CounterfactualGroup("g", tuple((Path(f"{i}"),) for i in range(len(match))), texts, match), StoredScores(logp, ())
        )

    found = table(((1, 0), (0, 1)), ((-10.0, -12.0), (-9.0, -11.5)))
    assert found.margins == [[[2.0, -1.0], None], [None, [-2.5, 0.5]]] and (found.lost, found.rank) == (2, -1.25)
    assert table(((1, None), (None, None)), ((-1.0, -2.0), (-3.0, -4.0))).rank is None
    several = table(((1, 0, 0, 0, 1),), ((-1.0, -5.0, -6.0, -7.0, -7.0),), "pppqq")
    assert several.margins == [[[4.0, None], None, None, None, [0.0, None]]] and several.lost == 1


def worst(folder: Path, rows: dict[str, list[dict[str, Any]]], scores: dict[str, Any]) -> Path:
    """The page of a run's worst groups, and its folder."""
    splits = {split: open_groups(manifest(folder, *listed, name=f"{split}.jsonl")) for split, listed in rows.items()}
    found = {
        split: [GroupScores(torch.tensor(scores[each.id]), torch.tensor([-5.0, -5.0])) for each in groups]
        for split, groups in splits.items()
    }
    (run := folder / "run").mkdir(exist_ok=True)
    view_worst(run, 7, splits, found, folder / "page", MAX_PIXELS, print)
    return run


def test_a_run_shows_its_worst_groups(folder, monkeypatch):
    monkeypatch.setitem(view_worst.__globals__, "WORST", 3)
    scores: dict[str, Any] = {name: ((-10.0, -10.0 - margin), (-20.0, -1.0)) for name, margin in {"a": 3, "b": -2, "c": 1, "d": -7}.items()}
    scores["none"] = ((-1.0, -1.0), (-1.0, -1.0))
    rows = {"test": [group("a"), group("b")], "other": [group("c"), group("d"), group("none", match=[["i0", "t0", 1]])]}
    worst(folder, rows, scores)
    assert names(folder / "page") == ["d", "b", "c"]
    ranks = [float(Elements(each).all("data-worst")[0]) for each in templates(folder / "page")]
    assert ranks == pytest.approx([margin / 3 for margin in (-7, -2, 1)])
    document = index(folder / "page")
    assert "1 groups without a comparison" in document["dd"]
    groups = open_groups(folder / "test.jsonl")
    stored = {each.id: StoredScores(scores[each.id], (-5.0, -5.0)) for each in groups}
    write_scores(folder / "scores.jsonl", groups, stored, "run", data_identity(groups, groups.roots))
    view(folder / "test.jsonl", folder / "page", scores=folder / "scores.jsonl")
    first, second = drawn(folder / "page")
    assert first["b"] == ["\u221210.0", "\u221220.0", "\u22125.0", "\u221213.0", "\u22121.0", "\u22125.0"]
    assert first["verdict"][0].endswith(", smallest margin +1.0 per word") and "1 of 2" in second["verdict"][0]
    assert second["margin"] == ["\u25bc \u22122.0 vs texts", "\u25b2 +7.0 vs images"]


def test_groups_are_ranked_by_margin_per_word_and_say_whether_they_were_lost_before(folder):
    """A short answer that is lost by 2 nats comes before a long one that is lost by 4."""
    long = [{"id": "t0", "text": "two red dogs " * 10}, {"id": "t1", "text": "three red dogs " * 10}]
    rows = {"test": [group("long", texts=long), group("short"), group("won"), group("healed"), group("later")]}
    margins = {"long": -4, "short": -2, "won": 3, "healed": 1, "later": -1}
    scores = {name: ((-10.0, -10.0 - margin), (-20.0, -1.0)) for name, margin in margins.items()}
    run = worst(folder, rows, scores)
    lost = {"long": True, "short": False, "won": False, "healed": True}
    points = {name: {"pair": {"count": [2 - was, 2]}, "image_pair": {"count": [1.0, 1]}} for name, was in lost.items()}
    found = {each.id: content_hash(each) for each in open_groups(folder / "test.jsonl")}
    (run / "baseline").mkdir()
    file = run / "baseline" / "test.json"
    write_json(file, {"rows": [{"by_group": [[name, found[name], points[name]] for name in lost]}]})
    worst(folder, rows, scores)
    assert names(folder / "page") == ["short", "later", "long", "healed", "won"], "-2/3, -1/3, -4/30, 1/3, 3/3"
    said = {card["h2"][0]: [each for each in card["dd"] if "after training" in each] for card in drawn(folder / "page")}
    assert said["healed"] == ["all won after training, some lost before"] and said["short"] == ["some lost after training, all won before"]
    assert said["later"] == ["some lost after training, not evaluated before"]
    for damage in ("{", "[]", json.dumps({"rows": [{"by_group": [["won"]]}]})):
        file.write_text(damage)
        worst(folder, rows, scores)
        assert "some lost (3)" in index(folder / "page")["option"]


def test_a_report_has_a_list_of_contents(tmp_path):
    write_report_page(tmp_path / "page.html", "run", "# a\\|b\n\n## <i>one\n\ntext\n\n### part\n\n## two\n")
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r'<a href="#(.*?)">(.*?)</a>', page) == [("part-0", "a|b"), ("part-1", "&lt;i&gt;one"), ("part-2", "two")]
    assert '<h2 id="part-2">two</h2>' in page and "<i>" not in page


# ---- what the check counts


def counted(report: object) -> dict[str, str]:
    return {name.strip(): value for name, value in re.findall(r"^(\S.{15}) (.*)$", str(report), re.MULTILINE)}


def test_counts_of_a_store_are_those_of_its_rows(folder):
    """A row that is there twice under two ids, texts in another order; and the store of the rows."""
    again = group("h", texts=list(reversed(group("g")["texts"])), match=[["i0", "t1", 1], ["i0", "t0", 1], ["i1", "t0", 0]])
    path = manifest(folder, group("g"), again, group("k", prompt="Other."))
    found = check_manifest(path, progress=str)
    assert (found.num_repeated_rows, found.num_repeated_pictures) == (1, 0)
    assert preparing(path, folder / "store")
    of_store = check_manifest(folder / "store", progress=str)
    assert counted(of_store) == counted(found) | {name: counted(of_store)[name] for name in ("manifest", "text lengths")}


# ---- in a browser
UNTIL = """
(async () => {
  while (!(%s)) await new Promise((go) => setTimeout(go, 1));
  await Promise.all([...document.querySelectorAll("#item img")].map((image) => image.decode()));
  return performance.now();
})()
"""


class Tab(browser.Browser):
    def draw(self, page: Path, query: str = "") -> float:
        self.open("about:blank")
        self.open((page / "index.html").as_uri() + query)
        return float(self.run(UNTIL % "document.querySelector('#item').firstChild"))

    def count(self, selector: str) -> Any:
        return self.run(f"document.querySelectorAll('{selector}').length")

    def text(self, selector: str) -> Any:
        return self.run(f"document.querySelector('{selector}').textContent")

    def choose(self, number: int) -> None:
        change = "s.dispatchEvent(new Event('input', {bubbles: true}))"
        self.run(f"(() => {{ const s = document.querySelector('.filter'); s.selectedIndex = {number}; {change}; }})()")


@pytest.fixture
def tab():
    command = browser.found() or pytest.fail("no Chromium here: run tests/support/install_chromium.sh, or name one in CHROMIUM")
    with Tab(command) as opened:
        opened.look(1280, 900)
        yield opened
        assert opened.complaints == []


@pytest.mark.browser
def test_hostile_words_are_text_in_a_browser(folder, tab):
    tab.draw(view(manifest(folder, *hostile_rows(), name="<b>groups.jsonl"), folder / "page").folder)
    for k, text in enumerate(HOSTILE):
        assert tab.text("h2").startswith(f"{k} ") and len(tab.text(".matrix .text .words")) >= len(text)
        assert tab.count("main script, main b b, main img[onerror], [href^=javascript]") == 0
        tab.choose(k + 1)
        assert tab.text("#position") == "1 / 1 of 5"
        tab.choose(0)
        tab.press("j")
    assert tab.run("document.title") == "<b>groups.jsonl" and tab.run("({}).polluted === undefined")


@pytest.mark.browser
def test_keys_filters_and_address(folder, tab):
    rows = [group(f"g{k}", edits=[{"type": ["count", "colour"][k % 2], "text": "t1"}], source=f"s{k % 3}") for k in range(9)]
    page = view(manifest(folder, *rows), folder / "page").folder
    tab.draw(page)
    for key, expected in (("j", "g1"), ("ArrowRight", "g2"), ("k", "g1"), ("End", "g8"), ("j", "g8"), ("Home", "g0"), ("ArrowLeft", "g0")):
        tab.press(key)
        assert tab.text("h2") == expected, key
    tab.press("o")
    assert (tab.count(".card"), tab.count(".card.here")) == (9, 1)
    tab.press("o")
    tab.choose(2)
    assert tab.text("h2") == "g1" and tab.text("#position") == "1 / 4 of 9"
    tab.press("j")
    assert tab.text("h2") == "g3" and tab.run("location.hash") == "#group=4&edit+type=colour"
    for key in "/G7":
        tab.press(key)
    tab.run(UNTIL % "document.querySelector('h2').textContent === 'g7'")
    for key in ("Escape", "?"):
        tab.press(key)
    assert tab.run("document.getElementById('help').open") is True
    tab.draw(page, "#group=6&edit+type=colour&source=s2")
    assert tab.text("h2") == "g5" and tab.text("#position") == "1 / 1 of 9"
    tab.look(400, 900)
    assert tab.run("document.documentElement.scrollWidth") <= 400
    margins = [ScoreTable([[0.0]], decided=(-margin,)) for margin in (1.0, 9.0, 2.0)]
    items = [Item(str(k), [Shown([folder / "a.png"], "")], [Text("x")], [[1]], scores=each) for k, each in enumerate(margins)]
    tab.draw(write_page("p", items, 3, page).folder, "#order=worst")
    tab.press("Home")
    assert tab.text("h2") == "1"
