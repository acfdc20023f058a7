"""Planted secrets: real trainings with tokens and passwords in their environment and options, and a search for them afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import REPO, environment, free_port, run_train, train_arguments

from cfvlm_ds.core.errors import InputError
from cfvlm_ds.core.secrets import masked, without_secrets

SECRET = "hunter2-{}-0123456789abcdef"
"""One for each place, so that a leak says where it comes from."""
PLACES = ("uri", "password", "token", "hf", "wandb", "aws", "proxy", "option", "name", "query", "signature", "fragment", "root", "key")
PLANTED = {place: SECRET.format(place) for place in PLACES}


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


TRACKED = ["--tracking.enabled=true", "--train.max_steps=2"]


def trained(variables: dict[str, str], arguments: list[str], folder: Path, code: int = 0) -> str:
    """What a forked rank of train.py prints, which gets this environment after its imports and ends with this exit code."""
    return run_train(1, [*arguments, *TRACKED], variables, code=code)[0]


def test_a_tracked_run_tells_no_secret(server, model_dir, manifests, tmp_path):
    """A run named with a signed URL, as people do who paste an address into the wrong option, and a folder that was saved under one. The
    process imports everything with the secrets around it."""
    server.up()
    address = f"https://me:{PLANTED['name']}@host/run?password={PLANTED['query']}&sig={PLANTED['signature']}#t={PLANTED['fragment']}"
    (root := tmp_path / f"pictures?sig={PLANTED['root']}").symlink_to(manifests["train"].parent)
    named = ["--tracking.experiment=secrets", "--tracking.run_name", address, f"--data.root={root}"]
    evaluated = ["--data.evaluation.test", str(manifests["test"]), "--train.export=true", "--train.figures=true"]
    command = [sys.executable, "train.py", *train_arguments(model_dir, manifests, tmp_path / "run", *named, *evaluated), *TRACKED]
    done = subprocess.run(
        command, cwd=REPO, env=environment() | planted(server.url), capture_output=True, text=True, timeout=400, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "MLflow run" in said and "://***@127.0.0.1" in said, "the address is said, without its password"
    assert not leaks(said)
    assert "pictures?sig=***" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not leaks_of(tmp_path / "run")
    client: Any = mlflow.MlflowClient(tracking_uri=server.url)
    (run,) = client.search_runs([client.get_experiment_by_name("secrets").experiment_id])
    assert run.info.run_name == "https://***@host/run?password=***&sig=***#t=***"
    assert run.info.status == "FINISHED" and not leaks(json.dumps(run.to_dictionary(), default=str))
    assert not leaks_of(server.folder), "store, artifacts and log of the server"


@pytest.mark.long
def test_a_server_that_is_down_is_named_without_its_password(model_dir, manifests, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    said = trained(planted(url), train_arguments(model_dir, manifests, tmp_path / "run"), tmp_path)
    assert "does not answer" in said and "://***@127.0.0.1" in said and "did not receive" in said
    assert not leaks(said) and not leaks_of(tmp_path / "run")


def test_no_secret_in_the_local_store(model_dir, manifests, tmp_path):
    """Without a server: the SQLite file of the run folder. The tokens are those of other services."""
    variables = planted("http://unused")
    del variables["MLFLOW_TRACKING_URI"]
    said = trained(variables, train_arguments(model_dir, manifests, tmp_path / "run"), tmp_path)
    assert (tmp_path / "run" / "mlflow.db").exists() and not leaks(said) and not leaks_of(tmp_path / "run")


def test_an_error_that_quotes_an_option_leaves_its_password_out(model_dir, manifests, tmp_path):
    given = f"--data.train=https://me:{PLANTED['option']}@host/a.jsonl?sig={PLANTED['signature']}"
    said = trained(planted("http://x"), [*train_arguments(model_dir, manifests, tmp_path), given], tmp_path, code=2)
    assert not leaks(said), said
    assert "error: https://***@host/a.jsonl?sig=*** is an address on the network" in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:a@b@host/x?v=1: gone", "http://***@host/x?v=***: gone"),  # passwords that nobody has quoted
        ("http://me:a/b@host/x", "http://***@host/x"),
        ("at http://127.0.0.1:5000/a@main", "at http://127.0.0.1:5000/a@main"),
        ("sqlite:////tmp/a@b?password=x", "sqlite:////tmp/a@b?password=***"),
        (
            "https:/host/a?Expires=1&Signature=a%2Fb==, and (https://h/b?x)",
            "https:/host/a?Expires=***&Signature=***, and (https://h/b?***)",
        ),
        ("http://a/b?next=http://c/d?sig=e&f=g h", "http://a/b?next=***://c/d?sig=***&f=*** h"),
        ("http://a/b#section, http://u:p@c/d#access_token=e", "http://a/b#section, http://***@c/d#access_token=***"),
        ("sqlite:////a/R&D/m.db?b=c, http://h/d&password: e", "sqlite:////a/R&D/m.db?b=***, http://h/d&password: ***"),
        ("a.jsonl?sig=x&n=1: no such manifest", "a.jsonl?sig=***&n=1: no such manifest"),
        ("--opt=password=x y", "--opt=password=*** y"),
        ("{'password': 'a b', \"api_key\": \"c\", 'key': 'd'}", "{'password': '***', \"api_key\": \"***\", 'key': 'd'}"),
        ("Authorization: Bearer a.b", "Authorization: ***"),
        ("edit.sh --api-key a -token 'b c' --key 5 --token --seed 3", "edit.sh --api-key *** -token '***' --key 5 --token --seed 3"),
        ("['curl', '--auth-token', 'a']", "['curl', '--auth-token', '***']"),
        ("AWS_SECRET_ACCESS_KEY=a/b== hf_token=c Pwd=d;Server=e", "AWS_SECRET_ACCESS_KEY=*** hf_token=*** Pwd=***;Server=e"),
        (
            "512 tokens: too many; num_key_value_heads=2 max_tokens=9 token=7",
            "512 tokens: too many; num_key_value_heads=2 max_tokens=9 token=7",
        ),
    ],
)
def test_what_is_masked_in_a_text(text, shown):
    assert without_secrets(text) == shown == without_secrets(shown)
    assert str(InputError(text)) == shown


def test_names_of_credentials_mask_their_values():
    """Also as keys of a DeepSpeed JSON, in the styles that names have."""
    key = PLANTED["key"]
    secret = {
        "X-Amz-Signature": key,
        "accessKeyId": key,
        "client_secret": key,
        "sas": key,
        "AUTH_TOKEN": key,
        "credentials": {"a": [key, 7]},
    }
    plain = {"author": "me", "tokenizer": "fast", "token_budget": 512, "num_key_value_heads": 2, "monkey": "x", "weights": None, "on": True}
    assert not leaks(json.dumps(masked({"wandb": secret}))) and masked(plain) == plain
    assert masked({f"http://h/?sig={key}": 1}) == {"http://h/?sig=***": 1}


def test_a_mask_takes_no_time():
    """Texts from files may be large, and made to be slow."""
    started = time.process_time()
    for text in ("=a" * 10**5, "token='" * 30_000, "://u:" * 30_000, "://a?" + "b&" * 30_000, "a" * 10**6 + "=", " bearer " * 10**5):
        without_secrets(text)
    assert time.process_time() - started < 20


def test_a_traceback_shows_no_secret():
    code = (
        "import threading\nfrom cfvlm_ds.core.secrets import mask_tracebacks\nmask_tracebacks()\n"
        f"def fail(): raise OSError('http://me:{PLANTED['name']}@host/?sig={PLANTED['query']}')\n"
        "(thread := threading.Thread(target=fail)).start()\nthread.join()\nfail()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("OSError: http://***@host/?sig=***") == 2 and "line 4, in fail" in done.stderr
