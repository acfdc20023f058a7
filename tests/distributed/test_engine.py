"""DeepSpeed's side: what "auto" becomes, what is refused, how parameters are grouped, stale build locks, and real partitioning."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPO, environment, tensors, train_arguments, write_json

from cfvlm_ds import engine
from cfvlm_ds.core import distributed, versions
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.deepspeed_compat import starting as starting
from cfvlm_ds.engine import setup
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.objectives import OBJECTIVES

CPU = torch.device("cpu")
SHIPPED = sorted((REPO / "ds_configs").glob("*.json"))
HIDDEN, STEPS = 96, 50


def configured(*argv: str, json_file: Path = REPO / "ds_configs" / "z3_offload.json") -> RunConfig:
    return parse_config(["--deepspeed", str(json_file), *argv], OBJECTIVES)


def raw(name: str = "z3_offload", **changes: Any) -> dict[str, Any]:
    """A shipped JSON with values changed: a dict goes into its section, None removes the key."""
    result = engine.read_json(str(REPO / "ds_configs" / f"{name}.json"))
    for key, value in changes.items():
        if value is None:
            del result[key]
        elif isinstance(value, dict) and key in result:
            result[key].update(value)
        else:
            result[key] = value
    return result


def resolve(given: dict[str, Any], *argv: str, ranks: int = 1, device: torch.device = CPU) -> Any:
    return engine.resolve(given, configured(*argv), ranks, device, HIDDEN, STEPS)


def by_transformers(given: dict[str, Any], tmp_path: Path, **arguments: Any) -> dict[str, Any]:
    """The same JSON as the Hugging Face Trainer fills it in, with its own TrainingArguments."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    real = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **arguments)
    assert real.world_size == 1
    theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(given))
    theirs.trainer_config_process(real)
    theirs.trainer_config_finalize(real, SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN)), STEPS)
    return theirs.config


VALUES = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.7,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
}


@pytest.mark.parametrize(
    "changes", [{}, {"scheduler": SCHEDULER | {"params": SCHEDULER["params"] | {"warmup_min_lr": 0}}}], ids=["", "scheduler"]
)
@pytest.mark.parametrize("name", [path.stem for path in SHIPPED])
def test_autos_are_filled_as_transformers_fills_them(name, changes, tmp_path):
    options = [part for key, value in VALUES.items() for part in (f"--train.{key}", str(value))]
    ours = resolve(raw(name, **changes), *options, "--train.warmup_ratio=0.2").config
    assert resolve(raw(name), *options, ranks=8).config["train_batch_size"] == 48
    theirs = by_transformers(raw(name, **changes), tmp_path, **VALUES, warmup_steps=0.2)
    assert ours == theirs
    assert ours["train_batch_size"] == 6 and ours["gradient_clipping"] == 0.7 and "auto" not in json.dumps(ours)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_explicit_and_known_to_deepspeed(path):
    import deepspeed
    import deepspeed.runtime.constants as constants

    given = engine.read_json(str(path))
    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", "optimizer"}
    assert not set(given) - known, "DeepSpeed ignores top-level keys it does not know"
    assert given["zero_optimization"]["stage"] == (2 if path.stem == "z2" else 3)
    always = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16"}
    assert always <= set(given), "releases differ in what a missing key means"
    assert deepspeed.DeepSpeedConfig(resolve(given).config).gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("changes", "argv", "parts"),
    [
        ({"gradient_clipping": 0.5}, [], ["gradient_clipping=0.5", "train.max_grad_norm=1.0"]),
        ({"train_batch_size": 4}, [], ["train_batch_size=4", "micro-batch x accumulation x ranks=8"]),
        ({"optimizer": {"params": {"lr": 1e-3}}}, [], ["optimizer.params.lr=0.001", "train.learning_rate=1e-05"]),
        ({"bf16": {"enabled": True}}, ["--train.bf16=false"], ["bf16.enabled=True", "train.bf16=False"]),
        ({"bf16": None}, ["--train.bf16=true"], ["train.bf16=true", "torch.float32"]),
        ({"zero_optimization": {"sub_group_size": "auto"}}, [], ["zero_optimization.sub_group_size"]),
        ({"gradient_clipping": None}, [], ["gradient_clipping"]),
    ],
)
def test_contradictions_name_both_values(changes, argv, parts):
    with pytest.raises(ConfigError) as raised:
        resolve(raw(**changes), *argv)
    assert all(part in str(raised.value) for part in [*parts, "z3_offload.json"]), str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_made_after_a_configuration_is_resolved_is_whole():
    """Also where one is refused: a start that follows in the process would partition what rank 0 alone makes to count parameters."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    kept = resolve(raw())
    assert kept.is_zero3() and not is_deepspeed_zero3_enabled()
    with pytest.raises(ConfigError) as refused:
        resolve(raw(gradient_clipping=0.5))
    assert refused.traceback and not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("capable", "written", "asked", "expected"),
    [
        (None, "auto", "auto", torch.float32),
        (False, "auto", "auto", torch.float32),
        (True, "auto", "auto", torch.bfloat16),
        (True, "auto", "false", torch.float32),
        (None, "auto", "true", torch.bfloat16),
        (True, False, "auto", torch.float32),
        (None, True, "auto", torch.bfloat16),
    ],
)
def test_precision(monkeypatch, capable, written, asked, expected):
    """capable None is a CPU; the JSON decides where it says something, the device where both leave it open."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bool(capable))
    device = CPU if capable is None else torch.device("cuda", 0)
    resolved = resolve(raw(bf16={"enabled": written}), "--train.bf16", asked, device=device)
    assert resolved.dtype() == expected and resolved.config["bf16"]["enabled"] == (expected == torch.bfloat16)


