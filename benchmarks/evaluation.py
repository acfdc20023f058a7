"""Cost of many questions about one image, in evaluation and training, with one forest, one tree per question, or one sequence per answer.

    python benchmarks/evaluation.py                               # LLaVA, Qwen2.5-VL and Qwen3.5 with 576 visual tokens
    python benchmarks/evaluation.py --family llava --visual 1024 --cases yes_no_10 --repeats 5
    python benchmarks/evaluation.py --family llava --forward      # without the backward pass, as in evaluation
    python benchmarks/evaluation.py --device cuda --dtype bfloat16 --size 7b --attention flash_attention_2

The cases are 10 or 18 questions of 24 tokens with the answers yes and no, a question of 20 tokens with four lettered options of 8 tokens in
all 24 orders, and 8 captions after one prompt. Every layout encodes the image once, so only the language model is compared. All layouts
must give the same scores. Times are medians, in CPU seconds of one thread or in seconds on the device. The layouts take turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scoring import SIZES, VOCABULARY, add_common_options, build, case, clear, now
from torch import Tensor

from cfvlm_ds.batching.packing import Material, Tree, pack
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.models import FAMILIES, Scorer
from cfvlm_ds.models.forest_attention import registered

PICTURE = (Path("picture"), False)
BEFORE = 6  # template tokens before the image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(VOCABULARY), default=list(VOCABULARY))
    parser.add_argument("--visual", nargs="+", type=int, default=[576], help="visual tokens of the image; squares of even numbers")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add_common_options(parser)
    parser.add_argument("--forward", action="store_true", help="time only the forward pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | visual tokens | case | layout | tokens | ratio | forward, s | ratio | with backward, s | ratio |")
    print("|---|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for family, visual in itertools.product(arguments.family, arguments.visual):
        model = build(family, visual, SIZES[arguments.size], torch.device(arguments.device), getattr(torch, arguments.dtype))
        model.config.get_text_config()._attn_implementation = registered(arguments.attention)
        for name in arguments.cases:
            measured(model, family, visual, name, arguments.repeats, arguments.forward)


def words(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(5, 1000, (count,), generator=generator).tolist())


def questions(count: int) -> Callable[[torch.Generator], list[tuple[tuple[int, ...], list[tuple[int, ...]]]]]:
    def made(generator: torch.Generator) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        return [(words(24, generator), [(7,), (8,)]) for _ in range(count)]

    return made


def letters(generator: torch.Generator) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    question, options = words(20, generator), [words(7, generator) for _ in range(4)]
    orders = itertools.permutations(options)
    return [
        (
            question + tuple(token for letter, option in zip((11, 12, 13, 14), order, strict=True) for token in (letter, *option)),
            [(11,), (12,), (13,), (14,)],
        )
        for order in orders
    ]


def captions(generator: torch.Generator) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    return [(words(16, generator), [words(16, generator) for _ in range(8)])]


CASES = {"yes_no_10": questions(10), "yes_no_18": questions(18), "letters_24": letters, "captions_8": captions}


def rows(model: Any, family: str, visual: int, name: str) -> dict[str, dict[str, Any]]:
    """Return the inputs of each layout, with the scored texts in the same order in all layouts."""
    generator = torch.Generator().manual_seed(3)
    token, kin = model.config.image_token_id, FAMILIES[model.config.model_type]
    head = (*words(BEFORE, generator), token)
    branches: list[tuple[int, Encoded]] = []
    for prompt, answers in CASES[name](generator):
        for answer in answers:
            branches.append((len(branches), Encoded("", head + prompt, answer, (2,))))
    by_prompt: dict[tuple[int, ...], list[tuple[int, Encoded]]] = {}
    for branch in branches:
        by_prompt.setdefault(branch[1].prompt_ids, []).append(branch)
    layouts = {
        "forest": [Tree((PICTURE,), branches)],
        "tree per question": [Tree((PICTURE,), each) for each in by_prompt.values()],
        "sequence per answer": [Tree((PICTURE,), [branch]) for branch in branches],
    }
    images = case(model, family, visual, 1).images

    def row(trees: Sequence[Tree]) -> dict[str, Any]:
        packed = pack(Material(tuple(trees), (PICTURE,), ([token] * visual,)), images, kin, model.config, token)
        inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in packed.model_inputs.items()}
        return {"inputs": inputs, "cell": packed.cell.to(model.device), "tokens": packed.num_tokens, "cells": len(branches)}

    return {layout: row(trees) for layout, trees in layouts.items()}


def scores(scorer: Scorer, row: dict[str, Any]) -> Tensor:
    logp = scorer(**row["inputs"])
    return logp.new_zeros(row["cells"]).index_add(0, row["cell"], logp)


def measured(model: Any, family: str, visual: int, name: str, repeats: int, forward: bool) -> None:
    scorer, layouts = Scorer(model, FAMILIES[model.config.model_type]), rows(model, family, visual, name)
    of = case(model, family, visual, 1)
    times: dict[str, tuple[list[float], list[float]]] = {layout: ([], []) for layout in layouts}
    found: dict[str, Tensor] = {}
    for turn in range(repeats + 1):
        for layout, row in layouts.items():
            start = now(of)
            with torch.no_grad():
                found[layout] = scores(scorer, row)
            middle = now(of)
            if not forward:
                scores(scorer, row).sum().backward()
            end = now(of)
            clear(model)
            if turn:  # the first turn is a warm-up
                times[layout][0].append(middle - start)
                times[layout][1].append(end - middle)
    for layout, values in found.items():
        if model.dtype == torch.float32 and not torch.allclose(values, found["forest"], rtol=1e-4, atol=1e-4):
            raise SystemExit(f"the scores of {layout} differ from those of the forest")
    ours = [statistics.median(each) for each in times["forest"]]
    for layout, row in layouts.items():
        both = [statistics.median(each) for each in times[layout]]
        cells = [f"{seconds:.3f} | {seconds / own:.2f}" for seconds, own in zip(both, ours, strict=True)]
        cells[1:] = [" | "] if forward else cells[1:]
        more = row["tokens"] / layouts["forest"]["tokens"]
        print(f"| {family} | {visual} | {name} | {layout} | {row['tokens']} | {more:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
