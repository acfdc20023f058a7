"""From captions and pictures to groups: the work folder under kills and cuts, editors, verdicts against a known truth, selection, audit.

The built-in world stands for a user's photographs. Its editor fails in known ways, so it is known of every candidate whether it is good.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, REPO, contents, draw, printed, read_json, read_rows, refused, wait_for, write_json, write_rows
from PIL import Image, ImageDraw, ImageOps
from test_propose import Server, proposing, quiet, reply
from world_editor import WorldEditor, describes, failed, fault_of, scene_of, shown_by

from cfvlm_ds.cli.main import main
from cfvlm_ds.cli.making import _print_done
from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.counterfactuals.audit import shortcuts
from cfvlm_ds.counterfactuals.audit.duplicates import Look, look, near_pairs
from cfvlm_ds.counterfactuals.audit.report import audit, write_report
from cfvlm_ds.counterfactuals.checks import compared, largest_piece, perceptual_hash
from cfvlm_ds.counterfactuals.edit import EDITORS
from cfvlm_ds.counterfactuals.edit.base import Picture, Task
from cfvlm_ds.counterfactuals.edit.diffusion import OLDEST, Diffusers, call_options
from cfvlm_ds.counterfactuals.edit.flip import Flip
from cfvlm_ds.counterfactuals.edit.step import edit
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, calibrated, read_thresholds, verdict
from cfvlm_ds.counterfactuals.options import TYPES, AuditOptions, EditOptions, ProposeOptions, SelectOptions, VerifyOptions
from cfvlm_ds.counterfactuals.plan import read_plan
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.counterfactuals.propose.vocabulary import NOUNS
from cfvlm_ds.counterfactuals.select import REPEATED, Survival, checked, ranges, select
from cfvlm_ds.counterfactuals.status import status
from cfvlm_ds.counterfactuals.verify import calibrate, verify
from cfvlm_ds.counterfactuals.work_folder import OUTDATED, WorkFolder
from cfvlm_ds.data import check_manifest, open_groups, open_image, read_manifest
from cfvlm_ds.demo.habits import build_habits
from cfvlm_ds.demo.habits.grammar import noun
from cfvlm_ds.demo.habits.world import COLOURS as WORLD_COLOURS
from cfvlm_ds.demo.habits.world import KINDS
from cfvlm_ds.evaluation.scoring import GroupScores

SEED, FAULTS = 5, 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "world"
    build_habits(HabitsConfig(str(folder), num_train=1, num_test=36), lambda line: None)
    nouns = {noun(kind, number) for kind in KINDS for number in (1, 2)}
    words = {"colour": list(WORLD_COLOURS), "count": ["one", "two", "three"], "object": sorted(nouns & {*NOUNS})}
    write_json(folder.parent / "words.yaml", words)
    return folder


@pytest.fixture(autouse=True)
def _world_editor(monkeypatch):
    monkeypatch.setitem(EDITORS, "world", WorldEditor)


def begun(world: Path, out: Path, shards: int = 1) -> Path:
    options = ProposeOptions(words=str(world.parent / "words.yaml"), seed=SEED)
    for shard in range(shards):
        propose(open_groups(world / "test_combo.jsonl"), out, options, shard, quiet, shards)
    return out


def world_options(attempts: int = 2) -> EditOptions:
    return EditOptions(back_ends="world", options=f"faults={FAULTS}", attempts=attempts, seed=SEED)


class Oracle:
    """A scorer that sees what is drawn, through noise: log P(yes) is high where a text describes the scene behind a picture."""

    def __init__(self, work: Path, noise: float = 0.0) -> None:
        self.noise, self.calls = noise, 0
        self.truth: dict[tuple[str, int], bool] = {}
        self._behind: dict[str, Any] = {}
        folder = WorkFolder.open(work)
        for shard in range(folder.shards):
            proposals = {e["id"]: (e, line) for line in folder.records("propose", shard) for e in line["edits"]}
            for made in folder.records("edit", shard):
                if made.get("picture"):
                    proposal, line = proposals[made["edit"]]
                    before, fault = scene_of(line["source"]), fault_of(made["seed"], FAULTS)
                    wanted = shown_by(before, proposal["text"])
                    assert wanted is not None and made.get("info", {}).get("fault", "") == fault
                    after = failed(before, wanted, fault, made["seed"])
                    self._behind[f"{made['edit']}@{made['attempt']}"] = (line["caption"], proposal["text"], before, after)
                    is_right = describes(proposal["text"], after) and not describes(line["caption"], after)
                    self.truth[made["edit"], made["attempt"]] = is_right

    def __call__(self, groups: Sequence[CounterfactualGroup]) -> list[GroupScores]:
        self.calls += len(groups)
        return [self._scored(group) for group in groups]

    def _scored(self, group: CounterfactualGroup) -> GroupScores:
        old, new, before, after = self._behind[group.id]
        draw = random.Random(group.id)
        rows = []
        for scene in (before, after)[: len(group.images)]:
            odds = [(4.0 if describes(text, scene) else -4.0) + draw.gauss(0, self.noise) for text in (old, new)]
            cells = (len(group.candidates) - 2) // 4
            asked = [v for each in odds for sign in (1, -1) for v in [-math.log1p(math.exp(-sign * each)) - math.log(cells)] * cells]
            rows.append([*asked, *(-20 + each for each in odds)])
        return GroupScores(torch.tensor(rows, dtype=torch.float64), torch.full((len(group.candidates),), -3.0, dtype=torch.float64))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A work folder with all steps done, in one shard and without a disturbance."""
    EDITORS["world"] = WorldEditor
    out = begun(world, tmp_path_factory.mktemp("whole") / "W")
    edit(out, world_options(), 0, quiet)
    verify(out, VerifyOptions(), 0, quiet, Oracle(out, noise=2.5))
    return out


# --- the work folder --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["propose", "edit", "verify"])
@pytest.mark.parametrize("part", [0.31, 0.999])
def test_whatever_is_torn_ends_in_the_same_bytes(step, part, whole, world, tmp_path):
    out = tmp_path / "W"
    shutil.copytree(whole, out)
    for later in ("propose", "edit", "verify")[("propose", "edit", "verify").index(step) :]:
        (out / later / "shard-00000.done.json").unlink()
        if later != step:
            (out / later / "shard-00000.jsonl").unlink()
    journal = out / step / "shard-00000.jsonl"
    os.truncate(journal, int(part * journal.stat().st_size))
    if step == "edit":
        with open(out / "pictures" / "shard-00000.tar", "ab") as tar:  # a picture whose record was not written any more
            tar.write(b"torn" * 1000)
    whole_lines = journal.read_bytes().count(b"\n")
    assert len(list(WorkFolder.open(out).records(step, 0))) == whole_lines, "looked at before it goes on"
    begun(world, out)
    edit(out, world_options(), 0, quiet)
    oracle = Oracle(out, noise=2.5)
    verify(out, VerifyOptions(batch_size=4), 0, quiet, oracle)
    assert contents(out) == contents(whole)
    assert oracle.calls > 0 and (step != "verify" or part < 0.9 or oracle.calls <= 64)