# --- parameter groups ---------------------------------------------------------------------------------------------------------------


def grouped(model_dir: Path, *argv: str) -> list[dict[str, Any]]:
    """Parameter groups with names in place of parameters."""
    config = configured(f"--model.name_or_path={model_dir}", "--train.weight_decay=0.1", *argv)
    model = load_model(config.model, torch.float32)
    scorer = Scorer(model, family_of(model.config))
    name = {parameter: name for name, parameter in model.named_parameters()}
    return [group | {"params": [name[p] for p in group["params"]]} for group in setup.parameter_groups(scorer, config)]


def expected_module(name: str) -> str:
    return "vision_tower" if "vision_tower" in name else "projector" if "projector" in name else "language_model"


def test_groups_have_rates_by_module_and_decay_by_kind(model_dir):
    groups = grouped(
        model_dir, "--train.learning_rate=1e-4", "--model.vision_tower.learning_rate=1e-6", "--model.projector.learning_rate=0"
    )
    rates = {"vision_tower": 1e-6, "projector": 0.0, "language_model": 1e-4}
    for group in groups:
        for name in group["params"]:
            assert group["lr"] == rates[expected_module(name)], name
            exempt = any(part in name for part in ("bias", "norm", "layrnorm", "class_embedding"))
            assert group["weight_decay"] == (0.0 if exempt else 0.1), name
    number = sum("post_layernorm" not in name for name in tensors(model_dir))  # LLaVA does not use CLIP's pooled output
    modules = ("language_model", "projector", "vision_tower")
    assert [group["name"] for group in groups] == [f"{module}{kind}" for module in modules for kind in ("", ".exempt")], (
        "as checkpoints are"
    )
    names = [name for group in groups for name in group["params"]]
    assert len(names) == len(set(names)) == number, "every weight that is used is in exactly one group"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "a list"),
        (b"\xff{}", ""),
        (b"[" * 100_000, ""),
        (b'{\n  "bf16": {"enabled": true},,\n}', "line 2, column 29"),
        (b'{"bf16": true}', "bf16 must be an object"),
        (b'{"gradient_clipping": [1]}', "gradient_clipping=[1] against"),
    ],
)
def test_what_is_no_deepspeed_json_is_one_sentence(content, said, tmp_path):
    (path := tmp_path / "ds.json").write_bytes(content)
    config = configured(json_file=path)
    with pytest.raises(ConfigError) as raised:
        engine.validate(config, engine.resolve(engine.read_json(str(path)), config, 1, CPU, HIDDEN, STEPS))
    assert said in str(raised.value) and str(path) in str(raised.value) and str(raised.value).isprintable()
    (tmp_path / "loop").symlink_to("loop")
    for other in (tmp_path, tmp_path / "loop", tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match=f"--deepspeed {other}"):
            engine.read_json(str(other))


# --- where ranks meet -----------------------------------------------------------------------------------------------------------------

