"""Plain-torch version of the training loop for one process, without shared code: MODEL_DIR MANIFEST STEPS -> the losses as a JSON list.

It implements train.yaml: NLL of the factual pair + 0.5 x mean NLL of the other true pairs, 0.5 x cross CSD, 0.7 x symmetric FCD, margins of
0.25 and 0.30 nats per anchor token, 16 groups per step, AdamW, cosine schedule after 20 % warm-up, clipping at 1.
"""

import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model_dir, manifest, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
processor, model = AutoProcessor.from_pretrained(model_dir), AutoModelForImageTextToText.from_pretrained(model_dir)
rows = [json.loads(line) for line in manifest.read_text().splitlines()]


def logp(row, i, c):
    """Return (log p of the caption, log p of end-of-turn, number of caption tokens). Each cell takes one forward."""
    head = f"USER: <image>\n{row['prompt']} ASSISTANT:"
    image = Image.open(manifest.parent / row["images"][i]["path"])
    inputs = processor(images=[image], text=[f"{head} {row['texts'][c]['text']}</s>"], return_tensors="pt")
    start = processor(images=[image], text=[head], return_tensors="pt").input_ids.shape[1]
    logits = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    tokens = logits.gather(1, inputs.input_ids[0, start:, None])[:, 0]
    return tokens[:-1].sum(), tokens[-1], len(tokens) - 1


def step_loss(groups, progress):
    nll, other, text_side, image_side = [], [], [], []
    for row in groups:
        ids = [t["id"] for t in row["texts"]]
        true = {(i, ids.index(t)) for i, image in enumerate(row["images"]) for im, t, y in row["match"] if im == image["id"] and y}
        cells = true | {(0, c) for c in range(len(ids))} | {(i, 0) for i in range(len(row["images"]))}
        score = {cell: logp(row, *cell) for cell in sorted(cells)}
        n = score[0, 0][2]
        s = {cell: value[0] / n for cell, value in score.items()}
        nll.append((-score[0, 0][0] - score[0, 0][1], n + 1))
        rest = [score[cell] for cell in sorted(true - {(0, 0)})]
        if rest:
            other.append((sum(-a - b for a, b, _ in rest) / len(rest), sum(m + 1 for *_, m in rest) / len(rest)))
        hinge = lambda gap, m: (m + gap).clamp(0, 4 * m)  # noqa: E731
        pairs = [hinge(s[i, f] - s[i, t], 0.25) for i, t in true for f in range(len(ids)) if (i, f) in s and (i, f) not in true]
        if pairs:
            text_side.append(sum(pairs) / len(pairs))
        own = {c: min(i for i, t in true if t == c) for c in range(len(ids))}
        worst = {c: [s[i, c] - s[own[c], c] for i in range(len(row["images"])) if (i, c) in s and (i, c) not in true] for c in own}
        halves = [max(worst[0])] if worst[0] else []
        halves += [max(max(v) for c, v in worst.items() if c and v)] if any(v for c, v in worst.items() if c) else []
        if halves:
            image_side.append(sum(hinge(h, 0.30) for h in halves) / len(halves))
    ratio = lambda parts: sum(a for a, _ in parts) / sum(b for _, b in parts) if parts else 0.0  # noqa: E731
    mean = lambda parts: sum(parts) / len(parts) if parts else 0.0  # noqa: E731
    ramp = min(1.0, progress / 0.5)
    return ratio(nll) + 0.5 * ratio(other) + ramp * (0.5 * mean(text_side) + 0.7 * mean(image_side))


def order(epoch):
    """Return the groups of an epoch in the sampler's order."""
    from cfvlm_ds.data.permutation import permuted  # the order is an input of the comparison

    return permuted(0, len(rows), len(rows), 0, epoch)


def factor(step, warmup):
    done = (step - warmup) / max(1, steps - warmup)
    return step / max(1, warmup) if step < warmup else max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


weights = [p for p in model.parameters()]
optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
stream = [index for epoch in range(2 + 16 * steps // len(rows)) for index in order(epoch)]
result = []
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * factor(step, math.ceil(0.2 * steps))
    loss = step_loss([rows[i] for i in stream[16 * step : 16 * step + 16]], step / steps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    result.append(loss.item())
print(json.dumps(result))