def test_sigkill_in_the_midst_ends_in_the_same_bytes(whole, world, tmp_path):
    out = begun(world, tmp_path / "W")
    shard = out / "edit" / "shard-00000.jsonl"
    shard.parent.mkdir()
    shard.touch()
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                edit(out, world_options(), 0, quiet)
            finally:
                os._exit(0)
        before = shard.stat().st_size
        wait_for(lambda before=before: shard.stat().st_size > before + 9000 or shard.with_suffix(".done.json").exists(), 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    edit(out, world_options(), 0, quiet)
    assert contents(out).items() >= {name: held for name, held in contents(whole).items() if not name.startswith("verify")}.items()


def verified(out: Path, shard: int = 0) -> dict[str, Any]:
    """Verify a shard without a scorer."""
    return verify(out, VerifyOptions(), shard, quiet, None)


def candidates_of(out: Path, step: str) -> dict[tuple[str, int], Any]:
    """The records without the places of pictures, whatever the shard."""
    work, found = WorkFolder.open(out), {}
    for shard in range(work.shards):
        for record in work.records(step, shard):
            for each in (record, record.get("made", {})):
                if isinstance(picture := each.get("picture"), dict):
                    each["picture"] = picture.get("sha256")
            found[record.get("edit") or record["source"], record.get("attempt", 0)] = record
    return found


def test_one_shard_and_seven_give_the_same_candidates(whole, world, tmp_path):
    out = begun(world, tmp_path / "W", shards=7)
    for shard in (6, 2, 0, 1, 5, 4, 3):
        edit(out, world_options(), shard, quiet, 7)
    oracle = Oracle(out, noise=2.5)
    for shard in range(7):
        verify(out, VerifyOptions(), shard, quiet, oracle)
    for step in ("propose", "edit", "verify"):
        assert candidates_of(out, step) == candidates_of(whole, step)
    rows = []
    for folder in (whole, out):
        select(folder, tmp_path / f"{folder.parent.name}.jsonl", SelectOptions(), quiet)
        listed = read_rows(tmp_path / f"{folder.parent.name}.jsonl")
        rows.append({row["id"]: ([text["text"] for text in row["texts"]], row["match"], row["edits"]) for row in listed})
    assert rows[0] == rows[1] and len(rows[0]) > 10


def test_what_differs_is_refused_before_anything_is_touched(whole, world, tmp_path):
    out, other = tmp_path / "W", tmp_path / "other"
    shutil.copytree(whole, out)
    other.mkdir()
    (other / "file").touch()
    store, same = open_groups(world / "test_combo.jsonl"), world_options()
    for unfinished, place, call in (
        ("", "shards: 1", lambda: propose(store, out, ProposeOptions(), 0, quiet, 2)),
        ("propose", "seed: 5", lambda: propose(store, out, ProposeOptions(words=str(world.parent / "words.yaml"), seed=6), 0, quiet)),
        ("propose", r"source\.path", lambda: propose(open_groups(world / "test_agrees.jsonl"), out, ProposeOptions(seed=SEED), 0, quiet)),
        (
            "propose",
            re.escape(f"data propose {world / 'test_combo.jsonl'} --out {out} --shard 0/1"),
            lambda: edit(out, same, 0, quiet),
        ),
        ("", "3/4", lambda: edit(out, same, 3, quiet, 4)),
        ("edit", "attempts: 2", lambda: edit(out, world_options(attempts=3), 0, quiet)),
        ("", "other", lambda: propose(store, other, ProposeOptions(), 0, quiet)),
        ("", "other", lambda: edit(other, same, 0, quiet)),
    ):
        if unfinished:
            (out / unfinished / "shard-00000.done.json").unlink()
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=place):
            call()
        assert contents(tmp_path) == before
        if unfinished:
            shutil.copy(whole / unfinished / "shard-00000.done.json", out / unfinished)


