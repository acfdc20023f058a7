"""A small world for the tests that run real models: a LLaVA checkpoint folder, image files, manifests, and real DeepSpeed launches."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tiny_llava import TinyLlavaConfig, build_tiny_llava
from xdist.scheduler import LoadFileScheduling

from cfvlm_ds.cli.main import main
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.models.forest_attention import stock_attention

REPO = Path(__file__).resolve().parent.parent
PROMPT = "Describe the image."
ONE = World(0, 1, torch.device("cpu"))
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "DEEPSPEED_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
"""Settings of forked ranks, also beside a GPU: CUDA does not live through a fork."""


ONE_SERVER = ("tracking", "tracked_run", "secrets")
"""Test files that share a server of MLflow, whose start takes as long as three trainings."""
LONG = (
    "campaigns", "slurm", *ONE_SERVER, "faults", "stopping", "training", "cli", "truth_table", "family_training", "features", "world_sizes",
    "resume", "export", "whole_steps", "evaluated", "dry_run", "scoring_benchmark", "resize", "packing", "preflight", "families", "fuzz",
)  # fmt: skip
"""Test files that take longest come first, so that nobody waits for them in the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
    if sys.version_info < (3, 11) and (without := [item for item in items if "diffusers" in item.keywords]):
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]
    for item in items:
        item.add_marker(pytest.mark.timeout(3600 if "long" in item.keywords else 600))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class FileScheduling(LoadFileScheduling):
    """A file's tests share what it has trained and go to one worker; campaigns share nothing and go where there is room.

    Marks of ``--dist loadgroup`` do nothing under pytest 9.2 (pytest-xdist issue 1386), and nothing says so.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
        return nodeid if name == "campaigns" else "one server" if name in ONE_SERVER else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    return FileScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ONE
    dist.destroy_process_group()


def build_test_model(out_dir: Path) -> Path:
    """A LLaVA of about 0.1 M parameters whose tokenizer knows the captions of ``write_manifest``."""
    captions = [f"a {c} {s} and a {d} {t}" for c in COLOURS for d in COLOURS for s in SHAPES for t in SHAPES]
    return build_tiny_llava(TinyLlavaConfig(out_dir=str(out_dir), hidden_size=32, vision_hidden_size=32, patch_size=12), captions)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """MLflow's, which tests start with ``up``."""
    from mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return build_test_model(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="session")
def scorer(model_dir):
    """The test model in fp32 with weights drawn wide, so that masks, positions and images matter as they do after training."""
    model = load_model(ModelConfig(str(model_dir), attn_implementation="sdpa"), torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return Scorer(model, family_of(model.config))


def plain_logp(
    model: Any, processor: Any, image: Image.Image | tuple[Path, ...], prompt: str, text: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the text's tokens, and of its end-of-turn: the library's own forward of one image and one string, template by hand."""
    all_logp, tokens = plain_distributions(model, processor, image, prompt, text)
    logp = all_logp[range(len(tokens)), tokens]
    return logp[:-1], logp[-1]


def plain_distributions(
    model: Any, processor: Any, image: Image.Image | tuple[Path, ...], prompt: str, text: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of every token at each place of the text and of its end-of-turn [T, V], and the tokens there [T]; as ``plain_logp``."""
    image = Image.open(*image).convert("RGB") if isinstance(image, tuple) else image
    head = f"USER: <image>\n{prompt} ASSISTANT:"
    start = processor(images=[image], text=[head], return_tensors="pt").input_ids.shape[1]
    inputs = processor(images=[image], text=[f"{head} {text}</s>"], return_tensors="pt")
    tokens = inputs.input_ids[0, start:]
    with stock_attention(model):
        logits = model(**inputs).logits
    return logits[0, start - 1 : -1].float().log_softmax(-1), tokens


def draw(path: Path, shapes: list[tuple[str, str]]) -> Path:
    image = Image.new("RGB", (48, 48))
    pen = ImageDraw.Draw(image)
    for x, (colour, shape) in zip((3, 26), shapes, strict=True):
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, 14, x + 18, 32), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def caption(shapes: list[tuple[str, str]]) -> str:
    return " and ".join(f"a {colour} {shape}" for colour, shape in shapes)


def write_manifest(path: Path, num_groups: int, seed: int = 0, ragged: bool = True) -> Path:
    """Groups with 0, 1 or 2 complete counterfactual pairs (1 each when not ragged), some with a sham image; real PNG files."""
    generator = random.Random(seed)
    groups = []
    for g in range(num_groups):
        num = generator.choice((0, 1, 1, 2)) if ragged else 1
        factual = [(generator.choice(COLOURS), generator.choice(SHAPES)) for _ in range(2)]
        scenes = [factual]
        while len(scenes) < num + 1:
            other = [(generator.choice(COLOURS), shape) for _, shape in factual]
            if other not in scenes:
                scenes.append(other)
        images = [draw(path.parent / "images" / f"{path.stem}-{g}-{k}.png", scene) for k, scene in enumerate(scenes)]
        match = [tuple(int(i == c) for c in range(len(scenes))) for i in range(len(scenes))]
        edits = [Edit("colour", k, k, factual[0][0], scenes[k][0][0]) for k in range(1, len(scenes))]
        if ragged and g % 3 == 0:
            sham = path.parent / "images" / f"{path.stem}-{g}-sham.png"
            Image.open(images[0]).rotate(2).save(sham)
            images, match, edits = [*images, sham], [*match, match[0]], [*edits, Edit("sham", len(scenes))]
        candidates = tuple(Candidate(PROMPT, caption(scene)) for scene in scenes)
        group = CounterfactualGroup(
            f"{path.stem}-{g}", tuple((image,) for image in images), candidates, tuple(match), tuple(edits), source="test"
        )
        groups.append(group)
    return save_groups(path, groups)


def save_groups(path: Path, groups: list[CounterfactualGroup]) -> Path:
    return write_rows(path, (to_row(group, path.parent) for group in groups))


@pytest.fixture(scope="session")
def manifests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: write_manifest(folder / f"{name}.jsonl", num, seed) for seed, (name, num) in enumerate((("train", 48), ("test", 10)))}


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options of sections by their whole names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found


