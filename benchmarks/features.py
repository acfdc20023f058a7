"""Savings from data.feature_cache: training steps that run the frozen tower on pictures of 336 x 336 pixels, compared with steps that read
its features from disk.

    python benchmarks/features.py                                  # both shapes
    python benchmarks/features.py --shapes llava --repeats 5

The shapes are LLaVAs with the language model of benchmarks/scoring.py and 576 visual tokens per picture. In `llava`, the sizes of the tower
and the language model have the same ratio as in LLaVA-1.5-7B. In `large tower`, the tower's forward pass takes a third of a step's
operations, as with language models of 1B to 3B parameters. A step is the forward and backward pass of one group: two pictures with two
texts each. It trains everything except the tower. To prepare a step, the collator opens the JPEG files (1024 x 768) or reads their
features. Both ways must give the same loss. Times are medians, in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from images import Engine
from PIL import Image
from scoring import SIZES

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.batching.precompute_features import precompute_features
from cfvlm_ds.core.config import ModelConfig, ModuleConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.data.features import FeatureCache
from cfvlm_ds.demo.tiny_llava import TinyLlavaConfig, llava_config, llava_processor, write_checkpoint
from cfvlm_ds.models import ModelFlops, Scorer, family_of, load_model

TOWERS = {
    "llava": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
    "large tower": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
}
TEXTS = ("two dogs on a lawn beside a red ball", "three dogs on a lawn beside a red ball")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes:
            measure(shape, Path(folder) / shape.replace(" ", "-"), arguments.repeats)


def measure(shape: str, folder: Path, repeats: int) -> None:
    model = ModelConfig(str(build(folder / "model", TOWERS[shape])), attn_implementation="sdpa", vision_tower=ModuleConfig("frozen"))
    loaded = load_model(model, torch.float32)
    engine = Engine(Scorer(loaded, family_of(loaded.config)))
    group = pictures(folder)
    collators: dict[str, Collator] = {name: load_collator(model, "full") for name in ("tower", "cache")}
    start = time.process_time()
    world = World(0, 1, 0, torch.device("cpu"))
    cache: FeatureCache = precompute_features(folder / "cache", model, engine, collators["cache"].files, [group], world, 0)
    filled = time.process_time() - start
    collators["cache"] = collators["cache"].taking_features(cache)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in collators}
    for _ in range(repeats + 1):
        for name, collator in collators.items():
            start = time.process_time()
            batch = collator([group])
            prepared = time.process_time()
            loss = step(engine, batch)
            found[name].append((prepared - start, time.process_time() - prepared, loss))
    losses = {round(loss, 4) for rows in found.values() for *_, loss in rows}
    if len(losses) > 1:
        raise SystemExit(f"the losses of the two ways differ: {losses}")
    flops, inputs = ModelFlops(loaded, engine.module.family), collators["tower"]([group])
    total, without = (flops.of(each.model_inputs, each.num_scored) for each in (inputs, collators["cache"]([group])))
    size = statistics.mean(file.stat().st_size for file in cache.place.rglob("*.safetensors"))
    share, each = 1 - without / total, filled / len(cache.known)
    print(f"{shape}: tower {share:.1%} of the operations, {size / 1e6:.2f} MB per picture on disk, {each:.2f} s per picture to compute it")
    for name, rows in found.items():
        preparing, stepping = (statistics.median(row[k] for row in rows[1:]) for k in (0, 1))
        print(f"  {name:<6} preparing {preparing:6.3f} s   step {stepping:6.2f} s", flush=True)


def step(engine: Engine, batch: Batch) -> float:
    """Run a forward and a backward pass with InfoNCE over the texts, and return the loss."""
    loss = -batch.scores(engine(**batch.model_inputs)).logp.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()
    loss.backward()
    engine.module.zero_grad()
    return loss.item()


def build(out: Path, tower: dict[str, int]) -> Path:
    tiny = TinyLlavaConfig(str(out), image_size=336, patch_size=14)

    def make(folder: Path) -> tuple[Any, Any]:
        from transformers import LlavaForConditionalGeneration

        processor = llava_processor(folder, tiny, TEXTS * 50)
        config = llava_config(tiny, processor)
        for part, values in ((config.vision_config, tower), (config.text_config, {**SIZES["small"], "max_position_embeddings": 4096})):
            for name, value in values.items():
                setattr(part, name, value)
        config.text_config.head_dim = SIZES["small"]["hidden_size"] // SIZES["small"]["num_attention_heads"]
        config.vision_feature_layer = -2
        processor.tokenizer.model_max_length = 4096
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config), processor

    return write_checkpoint(out, make)


def pictures(folder: Path) -> CounterfactualGroup:
    files = [folder / f"{k}.jpg" for k in range(2)]
    for file in files:
        noise = Image.effect_noise((1024, 768), 60)
        Image.merge("RGB", [noise, noise.rotate(90).resize(noise.size), noise.rotate(180)]).save(file, quality=90)
    texts = tuple(Candidate("Describe the image.", text) for text in TEXTS)
    return CounterfactualGroup("pair", tuple((file,) for file in files), texts, ((1, 0), (0, 1)))


if __name__ == "__main__":
    main()
