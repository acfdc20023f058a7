"""A data set of the hub: its files are fetched once by the hub's own client, here from a server of the same interface on this machine."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from public_data import PUBLIC

from cfvlm_ds.core.data_config import is_hub
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.data import open_groups, read_manifest
from cfvlm_ds.data.containers import hub
from cfvlm_ds.data.containers.hub import fetched
from cfvlm_ds.export.folder import UNNAMED_BASE, UNNAMED_REPO
from cfvlm_ds.export.hub import push

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """One data set, me/mine, whose files are those of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.asked, self.pushed = folder, list[str](), dict[str, bytes]()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        files = {str(each.relative_to(self.server.folder)): each for each in self.server.folder.rglob("*") if each.is_file()}
        if path.startswith("/api/datasets/me/mine/revision/"):
            self.say({"id": "me/mine", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/datasets/me/mine/tree/{COMMIT}"):
            sizes = ((name, each.stat().st_size) for name, each in files.items())
            self.say([{"type": "file", "path": name, "size": size, "oid": f"{len(name):040x}"} for name, size in sizes])
        elif (name := path.removeprefix(f"/datasets/me/mine/resolve/{COMMIT}/")) in files:
            self.answer(files[name].read_bytes(), {"ETag": f'"{len(name):040x}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """The upload of files as regular ones: https://huggingface.co/docs/hub/api, and the client's own source."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            given = json.loads(content)
            self.say({"url": f"http://{self.headers['Host']}/{given['organization']}/{given['name']}"})
        elif self.path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/tuned/preupload/main":
            files = json.loads(content)["files"]
            self.say({"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        elif self.path == "/api/models/me/tuned/commit/main":
            rows = [json.loads(line)["value"] for line in content.splitlines()]
            for row in rows:
                if "path" in row:
                    self.server.pushed[row["path"]] = base64.b64decode(row["content"])
            self.say({"commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(b"", {"X-Error-Message": "no rights to this namespace"}, 403)

    def say(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, content: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "remote").mkdir()
    PUBLIC["WebDataset"][0](tmp_path / "remote", 40)
    (tmp_path / "remote" / "README.md").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Hub(tmp_path / "remote")
    threading.Thread(target=found.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield found
    found.shutdown()
    found.server_close()


ADDRESS = "hf://datasets/me/mine/shards/*.tar"


def test_files_are_fetched_once_and_stay(server, tmp_path):
    """The same groups as from the folder; afterwards nobody is asked, also when the hub has other files, or is gone."""
    expected = read_manifest(tmp_path / "remote" / "shards", format="webdataset")
    groups = open_groups(ADDRESS, format="webdataset")
    assert [group.candidates for group in groups] == [group.candidates for group in expected] and len(groups) == 40
    shown = groups[39].images[0][0]
    assert shown.is_relative_to(tmp_path / "cache") and not list((tmp_path / "cache").rglob("README.md"))
    asked = len(server.asked)
    shutil.rmtree(tmp_path / "remote")
    for address in (ADDRESS, Path(ADDRESS)):  # which has one slash less
        assert is_hub(address) and open_groups(address, format="webdataset")[39].images[0][0] == shown
    assert len(server.asked) == asked
    tars = [each for each in (tmp_path / "cache").rglob("00000.tar") if ".prepared" not in str(each)]
    tars[0].write_bytes(b"cut")
    with pytest.raises(DataError, match=r"no such file"):
        open_groups(ADDRESS, format="webdataset")


def test_what_is_not_there_is_said_in_a_sentence(server, monkeypatch):
    cases = {
        "hf://datasets/me/mine": r"names no files; add them, such as hf://datasets/me/mine/data/train-\*\.parquet, or hf://datasets/me/mine@~parquet",
        "hf://datasets/me/mine/../../x": "no part may be empty, . or ..",
        "hf://datasets/me/mine/*/x.tar": "only the last part",
        "hf://datasets/me/mine/data/*.tar": "has no such file; it contains README.md, shards/00000.tar, shards/00001.tar",
        "hf://datasets/me/other/*.tar": r"cannot be fetched \(RepositoryNotFoundError: .*run `hf download --repo-type dataset me/other",
    }
    for address, sentence in cases.items():
        with pytest.raises(DataError, match=sentence) as raised:
            open_groups(address)
        assert str(raised.value).isprintable() and str(raised.value).startswith(address)
        with pytest.raises(DataError, match=f"^{re.escape(str(raised.value))}$"):
            open_groups(Path(address))  # which has one slash less
    with pytest.raises(DataError, match="is an address on the network"):
        open_groups(Path("s3://mine/x.tar"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be fetched"):
        open_groups(ADDRESS)


def test_an_export_is_pushed_file_by_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    (folder := tmp_path / "export").mkdir()
    files = {"README.md": b"---\nlibrary_name: transformers\n---\n# tuned\n", "config.json": b"{}", "model.safetensors": bytes(range(256))}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    said: list[str] = []
    (folder / "README.md").write_text(f"# tuned\n\n{UNNAMED_BASE}\n")
    with pytest.raises(ConfigError, match=r"README\.md does not name the base model.*push again; your changes are kept"):
        push(folder, "me/tuned", said.append)
    assert not said and not server.pushed
    (folder / "README.md").write_bytes(files["README.md"] + f'# mine\nname = "{UNNAMED_REPO}"\n'.encode())
    files["README.md"] += b'# mine\nname = "me/tuned"\n'
    assert push(folder, "me/tuned", said.append).endswith("/me/tuned") and server.pushed == files
    assert said == [f"pushing 3 files, 0.0 MB, to http://127.0.0.1:{server.server_port}/me/tuned"]
    (folder / "README.md").write_bytes(files["README.md"].replace(b"me/tuned", b"me/earlier"))
    assert push(folder, "me/tuned", said.append) and server.pushed == files
    with pytest.raises(ConfigError, match=r"cannot be pushed to other/tuned .*no rights to this namespace.*log in with `hf auth login`"):
        push(folder, "other/tuned", said.append)
    assert (folder / "README.md").read_bytes() == files["README.md"]
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=r"cannot be pushed to me/tuned \(ConnectError"):
        push(folder, "me/tuned", said.append)


def test_whoever_waits_shows_life(server, monkeypatch):
    signs = list[int]()
    monkeypatch.setattr(hub, "_EVERY_S", 0.001)
    assert fetched(ADDRESS, lambda: signs.append(1), str).name == "*.tar" and len(signs) > 1