MEETING = """
import os, sys
import torch
import torch.distributed as dist
from cfvlm_ds.core.distributed import meeting_point

def rank(number):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    with meeting_point():
        dist.init_process_group("gloo")
    met = torch.tensor([float(os.environ["MASTER_PORT"])])
    dist.all_reduce(met)
    os.write(1, f"{os.environ['MASTER_PORT']} {met.item()}\\n".encode())  # in one piece: both ranks write to one pipe
    os._exit(0)

print("ready", flush=True)
sys.stdin.read(1)
for number in range(2):
    os.fork() or rank(number)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""


def test_two_trainings_on_one_machine_meet_where_their_launcher_gives_both_the_same_port(tmp_path):
    """Two launchers of two ranks each start at once, and a third training holds the port of all."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "CROSS_SIZE": "1", "TMPDIR": str(tmp_path)}
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # held by somebody else: as good
            other.bind(("", 29500))
            other.listen()
        launchers = [
            subprocess.Popen(
                [sys.executable, "-c", MEETING], cwd=REPO, env=environment() | variables, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) for _ in range(2)
        ]  # fmt: skip
        for process in launchers:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in launchers:
            assert process.stdin is not None
            process.stdin.write("g")
            process.stdin.flush()
        said = [process.communicate(timeout=100)[0].split() for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0]
    ports = [int(lines[0]) for lines in said]
    assert ports[0] != ports[1] and 29500 not in ports
    assert said == [[str(port), str(2.0 * port)] * 2 for port in ports]
    assert not list(tmp_path.iterdir()), "nothing is left of how they met"


ALONE = """
import os, sys
import torch.distributed as dist
from cfvlm_ds.core.distributed import launch_environment, meeting_point

def run():
    os.read(start, 1)
    launch_environment()
    with meeting_point():
        dist.init_process_group("gloo")
    dist.barrier()
    os._exit(0)

start, begin = os.pipe()
for _ in range(16):
    os.fork() or run()
os.write(begin, bytes(16))
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(16)))
"""


def test_sixteen_runs_that_one_script_starts_at_once_all_start():
    assert subprocess.run([sys.executable, "-c", ALONE], cwd=REPO, env=environment(), timeout=100, check=False).returncode == 0


def test_a_port_that_rank_0_does_not_publish_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_PORT_TIMEOUT_S", 0.2)
    with pytest.raises(ConfigError, match="rank 0 did not publish a port"):
        distributed._published_port(tmp_path / "published")


def test_the_device_of_a_rank(monkeypatch):
    """Slurm may show each task its own GPU alone; a launcher that shows all and starts more ranks is refused."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert [setup.device_index(rank, 8) for rank in range(8)] == list(range(8))
    with pytest.raises(ConfigError, match=r"rank 3 is number 4 on .*, where torch finds 2 GPUs; .*--num_gpus 2"):
        setup.device_index(3, 2)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert setup.device_index(3, 1) == 0 and setup.device_index(3, 8) == 3


# --- what runs here -------------------------------------------------------------------------------------------------------------------


def test_the_revision_is_the_package_s_wherever_a_run_is_started(tmp_path):
    """Git is asked about a copy of the package in a checkout of its own, as an installed file below one, and where there is no git."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C"]
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        (folder / "cfvlm_ds" / "core").mkdir(parents=True)
        (folder / "cfvlm_ds" / "__init__.py").touch()
        (folder / "cfvlm_ds" / "core" / "versions.py").write_bytes(Path(versions.__file__).read_bytes())
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        if folder == here:
            subprocess.run([*git, str(folder), "add", "cfvlm_ds"], check=True)
        subprocess.run([*git, str(folder), "commit", "-qm", "first", "--allow-empty"], check=True)
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    ask = "from cfvlm_ds.core.versions import git_revision, version; print(git_revision(), version('no-such-package'))"

    def asked(package: Path, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ask], cwd=elsewhere, env=environment() | {"PYTHONPATH": str(package)} | variables,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    (elsewhere / "installed").mkdir()
    (elsewhere / "cfvlm_ds").rename(elsewhere / "installed" / "cfvlm_ds")
    assert asked(here) == f"{head} none"
    assert asked(here, GIT_DIR=str(elsewhere / ".git")) == f"{head} none"
    assert asked(elsewhere / "installed") == "unknown none"
    assert asked(here, PATH=str(tmp_path)) == "unknown none"


# --- build locks --------------------------------------------------------------------------------------------------------------------


def plant(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "lock").touch()
    return folder / name / "lock"


def test_a_stale_lock_is_removed_and_named_and_one_that_a_process_holds_open_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    held, stale = plant(tmp_path, "a"), plant(tmp_path, "b")
    (tmp_path / "b" / "b.so").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sys; handle = open({str(held)!r}); print('open', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    starting.clear_stale_locks()
    assert held.exists() and not stale.exists() and (tmp_path / "b" / "b.so").exists()
    (said,) = capsys.readouterr().out.splitlines()
    assert str(stale) in said
    holder.communicate("")
    starting.clear_stale_locks()
    assert not held.exists()


def test_on_a_network_file_system_a_fresh_lock_is_waited_for(tmp_path, monkeypatch, capsys):
    """Another machine may hold it; untouched for five minutes it is stale."""
    import psutil

    lock = plant(tmp_path, "a")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [SimpleNamespace(mountpoint="/", fstype="nfs4")])
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 9 and lock.exists()
        age = time.time() - (301 if len(naps) == 3 else 200)
        os.utime(lock, (age, age))

    monkeypatch.setattr(starting, "time", SimpleNamespace(sleep=nap, time=time.time))  # and not that of other threads
    starting.clear_stale_locks()
    assert len(naps) == 3 and not lock.exists() and "nfs4" in capsys.readouterr().out.splitlines()[0]


