"""Pretraining script for the vision tower in the demo's base model: each patch predicts the background, and the kind and colour of the
thing in its cell.

    python benchmarks/base_tower.py      # writes the model that base_sees.yaml trains; 8 minutes on two cores

The tower is trained first because, from descriptions alone, a model of this size did not learn to recognise any kind of thing in 3,500
steps (TRIALS.md).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from tiny_llava import TinyLlavaConfig, build_tiny_llava
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cfvlm_ds.demo.habits.edits import EDITS
from cfvlm_ds.demo.habits.grammar import NUMBERS, describe
from cfvlm_ds.demo.habits.questions import DESCRIBE, QUESTIONS, asking
from cfvlm_ds.demo.habits.render import SIZE, render
from cfvlm_ds.demo.habits.world import BACKGROUNDS, COLOURS, KINDS, SIDE, Scene, draw_scene

TINY = TinyLlavaConfig(
    "runs/base_sees/tiny-llava", image_size=64, patch_size=8, hidden_size=160, vision_hidden_size=128, num_layers=4, vision_num_layers=4
)
SCENES, BATCH, EPOCHS, RATE, STRENGTH = 48_000, 64, 4, 1e-3, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2, help="seed of the scenes and of their order (default 2)")
    text = "only copy the trained base EXPORT to FOLDER, with weights in bfloat16; the card there stays"
    parser.add_argument("--publish", nargs=2, type=Path, metavar=("EXPORT", "FOLDER"), help=text)
    arguments = parser.parse_args()
    if arguments.publish:
        publish(*arguments.publish)
        return
    out = build_tiny_llava(TINY, all_texts(seed=0, number=3000))
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    images = LlavaProcessor.from_pretrained(out).image_processor
    mean, deviation = np.array(images.image_mean), np.array(images.image_std)
    torch.manual_seed(arguments.seed)
    tower = model.model.vision_tower
    rng = Random(f"{arguments.seed}/tower")
    scenes = [draw_scene(rng, STRENGTH) for _ in range(SCENES)]
    pictures = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    labels = torch.tensor([labels_of(scene, SIZE // tower.config.patch_size) for scene in scenes])
    scale, shift = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in (1 / (255 * deviation), mean / deviation))
    heads = nn.Sequential(
        nn.LayerNorm(tower.config.hidden_size), nn.Linear(tower.config.hidden_size, len(BACKGROUNDS) + len(KINDS) + len(COLOURS) + 2)
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    steps, began = EPOCHS * SCENES // BATCH, time.monotonic()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    order = torch.cat([torch.randperm(SCENES) for _ in range(EPOCHS)])
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        shown = pictures[chosen].permute(0, 3, 1, 2).float() * scale - shift
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixel_values=shown, output_hidden_states=True).hidden_states[-1][:, 1:]
        loss, right = loss_of(heads(features.float()), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} right: {right}, {left:.0f} s left", flush=True)
    model.save_pretrained(out)


def publish(export: Path, folder: Path) -> None:
    """Copy a base model into the package, with its weights in bfloat16."""
    for path in export.iterdir():
        if path.name != "README.md":
            shutil.copy(path, folder)
    LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.bfloat16).save_pretrained(folder)


def labels_of(scene: Scene, side: int) -> list[list[int]]:
    """Return the labels [side * side, 3] of a scene's patches: background, kind, colour. The last kind and the last colour stand for an
    empty cell.
    """
    filled = {(thing.row, column): thing for thing in scene.things for column in thing.columns}
    found = []
    for y in range(side):
        for x in range(side):
            thing = filled.get(((2 * y + 1) * SIDE // (2 * side), (2 * x + 1) * SIDE // (2 * side)))
            kind, colour = (KINDS.index(thing.kind), COLOURS.index(thing.colour)) if thing else (len(KINDS), len(COLOURS))
            found.append([BACKGROUNDS.index(scene.background), kind, colour])
    return found


def loss_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, str]:
    """Return the sum of the three labels' cross-entropies, and a text with each label's accuracy in cells with a thing."""
    parts = logits.split([len(BACKGROUNDS), len(KINDS) + 1, len(COLOURS) + 1], dim=-1)
    losses, right = [], []
    for name, part, label in zip(("background", "kind", "colour"), parts, labels.unbind(-1), strict=True):
        losses.append(nn.functional.cross_entropy(part.flatten(0, 1), label.flatten()))
        counted = labels[..., 1] < len(KINDS)
        right.append(f"{name} {100 * (part.argmax(-1) == label)[counted].float().mean():.0f} %")
    return sum(losses, torch.zeros(())), ", ".join(right)


def all_texts(seed: int, number: int) -> list[str]:
    """Draw descriptions, prompts and answers that cover the grammar, to train a tokenizer."""
    rng = Random(f"{seed}/texts")
    texts = [*DESCRIBE, "Yes", "No", "A", "B", *NUMBERS[1:], *COLOURS]
    for index in range(number):
        scene = draw_scene(rng, 0.5)
        edit, kind = rng.choice([(edit, kind) for kind, edits in QUESTIONS.items() for edit in edits])
        texts += describe([scene], f"{seed}/{index}")
        edited = EDITS[edit](scene, rng, True)
        if edited and (asked := asking(kind, edit, (scene, edited), rng)):
            texts.append(str(asked[0][0].prompt))
    return texts


if __name__ == "__main__":
    main()
