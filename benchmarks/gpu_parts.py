"""Parts of benchmarks/gpu.py. Each part runs in its own process, which writes a line to a file after each case."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # no installation is needed

import scoring  # noqa: E402
import torch  # noqa: E402
from scoring import PROMPT, TEXT, clock  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from two_levels import two_levels  # noqa: E402

from cfvlm_ds.core.errors import ConfigError  # noqa: E402
from cfvlm_ds.core.versions import git_revision, version  # noqa: E402
from cfvlm_ds.models import FAMILIES, ModelFlops, attention, meta_model  # noqa: E402
from cfvlm_ds.models.forest import Forest  # noqa: E402
from cfvlm_ds.models.forest_attention import BACKENDS, registered  # noqa: E402

FAMILY = "qwen2_5_vl"
EXACT = 2.0
"""Attention counts as exact if its error against float64 is below EXACT times that of dense attention in the same dtype."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, inputs and runs. ``--small`` selects smaller ones."""

    words: int
    scored: dict[str, int]
    trained: dict[str, int]
    shared: dict[str, int]
    visual: int
    texts: tuple[int, ...]
    repeats: int
    steps: int
    accumulation: int
    rank_steps: int


_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SMALLER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
_SEVEN = scoring.SIZES["7b"]  # the widths of a 7B model, with four layers
LARGE = Sizes(scoring.VOCABULARY[FAMILY], {**_SEVEN, "num_hidden_layers": 8}, _SEVEN, _SMALLER, 1024, (8, 1, 4, 2), 7, 50, 4, 5)
SMALL = Sizes(2000, _TINY, _TINY, _TINY, 16, (2, 1), 1, 2, 2, 2)


@dataclass(frozen=True, eq=False)
class Run:
    """Device and sizes of the measurements in this process."""

    device: torch.device
    sizes: Sizes

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


class Unusable(Exception):
    """Raised with the package's own message if this machine does not support a back end."""


def usable(backend: str) -> None:
    try:
        attention(backend)
    except ConfigError as error:
        raise Unusable(str(error)) from None


def told(error: BaseException) -> dict[str, str]:
    """Convert an exception to the result of a case."""
    name = "unusable" if isinstance(error, Unusable) else "error"
    said = str(error).strip().partition("\n")[0][:300]
    return {name: said if name == "unusable" else f"{type(error).__name__}: {said}"}


Case = tuple[str, Callable[[Run], dict[str, Any]]]

# --- card -------------------------------------------------------------------------------------------------------------------------------


def card(run: Run) -> Iterator[Case]:
    yield "this machine", about


def about(run: Run) -> dict[str, Any]:
    cuda = run.device.type == "cuda"
    packages = ("torch", "transformers", "deepspeed", "flash-attn", "triton")
    found: dict[str, Any] = {name: torch.__version__ if name == "torch" else version(name) for name in packages}
    found |= {"python": sys.version.split()[0], "commit": git_revision(), "dtype": str(run.dtype), "device": "CPU"}
    if cuda:
        properties = torch.cuda.get_device_properties(run.device)
        found |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": torch.cuda.nccl.version(),
        }
    found["matmul"] = statistics.median(scoring.product_rate(run.device, run.dtype) for _ in range(run.sizes.repeats))
    source = torch.randn(1 << (29 if cuda else 22), device=run.device)
    into = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / seconds(run.device, lambda: into.copy_(source), run.sizes.repeats)
    found["backends"] = {}
    for backend in BACKENDS:
        try:
            usable(backend)
            found["backends"][backend] = "yes"
        except Unusable as error:
            found["backends"][backend] = str(error)
    found["auto"] = attention("auto")
    return found


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> Iterator[Case]:
    for name, forest in forests(run.sizes).items():
        for backend in ("causal", *BACKENDS):
            yield f"{name}, {backend}", functools.partial(kernel, forest, backend)


