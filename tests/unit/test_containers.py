"""The container files cannot be built here: their shell lines are read by the shells, and their targets are those of the Makefile."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from conftest import REPO, environment

DOCKERFILE = (REPO / "containers" / "Dockerfile").read_text()
DEFINITION = (REPO / "containers" / "cfvlm_ds.def").read_text()
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