def many_rows(manifest: Path, number: int) -> Path:
    """A manifest beside another one, whose rows it repeats under ids of their own: from 16,384 on they are checked in processes."""
    rows = read_rows(manifest)
    return write_rows(manifest.with_name(f"{number}.jsonl"), (rows[k % len(rows)] | {"id": str(k)} for k in range(number)))


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command prints."""
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    return only_sentence(capsys.readouterr().err)


def only_sentence(stderr: str) -> str:
    # Hugging Face's progress bars, the tokenizer's own warning about a long text, and torch's about a CUDA toolkit without a device are not
    # ours to silence here.
    foreign = re.compile(r"it/s\]|^\[transformers\]|No CUDA runtime is found")
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line and not foreign.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """What the condition gives when it holds."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = (10_000 + 2_500 * (_WORKER % 4) + (os.getpid() + n) % 2_500 for n in itertools.count())


def free_port() -> int:
    """A port for ranks to meet at that nobody takes before they start: below the ephemeral ones, and of this test worker's own range."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def launcher(ranks: int) -> list[str]:
    return ["deepspeed", "--num_gpus", str(ranks)]  # all of them on one port, as far as the launcher knows


def run(command: list[str], timeout: float = 300) -> str:
    """Run to the end, in a session of its own, and return the output; a failure shows it, a hang is killed with its family and fails."""
    process = subprocess.Popen(
        command, cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{process.communicate()[0][-4000:]}")
    assert process.returncode == 0, f"exit code {process.returncode}: {' '.join(command)}\n{output[-6000:]}"
    return output


def run_ranks(number: int, function: str, *arguments: object, timeout: float = 600) -> list[tuple[int, str]]:
    """Run ``MODULE:FUNCTION`` as so many ranks (support/forkserver_ranks.py): exit codes and output; what still runs is killed."""
    import forkserver_ranks

    with tempfile.TemporaryDirectory() as said:
        ranks = forkserver_ranks.start(number, function, *arguments, said=Path(said))
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank in ranks if rank.is_alive()]
        for rank in late:
            os.killpg(rank.pid or 0, signal.SIGKILL)
            rank.join()
        ended = [(rank.exitcode or 0, Path(said, f"rank-{index}.log").read_text()) for index, rank in enumerate(ranks)]
    assert not late, f"still running after {timeout} s:\n" + "\n".join(output[-2000:] for _, output in ended)
    return ended


def run_trainings(number: int, *trainings: list[str], timeout: float = 600, by: str = "forkserver_ranks:train_all") -> str:
    """The trainings, one after the other, by one family of ranks; what they said."""
    ended = run_ranks(number, by, trainings, timeout=timeout)
    output = "".join(text for _, text in ended)
    assert not any(code for code, _ in ended), output[-6000:]
    return output


def run_train(ranks: int, arguments: list[str], *variables: dict[str, str], code: int = 0) -> list[str]:
    """train.py by so many ranks, which all end with this exit code; what each said."""
    ended = run_ranks(ranks, "forkserver_ranks:train_script", arguments, *variables)
    assert {each for each, _ in ended} == {code}, ended
    return [output for _, output in ended]


def run_plans(ranks: int, plans: Iterable[tuple[list[Any], list[str]]], timeout: float = 900, code: int = 0) -> list[str]:
    """Trainings one after the other by one family of ranks, each with a fault of support/fault_injection.py; what was said in each."""
    ended = run_ranks(ranks, "fault_injection:train_listed", list(plans), timeout=timeout)
    assert all(bool(each) == bool(code) for each, _ in ended), ended
    return ["".join(parts) for parts in zip(*(output.split("=== next training\n") for _, output in ended), strict=True)]


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of a parameter in this run's tests of the file: what is long may be deselected, and then is not trained either."""
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(parameters[name] for parameters in chosen if name in parameters))


