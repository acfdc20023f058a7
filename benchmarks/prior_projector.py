"""Projector that maps pictures to the language model's own word vectors, so that the model understands pictures from the start.

From captions alone, a projector learns slowly, because its gradient passes through thirty layers: after 400 steps of eight rows, the model
still guesses. This projector is trained separately, in minutes. Its loss pulls the mean of a picture's visual tokens towards the mean word
vector of the thing's name, and away from those of other names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from cfvlm_ds.core.files import whole_file

EPOCHS, BATCH, RATE = 40, 64, 2e-3
TEMPERATURE = 0.07
HELD_BACK = 0.1
"""Share of the pictures that are held back to evaluate the projector."""


def translated(tower: Path, language: Path, rows: Path, out: Path) -> dict[str, Any]:
    """Train a projector between a small LLaVA's tower and a language model on a manifest's pictures. Returns its ``weights``, ``top1`` and
    ``top5``.

    ``top1`` and ``top5`` are percentages of held-back pictures (of a single thing) whose name is the nearest, or among the five nearest.
    The result is cached in the file ``out``.
    """
    if out.exists():
        return dict(torch.load(out, weights_only=True))
    listed = [json.loads(line) for line in rows.read_text().splitlines()]
    shown = [row["meta"]["things"] for row in listed]
    names = sorted({name for things in shown for name in things})
    seen = _features(tower, [rows.parent / row["images"][0]["path"] for row in listed])
    words = _vectors(language, names)
    wanted = torch.zeros(len(listed), len(names))
    for k, things in enumerate(shown):
        for name in things:
            wanted[k, names.index(name)] += 1 / len(things)
    torch.manual_seed(0)
    width = words.shape[1]
    projector = torch.nn.Sequential(torch.nn.Linear(seen.shape[2], width), torch.nn.GELU(), torch.nn.Linear(width, width))
    mean, deviation = seen.mean((0, 1)), seen.std((0, 1)) + 1e-6
    held = max(1, round(HELD_BACK * len(listed)))
    learned = len(listed) - held
    steps = max(1, learned // BATCH)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps + 1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(learned).split(BATCH)[:steps]:
            tokens = projector((seen[batch] - mean) / deviation)
            choice = -(wanted[batch] * log_softmax(_likeness(tokens, words) / TEMPERATURE, -1)).sum(-1).mean()
            apart = (tokens.mean(1) - wanted[batch] @ words).square().mean() + 0.1 * tokens.square().mean()
            optimizer.zero_grad()
            (choice + apart / words.square().mean()).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        likeness = _likeness(projector((seen[learned:] - mean) / deviation), words)
        alone = torch.tensor([len(set(things)) == 1 for things in shown[learned:]])
        rank = (likeness > (likeness * wanted[learned:]).sum(-1, keepdim=True)).sum(-1)[alone]
        first: Any = projector[0]
        first.bias -= first.weight @ (mean / deviation)
        first.weight /= deviation
    found = {
        "linear_1.weight": first.weight.detach(), "linear_1.bias": first.bias.detach(),
        "linear_2.weight": projector[2].weight.detach(), "linear_2.bias": projector[2].bias.detach(),
    }  # fmt: skip
    kept = {"weights": found, **{f"top{most}": round(100 * float((rank < most).float().mean()), 1) for most in (1, 5)}}
    with whole_file(out) as file:
        torch.save(kept, file)
    return kept


def _likeness(tokens: Tensor, words: Tensor) -> Tensor:
    """Return cosine similarities [pictures, names] after subtracting the names' mean vector."""
    mean = words.mean(0)
    return normalize(tokens.mean(1) - mean, dim=1) @ normalize(words - mean, dim=1).T


def _features(folder: Path, pictures: list[Path]) -> Tensor:
    """Return the inputs of a LLaVA's projector [pictures, visual tokens, width]."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), 100):
            images = [Image.open(path).convert("RGB") for path in pictures[start : start + 100]]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            found.append(states[model.config.vision_feature_layer][:, 1:])
    return torch.cat(found)


def _vectors(folder: Path, names: list[str]) -> Tensor:
    """Return the mean word vector of each name [names, width]."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight.detach()
    return torch.stack([vectors[tokenizer(f" {name}", add_special_tokens=False)["input_ids"]].mean(0) for name in names])