def spoilt(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    """Change the lines of a file of a work folder."""
    return lambda out: (out / name).write_bytes(b"".join(change((out / name).read_bytes().splitlines(keepends=True))))


SPOILT = {
    **{
        f"{line!r} for a record": (spoilt("verify/shard-00000.jsonl", lambda lines, line=line: [*lines[:2], line + b"\n", *lines[3:]]),
                                   r"verify/shard-00000\.jsonl:3: ")
        for line in (b"{", b'"x"', b"\xff\xfe")
    },
    **{
        f"{step}: records in another order": (
            lambda out, step=step: [(out / step / "shard-00000.done.json").unlink(),
                                    spoilt(f"{step}/shard-00000.jsonl", lambda lines: [lines[1], lines[0], *lines[2:4]])(out)],
            "instead of",
        )
        for step in ("propose", "edit", "verify")
    },
    **{
        f"{text} as {name}": (lambda out, name=name, text=text: (out / name).write_text(text), f"{name}|work folder")
        for name, text in (("run.json", "[]"), ("run.json", "{"), ("edit/shard-00000.done.json", "null"))
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_no_step_has_written_is_refused_by_file(case, photos, tmp_path):
    through_all(photos, out := tmp_path / "W", 1)
    change, place = SPOILT[case]
    change(out)
    with pytest.raises((ConfigError, DataError), match=place):
        through_all(photos, out, 1)
        select(out, tmp_path / "groups.jsonl", SelectOptions(), quiet)
    assert not (tmp_path / "groups.jsonl").exists()


def test_repeated_ids_and_broken_rows_are_counted(tmp_path):
    draw(tmp_path / "a.png", [("red", "circle"), ("blue", "square")])
    rows = [
        '{"id": "a", "image": "a.png", "caption": "a red car"}',
        '{"id": "a", "image": "a.png", "caption": "a blue bus"}',
        "{broken",
        '{"id": "b"}',
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(rows) + "\n")
    done = propose(open_groups(tmp_path / "c.jsonl", None, "captions"), tmp_path / "W", ProposeOptions(), 0, quiet)
    assert done["counts"]["rows that cannot be read"] == 3 and done["counts"]["captions"] == 1
    problems = [record["detail"] for record in WorkFolder.open(tmp_path / "W").records("propose", 0) if "problem" in record]
    assert all(f"c.jsonl:{line}: " in problem for line, problem in zip((2, 3, 4), problems, strict=True)) and "'a'" in problems[0]
    (tmp_path / "a.png").unlink()
    said = []  # a picture is missed by the step that opens it
    edit(tmp_path / "W", EditOptions(), 0, said.append)
    assert any(re.search(r"(\d+) of \1 records.* \S*a\.png", line) for line in said if line.startswith("warning: "))


def test_captions_without_their_pictures_or_in_their_place_begin_no_work_folder(photos, tmp_path, capsys):
    """A forgotten --root, and columns of which each has the other's name; one picture that is there is enough."""
    swapped = [row | {"image": row["caption"], "caption": row["image"]} for row in read_rows(photos)]
    write_rows(tmp_path / "swapped.jsonl", swapped)
    (tmp_path / "other").mkdir()
    shutil.copy(photos, tmp_path / "other" / "captions.jsonl")
    for path in (tmp_path / "swapped.jsonl", tmp_path / "other" / "captions.jsonl"):
        said = refused(capsys, "data", "propose", path, "--out", tmp_path / "W")
        assert f"{path}: none of the pictures of 6 groups" in said and "--root" in said
    assert not (tmp_path / "W").exists()
    shutil.copy(tmp_path / "5.png", tmp_path / "other")
    assert "6  captions" in printed(capsys, "data", "propose", tmp_path / "other" / "captions.jsonl", "--out", tmp_path / "W")
    late = [{"image": f"gone{n}.png", "caption": "a red cup"} for n in range(150)] + [{"image": "5.png", "caption": "a red cup"}]
    write_rows(tmp_path / "other" / "late.jsonl", late)
    assert "151  captions" in printed(capsys, "data", "propose", tmp_path / "other" / "late.jsonl", "--out", tmp_path / "late")
    (tmp_path / "other" / "5.png").unlink()
    printed(capsys, "data", "propose", tmp_path / "other" / "late.jsonl", "--out", tmp_path / "late")  # finished before
    assert f"or a folder other than {tmp_path / 'W'}, or remove " in refused(capsys, "data", "propose", photos, "--out", tmp_path / "W")


def test_what_nothing_has_scored_is_not_called_good(photos, tmp_path, capsys):
    edited(photos, tmp_path / "W", back_ends="none")
    verify(tmp_path / "W", VerifyOptions(), 0, quiet, None)
    printed(capsys, "data", "view", tmp_path / "W", "--out", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "not scored" in page and not re.search(r"\bgood\b", page)


def test_no_count_is_left_out_without_a_word(capsys):
    for number, more in ((12, ""), (14, "2  more counts")):
        _print_done("propose", {"records": 1, "counts": {f"count {k}": 1 for k in range(number)}})
        said = capsys.readouterr().out
        assert said.count("1  count ") == 12 and (more in said) and ("more" in said) == bool(more)


def test_status_names_missing_shards_as_an_array(world, tmp_path):
    out = tmp_path / "W"
    for shard in (0, 1, 4):
        propose(open_groups(world / "test_combo.jsonl"), out, ProposeOptions(), shard, quiet, 6)
    text = status(out)
    assert "propose: 3 of 6 shards" in text and "    missing: --array=2-3,5" in text and text.endswith("missing: --array=0-5")
    begun = WorkFolder.open(out).file("propose", 3)
    begun.write_bytes(b"{}\n{}\n{")  # a kill has cut off the third record
    before, after = (int(re.findall(r"propose: 3 of 6 shards, (\d+) records", each)[0]) for each in (text, status(out)))
    assert after == before + 2
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == ""
    with pytest.raises(ConfigError, match=r"6 of 6 shards.*--array=0-5"):
        select(out, tmp_path / "g.jsonl", SelectOptions(), quiet)


def through_all(photos: Path, out: Path, shards: int) -> None:
    """All steps of all shards, as far as they are not done."""
    for shard in range(shards):
        proposing(photos, out, shard=shard, shards=shards, types="colour,relation")
        edit(out, EditOptions(), shard, quiet)
        verified(out, shard)


def test_an_id_that_is_in_two_shards_is_counted_and_left_out_the_second_time(photos, tmp_path):
    with open(photos, "a") as file:
        file.write(json.dumps({"id": "p0", "image": "1.png", "caption": "a cup to the left of a box"}) + "\n")
    through_all(photos, tmp_path / "W", 4)  # rows 0 and 6 are of the shards 0 and 2
    survival = select(tmp_path / "W", tmp_path / "g.jsonl", SelectOptions(), quiet)
    assert survival.total[REPEATED] > 0 and len(read_manifest(tmp_path / "g.jsonl")) == 6


def test_a_shard_of_older_records_is_refused_with_a_remedy_that_gives_the_same_bytes(photos, tmp_path):
    out = tmp_path / "W"
    through_all(photos, out, 3)
    before = contents(out)
    for step, later in (("propose", "edit"), ("edit", "verify")):  # made again with another outcome, as by an editor that draws otherwise
        done = out / step / "shard-00001.done.json"
        write_json(done, read_json(done) | {"sha256": hashlib.sha256(b"").hexdigest()})
        for refuses in (
            lambda: select(out, tmp_path / "g.jsonl", SelectOptions(), quiet),
            lambda: verified(out, 1),
        ):
            with pytest.raises(DataError, match=rf"{later}/shard-00001\.jsonl {OUTDATED}") as said:
                refuses()
        done.unlink()
        for pattern in re.findall(r"remove (.*); then run these steps again", str(said.value))[0].split():
            for file in Path(pattern).parent.glob(Path(pattern).name):
                file.unlink()
        assert "missing: --array=1" in status(out)
        through_all(photos, out, 3)
        assert contents(out) == before
    (out / "edit" / "shard-00002.jsonl").unlink()  # with the completion file alone it is not through
    assert "edit: 2 of 3 shards" in status(out)
    with pytest.raises(ConfigError, match="edit has not finished shard 2"):
        verified(out, 2)
    through_all(photos, out, 3)
    assert contents(out) == before


def test_a_work_folder_writes_through_no_link(photos, tmp_path):
    through_all(photos, tmp_path / "W", 1)
    for name in ("propose", "edit", "verify", "pictures"):
        (tmp_path / "W" / name).rename(tmp_path / "elsewhere")
        (tmp_path / "W" / name).symlink_to(tmp_path / "elsewhere")
        for function in (lambda: through_all(photos, tmp_path / "W", 1), lambda: status(tmp_path / "W")):
            with pytest.raises(ConfigError, match=f"W/{name}"):
                function()
        (tmp_path / "W" / name).unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "W" / name)
    (tmp_path / "V").symlink_to(tmp_path / "W")
    with pytest.raises(ConfigError, match="V is"):
        edit(tmp_path / "V", EditOptions(), 0, quiet)


def test_a_table_that_was_copied_is_the_same_data_and_a_corrected_one_is_not(photos, tmp_path):
    """A copy's rows are prepared in another folder, which is none of the settings; a correction may keep the size."""
    rows = read_rows(photos)
    table = tmp_path / "captions.csv"
    table.write_text("id,image,caption\n" + "".join(f"{row['id']},{row['image']},{row['caption']}\n" for row in rows))
    through_all(table, tmp_path / "W", 1)
    before = contents(tmp_path / "W")
    os.utime(table, (1, 1))
    through_all(table, tmp_path / "W", 1)
    after = contents(tmp_path / "W")
    assert before == after and len(list(tmp_path.glob("captions.csv.*.prepared"))) == 2
    with pytest.raises(ConfigError, match=r"source\.roots"):
        propose(open_groups(table, [tmp_path, tmp_path / "W"], "auto"), tmp_path / "W", ProposeOptions(types="colour,relation"), 0, quiet)
    table.write_text(table.read_text().replace("a red cup", "a tan cup"))
    with pytest.raises(ConfigError, match=r"source\.sha256"):
        through_all(table, tmp_path / "W", 1)


# --- verdicts against the truth ---------------------------------------------------------------------------------------------------------


def judged(out: Path, thresholds: Thresholds, oracle: Oracle) -> tuple[int, int, int]:
    """Candidates that pass, those of them that are good, and all good ones."""
    records = [record for record in WorkFolder.open(out).records("verify", 0) if (record["edit"], record["attempt"]) in oracle.truth]
    passed = [oracle.truth[r["edit"], r["attempt"]] for r in records if verdict(r, thresholds).reason == GOOD]
    return len(passed), sum(passed), sum(oracle.truth.values())


def test_verdicts_are_precise_where_the_scorer_sees(whole, tmp_path):
    """A noisy scorer is made precise by a margin that labels call for; a perfect one needs none; pixels alone are not enough."""
    noisy = Oracle(whole, noise=2.5)
    assert {False, True} == set(noisy.truth.values())
    out = tmp_path / "W"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "verify")
    (out / "verify.json").unlink()
    perfect = Oracle(out)
    verify(out, VerifyOptions(), 0, quiet, perfect)
    passed, right, good = judged(out, Thresholds(), perfect)
    assert right / passed > 0.95 and right / good > 0.8
    assert judged(out, Thresholds(rule="likelihood"), perfect) == judged(out, Thresholds(), perfect)
    assert judged(out, Thresholds(rule="checks"), perfect)[1] / judged(out, Thresholds(rule="checks"), perfect)[0] < 0.85
    plain, fitted = judged(whole, Thresholds(), noisy), 0.0
    names = sorted(noisy.truth)
    labelled = random.Random(0).sample(names, len(names) // 2)
    rows = [{"edit": name, "attempt": attempt, "good": noisy.truth[name, attempt]} for name, attempt in labelled]
    write_rows(tmp_path / "labels.jsonl", rows)
    shutil.copytree(whole, tmp_path / "V")
    found = calibrate(tmp_path / "V", tmp_path / "labels.jsonl", Thresholds(), 0.99)
    fitted = found.thresholds.margin
    assert found.good_kept / found.kept >= 0.99 and fitted > 0 and found.labelled == len(rows)
    with_margin = judged(whole, found.thresholds, noisy)
    assert with_margin[1] / with_margin[0] > max(0.95, plain[1] / plain[0]) and with_margin[1] / with_margin[2] > 0.3
    own = tmp_path / "V" / "thresholds.json"
    assert read_thresholds(own) == found.thresholds
    own.write_text('{"largest": 0.051}')  # what was decided by hand stays
    fitting = ["data", "verify", str(tmp_path / "V"), "--calibrate", str(tmp_path / "labels.jsonl")]
    main([*fitting, "--precision", "0.99"])
    assert read_thresholds(own).largest == 0.051 and read_thresholds(own).margin == pytest.approx(fitted, abs=0.1)


SCORES = {"match": [[-0.1, -3.0]], "likelihood": [[-9.0, -12.0]], "blank": [-9.5, -9.4]}


def test_a_verdict_by_hand():
    log = math.log
    record = {
        "type": "colour",
        "checks": {"changed": 0.05, "identical": False, "largest": 0.9, "hash": 4},
        "scores": {
            "match": [[log(0.9), log(0.2)], [log(0.3), log(0.8)]],
            "likelihood": [[-9.0, -12.0], [-12.5, -10.0]],
            "blank": [-10.0, -11.0],
        },
    }
    odds = [[log(9), log(1 / 4)], [log(3 / 7), log(4)]]
    assert verdict(record, Thresholds()).worst == pytest.approx(
        min(odds[0][0] - odds[0][1], odds[1][1] - odds[1][0], odds[0][0] - odds[1][0], odds[1][1] - odds[0][1])
    )
    assert verdict(record, Thresholds(rule="likelihood")).worst == pytest.approx(
        min((-9 + 10) - (-12 + 11), (-10 + 11) - (-12.5 + 10), -9 + 12.5, -10 + 12)
    )
    assert verdict(record, Thresholds(margin=2.3)).reason == "score: the new text on the edited picture"
    for change, said in (
        ({"changed": 0.001}, "picture: hardly anything changed"), ({"identical": True}, "picture: hardly anything changed"),
        ({"changed": 0.7}, "picture: too much changed"), ({"largest": 0.01}, "picture: the changes are scattered"),
        ({"outside": 0.01}, "picture: changed outside its mask"),
    ):  # fmt: skip
        assert verdict(record | {"checks": record["checks"] | change}, Thresholds()).reason == said
    assert verdict(record | {"type": "relation", "checks": record["checks"] | {"changed": 0.7}}, Thresholds()).reason == GOOD
    assert verdict({"checks": None, "scores": SCORES}, Thresholds()).reason == GOOD  # text alone: one comparison
    assert verdict({"checks": None}, Thresholds()).reason.startswith("no scores")
    for drop, said in ((1.0, GOOD), (0.999, "score: the new text fits worse than the caption did")):  # -10 in place of -9
        assert verdict(record, Thresholds(drop=drop)).reason == verdict(record, Thresholds(rule="likelihood", drop=drop)).reason == said
    assert verdict(record, Thresholds(rule="checks", drop=0.0)).reason == GOOD
    assert verdict({"checks": None, "scores": SCORES}, Thresholds(drop=0.0)).reason == GOOD  # text alone: nothing to fit worse
    unknown = record | {"scores": record["scores"] | {"likelihood": [[None, -12.0], [-12.5, -10.0]]}}
    assert verdict(unknown, Thresholds(drop=99.0)).reason == "score: the new text fits worse than the caption did"
    broken = {"checks": None, "scores": SCORES | {"match": [[None, -3.0]]}}
    assert verdict(broken, Thresholds()).reason == "scores are not finite"


@pytest.mark.parametrize("seed", range(5))
def test_margin_and_drop_keep_most_at_the_precision(seed):
    """Against every pair of thresholds that labels can call for, tried one by one; a drop is set only where it keeps more."""
    draw = random.Random(seed)

    def candidate(worst, drop):
        logp = [[-5.0, -99.0], [-99.0, None if drop == math.inf else -5.0 - drop]]
        return {"checks": None, "scores": {"match": [[math.log(0.5 + worst / 20), math.log(0.5)]] * 1, "likelihood": logp, "blank": [0, 0]}}

    labels = [(draw.uniform(-2, 5), math.inf if draw.random() < 0.05 else round(draw.uniform(-2, 8), 2)) for _ in range(60)]
    good = [draw.random() < (0.9 if drop < 3 else 0.4) for _, drop in labels]
    records = [candidate(*each) for each in labels]
    worst = [verdict(record, Thresholds()).worst for record in records]
    most = {}
    for limited in (False, True):
        limits = [drop for _, drop in labels if drop >= 0] if limited else [math.inf]
        ways = [
            [i for i in range(60) if worst[i] > margin and labels[i][1] <= limit]
            for margin in (0.0, *(w for w in worst if w > 0))
            for limit in limits
        ]
        most[limited] = max((len(kept) for kept in ways if kept and sum(good[i] for i in kept) / len(kept) >= 0.85), default=0)
    found = calibrated(zip(records, good, strict=True), Thresholds(drop=0.5), 0.85)
    kept = [right for record, right in zip(records, good, strict=True) if verdict(record, found.thresholds).reason == GOOD]
    assert (found.kept, found.good_kept) == (len(kept), sum(kept)) and found.kept == max(most.values()) > 0
    assert (found.thresholds.drop is None) == (most[False] >= most[True])
    alone = calibrated([(candidate(1.0, 2.0), True), (candidate(3.0, math.inf), False)], Thresholds(), 0.9)
    assert (alone.kept, alone.thresholds.margin, alone.thresholds.drop) == (1, 0.0, 2.0), "what has no likelihood fits worst"


def test_no_threshold_accepts_a_candidate_of_which_a_cell_is_wrong(tmp_path):
    """Labels that a margin below 0 would suit, by hand; and files of thresholds."""

    def fitted(labels, precision=0.9):
        scores = [{"match": [], "likelihood": [[worst, 0.0]], "blank": [0.0, 0.0]} for worst, _ in labels]
        records = [({"checks": None, "scores": each}, good) for each, (_, good) in zip(scores, labels, strict=True)]
        return calibrated(records, Thresholds(rule="likelihood"), precision)

    generous = fitted([(2.0, True), (1.0, True), (0.5, True), (0.0, True), (-0.3, True), (-0.9, True), (-1.7, False)])
    assert (generous.kept, generous.good_kept, generous.labelled) == (3, 3, 7)
    assert fitted([(2.0, True), (1.0, True), (1.0, False)]).kept == 1, "ties stay together"
    assert fitted([(2.0, True), (2.0 - 1e-6, False)], 1.0).thresholds.margin < 2.0  # what is kept is above it by less than is shown
    with pytest.raises(ConfigError, match="2 pass the checks"):
        fitted([(2.0, False), (1.0, True), *[(-0.1, True)] * 20])
    for wrong, place in (
        ({"drop": math.nan}, "drop"), ({"outside": 1.5}, "outside"), ({"margin": "much"}, "margin"), ({"rule": "best"}, "rule"),
        *(({"changed": {"*": bounds}}, "changed") for bounds in ([0.5, 0.1], [0.0, math.nan], [0.1])),
        ([1], ""), ({"margn": 1}, "'margin'"),
    ):  # fmt: skip
        write_json(tmp_path / "t.json", wrong)
        with pytest.raises(ConfigError, match=rf"--thresholds .*t\.json: .*{place}"):
            read_thresholds(tmp_path / "t.json")
    (tmp_path / "t.yaml").write_text("changed: {colour: [0.1, 0.2]}\nmargin: 1")
    found = read_thresholds(tmp_path / "t.yaml", "likelihood", 0.5)
    assert found == Thresholds("likelihood", 0.5, {"colour": (0.1, 0.2)}) and found.bounds("size") == (0.0, 1.0)


def test_a_candidate_that_cannot_be_scored_does_not_take_the_others_with_it(whole, tmp_path):
    out = tmp_path / "W"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "verify")
    oracle = Oracle(out)
    bad = next(iter(oracle._behind))

    def score(groups):
        if any(group.id == bad for group in groups):
            raise DataError(f"group {bad!r}: text 3 has 9999 tokens")
        return oracle(groups)

    (out / "verify.json").unlink()
    done = verify(out, VerifyOptions(), 0, quiet, score)
    problems = [record for record in WorkFolder.open(out).records("verify", 0) if record.get("problem") == "it cannot be scored"]
    assert len(problems) == 1 and f"{problems[0]['edit']}@{problems[0]['attempt']}" == bad and done["counts"]["scored"] > 50


# --- pixels -----------------------------------------------------------------------------------------------------------------------------


def naive_largest(mask: np.ndarray[Any, Any]) -> int:
    """Flood fill, cell by cell."""
    left, best = {tuple(cell) for cell in np.argwhere(mask)}, 0
    while left:
        queue, size = [left.pop()], 0
        while queue:
            y, x = queue.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        best = max(best, size)
    return best


def test_largest_piece_is_that_of_a_flood_fill():
    draw = np.random.default_rng(0)
    for density in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        for shape in ((1, 1), (1, 9), (13, 7), (40, 31)):
            mask = draw.random(shape) < density
            assert largest_piece(mask) == naive_largest(mask)
    spiral = np.zeros((21, 21), bool)
    for k in range(0, 10, 2):
        spiral[k, k : 21 - k] = spiral[k : 21 - k, 20 - k] = spiral[20 - k, k : 21 - k] = spiral[k + 2 : 21 - k, k] = True
    assert largest_piece(spiral) == naive_largest(spiral)


def test_facts_of_two_pictures_by_hand(tmp_path):
    first = Image.new("RGB", (100, 50), (90, 90, 90))
    second = first.copy()
    second.paste((200, 90, 90), (20, 10, 40, 30))
    mask = Image.new("L", (100, 50), 0)
    mask.paste(255, (20, 10, 40, 25))
    for image, name in ((first, "a"), (second, "b"), (first.resize((50, 50)), "c")):
        image.save(tmp_path / f"{name}.png")
    found = compared(tmp_path / "a.png", tmp_path / "b.png", mask)
    assert found["changed"] == 20 * 20 / 5000 and found["largest"] == 1
    assert found["outside"] == round(20 * 5 / (5000 - 20 * 15), 5)
    assert compared(tmp_path / "a.png", tmp_path / "a.png")["identical"]
    assert compared(tmp_path / "a.png", tmp_path / "c.png").keys() == {"hash"}
    (tmp_path / "d.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"d\.png"):
        compared(tmp_path / "a.png", tmp_path / "d.png")


def noise_picture(seed: int, size: int = 64) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def test_hashes_find_what_was_saved_again_and_nothing_else(tmp_path):
    pictures = [noise_picture(k) for k in range(30)]
    again = []
    for k, picture in enumerate(pictures):
        picture.save(tmp_path / f"{k}.png")
        picture.resize((100, 90)).save(tmp_path / f"{k}.jpg", quality=60)
        again.append(look(tmp_path / f"{k}.jpg"))
    own = [look(tmp_path / f"{k}.png") for k in range(30)]
    assert {*near_pairs(own, again)} == {(k, k, False) for k in range(30)}  # type: ignore[arg-type]
    assert {*near_pairs(own, own)} == {(k, k, True) for k in range(30)}  # type: ignore[arg-type]
    chance = random.Random(8)
    sides = [[Look(Path(), bytes([side, k % 256, k // 256]), chance.getrandbits(64)) for k in range(300)] for side in (0, 1)]
    for k in range(200):  # 0 to 12 bits apart, in all quarters of the hash
        sides[1][k] = replace(sides[1][k], hash=sides[0][k].hash ^ sum(1 << bit for bit in chance.sample(range(64), k % 13)))
    naive = {(i, j) for i, a in enumerate(sides[0]) for j, b in enumerate(sides[1]) if (a.hash ^ b.hash).bit_count() <= 8}
    assert {(i, j) for i, j, _ in near_pairs(*sides)} == naive and len(naive) > 130
    assert list(near_pairs([], sides[0])) == list(near_pairs(sides[0], [])) == []
    assert perceptual_hash(pictures[0]) != perceptual_hash(ImageOps.mirror(pictures[0]))


# --- editors ----------------------------------------------------------------------------------------------------------------------------


def task(path: Path, caption: str = "a cup to the left of a plate", text: str = "a cup to the right of a plate", **more: Any) -> Task:
    named = {"id": "a/0", "source": "a", "type": "relation", "picture": path, "caption": caption, "text": text, "source_words": "left"}
    return Task(**(named | {"target_words": "right", "instruction": "Do it.", "attempt": 0, "seed": 7} | more))


def test_a_mirror_image_is_taken_where_it_is_exact(tmp_path):
    path = draw(tmp_path / "a.png", [("red", "circle"), ("blue", "square")])
    flip = Flip(EditOptions())
    assert flip.takes(task(path)) and not flip.takes(task(path, type="object"))
    found = flip.edit(task(path))
    assert isinstance(found, Picture) and found.image.tobytes() == ImageOps.mirror(Image.open(path).convert("RGB")).tobytes()
    for caption, text in (
        ("a man left his cup on a plate", "a man left his mug on a plate"),  # left is a verb
        ("a cup left of a plate, a fork right of it", "a cup right of a plate, a fork right of it"),  # only one of two sides
        ("a cup above a plate", "a cup below a plate"),
    ):
        assert not flip.takes(task(path, caption, text))
    for shown in ("a clock", "a sign with lettering", "a man in a jersey"):
        assert not flip.takes(task(path, f"{shown} to the left of a door", f"{shown} to the right of a door")), "the next editor's"


@pytest.fixture
def photos(tmp_path):
    """Captions of real pictures, of which each has a relation to exchange."""
    rows = []
    for k in range(6):
        noise_picture(k).save(tmp_path / f"{k}.png")
        rows.append({"id": f"p{k}", "image": f"{k}.png", "caption": f"a {COLOURS[k % 4]} cup to the {('left', 'right')[k % 2]} of a plate"})
    path = tmp_path / "captions.jsonl"
    write_rows(path, rows)
    return path


def edited(photos: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    proposing(photos, out, types="colour,relation")
    edit(out, EditOptions(**options), 0, quiet)
    return list(WorkFolder.open(out).records("edit", 0))


def test_edited_pictures_of_a_folder_are_checked(photos, tmp_path):
    folder = tmp_path / "mine"
    for k in range(4):
        (folder / f"p{k}").mkdir(parents=True)
    noise_picture(9).save(folder / "p0" / "0.png")
    noise_picture(9, 32).save(folder / "p1" / "0.png")
    (folder / "p2" / "0.png").write_bytes(b"\x89PNG nothing")
    (folder / "p3" / "0.png").symlink_to(photos.with_name("3.png"))
    found = {each["edit"]: each for each in edited(photos, tmp_path / "W", back_ends="folder", folder=str(folder))}
    assert found["p0/0"]["picture"]["sha256"] and "another size (32x32 instead of 64x64)" in found["p1/0"]["refused"]
    assert "p2/0.png" in found["p2/0"]["refused"] and found["p3/0"]["refused"] == "no editor accepts this edit"  # the link leads out
    assert found["p4/0"]["refused"] == "no editor accepts this edit"


def test_a_picture_that_was_replaced_after_the_edit_is_no_example(photos, tmp_path):
    edited(photos, tmp_path / "W", back_ends="flip,none")
    shutil.copy(tmp_path / "2.png", tmp_path / "1.png")
    work = WorkFolder.open(tmp_path / "W")
    with open(work.tar(0), "r+b") as tar:  # a byte of the mirror image of the first
        place = next(each["picture"] for each in work.records("edit", 0) if each["picture"])
        tar.seek(place["start"] + place["length"] // 2)
        tar.write(b"\0")
    verified(tmp_path / "W")
    said = {each["edit"]: each.get("problem", "") for each in work.records("verify", 0)}
    assert {name for name, problem in said.items() if problem == "a picture has changed since the step edit"} == {
        "p0/1", "p1/0", "p1/1",
    }  # fmt: skip
    assert sum(not problem for problem in said.values()) == 9


def test_masks_confine_what_changes(photos, tmp_path):
    (tmp_path / "masks" / "p0").mkdir(parents=True)
    (tmp_path / "masks" / "p1").mkdir()
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (10, 10, 30, 30))
    mask.save(tmp_path / "masks" / "p0" / "0.png")
    mask.resize((32, 32)).save(tmp_path / "masks" / "p1" / "0.png")
    folder = tmp_path / "mine"
    for k in range(2):
        (folder / f"p{k}").mkdir(parents=True)
        noise_picture(20 + k).save(folder / f"p{k}" / "0.png")
    found = edited(photos, tmp_path / "W", back_ends="folder", folder=str(folder), masks=str(tmp_path / "masks"))
    work = WorkFolder.open(tmp_path / "W")
    place = found[0]["picture"]
    with open(work.tar(0), "rb") as tar:
        tar.seek(place["start"])
        image = np.asarray(Image.open(io.BytesIO(tar.read(place["length"]))))
    original, inside = np.asarray(open_image(photos.with_name("0.png"))), np.asarray(mask) > 0
    assert (image[~inside] == original[~inside]).all() and (image[inside] == np.asarray(noise_picture(20))[inside]).all()
    assert "the mask is 32x32, but its picture is 64x64" in next(each for each in found if each["edit"] == "p1/0")["detail"]
    verified(tmp_path / "W")
    assert next(work.records("verify", 0))["checks"]["outside"] == 0


PROGRAM = """
import json, sys
from PIL import Image
told = json.load(open(sys.argv[1]))
kind = told["id"]
if kind == "p1/0": sys.exit("no such model")
if kind == "p2/0":
    import time; time.sleep(60)
if kind == "p3/0": sys.exit(0)
image = Image.open(told["image"])
image.putpixel((3, 4), (255, 0, told["seed"] % 256))
if kind == "p4/0": open(sys.argv[2], "wb").write(b"text")
else: image.save(sys.argv[2], "PNG")
"""


def test_a_command_that_edits_is_called_without_a_shell_and_bounded(photos, tmp_path):
    (tmp_path / "edit.py").write_text(PROGRAM)
    photos.write_text("".join(photos.read_text().splitlines(keepends=True)[:5]))
    command = f"{sys.executable} {tmp_path / 'edit.py'} {{request}} {{output}}"
    found = edited(photos, tmp_path / "W", back_ends="command", command=command, timeout_s=8.0, threads=5)
    by_id = {each["edit"]: each for each in found}
    assert by_id["p0/0"]["picture"]["size"] == [64, 64] and by_id["p1/0"]["refused"] == "the command exited with code 1: no such model"
    assert (
        by_id["p2/0"]["refused"] == "the command took more than 8 s"
        and by_id["p3/0"]["refused"] == "the command wrote no picture to {output}"
    )
    assert "it contains no image" in by_id["p4/0"]["refused"]


def test_a_mistake_in_the_options_of_a_step_leaves_nothing_that_refuses_the_right_ones(photos, tmp_path):
    out = tmp_path / "W"
    proposing(photos, out, types="relation")
    for options in (
        *({"back_ends": "command", "command": command}
          for command in ("", "edit.py {request}", "nosuchprogram {request} {output}", "true '{request} {output}")),
        {"masks": "nowhere"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{list(options)[-1]}"):
            edit(out, EditOptions(**options), 0, quiet)
        assert not (out / "edit.json").exists() and not (out / "edit").exists()
    assert edit(out, EditOptions(), 0, quiet)["counts"]["pictures"] == 6


def test_no_secret_of_an_option_is_recorded_or_shown(photos, tmp_path, capsys):
    """Addresses with a key in their query, a command with a token, and what both say: neither records, groups nor the page have it."""
    secret, out = "hunter2", tmp_path / "W"
    (tmp_path / "edit.py").write_text(
        "import json, sys\nfrom PIL import Image, ImageOps\n"
        "told = json.load(open(sys.argv[3]))\n"
        "if told['id'] == 'p0/0': sys.exit(f'denied: {sys.argv[1]} {sys.argv[2]}')\n"
        "ImageOps.mirror(Image.open(told['image'])).save(sys.argv[4], 'PNG')\n"
    )
    command = f"{sys.executable} {tmp_path / 'edit.py'} --api-key {secret} {{request}} {{output}}"
    server = Server(lambda body, number: (200, reply([]), {}))
    with server.running():
        asked = {"llm_url": f"{server.url}?key={secret}", "llm_model": "m"}
        proposing(photos, out, back_ends="rules,llm", types="relation", **asked)
    for given in (command, command.replace(secret, "renewed")):  # a secret may change
        edit(out, EditOptions(back_ends="command", command=given), 0, quiet)
    verified(out)
    assert server.paths == {f"/v1/chat/completions?key={secret}"}  # which the server did get
    assert "denied" in str(list(WorkFolder.open(out).records("edit", 0)))
    printed(capsys, "data", "select", out, "--out", tmp_path / "groups.jsonl")
    printed(capsys, "data", "view", tmp_path / "groups.jsonl", "--root", tmp_path, "--out", tmp_path / "page")
    printed(capsys, "data", "view", out, "--out", tmp_path / "work_page")
    shown = (tmp_path / "groups.jsonl").read_text(), (tmp_path / "page" / "index.html").read_text()
    assert all("--api-key ***" in text for text in shown)
    assert not [name for name, content in contents(tmp_path).items() if secret.encode() in content]
    with pytest.raises(ConfigError, match=r"\(command: "):
        edit(out, EditOptions(back_ends="command", command=command.replace("edit.py", "other.py")), 0, quiet)


def test_options_of_a_pipeline_have_types():
    assert call_options("steps=28, scale=3.5,flag=true,name=x") == {"steps": 28, "scale": 3.5, "flag": True, "name": "x"}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        call_options("steps")


def tiny_pipeline(folder: Path, kind: str) -> Path:
    """A pipeline of random weights in diffusers' own form: InstructPix2Pix, or SDXL's inpainting."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    letters = [chr(n) for n in range(33, 127)]
    vocabulary = {word: n for n, word in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocabulary, [], model_max_length=77)
    told = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        bos_token_id=188, eos_token_id=189, pad_token_id=189,
    )  # fmt: skip
    parts = {
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
        ),
        "text_encoder": transformers.CLIPTextModel(told),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(),
    }
    unet = {
        "sample_size": 32, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    if kind == "instruct":
        parts["unet"] = diffusers.UNet2DConditionModel(in_channels=8, cross_attention_dim=32, **unet)
        pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        parts["unet"] = diffusers.UNet2DConditionModel(
            in_channels=9, cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, **unet,
        )  # fmt: skip
        second = transformers.CLIPTextModelWithProjection(told)
        pipe = diffusers.StableDiffusionXLInpaintPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.diffusers
def test_code_that_a_pipeline_names_is_not_run(tmp_path, monkeypatch):
    """In the folder of a part, under a name of its own and a library's, and a module that could be imported; the oldest version is one."""
    import diffusers

    planted = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for place in ("pipe/unet/own.py", "pipe/unet/diffusers.py", "pipe/own.py", "importable/planted.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(planted)
    monkeypatch.syspath_prepend(tmp_path / "importable")
    editor = EditOptions(model=str(tmp_path / "pipe"))
    for part, library in (("unet", "own"), ("unet", "planted"), ("_class_name", "own"), ("unet", "diffusers"), ("unet", "os")):
        index = {"_class_name": "DDPMPipeline", part: [library, "UNet2DConditionModel"]}
        write_json(tmp_path / "pipe" / "model_index.json", index)
        with pytest.raises(ConfigError, match="diffusers pipeline"):
            Diffusers(editor)
    assert not (tmp_path / "ran").exists()
    assert f"diffusers>={OLDEST};" in (REPO / "pyproject.toml").read_text()
    monkeypatch.setattr(diffusers, "__version__", "0.37.1")
    with pytest.raises(ConfigError, match=r"pip install 'diffusers>="):
        Diffusers(editor)


@pytest.mark.long
@pytest.mark.diffusers
@pytest.mark.parametrize("kind", ["instruct", "inpaint"])
def test_real_pipelines_give_the_same_bytes_for_a_seed_and_keep_the_size(kind, tmp_path):
    noise_picture(3).crop((0, 0, 50, 41)).save(path := tmp_path / "a.png")
    mask = Image.new("L", (50, 41), 0)
    mask.paste(255, (10, 10, 30, 30))
    mask.save(tmp_path / "m.png")
    options = EditOptions(model=str(tiny_pipeline(tmp_path / "pipe", kind)), options="num_inference_steps=2")
    editor = Diffusers(options)
    assert editor.kind == kind and editor.settings()["batch"] == 1 and editor.takes(task(path)) == (kind == "instruct")
    pictures = [editor.edit(task(path, seed=seed, mask=tmp_path / "m.png")) for seed in (1, 1, 2)]
    content = [picture.image.tobytes() for picture in pictures if isinstance(picture, Picture) and picture.image.size == (50, 41)]
    assert content[0] == content[1] != content[2]
    with pytest.raises(ConfigError, match=r"--options steps: .*num_inference_steps"):
        Diffusers(EditOptions(model=options.model, options="steps=2"))
    with pytest.raises(ConfigError, match="diffusers pipeline"):
        Diffusers(EditOptions(model=str(tmp_path)))


# --- selection --------------------------------------------------------------------------------------------------------------------------


def test_groups_are_the_best_of_each_edit_with_their_history(whole, tmp_path):
    survival = select(whole, tmp_path / "groups.jsonl", SelectOptions(per_source=2), quiet)
    rows = read_rows(tmp_path / "groups.jsonl")
    groups = read_manifest(tmp_path / "groups.jsonl", survival.roots or None)
    assert len(groups) == len(rows) > 10 and survival.files == {str(tmp_path / "groups.jsonl"): len(rows)}
    work = WorkFolder.open(whole)
    records = {(r["edit"], r["attempt"]): r for r in work.records("verify", 0)}
    for group, row in zip(groups, rows, strict=True):
        assert 2 <= len(group.candidates) <= 3 and len(group.images) == len(group.candidates)
        assert all(group.match[k][k] == 1 and group.match[0][k] == 0 == group.match[k][0] for k in range(1, len(group.images)))
        for history in row["meta"]["edits"]:
            name = history["propose"]["id"]
            tried = {k: verdict(records[name, k], Thresholds()) for k in (0, 1) if (name, k) in records}
            best = max((v.worst, -k) for k, v in tried.items() if v.reason == GOOD)
            assert history["margin"] == best[0] > 0 and history["edit"]["attempt"] == -best[1]
            assert len(history["edit"]["parent_sha256"]) == 64 and history["verify"]["checks"] and history["propose"]["back_end"] == "rules"
        assert row["meta"]["steps"]["edit"]["settings"]["world"] == {"faults": FAULTS}
    assert not check_manifest(tmp_path / "groups.jsonl", survival.roots or None, progress=quiet).metadata, "no column of the user's"
    total = {kind: dict(counts) for kind, counts in survival.by_type.items()}
    for counts in total.values():
        assert counts.pop("proposed") == sum(counts.values())
    kept = sum(counts.get("kept", 0) for counts in total.values())
    assert kept == sum(len(group.candidates) - 1 for group in groups)


def test_excluded_edits_are_left_out_and_counted(whole, tmp_path):
    """Their places within the quota go to other edits. An id that no edit has is refused before a file is written."""

    def ids(excluded: str, name: str, most: int = 1, per_type: int = 0) -> tuple[set[str], int]:
        (tmp_path / "wrong.txt").write_text(excluded, "utf-8-sig")
        options = SelectOptions(per_source=most, exclude=str(tmp_path / "wrong.txt"), per_type=per_type)
        survival = select(whole, tmp_path / name, options, quiet)
        rows = read_rows(tmp_path / name)
        return {edit["propose"]["id"] for row in rows for edit in row["meta"]["edits"]}, survival.total["excluded by --exclude"]

    (kept, none), (good, _) = ids("", "one.jsonl"), ids("", "all.jsonl", 9)
    others = Counter(name.rpartition("/")[0] for name in good - kept)
    wrong = sorted(name for name in kept if others[name.rpartition("/")[0]])[:2]
    rest, excluded = ids(f"{wrong[0]}\n\n  {wrong[1]}\r\n", "rest.jsonl")
    assert (none, excluded) == (0, 2) and not rest & set(wrong) and kept - rest == set(wrong)
    assert [name.rpartition("/")[0] for name in sorted(rest - kept)] == [name.rpartition("/")[0] for name in wrong]
    one_each, _ = ids("", "quota.jsonl", 9, 1)
    others, _ = ids("\n".join(one_each), "quota2.jsonl", 9, 1)
    assert not one_each & others and len(others) > len(one_each) / 2, "an excluded edit takes no place"
    with pytest.raises(DataError, match=r"no-such.txt: ids cannot be read"):
        checked(tmp_path / "y.jsonl", SelectOptions(exclude=str(tmp_path / "no-such.txt")), tmp_path)
    with pytest.raises(DataError, match=r"wrong.txt:2: .* has no edit 'no-such/7'"):
        ids(f"{wrong[0]}\nno-such/7\n", "x.jsonl")
    assert not list(tmp_path.glob("x*"))


def test_quotas_splits_and_what_is_left_of_nothing(whole, tmp_path, monkeypatch):
    every, few = (select(whole, tmp_path / f"{most}.jsonl", SelectOptions(per_type=most, per_source=9), quiet) for most in (0, 3))
    assert all(counts["kept"] == min(3, every.by_type[kind]["kept"]) for kind, counts in few.by_type.items())
    parts = select(whole, tmp_path / "g.jsonl", SelectOptions(splits="train=0.7,test=0.3"), quiet)
    assert set(parts.files) == {str(tmp_path / "g.train.jsonl"), str(tmp_path / "g.test.jsonl")} and all(parts.files.values())
    shown = [{row["images"][0]["path"] for row in read_rows(Path(name))} for name in parts.files]
    assert not shown[0] & shown[1]
    assert parts.summary().count("wrote ") == 2
    assert len(shown[0]) == round(0.7 * (len(shown[0]) + len(shown[1]))), "exact, by pictures"
    monkeypatch.setattr("cfvlm_ds.counterfactuals.select._MANY", 2)
    parts = select(whole, tmp_path / "g.jsonl", SelectOptions(splits="train=0.7,test=0.3", seed=5), quiet)
    for name in parts.files:  # of many pictures, each has its split by its own hash
        for row in read_rows(Path(name)):
            digest = hashlib.sha256(b"5\0" + row["meta"]["edits"][0]["edit"]["parent_sha256"].encode()).digest()
            assert (digest[0] + digest[1] / 256 < 0.7 * 256) == name.endswith("train.jsonl")
    sources = {record["source"]: bool(record["edits"]) for record in WorkFolder.open(whole).records("propose", 0)}
    assert (parts.sources["captions"], parts.sources["with a proposal"]) == (len(sources), sum(sources.values()))
    for options, place in (
        *(({"splits": text}, "--splits") for text in ("train", "a=0.5", "a/b=1", "a=0,b=1", "a=2,b=-1", "a=.nan")),
        ({"splits": "a=60,b=40"}, "add up to 1"),
        ({"margin": 1000.0}, "score: "), ({"rule": "checks", "margin": 1.0}, "--margin"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=place):
            select(whole, tmp_path / "x.jsonl", SelectOptions(**options), quiet)
    assert not list(tmp_path.glob("x*"))
    (hostile := Survival()).add("a\x1b[2J|b\n", "c\x1b|d")
    assert hostile.table().splitlines()[0] == r"| | a\\x1b\[2J\|b | all | |"


def test_no_file_that_somebody_wrote_is_replaced(photos, tmp_path, capsys):
    """What a command wrote it replaces: groups and tables. Captions, other rows, journals and somebody's files stay."""
    out, groups = tmp_path / "W", tmp_path / "g.jsonl"
    edited(photos, out)
    verified(out)
    selecting = ["data", "select", out, "--out"]
    for _ in range(2):
        printed(capsys, *selecting, groups)
    for name, text in (
        ("notes.jsonl", '{"schema": "cfgroup/1", "meta": {"mine": 1}}\n'), ("h.a.jsonl", "notes\n"), ("i.jsonl.survival.md", "notes\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    for name, words in (
        ("captions.jsonl", selecting), ("notes.jsonl", selecting), ("W/run.json", selecting), ("W/edit/shard-00000.jsonl", selecting),
        ("i.jsonl", selecting), ("h.jsonl", [*selecting[:3], "--splits", "a=0.5,b=0.5", "--out"]),
    ):  # fmt: skip
        assert Path(name).name.replace(".jsonl", "") in refused(capsys, *words, tmp_path / name)
        assert contents(tmp_path) == before, name
    wide = Survival({kind: Counter(proposed=1, kept=1) for kind in TYPES})
    Path(f"{groups}.survival.md").write_text(f"{wide.table()}\n")  # a row that names every type is long
    with whole_file(groups), pytest.raises(ConfigError, match=r"g\.jsonl"):
        select(out, groups, SelectOptions(), quiet)
    assert select(out, groups, SelectOptions(), quiet).roots == []
    folders = select(out, tmp_path / "sub" / "g.jsonl", SelectOptions(), quiet).roots
    assert folders == [str(tmp_path / "sub"), str(tmp_path)]  # and no folder that holds none of the pictures
    assert len(read_manifest(tmp_path / "sub" / "g.jsonl", folders)) == 6


def test_a_real_pair_is_of_one_split_or_of_none(tmp_path):
    """`mine` shows the picture of another source: where that is of another split, the pair is counted and left out."""
    rows = []
    for k in range(24):
        noise_picture(k).save(tmp_path / f"{k}.png")
        rows.append({"id": f"p{k:02d}", "image": f"{k}.png", "caption": f"a {COLOURS[k % 2]} cup near plate number {k // 2}"})
    write_rows(tmp_path / "c.jsonl", rows)
    (tmp_path / "23.png").write_bytes(b"no picture")
    options = ProposeOptions(back_ends="mine,rules", types="colour")
    propose(open_groups(tmp_path / "c.jsonl", None, "auto"), tmp_path / "W", options, 0, quiet)
    edit(tmp_path / "W", EditOptions(back_ends="none"), 0, quiet)
    done = verified(tmp_path / "W")
    assert done["counts"]["verdict: a picture cannot be read"] == 2  # in a pair, and as one that is to be edited
    assert not any(name == "scored" or name.startswith("verdict: good") for name in done["counts"]), "nothing is good without a scorer"
    parts = select(tmp_path / "W", tmp_path / "g.jsonl", SelectOptions(splits="a=0.5,b=0.5"), quiet)
    counts = parts.by_type["colour"]
    assert counts["its real picture belongs to another split"] > 1 and counts["kept"] > 15
    shown = []
    for name in parts.files:
        groups = read_manifest(Path(name))
        shown.append({path for group in groups for image in group.images for path in image})
    assert all(shown) and not shown[0] & shown[1]


# --- audit ------------------------------------------------------------------------------------------------------------------------------


def test_an_area_over_the_limit_is_a_fault_only_if_its_interval_excludes_chance():
    """Areas over the limit of 0.6 by hand: 30 of 45 and 480 of 720 pairs won, one of few texts, one of many."""
    few, many = ([2.0] * 6 * k + [0.0] * 3 * k for k in (1, 16))
    rows = [shortcuts.Shortcut("w", *shortcuts.auc(texts, [1.0] * 5 * k), 5 * k) for texts, k in ((few, 1), (many, 16))]
    assert [row.auc for row in rows] == pytest.approx([30 / 45, 30 / 45]) and rows[0].low < 0.5 < rows[1].low
    assert [row.exceeds for row in rows] == [False, True] and ["above the limit" in str(row) for row in rows] == [True, False]
    below = shortcuts.Shortcut("w", 0.55, 0.52, 0.58, 999)
    assert not below.exceeds and "limit" not in str(below)


def audited(tmp_path: Path, rows: dict[str, list[dict[str, Any]]], score: Any = None, **options: Any) -> Any:
    names = []
    for name, listed in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", listed)
        names.append(str(tmp_path / f"{name}.jsonl"))
    return audit(names, None, "cfgroup", AuditOptions(**options), quiet, score)


def pair_rows(
    tmp_path: Path, number: int, start: int = 0, spoil: Callable[[Image.Image, int], None] | None = None, cue: str = ""
) -> list[dict[str, Any]]:
    """Clean pairs: a disc whose colour changes to and fro, so that neither words nor pictures tell which is the edited one."""
    rows = []
    for k in range(start, start + number):
        colours = ("red", "blue") if k % 2 else ("blue", "red")
        for side, colour in enumerate(colours):
            image = noise_picture(1000 + k)
            ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill=colour)
            if side and spoil:
                spoil(image, k)
            image.save(tmp_path / f"{k}-{side}.png")
        texts = [f"a {colours[0]} disc number {k}", f"a {colours[1]} disc number {k}{cue}"]
        rows.append({
            "id": f"g{k}", "source": "test", "images": [{"id": f"i{i}", "path": f"{k}-{i}.png"} for i in (0, 1)],
            "texts": [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)],
            "match": [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]],
            "edits": [{"type": "colour", "image": "i1", "text": "t1", "from": colours[0], "to": colours[1]}],
        })  # fmt: skip
    return rows


def test_clean_data_pass_and_every_planted_fault_is_found(tmp_path):
    clean = pair_rows(tmp_path, 60)
    found, sets = audited(tmp_path, {"train": clean[:40], "test": clean[40:]})
    assert found.faults == []
    write_report(found, sets, tmp_path / "page", quiet)
    assert "None." in (tmp_path / "page" / "report.md").read_text() and (tmp_path / "page" / "index.html").is_file()

    (tmp_path / "cue").mkdir()
    found, _ = audited(tmp_path / "cue", {"train": pair_rows(tmp_path / "cue", 40, cue=" indeed")})
    assert [sentence.split(":")[0] for sentence, _ in found.faults] == ["texts by length", "texts by their words"]
    telling = dict(re.fullmatch(r"(\w+) \((.*)\)", each).groups() for each in found.shortcuts[1].telling)
    assert found.shortcuts[1].telling[0].startswith("indeed ") and telling["indeed"] == "0 original, 40 counterfactual", "all pairs"

    (tmp_path / "paste").mkdir()

    def pasted(image, k):
        image.paste((128, 128, 128), (0, 52, 64, 64))

    found, _ = audited(tmp_path / "paste", {"train": pair_rows(tmp_path / "paste", 40, spoil=pasted)})
    assert [sentence.split(":")[0] for sentence, _ in found.faults] == ["pictures by their grain"]


def test_answers_to_different_questions_are_not_compared(tmp_path):
    """24 pictures with some questions each. A scorer likes any answer to a later question less, and of each question's the true one more:
    without the picture it knows every answer, though it is right in fewer of all pairs of a true and a false text."""
    questions = 8
    pair_rows(tmp_path, 24)
    rows = [
        {
            "id": f"g{k}", "images": [{"id": "i0", "path": f"{k}-0.png"}],
            "texts": [{"id": f"t{2 * q + c}", "text": text, "prompt": f"Question {q}?"} for q in range(questions)
                      for c, text in enumerate(("yes", "no") if (k + q) % 2 else ("no", "yes"))],
            "match": [["i0", f"t{2 * q + c}", 1 - c] for q in range(questions) for c in (0, 1)],
        }
        for k in range(24)
    ]  # fmt: skip
    blank = torch.tensor([float(-2 * q - c) for q in range(questions) for c in (0, 1)])

    def score(groups):
        return [GroupScores(blank.expand(1, -1), blank) for _ in groups]

    found, _ = audited(tmp_path, {"train": rows}, score)
    total = 24 * questions
    assert dict(found.facts)["true texts preferred on a blank picture"] == f"100.0 % of {total} comparisons"
    assert f"a scorer that sees no picture is right in 100.0 % of {total} comparisons (limit 60)" in [
        sentence for sentence, _ in found.faults
    ]
    assert found.shortcuts[1].auc == pytest.approx(0.5, abs=0.15), "yes is true as often as no"


def test_what_is_not_measured_has_no_number(tmp_path):
    """All captions of one picture are on one side of the halves; a group of two questions with a text each has nothing to compare."""
    rows = pair_rows(tmp_path, 1)
    row = rows[0]
    alone = [{key: row[key] for key in ("images", "texts", "match", "edits")} | {"id": f"g{k}"} for k in range(6)]
    found, sets = audited(tmp_path, {"train": alone})
    write_report(found, sets, tmp_path / "page", quiet)
    table = (tmp_path / "page" / "report.md").read_text()
    assert "| texts by their words | not measured | 0 |" in table and "0.500" not in table
    measured = [shortcuts.by_length([("a disc", "a red disc")] * number).pairs for number in (9, 10)]
    halved = [shortcuts.by_words([("a disc", "a red disc")] * (number + 10), [False] * number + [True] * 10).pairs for number in (9, 10)]
    assert measured == halved == [0, 10], "an AUC of few pairs is no number"
    apart = [{"id": "g", "images": row["images"][:1], "texts": [text | {"prompt": text["id"]} for text in row["texts"]],
              "match": [["i0", "t0", 1], ["i0", "t1", 0]]}]  # fmt: skip
    found, _ = audited(tmp_path, {"train": apart}, lambda groups: [GroupScores(torch.zeros(1, 2), torch.zeros(2)) for _ in groups])
    assert dict(found.facts)["true texts preferred on a blank picture"].startswith("not measured") and not found.shortcuts


def test_duplicates_and_leaks_are_found_and_named(tmp_path):
    rows = pair_rows(tmp_path, 30)
    shutil.copy(tmp_path / "3-0.png", tmp_path / "5-0.png")  # the same picture in two groups
    Image.open(tmp_path / "7-0.png").resize((80, 80)).save(tmp_path / "25-0.jpg", quality=70)  # nearly so in another split
    rows[25]["images"][0]["path"] = "25-0.jpg"
    shutil.copy(tmp_path / "9-1.png", tmp_path / "21-0.png")  # an edited picture
    rows[22]["texts"][1]["text"] = rows[11]["texts"][1]["text"].upper()
    (tmp_path / "23-0.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as broken:
        open_image(tmp_path / "23-0.png")
    found, sets = audited(tmp_path, {"train": rows[:20], "test": rows[20:]})
    said = {sentence: ids for sentence, ids in found.faults}
    assert [(sorted(ids), sentence) for sentence, ids in said.items()] == [
        (["g23"], f"1 pictures cannot be read; the first: {broken.value}"),
        (["g3", "g5"], "train: 1 pairs of originals are identical (1) or near duplicates (0)"),
        # two originals are alike, each pair but for a disc, and so are their edits
        (["g21", "g25", "g7", "g9"], "train and test: 1 pairs of pictures are identical, and 3 are near duplicates"),
    ]
    *_, leaks = said.values()
    assert {frozenset(leaks[:2]), frozenset(leaks[2:])} == {frozenset(("g7", "g25")), frozenset(("g9", "g21"))}, "pair by pair"
    assert dict(found.facts)["texts of train and test"] == f"1 in both, such as {rows[11]['texts'][1]['text']!r}"
    write_report(found, sets, tmp_path / "page", quiet)
    assert "near duplicates (0): 3-0.png (g3), 5-0.png (g5)" in (tmp_path / "page" / "report.md").read_text()
    found, _ = audited(tmp_path, {"train": rows[:2], "test": [rows[2] | {"id": "g0"}]})
    assert found.names == {"g0": "g0", "g1": "1-0.png (g1)"}, "the picture of an id in two splits is not known"


# --- commands ---------------------------------------------------------------------------------------------------------------------------


def test_a_strict_audit_ends_with_an_error(photos, tmp_path):
    through_all(photos, tmp_path / "W", 1)
    select(tmp_path / "W", groups := tmp_path / "groups.jsonl", SelectOptions(), quiet)
    with pytest.raises(SystemExit) as ended:
        main(["data", "audit", str(groups), str(shutil.copy(groups, tmp_path / "again.jsonl")), "--out", str(tmp_path / "a"), "--strict"])
    assert ended.value.code == 1 and "groups and again: " in (tmp_path / "a" / "report.md").read_text()


def test_a_plan_is_all_of_it(photos, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"data: {photos}\nout: {tmp_path / 'W'}\ngroups: {tmp_path / 'g.jsonl'}\nshards: 3\n"
        "propose: {with: [rules, mine], types: [colour, relation]}\nedit: {with: [flip, none]}\nselect: {per_source: 1}\n"
    )
    printed(capsys, "data", "run", "--config", plan, "--shard", "1/3")
    assert "missing: --array=0,2" in printed(capsys, "data", "status", tmp_path / "W")
    printed(capsys, "data", "run", "--config", plan, "--shard", "2")
    assert "wrote" in printed(capsys, "data", "run", "--config", plan)
    groups = read_manifest(tmp_path / "g.jsonl")
    assert len(groups) == 6 and all(len(group.candidates) == 2 for group in groups)
    text = plan.read_text()  # what differs is said before anything is done of a shard that is missing
    for file in (tmp_path / "W" / "propose").glob("shard-00001.*"):
        file.unlink()
    for change, message in (("with: [flip, none]", "back_ends: 'flip,none' then, 'none' now"), ("verify", "template: ")):
        plan.write_text(text.replace(change, "with: [none]") if change in text else text + "verify: {template: 'Is it {text}?'}\n")
        assert message in refused(capsys, "data", "run", "--config", plan, "--shard", "1")
        assert not (tmp_path / "W" / "propose" / "shard-00001.jsonl").exists()
    plan.write_text(text)
    printed(capsys, "data", "run", "--config", plan)
    assert read_plan("examples/build_coco.yaml").shards == 64


def test_a_mistake_of_any_step_of_a_plan_is_said_before_the_first(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.yaml").write_text("colour: [red, 3]")
    plan = "data: captions.jsonl\nout: W\n"
    for text, place in (
        *((f"{plan}groups: g.jsonl\n{section}", place) for section, place in (
            ("propose: {wiht: x}", "'propose.with'"), ("propose: {words: words.yaml}", "--words words.yaml: words.colour"),
            ("edit: {with: flipp}", "--with flipp"), ("edit: {masks: nowhere}", "--masks nowhere"),
            ("verify: {scorer: nowhere}", "verify.scorer: model.name_or_path 'nowhere'"), ("verify: {template: x}", "verify.template 'x'"),
            ("select: {splits: train}", "--splits 'train'"), ("select: {thresholds: none.yaml}", "--thresholds none.yaml"),
            ("shards: 0", "shards must be from 1 "),
        )),
        (f"{plan}groups: captions.jsonl", "captions.jsonl"), ("data: a", "out is empty"), ("- a", "a list"),
    ):  # fmt: skip
        (tmp_path / "plan.yaml").write_text(text)
        assert place in refused(capsys, "data", "run", "--config", "plan.yaml"), text
        assert not (tmp_path / "W").exists()