def plain_scores(manifest: Path, *models: str) -> list[dict[str, list[list[float]]]]:
    """What support/transformers_scores.py finds in a process that does not know this package; a model is its folder, or folder+adapter."""
    command = [sys.executable, str(REPO / "tests" / "support" / "transformers_scores.py"), str(manifest), *models]
    done = subprocess.run(command, cwd=manifest.parent, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train_arguments(model_dir: Path, manifests: dict[str, Path], output_dir: Path, *extra: str) -> list[str]:
    options = {
        "--config": "tests/support/train.yaml",
        "--deepspeed": "tests/support/z3_partitioned.json",  # no parameter is small enough to stay gathered
        "--model.name_or_path": str(model_dir),
        "--data.train": str(manifests["train"]),
        "--train.output_dir": str(output_dir),
    }
    return [part for pair in options.items() for part in pair] + list(extra)


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return read_rows(output_dir / "metrics.jsonl")


def assert_same_trajectory(expected: Path, found: Path, *names: str) -> None:
    """Losses, likelihoods, gradient norms, and what begins with other names, of two runs: fp32, relative 2e-4."""
    for want, have in zip(metrics(expected), metrics(found), strict=True):
        for name in want:
            if name.startswith(("loss", "logp/", "grad_norm", *names)):
                assert have[name] == pytest.approx(want[name], rel=2e-4, abs=2e-5), (name, want["step"], found.name)


def losses(output_dir: Path) -> list[float]:
    """The loss of every step, in order."""
    return [row["loss"] for row in metrics(output_dir) if "loss" in row]


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Sequence[int], of: Sequence[int], scale: float, window: tuple[int, int]
) -> torch.Tensor:
    """What the kernels promise (flash-attn's README, since 2.1): in each segment the last query is at the last key, and a query sees the
    keys from ``window[0]`` before its own to ``window[1]`` after it, without a bound where that is -1."""
    found = []
    for (begin, end), (first, last) in zip(itertools.pairwise(at), itertools.pairwise(of), strict=True):
        keys, values = (each[first:last].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        ahead = (
            torch.arange(last - first, device=q.device) - torch.arange(last - first - end + begin, last - first, device=q.device)[:, None]
        )
        logits = torch.einsum("qhd,khd->hqk", q[begin:end].double(), keys) * scale
        for side, bound in ((-ahead, window[0]), (ahead, window[1])):
            logits = logits if bound < 0 else logits.masked_fill(side > bound, -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).to(q.dtype))
    return torch.cat(found)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins with the signatures of the three kernels that need a GPU: what is tested is how they are called."""
    flash: Any = types.ModuleType("flash_attn")

    def called(q: Any, k: Any, v: Any, at: Any, of: Any, longest: int, longest_of: int, *options: Any) -> torch.Tensor:
        assert longest == at.diff().max() and longest_of == of.diff().max() and at.dtype == of.dtype == torch.int32
        return varlen(q, k, v, at.tolist(), of.tolist(), *options)

    def flash_attn_varlen_func(*arguments: Any, softmax_scale: float, causal: bool, window_size: tuple[int, int]) -> torch.Tensor:
        return called(*arguments, softmax_scale, (window_size[0], 0) if causal else window_size)

    flash.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)

    def varlen_attn(*arguments: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
        assert enable_gqa == (arguments[0].shape[1] != arguments[1].shape[1])
        return called(*arguments, scale, window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("cfvlm_ds.models.flex_attention.compiled_flex", lambda: flex_on_cpus)


def flex_on_cpus(query: Any, key: Any, value: Any, block_mask: Any, **options: Any) -> torch.Tensor:
    """FlexAttention, which has no gradients on CPUs: there, a dense attention with the same mask gives them."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    if query.requires_grad:
        mask = create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return flex_attention(query.detach(), key.detach(), value.detach(), block_mask=block_mask, **options)
