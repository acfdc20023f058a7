"""Cost of scoring K texts on one image, forward and backward, in three layouts, compared with a supervised step on the same tokens.

    python benchmarks/scoring.py                                  # LLaVA and Qwen2.5-VL, 256 to 1024 visual tokens, 1 to 8 texts
    python benchmarks/scoring.py --family llava --visual 1024 --texts 8 --repeats 5 --json runs/scoring.json
    python benchmarks/scoring.py --figure docs/scoring.png --json runs/scoring.json          # only draws this file's figure
    python benchmarks/scoring.py --family qwen3_5 --visual 1024 --texts 8                    # gated delta nets, which fork their state
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --size 7b --attention flash_attention_2

The loss of every layout is InfoNCE over the texts' scores plus the first text's NLL. Its value must agree in the first three:

    concatenated   one sequence per text, each with the image; logits of every token (the usual batch of preference trainers)
    sparse         the same, with logits at scored tokens only
    shared prefix  cfvlm_ds: one row with the image and the prompt once, followed by every text
    supervised     the shared prefix's tokens as one ordinary causal sequence: the minimum cost of these tokens

Each row of the table has its own process, in which the layouts and a large matrix product take turns. Times are medians, in CPU seconds of
one thread or in seconds on the device. Memory is given twice: the size of the tensors that autograd saves for the backward pass, and the
peak of the process (or device) above weights and gradients. FLOP ratios are analytic.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from two_levels import two_levels

from cfvlm_ds.core.scores import token_logprobs
from cfvlm_ds.engine.setup import keep_freed_memory
from cfvlm_ds.models import FAMILIES, ModelFlops, Scorer
from cfvlm_ds.models.forest_attention import BACKENDS, registered, stock_attention

PROMPT, TEXT = 16, 16  # number of tokens in a prompt without its image, and in each text
SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4, "num_attention_heads": 28, "num_key_value_heads": 4},
}
VOCABULARY = {"llava": 32_000, "qwen2_5_vl": 152_064, "qwen3_5": 248_320}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(VOCABULARY), default=["llava", "qwen2_5_vl"])
    parser.add_argument(
        "--visual", nargs="+", type=int, default=[256, 576, 1024], help="visual tokens of the image; squares of even numbers"
    )
    parser.add_argument("--texts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    add_common_options(parser)
    parser.add_argument("--json", type=Path, help="file to which all results are also written, or from which --figure reads them")
    parser.add_argument("--figure", type=Path, help="only draw a figure of cost against texts, from --json, to this file")
    arguments = parser.parse_args()
    if arguments.figure:
        return figure(arguments.figure, json.loads(arguments.json.read_text()))
    rows = []
    cases = itertools.product(arguments.family, arguments.visual, arguments.texts)
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as fresh:  # a new process, whose memory earlier rows have not fragmented
        for row in fresh.map(measured, *zip(*cases, strict=True), itertools.repeat(arguments)):
            rows.append(row)
            show(row, first=len(rows) == 1)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that evaluation.py shares."""
    parser.add_argument("--attention", choices=BACKENDS, default="sdpa", help="back end of the shared prefix (default sdpa)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the language model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")


