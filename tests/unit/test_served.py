"""Proposals of a real server of an OpenAI-compatible address: `transformers serve` with a model of random weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw
from test_propose import quiet

from cfvlm_ds.counterfactuals.options import ProposeOptions
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.data import open_groups


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", str(model_dir)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-2000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.long
def test_a_real_server_that_talks_nonsense_breaks_nothing(server: str, model_dir: Path, tmp_path: Path) -> None:
    rows = []
    for k, caption in enumerate(["a red circle and a blue square", "two dogs on a couch"]):
        draw(tmp_path / f"{k}.png", [("red", "circle"), ("blue", "square")])
        rows.append({"id": f"c{k}", "image": f"{k}.png", "caption": caption})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_groups(tmp_path / "c.jsonl", None, "auto")
    options = ProposeOptions(back_ends="rules,llm", llm_url=server, llm_model=str(model_dir), llm_attempts=2, llm_timeout_s=600)
    done = propose(store, tmp_path / "W", options, 0, quiet)
    lines = [json.loads(line) for line in (tmp_path / "W" / "propose" / "shard-00000.jsonl").read_text().splitlines()]
    assert done["counts"]["without a reply"] == 2 and len(lines) == 2
    for line in lines:
        (said,) = [each for each in line["rejected"] if each["back_end"] == "llm"]
        assert said["failed"] and said["reason"].startswith("no usable reply: the reply ")  # of the model, not of the server
        assert line["edits"] and all(each["back_end"] == "rules" for each in line["edits"])