def forests(sizes: Sizes) -> dict[str, Forest]:
    visual = sizes.visual
    found = {f"{visual} + {k} texts": two_levels((visual + PROMPT,), ((TEXT,) * k,)) for k in sorted(sizes.texts)}
    lengths, parents = [visual], [-1]
    for _ in range(4):  # four questions with four answers each
        parents += [0, *[len(lengths)] * 4]
        lengths += [24, *[4] * 4]
    found[f"{visual} + 4 questions"] = Forest(tuple(lengths), tuple(parents))
    found[f"8 trees of {visual // 4}"] = two_levels((visual // 4,) * 8, ((TEXT,) * 4,) * 8)
    return found


def kernel(forest: Forest, backend: str, run: Run) -> dict[str, Any]:
    """Measure a back end, and compare its output and gradients with float64. The back end ``causal`` (one sequence of the same length, as
    in a supervised step) is only measured.
    """
    if backend != "causal":
        usable(backend)
    qkv, weights = attention_inputs(forest, run)
    if backend == "causal":

        def forward() -> Tensor:
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

    else:
        function: Callable[..., Any] = AttentionInterface()[registered(backend)]

        def forward() -> Tensor:
            return function(None, *qkv, None, forest=forest)[0]

    def both() -> None:
        torch.autograd.grad(forward(), qkv, weights)

    found: dict[str, Any] = {"tokens": forest.bounds[-1]}
    if backend != "causal":
        found |= distances(forest, backend, run, [forward().detach(), *torch.autograd.grad(forward(), qkv, weights)])
    with torch.no_grad():
        found["forward"] = seconds(run.device, forward, run.sizes.repeats)
    found["time"] = seconds(run.device, both, run.sizes.repeats)
    if run.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        found["peak"] = torch.cuda.max_memory_allocated() - before
    pairs = sum(n * seen + n * (n + 1) / 2 for n, seen in zip(forest.lengths, forest.seen, strict=True))
    if backend == "causal":
        pairs = forest.bounds[-1] * (forest.bounds[-1] + 1) / 2
    found["flop"] = 12 * pairs * qkv[0].shape[1] * qkv[0].shape[-1]  # two matrix products forward, four backward
    return found


@functools.lru_cache(maxsize=1)
def attention_inputs(forest: Forest, run: Run) -> tuple[list[Tensor], Tensor]:
    size = run.sizes.scored
    heads, length = size["num_attention_heads"], forest.bounds[-1]
    width = size["hidden_size"] // heads
    generator = torch.Generator(run.device).manual_seed(0)
    shapes = [(1, n, length, width) for n in (heads, *[size["num_key_value_heads"]] * 2)]
    drawn = [torch.randn(shape, generator=generator, device=run.device, dtype=run.dtype) for shape in (*shapes, shapes[0])]
    return [each.requires_grad_() for each in drawn[:3]], drawn[3].transpose(1, 2)


@functools.lru_cache(maxsize=1)
def references(forest: Forest, run: Run) -> list[list[Tensor]]:
    """Return the output and gradients of dense attention with a mask, in float64 and in the inputs' dtype."""
    qkv, weights = attention_inputs(forest, run)
    above = torch.zeros(len(forest.lengths), len(forest.lengths), dtype=torch.bool)
    for node, ancestors in enumerate(forest.ancestors):
        above[node, [*ancestors, node]] = True
    owner = torch.arange(len(forest.lengths)).repeat_interleave(torch.tensor(forest.lengths))
    seen = (above[owner][:, owner].tril()).to(run.device)
    found = []
    for dtype in (torch.float64, run.dtype):
        q, k, v = leaves = [each.detach().to(dtype).requires_grad_() for each in qkv]
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        out = (logits.softmax(-1) @ v).transpose(1, 2)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))])
    return found


