"""The container files cannot be built here: their shell lines are read by the shells, and run with stand-ins for what they install with."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from conftest import REPO, environment

DOCKERFILE = (REPO / "containers" / "Dockerfile").read_text()
DEFINITION = (REPO / "containers" / "cfvlm_ds.def").read_text()
INSTALL = (REPO / "docs" / "install.md").read_text()
HOME = "/opt/cfvlm_ds"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines that go on joined."""
    whole = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in whole.splitlines() if line]


def section(name: str) -> str:
    found = re.search(rf"^%{name}\n((?:    .*\n|\n)+)", DEFINITION, re.MULTILINE)
    assert found, name
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


def docker_lines() -> str:
    """Docker ends where a line of RUN fails."""
    lines = [
        f"({text}) || exit 1" if name == "RUN" else f"cd {text} || exit 1" for name, text in instructions() if name in ("RUN", "WORKDIR")
    ]
    return "".join(f"{line}\n" for line in lines)


SHELL = {"Dockerfile": docker_lines(), "post": section("post"), "environment": section("environment"), "runscript": section("runscript")}


@pytest.mark.parametrize("name", SHELL)
def test_shells_take_the_lines(name):
    for command in (["bash", "-n"], ["sh", "-n"], ["shellcheck", "-s", "sh", "-"]):
        done = subprocess.run(command, input=SHELL[name], text=True, capture_output=True, env=environment(), check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "post"])
def test_what_the_lines_do(name, tmp_path):
    """Install a compiler, then the README's way: both alike, in the clone's copy, and not past something that fails."""
    (home := tmp_path / "home").mkdir()
    (stubs := tmp_path / "stubs").mkdir()
    for program in ("apt-get", "make", "rm"):
        (stubs / program).write_text('#!/bin/sh\necho "${0##*/} $* in $PWD"\n[ "$1" != "$FAILS" ]\n')
        (stubs / program).chmod(0o755)

    def run(fails: str) -> subprocess.CompletedProcess[str]:
        script = SHELL[name].replace(HOME, str(home))
        variables = {"PATH": str(stubs), "FAILS": fails}
        return subprocess.run(["/bin/sh", "-f"], input=script, env=variables, cwd=tmp_path, text=True, capture_output=True, check=False)

    done = run("nothing")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"apt-get update in {tmp_path}",
        f"apt-get install -y --no-install-recommends git make g++ libibverbs1 ibverbs-providers librdmacm1 in {tmp_path}",
        f"rm -rf /var/lib/apt/lists/* in {tmp_path}",
        f"make install TORCH=torch==2.8.* EXTRAS=dev,gpu in {home}",
    ], done  # fmt: skip
    for step in ("update", "install"):
        assert run(step).returncode != 0, "an image of which a part is missing"


def test_both_files_take_the_whole_clone():
    assert dict(instructions())["COPY"] == f". {HOME}" and section("files").split() == [".", HOME]
    for line in (REPO / ".dockerignore").read_text().splitlines():
        assert not subprocess.run(["git", "ls-files", line], cwd=REPO, capture_output=True, text=True, check=True).stdout, line


def test_their_targets_and_paths_are_those_of_the_makefile(tmp_path):
    """`make -n` says what each would run; the environment is where both put it on the path."""
    command = json.loads(dict(instructions())["CMD"])
    assert command == ["make", "demo"]
    for target in ("install", "demo"):
        said = subprocess.run(["make", "-n", "-B", target], cwd=REPO, capture_output=True, text=True, check=True).stdout
        assert "python3 -m venv .venv" in said and '--no-build-isolation --editable ".[dev]"' in said
    assert "train.py --deepspeed ds_configs/z2.json --train.bf16" in said and "--train.per_device_train_batch_size" in said
    path = f"{HOME}/.venv/bin:"
    assert dict(instructions())["ENV"].startswith(f"PATH={path}") and section("environment").startswith(f'export PATH="{path}')
    (tool := tmp_path / "tool").write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    tool.chmod(0o755)
    done = subprocess.run(["sh", "-c", section("runscript"), "run", str(tool), "a b", "$c"], capture_output=True, text=True, check=True)
    assert done.stdout == "<a b><$c>"


def test_the_page_installs_what_the_makefile_installs_and_says_unbuilt():
    page, makefile = INSTALL.splitlines(), (REPO / "Makefile").read_text()
    for line in (each for each in page if each.startswith("pip install") and "dist/" not in each):
        wanted = re.sub(r"\s--(?:quiet|no-compile)", "", makefile).replace("$(TORCH)", re.findall(r"TORCH \?= (.*)", makefile)[0])
        assert line.replace("pip install", "-m pip install") in wanted, line
    assert "never been built" in INSTALL and all(f"containers/{name}" in INSTALL for name in os.listdir(REPO / "containers"))
