"""Scores from transformers alone: every cell is one string with its own forward and positions. No code is shared with the package.

    python tests/support/transformers_scores.py MANIFEST MODEL_FOLDER[+ADAPTER_FOLDER] ...

Prints {group: [[log p of each text] for each image]} for each model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def conversation(num_pictures: int, prompt: str, text: str | None) -> list[dict[str, Any]]:
    user = {"role": "user", "content": [*[{"type": "image"}] * num_pictures, {"type": "text", "text": prompt}]}
    return [user] if text is None else [user, {"role": "assistant", "content": [{"type": "text", "text": text}]}]


def plain(model: Any, processor: Any, pictures: tuple[Path, ...], prompt: str, text: str) -> tuple[float, float]:
    """Return (log p of the text, transformers' own mean loss on it)."""
    head = processor.apply_chat_template(conversation(len(pictures), prompt, None), add_generation_prompt=True)
    whole = processor.apply_chat_template(conversation(len(pictures), prompt, text))
    whole = whole[: whole.index(text, len(head)) + len(text)]
    images = {"images": [[Image.open(picture) for picture in pictures]]} if pictures else {}
    start = processor(text=[head], return_tensors="pt", **images).input_ids.shape[1]
    inputs = processor(text=[whole], return_tensors="pt", **images)
    labels = inputs.input_ids.clone()
    labels[:, :start] = -100
    output = model(**inputs, labels=labels)
    ids = inputs.input_ids[0, start:]
    assert processor.tokenizer.decode(ids).strip() == text, "the scored tokens are the text"
    logp = output.logits[0, start - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
    return logp.sum().item(), output.loss.item()


def scores(rows: list[dict[str, Any]], root: Path, folder: str, adapter: str) -> dict[str, list[list[float]]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    processor, found = AutoProcessor.from_pretrained(folder), {}
    for row in rows:
        paths = [image["path"] for image in row["images"]]
        listed = [path if isinstance(path, list) else [path] if path else [] for path in paths]
        images = [tuple(root / name for name in names) for names in listed]
        texts = [(text.get("prompt", row["prompt"]), text["text"]) for text in row["texts"]]
        found[row["id"]] = [[plain(model, processor, image, *text)[0] for text in texts] for image in images]
    return found


if __name__ == "__main__":
    manifest = Path(sys.argv[1])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    with torch.no_grad():
        printed = [scores(lines, manifest.parent, *model.partition("+")[::2]) for model in sys.argv[2:]]
    assert not {"cfvlm_ds", "deepspeed"} & set(sys.modules)
    print(json.dumps(printed))
