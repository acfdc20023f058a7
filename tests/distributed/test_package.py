"""The package as somebody gets it: a wheel, installed where there is no repository, that trains in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ONE, REPO, contents, environment, launcher, read_json, refused

from cfvlm_ds.cli.main import main
from cfvlm_ds.core import verbosity
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import option_parser, parse_config
from cfvlm_ds.core.shipped import SHIPPED, resolve_shipped, shipped
from cfvlm_ds.objectives import OBJECTIVES

ROOT_FILES = sorted(str(path.relative_to(REPO)) for name in SHIPPED for path in [REPO / name, *(REPO / name).glob("*")] if path.is_file())
SMALL = [
    "--build.habits.num_train=24", "--build.habits.num_test=4", "--data.num_workers=0", "--train.per_device_train_batch_size=4",
    "--train.max_steps=3", "--train.logging_steps=1", "--train.eval_steps=0", "--train.figures=false", "--tracking.enabled=false",
]  # fmt: skip
IN_ONE_PROCESS = """
import runpy, sys
import cfvlm_ds
from cfvlm_ds.cli.main import main
main(["init", "copies"])
sys.argv = ["cfvlm-ds", "--local_rank=0", "train", *sys.argv[1:]]
runpy.run_module("cfvlm_ds", run_name="__main__")
print("imported from", cfvlm_ds.__file__)
"""


def git(folder: Path, *command: str) -> str:
    named = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *command]
    return subprocess.run(named, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the repository as they are now, committed elsewhere: a build writes into the tree that it builds. And some that a
    working tree has besides."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    for name in filter(None, git(REPO, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it is")
    for name in (
        "examples/notes.txt",
        "ds_configs/z3.json~",
        "build/lib/cfvlm_ds/of_an_earlier_build.py",
        "runs/quickstart/export/config.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)])
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel alone is installed; everything that it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("installed") / "packages"
    pip(["install", "--no-deps", "--target", str(folder), str(wheel)])
    return folder


def pip(command: list[str]) -> None:
    quiet = ["--quiet", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", *command, *quiet], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def with_packages(installed: Path) -> dict[str, str]:
    return environment() | {"PYTHONPATH": str(installed), "PATH": f"{installed / 'bin'}:{environment()['PATH']}"}


def test_the_wheel_has_the_package_and_what_a_run_needs_and_nothing_else(wheel):
    files = [
        path
        for path in (REPO / "cfvlm_ds").rglob("*")
        if path.suffix in (".py", ".jinja", ".js", ".css", ".yaml") or path.name == "py.typed"
    ]
    code = {str(path.relative_to(REPO)) for path in files}
    demo = REPO / "cfvlm_ds" / "demo"
    code |= {str(path.relative_to(REPO)) for path in (demo / "measured.json", *(demo / "base_checkpoint").iterdir())}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == code | {f"cfvlm_ds/shipped/{name}" for name in ROOT_FILES} | {"cfvlm_ds/shipped/revision"}
        for name in ROOT_FILES:
            assert archive.read(f"cfvlm_ds/shipped/{name}") == (REPO / name).read_bytes(), name
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    version = re.search(r"^Version: (.*)$", metadata, re.MULTILINE)
    assert version and f"\nversion: {version[1]}\n" in (REPO / "CITATION.cff").read_text(), "the citation names another version"


def test_the_installed_copy_trains_in_an_empty_folder(source, installed, tmp_path):
    """With the packaged recipe and DeepSpeed JSON, by their names; the option of DeepSpeed's launcher stands where that puts it."""
    command = [sys.executable, "-c", IN_ONE_PROCESS, "--config", "quickstart.yaml", "--deepspeed", "z3.json", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=with_packages(installed), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"imported from {installed / 'cfvlm_ds'}/" in done.stdout and "step 3/3" in done.stdout
    run_dir = tmp_path / "runs" / "quickstart"
    assert read_json(run_dir / "finished.json")["step"] == 3 and (run_dir / "export" / "config.json").is_file()
    assert "| combo | mean of edit types, blank image |" in (run_dir / "export" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "copies"}
    assert read_json(run_dir / "environment.json")["git_revision"] == git(source, "rev-parse", "HEAD").strip()
    written = contents(tmp_path / "copies")
    assert written.keys() == set(ROOT_FILES)
    assert all(written[name] == (REPO / name).read_bytes() for name in ROOT_FILES if name != "slurm/env.sh")


@pytest.mark.long
def test_deepspeeds_launcher_starts_the_installed_module(installed, tmp_path):
    command = [*launcher(2), "--module", "cfvlm_ds", "train", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=with_packages(installed), capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0 and "step 3/3" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
    assert (tmp_path / "runs" / "quickstart" / "export" / "config.json").is_file()


@pytest.mark.long
def test_an_empty_environment_by_the_lines_of_the_page(source, tmp_path):
    """Downloads everything that the package depends on: minutes, and gigabytes."""
    (block,) = re.findall(r"```\n(python3 -m venv .*?)```", (REPO / "docs" / "install.md").read_text(), re.DOTALL)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean["PATH"] = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != str(Path(sys.executable).parent))
    script = f"set -e\n{block.replace('PATH_OF_THE_CLONE', str(source))}\ncd {tmp_path / 'empty'}\ncfvlm-ds train {' '.join(SMALL)}\n"
    (tmp_path / "empty").mkdir()
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0 and "step 3/3" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
    assert (tmp_path / "empty" / "runs" / "quickstart" / "export" / "README.md").is_file()


# --- files by their names ---------------------------------------------------------------------------------------------------------------


def test_a_name_means_the_file_of_the_working_directory_and_else_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = str(REPO / "ds_configs" / "z3.json")
    assert resolve_shipped("z3.json", "ds_configs") == resolve_shipped("ds_configs/z3.json", "ds_configs") == packaged
    others = ("z9.json", "examples/z3.json", "./z3.json", "../ds_configs/z3.json", "/z3.json", "ds_configs/../train.py", "..", "")
    assert [resolve_shipped(other, "ds_configs") for other in (*others, "x/ds_configs/z3.json")] == [*others, "x/ds_configs/z3.json"]
    (tmp_path / "z3.json").symlink_to("nowhere")
    assert resolve_shipped("z3.json", "ds_configs") == "z3.json", "what is named is what is there, also where that is broken"
    assert resolve_shipped("ds_configs/z3.json", "ds_configs") == packaged


def test_options_name_packaged_files_and_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_config(["--config", "qwen2_5_vl_7b.yaml"], OBJECTIVES)
    assert recipe.model.name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct" and recipe.deepspeed == str(shipped("ds_configs") / "z3.json")
    assert recipe.resolved["deepspeed"] == "ds_configs/z3.json", "recorded as it was given: it means the same on another machine"
    own = parse_config(["--config=examples/qwen2_5_vl_7b.yaml", "--deepspeed", "z2.json"], OBJECTIVES)
    assert own.model == recipe.model and own.deepspeed == str(shipped("ds_configs") / "z2.json")
    (tmp_path / "qwen2_5_vl_7b.yaml").write_text("model: {name_or_path: mine}\n")
    assert parse_config(["--config", "qwen2_5_vl_7b.yaml"], OBJECTIVES).model.name_or_path == "mine"


# --- init -------------------------------------------------------------------------------------------------------------------------------


def test_written_copies_are_not_overwritten_and_their_jobs_find_this_python(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/opt/a b's/bin/python")
    main(["init", str(folder := tmp_path / "my runs")])
    script = "SLURM_JOB_ID=7 HOME=/h PATH=/bin; source slurm/env.sh; echo $PATH"
    assert subprocess.check_output(["bash", "-c", script], cwd=folder, text=True) == "/opt/a b's/bin:/bin\n"
    (folder / ".venv").mkdir()
    assert subprocess.check_output(["bash", "-c", script], cwd=folder, text=True).startswith(f"{folder}/.venv/bin:")
    assert f"{folder / 'train.py'} already exists" in refused(capsys, "init", folder)
    for name in ("train.py", "ds_configs", "examples"):
        (folder / name).rename(tmp_path / name)
    (dangling := tmp_path / "other").mkdir()
    (dangling / "slurm").symlink_to("nowhere")
    (link := tmp_path / "link").symlink_to(folder)
    before = contents(tmp_path)
    for given, named in (
        (folder, "slurm already exists"),
        (link, "is a link"),
        (tmp_path / "train.py", "folder"),
        (dangling, "slurm already exists"),
    ):
        assert named in refused(capsys, "init", given)
    assert contents(tmp_path) == before and [path.name for path in dangling.iterdir()] == ["slurm"]


# --- the command ------------------------------------------------------------------------------------------------------------------------


def test_the_help_of_train_has_an_example_that_parses_and_the_rule_of_names():
    said = " ".join(option_parser(OBJECTIVES, "cfvlm-ds train").format_help().split())
    assert "first look for the file in the working directory" in said
    rule, example = said.split(" example: cfvlm-ds train ")
    assert parse_config(example.split(), OBJECTIVES).train.max_steps == 100 and "--quiet print only warnings" in rule


@pytest.fixture
def mask():
    before, interrupt = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGINT)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.signal(signal.SIGINT, interrupt)


def test_train_holds_signals_back_and_passes_its_options_on(mask, monkeypatch):
    seen = []
    monkeypatch.setattr("cfvlm_ds.cli.train.train_main", lambda *given: seen.append((given, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    main(["--local_rank=1", "train", "--config", "train", "train"])
    main(["train"])
    (first, held), (bare, _) = seen
    assert first == (["--local_rank=1", "--config", "train", "train"], "cfvlm-ds train") and bare == ([], "cfvlm-ds train")
    assert {signal.SIGUSR1, signal.SIGTERM} <= held


def test_quiet_and_verbose_are_options_of_every_command(tmp_path, capsys, monkeypatch):
    for name in ("DEEPSPEED_LOG_LEVEL", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    monkeypatch.setattr(verbosity, "_quiet", False)
    monkeypatch.setattr(verbosity, "_verbose", False)
    world = ONE

    def said() -> list[str]:
        capsys.readouterr()
        for line in ("step 1", "warning: low"):
            world.say(line)
        return capsys.readouterr().out.splitlines()

    assert said() == ["step 1", "warning: low"]
    for arguments in (["--quiet", "init", str(tmp_path / "a")], ["init", "--quiet", str(tmp_path / "b")]):
        main(arguments)
        assert said() == ["warning: low"]
    main(["init", str(tmp_path / "c")])
    assert len(said()) == 2, "what one command was asked for is not kept for the next"
    with pytest.raises(SystemExit):
        main(["--verbose", "init", str(tmp_path / "c")])
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("error: ")
    for given in ([], ["--quiet"], ["--verbose"]):
        assert not {"quiet", "verbose"} & parse_config(given, OBJECTIVES).resolved.keys()
    with pytest.raises(ConfigError, match="--quiet and --verbose"):
        parse_config(["--quiet", "--verbose"], OBJECTIVES)


def test_the_version_has_the_revision(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(r"cfvlm-ds \S+ \(revision [0-9a-f]{40}\)\n", capsys.readouterr().out)
