"""What a command makes of wrong arguments, and whose files it writes over: no model is loaded for either."""

from __future__ import annotations

import pytest
from conftest import write_manifest

from cfvlm_ds.cli.main import main
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.data import open_groups
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, is_written, write_scores
from cfvlm_ds.export.folder import refuse_others_model, sealed


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with groups in a.jsonl, and what only looks like a model."""
    write_manifest(tmp_path / "a.jsonl", 2, seed=1, ragged=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ended(capsys):
    """The one sentence that a command ends with; nothing else is printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        said = capsys.readouterr()
        assert left.value.code == 2 and not said.out, said
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


# --- wrong arguments --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "cfvlm-ds: the following arguments are required: command; see `cfvlm-ds --help`"),
        ("data chek a.jsonl", "did you mean check?"),
        ("data --root X check a.jsonl", "write `cfvlm-ds data check a.jsonl --root X`"),
        ("--option train", "write `cfvlm-ds train --option`"),
        ("data convert a.jsonl", "cfvlm-ds data convert: the following arguments are required: --out; see `cfvlm-ds data convert --help`"),
        ("data convert a.jsonl --out b --on_error skp", "did you mean skip?"),
        ("score model a.jsonl --limit x", "argument --limit: must be a whole number of at least 1, not 'x'"),
        ("evaluate model --benchmarks pope --draws -1", "argument --draws: must be a whole number of at least 0, not '-1'"),
        (
            "score a.jsonl model",
            "model is a folder without",
        ),
        ("evaluate a.jsonl a.jsonl", "model.name_or_path 'a.jsonl' is a file; give a model folder"),
        ("cluster check images", "SLURM_PROCID is not set"),
        ("data prepare none.jsonl --out b", "none.jsonl: no such manifest; did you mean"),
        ("data prepare a.jsonl --config c.yaml --pack", "cannot be combined with manifest, pack; set them in c.yaml"),
        ("data check model", "model is a folder without"),
        *((f"{command} none a.jsonl", "model.name_or_path 'none'") for command in ("score", "evaluate")),
        ("data check a.jsonl --model none", "model.name_or_path 'none'"),
        ("export .", "config.yaml"),
        *((f"{command} model a.jsonl --out a.jsonl/out", "a.jsonl/out cannot be written") for command in ("score", "evaluate")),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence, here, ended):
    """Also those that argparse itself refuses, which prints its usage before; and no table is printed of data that hold nothing."""
    (here / "words.txt").write_text("hello\n")
    assert sentence in ended(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "score model _", "score _ a.jsonl", "score model a.jsonl --out _", "evaluate model a.jsonl _", "data check a.jsonl --root _",
        "data view _", "data convert _ --out b", "compare model _", "init _", "export _", "data prepare a.jsonl --out _",
    ],
)  # fmt: skip
def test_an_empty_argument_is_no_folder(arguments, here, ended):
    """As a variable is that was not set: the working folder is not meant, and an output is not left out."""
    before = sorted(here.iterdir())
    assert "is empty (an unset variable?)" in ended(*("" if each == "_" else each for each in arguments.split()))
    assert sorted(here.iterdir()) == before


def test_a_step_of_several_ranks_is_refused(here, ended, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step in ("edit W", "verify W", "select W --out g.jsonl"):
        assert f"data {step.split()[0]} runs in one process, but 2 were started" in ended("data", *step.split())


# --- files of somebody's own ------------------------------------------------------------------------------------------------------------

MINE = {
    "mine.json": '{"mine": [{"name": "x"}]}',
    "mine.yaml": "objective:\n  csd: {}\n# and mine\n",
    "mine.jsonl": "",
    "mine.txt": "my words\n",
    "words.json": '{"test": "words"}\t\n',
    "list.json": '[[1], "x"]\t\n',
    "null.json": "null\n",
    "table.tsv": "a\tb\t\n1\t2\t\n",
    "run/results.json": '{"test": [{"name": "all", "num": 1, "metrics": {}}]}',
    "run/config.yaml": "model: {}\n",
}
"""Files that look like those that commands write; mine.jsonl has the groups of a.jsonl, as somebody else would have written them."""


@pytest.mark.parametrize(
    "command",
    [
        "score model a.jsonl --out", "evaluate model a.jsonl --out", "data convert a.jsonl --out",
        "data download a.jsonl --out",
    ],
)  # fmt: skip
def test_no_file_of_somebodys_own_is_written_over(command, here, ended):
    (here / "run").mkdir()
    for name, text in MINE.items():
        (here / name).write_text(text or (here / "a.jsonl").read_text())
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for name in (*MINE, "model/config.json"):
        assert f"{name} already exists and " in (said := ended(*command.split(), name)) and " name another" in said
    assert "a.jsonl is an input and would be overwritten" in ended(*command.split(), "a.jsonl")
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["score model a.jsonl --out", "data convert a.jsonl --out", "data download a.jsonl --out"])
def test_the_second_writer_of_a_file_is_told_before_it_works(command, here, ended):
    with whole_file(here / "b.jsonl") as first:
        first.write(b"the first")
        before = sorted(here.rglob("*"))
        assert "b.jsonl is being written by another process" in ended(*command.split(), "b.jsonl")
        assert sorted(here.rglob("*")) == before
    assert (here / "b.jsonl").read_bytes() == b"the first"


@pytest.mark.parametrize("command", ["convert", "download"])
def test_rows_replace_no_file(command, here, ended):
    """Of rows nothing tells who has written them; a list of rows that were left out is replaced, unless it is somebody else's."""
    call = ["data", command, "a.jsonl", "--out", "out/b.jsonl", "--on_error", "skip"]
    main(call)
    first = (out := here / "out" / "b.jsonl").read_text()
    assert list(open_groups(out, here)) == list(open_groups(here / "a.jsonl"))
    (here / "a.jsonl").write_text((here / "a.jsonl").read_text().splitlines(True)[0] + "no row\n")
    assert "b.jsonl already exists and would be overwritten; remove it, or name another file with --out" in ended(*call)
    assert out.read_text() == first
    out.unlink()
    main(call)
    assert out.read_text() == first.splitlines(True)[0]
    out.unlink()
    (listed := here / "out" / "b.jsonl.skipped.jsonl").write_text('{"mine": 1}\n')
    assert "b.jsonl.skipped.jsonl already exists and was not written by this package" in ended(*call)
    assert listed.read_text() == '{"mine": 1}\n'


def test_own_scores_are_known_again(here):
    groups = open_groups(here / "a.jsonl")
    scores = {group.id: StoredScores(((0.0, 0.0),) * 2, (0.0, 0.0)) for group in groups}
    identity = data_identity(groups, groups.roots)
    write_scores(here / "own", groups, scores, "m", identity, made_by={"weights": "w", "inputs": "i"})
    write_scores(here / "of a run", groups, scores, "m", identity)
    assert [is_written((here / name).open("rb")) for name in ("own", "of a run")] == [True, False]


def test_a_model_of_somebodys_own_is_not_taken_for_an_export(here):
    with pytest.raises(ConfigError, match=r"model contains a model that no export wrote .* would be lost; name another folder"):
        refuse_others_model(here / "model")
    for card in (sealed("# ours\n"), sealed("# ours\n") + "edited\n"):
        (here / "model" / "README.md").write_text(card)
        refuse_others_model(here / "model")
    (here / "model" / "README.md").unlink()
    (here / "config.yaml").touch()
    refuse_others_model(here / "model")  # in a run's folder
