"""Proposals of a real server of an OpenAI-compatible address: `transformers serve` with a model of random weights."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw, read_json, read_rows, run_ranks, train_arguments, write_rows
from test_propose import quiet

from cfvlm_ds.cli.main import main
from cfvlm_ds.counterfactuals.options import ProposeOptions
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.data import open_groups


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", str(model)]
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


def is_known(text, row):
    return text in [known["text"] for known in row["texts"]]


@pytest.mark.long
def test_a_real_server_that_talks_nonsense_breaks_nothing(model_dir, tmp_path):
    rows = []
    for k, caption in enumerate(["a red circle and a blue square", "two dogs on a couch"]):
        draw(tmp_path / f"{k}.png", [("red", "circle"), ("blue", "square")][:: 1 - 2 * k])
        rows.append({"id": f"c{k}", "image": f"{k}.png", "caption": caption})
    write_rows(tmp_path / "c.jsonl", rows)
    store = open_groups(tmp_path / "c.jsonl", None, "auto")
    shutil.copytree(model_dir, model := tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096  # more than the request's 740 tokens
    (model / "config.json").write_text(json.dumps(config))
    ends = list(range(2, config["text_config"]["vocab_size"], 16))  # so that some texts of 24 tokens end
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    with served(model, tmp_path / "log") as server:
        options = ProposeOptions(back_ends="rules,llm", llm_url=server, llm_model=str(model), llm_attempts=2, llm_timeout_s=600)
        done = propose(store, tmp_path / "W", options, 0, quiet)
        sample = ["data", "sample", server, str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "S"), "--judge", "test_served:is_known"]
        main([*sample, "--served_model", str(model), "--n", "6", "--max_new_tokens", "24", "--timeout_s", "600"])
    texts = [text["text"] for row in read_rows(tmp_path / "S" / "groups.jsonl") for text in row["texts"]]
    assert read_json(tmp_path / "S" / "counts.json")["sampled"] == 12 and len(set(texts)) == len(texts) > 2
    lines = read_rows(tmp_path / "W" / "propose" / "shard-00000.jsonl")
    assert done["counts"]["without a reply"] == 2 and len(lines) == 2
    for line in lines:
        (said,) = [each for each in line["rejected"] if each["back_end"] == "llm"]
        assert said["failed"] and said["reason"].startswith("no usable reply: the reply ")  # of the model, not of the server
        assert line["edits"] and all(each["back_end"] == "rules" for each in line["edits"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_server_answers_as_describe_does(family, manifests, tmp_path, capsys):
    """With greedy decoding, for a model trained in full and for merged adapters."""
    draw(tmp_path / "a.png", [("red", "circle"), ("blue", "square")])
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the image."}]
    main(["tiny", family, str(tmp_path / "base")])
    answers = list[str]()
    for tuning in ("full", "lora"):
        run_dir = tmp_path / tuning
        options = [f"--model.{module}.tuning={tuning}" for module in ("vision_tower", "projector", "language_model")]
        options += ["--train.learning_rate=0.02", "--train.max_steps=3", "--train.export=true"]
        ((code, said),) = run_ranks(1, "forkserver_ranks:train_script", train_arguments(tmp_path / "base", manifests, run_dir, *options))
        assert code == 0, said
        if tuning == "lora":
            main(["export", str(run_dir)])
        capsys.readouterr()
        main(["describe", str(run_dir / "export"), str(tmp_path / "a.png"), "--max_new_tokens", "12"])
        described = capsys.readouterr().out.partition("\n")[2].strip()
        body = {"model": str(run_dir / "export"), "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
        with served(run_dir / "export", tmp_path / "log") as server:
            request = urllib.request.Request(f"{server}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=600) as reply:
                answers.append(json.load(reply)["choices"][0]["message"]["content"].strip())
        assert answers[-1] == described
    assert answers[0] != answers[1]