def measured(family: str, visual: int, texts: int, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = build(family, visual, SIZES[arguments.size], torch.device(arguments.device), getattr(torch, arguments.dtype))
    return {"family": family, "visual": visual, "texts": texts, **measure(model, family, visual, texts, arguments)}


def build(family: str, visual: int, size: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    side, text = math.isqrt(visual), {**size, "vocab_size": VOCABULARY[family], "max_position_embeddings": 1 << 15}
    if family == "llava":
        vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
        vision |= {"num_attention_heads": 4, "image_size": 14 * side, "patch_size": 14}
        options: dict[str, Any] = {
            "vision_config": vision,
            "text_config": {**text, "model_type": "llama"},
            "image_token_id": VOCABULARY[family] - 1,
        }
    elif family == "qwen3_5":  # three of four layers are gated delta nets
        vision = {"hidden_size": 192, "intermediate_size": 512, "depth": 5, "num_heads": 4, "out_hidden_size": size["hidden_size"]}
        heads, head = size["num_attention_heads"], size["hidden_size"] // size["num_attention_heads"]
        text |= {"head_dim": head, "linear_num_key_heads": heads // 2, "linear_num_value_heads": heads}
        text |= {"linear_key_head_dim": head, "linear_value_head_dim": head}
        sections = [head // 8 - 2 * (head // 24), head // 24, head // 24]
        rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": sections}
        options = {"vision_config": vision, "text_config": {**text, "rope_parameters": rope}, "image_token_id": VOCABULARY[family] - 1}
    else:
        vision = {"hidden_size": 192, "intermediate_size": 512, "depth": 5, "num_heads": 4, "out_hidden_size": size["hidden_size"]}
        vision |= {"fullatt_block_indexes": [4]}
        head = size["hidden_size"] // size["num_attention_heads"] // 2
        sections = [head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8]
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}}
        options = {"vision_config": vision, "text_config": text, "image_token_id": VOCABULARY[family] - 1}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(0)
    with device:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


@dataclass(frozen=True)
class Case:
    """Random inputs: one image, a prompt that contains it, and K texts of the same length."""

    model: Any
    family: str
    images: dict[str, Tensor]
    prefix: Tensor
    texts: Tensor  # [K, TEXT]

    @property
    def visual(self) -> int:
        return int((self.prefix == self.model.config.image_token_id).sum())

    def positions(self, length: int) -> Tensor:
        """Return the positions [1, T] or [3, 1, T] of a row of ``length`` tokens that begins with the prefix."""
        family, device = FAMILIES[self.model.config.model_type], self.prefix.device
        grids = self.images["image_grid_thw"].cpu() if family.grid else torch.empty(0)
        own = family.positions(self.model.config, (self.prefix == self.model.config.image_token_id).cpu(), grids)
        rest = torch.arange(int(own.max()) + 1, int(own.max()) + 1 + length - len(self.prefix)).expand(*own.shape[:-1], -1)
        return torch.cat([own, rest], -1).unsqueeze(-2).to(device)


def case(model: Any, family: str, visual: int, texts: int, seed: int = 1) -> Case:
    parameter, side = model.get_input_embeddings().weight, math.isqrt(visual)
    generator = torch.Generator().manual_seed(seed)
    if family == "llava":
        images = {"pixel_values": torch.randn(1, 3, 14 * side, 14 * side, generator=generator)}
    else:
        images = {
            "pixel_values": torch.randn(4 * visual, 6 * model.config.vision_config.patch_size**2, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
        }
    images = {n: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype) for n, t in images.items()}
    words = torch.randint(5, 1000, (PROMPT + texts * TEXT,), generator=generator).to(parameter.device)
    marks = torch.full((visual,), model.config.image_token_id, device=parameter.device)
    return Case(model, family, images, torch.cat([marks, words[:PROMPT]]), words[PROMPT:].view(texts, TEXT))


# --- layouts: each returns log-probs [K, TEXT] of the texts' tokens ----------------------------------------------------------------------


def concatenated(case: Case, keep: bool = False) -> Tensor:
    texts, prefix = len(case.texts), len(case.prefix)
    ids = torch.cat([case.prefix.expand(texts, -1), case.texts], 1)
    positions = case.positions(ids.shape[1])
    positions = positions.expand(*positions.shape[:-2], texts, -1)
    features = case.model.get_image_features(**{n: torch.cat([t] * texts) for n, t in case.images.items()}, return_dict=True)
    wanted = torch.arange(prefix - 1, ids.shape[1] - 1, device=ids.device)
    kept = {"logits_to_keep": wanted} if keep else {}
    with stock_attention(case.model):
        logits = case.model(input_ids=ids, position_ids=positions, mm_encoder_outputs={"image": features}, use_cache=False, **kept).logits
    logits = logits if keep else logits[:, :-1]
    targets = case.texts if keep else ids[:, 1:]
    logp = token_logprobs(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    return logp[:, -TEXT:]


def supervised(case: Case) -> Tensor:
    ids = torch.cat([case.prefix, case.texts.flatten()]).unsqueeze(0)
    features = case.model.get_image_features(**case.images, return_dict=True)
    wanted = torch.arange(len(case.prefix) - 1, ids.shape[1] - 1, device=ids.device)
    with stock_attention(case.model):
        logits = case.model(
            input_ids=ids,
            position_ids=case.positions(ids.shape[1]),
            mm_encoder_outputs={"image": features},
            logits_to_keep=wanted,
            use_cache=False,
        ).logits
    return token_logprobs(logits[0], case.texts.flatten()).view_as(case.texts)


def packed_inputs(case: Case) -> dict[str, Any]:
    """Return the model inputs that cfvlm_ds.batching.collator would build for the case."""
    texts, prefix = len(case.texts), len(case.prefix)
    one = case.positions(prefix + TEXT)
    starts = [prefix + k * TEXT for k in range(texts)]
    predicts = torch.tensor([place for start in starts for place in (prefix - 1, *range(start, start + TEXT - 1))])
    places, predicted_by = predicts.unique(return_inverse=True)
    return {
        "input_ids": torch.cat([case.prefix, case.texts.flatten()]).unsqueeze(0),
        "position_ids": torch.cat([one[..., :prefix], *[one[..., prefix:]] * texts], -1),
        "forest": two_levels((prefix,), ((TEXT,) * texts,)),
        "visual": (case.prefix == case.model.config.image_token_id).nonzero().squeeze(1),
        "scored": places.to(case.prefix.device),
        "predicted_by": predicted_by.to(case.prefix.device),
        "targets": case.texts.flatten(),
        "images_of_tree": [(0,)],
        "visual_tokens": [case.visual],
        "image_inputs": case.images,
    }


def shared_prefix(case: Case) -> Tensor:
    logp = Scorer(case.model, FAMILIES[case.model.config.model_type])(**packed_inputs(case))
    return logp.view_as(case.texts)


Layout = Callable[[Case], Tensor]
LAYOUTS: dict[str, Layout] = {
    "concatenated": concatenated,
    "sparse": lambda case: concatenated(case, keep=True),
    "shared prefix": shared_prefix,
    "supervised": supervised,
}


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


def measure(model: Any, family: str, visual: int, texts: int, arguments: argparse.Namespace) -> dict[str, Any]:
    of = case(model, family, visual, texts)
    model.config.get_text_config()._attn_implementation = registered(arguments.attention)
    timed, rate = take_turns({name: LAYOUTS[name] for name in arguments.layouts}, of, arguments.repeats)
    losses = [timed[name]["loss"] for name in arguments.layouts if name != "supervised"]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]) and model.dtype == torch.float32:
        raise SystemExit(f"the losses of the layouts differ: {losses}")
    return {"matmul": rate, **timed}


def take_turns(layouts: Mapping[str, Layout], of: Case, repeats: int) -> tuple[dict[str, dict[str, Any]], float]:
    """Measure the layouts and a matrix product alternately. Returns each layout's results, and the median rate of the product."""
    clear(of.model)  # allocates gradients, which the first step's peak would otherwise include
    times: dict[str, list[float]] = {name: [] for name in layouts}
    found: dict[str, dict[str, Any]] = {}
    rates: list[float] = []
    for name, layout in layouts.items():  # the first round is a warm-up, and measures only memory
        loss, saved, peak = weighed(layout, of)
        found[name] = {"loss": loss, "saved": saved, "peak": peak, "flop": flop(name, of)}
    for _ in range(repeats):
        for name, layout in layouts.items():
            start = now(of)
            step(layout, of)
            times[name].append(now(of) - start)
            clear(of.model)
            rates.append(matmul_rate(of))
    for name in layouts:
        found[name] |= {"time": statistics.median(times[name]), "times": times[name]}
    return found, statistics.median(rates)


def step(layout: Layout, of: Case) -> float:
    loss = loss_of(layout(of))
    loss.backward()
    return loss.item()


def loss_of(logp: Tensor) -> Tensor:
    """Return InfoNCE over the texts' scores plus the NLL per token of the first text, which is the true one. ``logp`` is [K, TEXT]."""
    return -logp.sum(-1).log_softmax(0)[0] - logp[0].mean()


def clear(model: Any) -> None:
    """Set gradients to zero. They stay in memory, as in gradient accumulation."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()


def now(of: Case) -> float:
    return clock(of.prefix.device)


def clock(device: torch.device) -> float:
    """Return the time in seconds: CPU time on a CPU; on a GPU, wall-clock time after all queued work has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def weighed(layout: Layout, of: Case) -> tuple[float, int, int]:
    """Run a step. Returns its loss, the bytes that autograd saves, and the peak in bytes above the memory before the step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in of.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = layout(of)  # kept alive, so that no storage is counted twice or reused
    saved = sum(kept.values())
    del graph
    before = reset_peak(of.prefix.device)
    loss = step(layout, of)
    most = peak(of.prefix.device) - before
    clear(of.model)
    return loss, saved, most


def reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_MAX, 1 << 16)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)  # so that freed memory leaves no holes
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    keep_freed_memory()  # as in training, to measure time
    return _status("VmHWM")


_MMAP_THRESHOLD, _MMAP_MAX = -3, -4  # malloc.h


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def flop(name: str, of: Case) -> float:
    """Return the number of floating-point operations of a forward and backward pass. The part of ``name`` after a comma is ignored."""
    name = name.partition(",")[0]
    texts, prefix = len(of.texts), len(of.prefix)
    repeated = texts if name in ("concatenated", "sparse") else 1
    if name == "supervised":
        forest, scored = two_levels((prefix + texts * TEXT,), ((),)), texts * TEXT
    elif name == "shared prefix":
        forest, scored = two_levels((prefix,), ((TEXT,) * texts,)), texts * (TEXT - 1) + 1
    else:
        forest = two_levels((prefix,) * texts, ((TEXT,),) * texts)
        scored = texts * (prefix + TEXT - 1 if name == "concatenated" else TEXT)
    inputs = {
        "forest": forest,
        "input_ids": torch.empty(repeated * prefix + texts * TEXT, device="meta"),
        "visual_tokens": [of.visual] * repeated,
        "image_inputs": {"pixel_values": of.images["pixel_values"].expand(repeated, *of.images["pixel_values"].shape)},
    }
    return ModelFlops(of.model, FAMILIES[of.model.config.model_type]).of(inputs, scored)


def figure(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw a step's time and saved memory against the number of texts, for the first family and its largest number of visual tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["family"] == rows[0]["family"]]
    visual = max(row["visual"] for row in rows)
    rows = sorted((row for row in rows if row["visual"] == visual), key=lambda row: row["texts"])
    looks = {"concatenated": ("#b8b8b8", "one sequence per text"), "sparse": ("#7f8790", "the same, logits at scored tokens only")}
    looks |= {"shared prefix": ("#1f6f8b", "cfvlm_ds: shared prefix"), "supervised": ("#d9a441", "supervised step on the same tokens")}
    canvas, panels = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for axes, what, unit, label in zip(panels, ("time", "saved"), (1, 1e9), ("step, s", "kept for the backward pass, GB"), strict=True):
        for name, (colour, text) in looks.items():
            values = [row[name][what] / unit for row in rows]
            dashes = "--" if name == "supervised" else "-"
            axes.plot([row["texts"] for row in rows], values, dashes, marker="o", markersize=4, color=colour, label=text)
        axes.set_xticks([row["texts"] for row in rows])
        axes.set_xlabel("texts scored on one image")
        axes.set_ylabel(label)
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(f"{rows[0]['family']}, {visual} visual tokens", fontsize=11, loc="left")
    panels[0].legend(frameon=False, fontsize=9)
    canvas.savefig(path, dpi=160)


def matmul_rate(of: Case) -> float:
    """Return the floating-point operations per second of a large matrix product in the model's dtype."""
    return product_rate(of.prefix.device, of.model.dtype)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 256  # most CPUs are slow in other dtypes
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    start = clock(device)
    for _ in range(4):
        a @ a
    return 4 * 2 * size**3 / (clock(device) - start)


COLUMNS = ("concatenated", "sparse", "supervised")


def show(row: dict[str, Any], first: bool) -> None:
    """Print a row of the table. Costs of the other layouts are relative to the shared prefix."""
    if first:
        print(f"{'family':<11} {'visual':>6} {'texts':>5}" + "".join(f" {name:>21}" for name in COLUMNS) + f" {'shared prefix':>38}")
        print(
            " " * 24 + "".join(f" {'time (FLOP) saved peak':>21}"[:22] for _ in COLUMNS) + f" {'s, MB saved, MB peak, of matmul rate':>38}"
        )
    ours = row["shared prefix"]
    cells = []
    for name in COLUMNS:
        if name not in row:
            cells.append("-")
            continue
        time_, flop_, saved, peak_ = (row[name][what] / ours[what] for what in ("time", "flop", "saved", "peak"))
        cells.append(f"{time_:.2f} ({flop_:.2f}) {saved:.2f} {peak_:.2f}")
    rate = ours["flop"] / ours["time"] / row["matmul"]
    own = f"{ours['time']:.3f} {ours['saved'] / 1e6:.0f} {ours['peak'] / 1e6:.0f} {rate:.2f}"
    print(
        f"{row['family']:<11} {row['visual']:>6} {row['texts']:>5}" + "".join(f" {cell:>21}" for cell in cells) + f" {own:>38}", flush=True
    )


if __name__ == "__main__":
    main()
