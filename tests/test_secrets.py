"""Planted secrets: real trainings with tokens and passwords in their environment and options, and a search for them afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, environment, run_ranks, train_arguments
from test_tracking import Server, _free_port

mlflow = pytest.importorskip("mlflow")

SECRET = "hunter2-{}-0123456789abcdef"
"""One for each place, so that a leak says where it comes from."""
PLACES = ("uri", "password", "token", "hf", "wandb", "aws", "proxy", "option", "name")
PLANTED = {place: SECRET.format(place) for place in PLACES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")).running() as server:
        yield server


def planted(url: str) -> dict[str, str]:
    """What is in the environment of a user with secrets; the server asks for none of them, and they are sent all the same."""
    return {
        "MLFLOW_TRACKING_URI": url.replace("://", f"://me:{PLANTED['uri']}@"),
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": PLANTED["password"],
        "MLFLOW_TRACKING_TOKEN": PLANTED["token"],
        "HF_TOKEN": PLANTED["hf"],
        "WANDB_API_KEY": PLANTED["wandb"],
        "AWS_SECRET_ACCESS_KEY": PLANTED["aws"],
        "HTTPS_PROXY": f"http://me:{PLANTED['proxy']}@127.0.0.1:9",
    }


def leaks(*texts: str | bytes) -> set[str]:
    """The places whose secret is in one of these."""
    contents = [text.encode() if isinstance(text, str) else text for text in texts]
    return {place for place, secret in PLANTED.items() if any(secret.encode() in content for content in contents)}


def leaks_of(folder: Path) -> dict[str, set[str]]:
    """The files of a folder, databases and checkpoints included, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {str(path.relative_to(folder)): found for path in files if (found := leaks(path.read_bytes()))}


TRACKED = ["--tracking.enabled", "true", "--train.max_steps", "2"]


def process(arguments: list[str], url: str) -> tuple[int, str]:
    """``python train.py``, which imports everything with the secrets around it: its exit code and all that it printed."""
    command = [sys.executable, "train.py", *arguments, *TRACKED]
    done = subprocess.run(command, cwd=REPO, env=environment() | planted(url), capture_output=True, text=True, timeout=400, check=False)
    return done.returncode, done.stdout + done.stderr


def trained(variables: dict[str, str], arguments: list[str], folder: Path) -> tuple[int, str]:
    """The same of a forked rank, which gets this environment behind its imports."""
    ((code, output),) = run_ranks(1, "forked:train_script", [*arguments, *TRACKED], variables, said=folder / "said")
    return code, output


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" + PLANTED["hf"].encode() + b"\xff")
    assert leaks_of(tmp_path) == {"a.bin": {"hf"}} and leaks(f"x{PLANTED['aws']}y") == {"aws"}


def test_a_tracked_run_tells_no_secret(server: Server, model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    """An experiment named with a URL too, as people do who paste an address into the wrong option."""
    named = ["--tracking.experiment", "secrets", "--tracking.run_name", f"https://me:{PLANTED['name']}@host/run"]
    evaluated = ["--data.evaluation.test", str(manifests["test"]), "--train.export", "true", "--train.figures", "true"]
    code, said = process(train_arguments(model_dir, manifests, tmp_path / "run", *named, *evaluated), server.url)
    assert code == 0, said[-3000:]
    assert "MLflow run" in said and "://***@127.0.0.1" in said, "the address is said, without its password"
    assert not leaks(said)
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not leaks_of(tmp_path / "run")
    client: Any = mlflow.MlflowClient(tracking_uri=server.url)
    (run,) = client.search_runs([client.get_experiment_by_name("secrets").experiment_id])
    assert run.info.status == "FINISHED" and not leaks(json.dumps(run.to_dictionary(), default=str))
    assert not leaks_of(server.folder), "store, artifacts and log of the server"


def test_a_server_that_is_down_is_named_without_its_password(model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{_free_port()}"
    code, said = trained(planted(url), train_arguments(model_dir, manifests, tmp_path / "run"), tmp_path)
    assert code == 0, said[-3000:]
    assert "does not answer" in said and "://***@127.0.0.1" in said and "did not get" in said
    assert not leaks(said) and not leaks_of(tmp_path / "run")


def test_no_secret_in_the_local_store(model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    """Without a server: the SQLite file of the run folder. The tokens are those of other services."""
    variables = planted("http://unused")
    del variables["MLFLOW_TRACKING_URI"]
    code, said = trained(variables, train_arguments(model_dir, manifests, tmp_path / "run"), tmp_path)
    assert code == 0, said[-3000:]
    assert (tmp_path / "run" / "mlflow.db").exists() and not leaks(said) and not leaks_of(tmp_path / "run")


def test_an_error_that_quotes_an_option_leaves_its_password_out(model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    given = f"--data.train=https://me:{PLANTED['option']}@host/a.jsonl"
    code, said = process([*train_arguments(model_dir, manifests, tmp_path), given], "http://x")
    assert code == 2 and not leaks(said), said
    assert "error: https://***@host/a.jsonl: no such manifest" in said