def distances(forest: Forest, backend: str, run: Run, found: list[Tensor]) -> dict[str, Any]:
    """Return the errors of the output and the gradients against float64, relative to the errors of dense attention in the same dtype."""
    true, dense = references(forest, run)

    def off(each: Tensor, truth: Tensor) -> float:
        return float((each.double() - truth).norm() / truth.norm())

    times = [off(ours, truth) / off(theirs, truth) for ours, theirs, truth in zip(found, dense, true, strict=True)]
    return {"distance": max(times), "distances": times, "exact": max(times) < EXACT}


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call in seconds over ``repeats`` measurements, after a warm-up. On a GPU, where calls are queued, each
    measurement times several calls together and divides by their number.
    """
    calls = 10 if device.type == "cuda" else 1
    for _ in range(3 if device.type == "cuda" else 1):
        work()
    times = []
    for _ in range(repeats):
        start = clock(device)
        for _ in range(calls):
            work()
        times.append((clock(device) - start) / calls)
    return statistics.median(times)


# --- scoring ----------------------------------------------------------------------------------------------------------------------------


def scored(run: Run) -> Iterator[Case]:
    for texts in run.sizes.texts:
        yield f"{texts} texts", functools.partial(layouts, texts)


STOCK = ("concatenated", "sparse", "supervised")  # layouts of benchmarks/scoring.py


def layouts(texts: int, run: Run) -> dict[str, Any]:
    """Measure the layouts alternately. A layout that fails is recorded with its error and left out of the timing."""
    model = model_of(run)
    of = scoring.case(model, FAMILY, run.sizes.visual, texts)
    taken: dict[str, scoring.Layout] = {name: scoring.LAYOUTS[name] for name in STOCK}
    taken |= {f"shared prefix, {backend}": functools.partial(shared_prefix, backend) for backend in BACKENDS}
    found: dict[str, dict[str, Any]] = {}
    for name in [*taken]:
        try:
            if name not in STOCK:
                usable(name.partition(", ")[2])
            scoring.weighed(taken[name], of)  # compiles; an out-of-memory error here affects only this layout
        except Exception as error:
            found[name] = told(error)
            del taken[name]
    timed, rate = scoring.take_turns(taken, of, run.sizes.repeats)
    for figures in timed.values():
        figures["of_matmul"] = figures["flop"] / figures["time"] / rate
        if "sparse" in timed:
            figures["loss_off"] = abs(figures["loss"] / timed["sparse"]["loss"] - 1)
    return {"matmul": rate, "layouts": {**timed, **found}}


def shared_prefix(backend: str, of: scoring.Case) -> Tensor:
    of.model.config.get_text_config()._attn_implementation = registered(backend)
    return scoring.shared_prefix(of)


@functools.lru_cache(maxsize=1)
def model_of(run: Run) -> Any:
    dtype = run.dtype if run.device.type == "cuda" else torch.float32  # faster on most CPUs
    return scoring.build(FAMILY, run.sizes.visual, run.sizes.scored, run.device, dtype)


# --- training ---------------------------------------------------------------------------------------------------------------------------


def training(run: Run) -> Iterator[Case]:
    yield f"ZeRO-3, {'nccl' if run.device.type == 'cuda' else 'gloo'}, 1 rank", one_rank


def one_rank(run: Run) -> dict[str, Any]:
    sizes = run.sizes
    with tempfile.TemporaryDirectory() as folder:
        write_model(run, sizes.trained, Path(folder))
        found = trained(run, Path(folder), sizes.steps, sizes.accumulation)
    rate = statistics.median(scoring.product_rate(run.device, run.dtype) for _ in range(3))
    return found | {"matmul": rate, "of_matmul": found["flop"] / found["time"] / rate}


def write_model(run: Run, size: dict[str, int], folder: Path) -> None:
    model = scoring.build(FAMILY, run.sizes.visual, size, run.device, run.dtype)
    model.save_pretrained(folder)


def trained(run: Run, folder: Path, steps: int, accumulation: int) -> dict[str, Any]:
    """Train as one of the ranks. Returns the losses, the step times, and the measured and planned memory."""
    from cfvlm_ds import engine
    from cfvlm_ds.training.dry_run import attention_without_data, model_states, working_memory

    gc.collect()
    torch.cuda.empty_cache()
    sizes, config = run.sizes, configured(folder, steps, accumulation)
    world = engine.start()
    resolved = engine.resolve(engine.read_json(config.deepspeed), config, world.size, world.device, engine.hidden_size(config), steps)
    planned = meta_model(config.model, run.dtype, attention_without_data())
    states, _ = model_states(planned, resolved.config, world.size, world.size)
    tokens = sizes.visual + PROMPT + max(sizes.texts) * TEXT
    working = working_memory(planned, resolved.config, tokens, recompute=False)
    plan = {"states": states, "working": sum(working.values()) - working["CUDA and NCCL"]}  # torch's counters do not include CUDA and NCCL
    del planned
    before = scoring.reset_peak(world.device)
    driver = engine.initialize(config, resolved, world, steps)
    model = driver.module.model
    of = [scoring.case(model, FAMILY, sizes.visual, max(sizes.texts), seed) for seed in range(accumulation * world.size)]
    own = [(each, scoring.packed_inputs(each)) for each in of[world.rank :: world.size]]
    flops = ModelFlops(model, FAMILIES[model.config.model_type])
    losses, times = [], []
    for _ in range(steps):
        start, total = clock(world.device), torch.zeros((), device=world.device)
        for number, (each, inputs) in enumerate(own):
            driver.set_gradient_accumulation_boundary(number == len(own) - 1)
            loss = scoring.loss_of(driver(**inputs).view_as(each.texts)) / len(own)
            driver.backward(loss, scale_wrt_gas=False)
            total += loss.detach()
        driver.step()
        losses.append(float(total))
        times.append(clock(world.device) - start)
    peak = scoring.peak(world.device) - before
    counted = sum(flops.of(inputs, len(inputs["scored"])) for _, inputs in own)
    driver.destroy()
    figures = {"losses": losses, "finite": all(map(math.isfinite, losses)), "time": statistics.median(times[1:]), "times": times}
    return figures | {"flop": counted, "tokens": tokens * len(own), "peak": peak, "plan": plan, "backend": torch.distributed.get_backend()}


def configured(folder: Path, steps: int, accumulation: int) -> Any:
    from cfvlm_ds.core.config import BuildConfig, DataConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig

    options = {"max_steps": steps, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    train = TrainConfig(**options, bf16=True, learning_rate=1e-5, warmup_ratio=0.0, lr_scheduler_type="constant")
    deepspeed = str(ROOT / "ds_configs" / "z3.json")
    return RunConfig(ModelConfig(str(folder)), DataConfig(), train, TrackingConfig(enabled=False), BuildConfig(), {}, deepspeed, {})


# --- two ranks --------------------------------------------------------------------------------------------------------------------------


def ranks(run: Run) -> Iterator[Case]:
    yield "ZeRO-3, gloo, 2 ranks on one device", two_ranks


def two_ranks(run: Run) -> dict[str, Any]:
    """Train with two ranks on one GPU (over gloo, because NCCL does not support this), and compare the losses with those of one rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(run, run.sizes.shared, folder / "model")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        places = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--device", run.device.type, *(["--small"] if run.sizes is SMALL else [])]
        started = []
        for rank in range(2):
            with (folder / f"{rank}.txt").open("w") as said:  # an unread pipe would fill up
                begin = [*command, "--rank", str(folder / "model"), "--into", str(folder / f"{rank}.json")]
                own = {**os.environ, **places, "RANK": str(rank)}
                started.append(subprocess.Popen(begin, env=own, stdout=said, stderr=subprocess.STDOUT))
        alone = trained(run, folder / "model", run.sizes.rank_steps, 2)
        for rank, process in enumerate(started):
            if code := process.wait():
                last = [line.strip() for line in (folder / f"{rank}.txt").read_text().splitlines() if line.strip()][-1:]
                raise RuntimeError(f"rank {rank} ended with exit code {code}: {' '.join(last)}")
        together = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    losses = [statistics.mean(pair) for pair in zip(*(each["losses"] for each in together), strict=True)]
    off = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, alone["losses"], strict=True))
    kept = {name: together[0][name] for name in ("time", "peak", "plan", "backend", "tokens")}
    return kept | {"losses": losses, "losses_of_one_rank": alone["losses"], "loss_off": off, "finite": all(map(math.isfinite, losses))}


def as_rank(run: Run, folder: Path, into: Path) -> None:
    torch.distributed.init_process_group("gloo")
    into.write_text(json.dumps(trained(run, folder, run.sizes.rank_steps, 1)))
    torch.distributed.destroy_process_group()


# --- the process ------------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Run], Iterator[Case]]] = {
    "card": card,
    "kernels": kernels,
    "scoring": scored,
    "training": training,
    "ranks": ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=PARTS, default="ranks")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--rank", type=Path, help="run as one of two ranks that train the model in this folder")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; to try every part without one, use --device cpu --small")
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    scoring.VOCABULARY[FAMILY] = (SMALL if arguments.small else LARGE).words
    run = Run(device, SMALL if arguments.small else LARGE)
    if arguments.rank is not None:
        return as_rank(run, arguments.rank, arguments.into)
    cases = dict(PARTS[arguments.part](run))
    with arguments.into.open("w", buffering=1) as file:
        file.write(json.dumps({"cases": list(cases)}) + "\n")
        for name, work in cases.items():
            try:
                result = work(run)
            except Exception as error:
                result = told(error)
            file.write(json.dumps({"case": name, "result": result}) + "\n")


if __name__ == "__main__":
    main()