# --- a real process -----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, resource, sys
import torch
from cfvlm_ds import engine
from cfvlm_ds.engine import setup
setup.version = lambda package: "0.21.0"
world = engine.start()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages = [new_pages(), new_pages()]
started = {"mlflow": "mlflow" in sys.modules, "deepspeed": "deepspeed" in sys.modules, "world": [world.rank, world.size]}
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import read_manifest
from cfvlm_ds.objectives import OBJECTIVES
config = parse_config(sys.argv[1:], OBJECTIVES)
resolved = engine.resolve(engine.read_json(config.deepspeed), config, world.size, world.device, engine.hidden_size(config), 2)
ds_engine = engine.initialize(config, resolved, world, 2)
named = dict(ds_engine.module.model.named_parameters())
state = lambda p: [hasattr(p, "ds_id"), list(p.shape), list(getattr(p, "ds_shape", []))]
before = {name: state(p) for name, p in named.items()}
inside = {}
def hook(name):
    return lambda module, *_: inside.update({f"{name}.{k}": list(p.shape) for k, p in module.named_parameters(recurse=False)})
for name, module in ds_engine.module.model.named_modules():
    if type(module).__name__ == "Linear":
        module.register_forward_pre_hook(hook(name))
batch = load_collator(config.model, config.data.max_pixels)(read_manifest(config.data.train)[:2])
logp = ds_engine(**batch.model_inputs)
ds_engine.backward(logp.sum(), scale_wrt_gas=False)
ds_engine.step()
after = {name: state(p) for name, p in named.items()}
groups = [[g["lr"], g["weight_decay"]] for g in ds_engine.optimizer.param_groups]
print("REPORT" + json.dumps({"started": started, "before": before, "inside": inside, "after": after, "groups": groups, "pages": pages}))
"""


@pytest.fixture(scope="module")
def process(model_dir, manifests, tmp_path_factory):
    """One rank that starts where a killed build left a lock, initializes ZeRO-3 with nothing kept gathered, and takes one step."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "script.py").write_text(SCRIPT)
    lock = plant(folder / "extensions", "deepspeed_shm_comm")
    zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    write_json(folder / "z3.json", raw("z3", zero_optimization=zero))
    options = ["--train.weight_decay=0.1", "--model.projector.learning_rate=1e-4", "--deepspeed", str(folder / "z3.json")]
    printed = subprocess.run(
        [sys.executable, folder / "script.py", *train_arguments(model_dir, manifests, folder / "out", *options)],
        cwd=REPO, env=environment() | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stdout + printed.stderr
    report = next(line for line in printed.stdout.splitlines() if line.startswith("REPORT"))
    return json.loads(report.removeprefix("REPORT")) | {"lock": lock, "output": printed.stdout}


def test_a_start_joins_alone_after_a_stale_lock_and_uses_freed_memory_again(process):
    """A tensor of 64 MB needs new pages of the system (16384, or 32 huge ones), and one after it none; MLflow is left out, and nothing is
    compiled."""
    assert not process["lock"].exists() and str(process["lock"]) in process["output"]
    assert not list(process["lock"].parent.glob("*.so"))
    assert process["started"] == {"mlflow": False, "deepspeed": True, "world": [0, 1]}
    assert process["output"].count("warning: DeepSpeed 0.21.0 is installed") == 1
    first, second = process["pages"]
    assert second < first / 4


def test_zero3_really_partitions(process, model_dir):
    shapes = sorted(list(tensor.shape) for tensor in tensors(model_dir).values())
    for when in ("before", "after"):
        assert all(has_id and shape == [0] for has_id, shape, _ in process[when].values()), f"gathered {when} the step"
        assert sorted(full for _, _, full in process[when].values()) == shapes
    assert len(process["inside"]) > 20
    for name, shape in process["inside"].items():
        assert shape == process["before"][name][2], f"{name} is whole where it is used"


def test_the_groups_reach_the_optimizer(process):
    """Six groups with the decay of their kind; the projector's rate is its own, in warm-up both start from the schedule's first value."""
    assert [decay for _, decay in process["groups"]] == [0.1, 0.0] * 3
    rates = [rate for rate, _ in process["groups"]]
    assert rates[2] == rates[3] and rates[0] == rates[1] == rates[4] == rates[5]
    assert rates[0] == pytest.approx(30 * rates[2]) and rates[0] > 0
