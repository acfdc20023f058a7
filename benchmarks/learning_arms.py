"""Runs of benchmarks/learning.py: an arm with a rate, a seed, a training time and data, and the rows that it trains on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.demo.habits.world import COLOURS, KINDS

RECORDS = Path(__file__).resolve().parent / "learning"
RATES = ("1e-4", "3e-4", "6e-4", "1e-3")
VALIDATION = "validation"
CAPTIONS = (VALIDATION, "combo")
"""Splits of captions; the others are questions."""
WORLD = 16_000
"""Training groups that examples/quickstart.yaml draws."""
STEPS = 1000
"""Steps of the default objective, and the ``clock`` of a record without one."""
NO_CONTRAST = ("--objective.csd.weight=0", "--objective.fcd.weight=0")
PAPER = [
    f"--objective.{term}.{option}={value}"
    for term, margin in (("csd", 0.25), ("fcd", 0.30))
    for option, value in (("weight", 0.5), ("margin", margin), ("link", "hinge"), ("len_norm", "anchor"), ("margin_unit", "per_token"))
]
ALONE = ("--objective.align.weight=0", *NO_CONTRAST)
LORA = tuple(f"--model.{module}.tuning=lora" for module in ("vision_tower", "language_model"))


@dataclass(frozen=True)
class Arm:
    """Changes of one arm to examples/quickstart.yaml.

    ``scores`` is true if it needs scores of the base. ``negatives`` keeps only the false ``texts`` or only the edited ``images`` of its
    rows. ``counterfactuals`` is their number per training scene. ``rates`` are those that --choose_rates tries.
    """

    title: str
    options: tuple[str, ...] = ()
    scores: bool = False
    negatives: str = ""
    counterfactuals: int = 1
    rates: tuple[str, ...] = RATES


ARMS: dict[str, Arm] = {
    "nll-factual": Arm("NLL, factual pairs", ("--objective.align.counterfactual=0", *NO_CONTRAST)),
    "nll-all": Arm("NLL, all pairs", ("--objective.align.counterfactual=1", *NO_CONTRAST)),
    "dpo": Arm("DPO", (*ALONE, "--objective.dpo.weight=1"), scores=True),
    "dpo-nll": Arm("DPO with NLL of all pairs", (*NO_CONTRAST, "--objective.dpo.weight=1"), scores=True),
    "mdpo": Arm("mDPO", (*ALONE, "--objective.dpo.image_side=1", "--objective.dpo.anchor=1"), scores=True),
    "symmpo": Arm("SymMPO", (*ALONE, "--objective.symmpo.weight=1"), scores=True),
    "misp": Arm("MISP-DPO", (*ALONE, "--objective.misp.weight=1"), scores=True),
    "texts": Arm("default, text negatives only", negatives="texts"),
    "images": Arm("default, image negatives only", negatives="images"),
    "paper": Arm(
        "paper's literal sum",
        ("--objective.align.counterfactual=0", *PAPER, "--objective.csd.mode=matched", "--objective.fcd.symmetric=false"),
    ),
    "default": Arm("default objective"),
    "no-align": Arm("default without align", ("--objective.align.weight=0",)),
    "no-csd": Arm("default without csd", ("--objective.csd.weight=0",)),
    "no-fcd": Arm("default without fcd", ("--objective.fcd.weight=0",)),
    "lora": Arm("default, adapters and projector", LORA, rates=("1e-3", "2e-3", "4e-3", "8e-3")),
    "batch-align": Arm("default and batch_align", ("--objective.batch_align.weight=0.3", "--objective.batch_align.texts=16"), scores=True),
    "three": Arm("default, three counterfactuals a scene", counterfactuals=3),
    "hardest": Arm("default, the hardest of three counterfactuals", ("--train.hard_negatives=1",), counterfactuals=3),
}
CONTROL_ARM = "nll-all"


def _contrast(**options: float | str) -> tuple[str, ...]:
    return tuple(f"--objective.{term}.{name}={value}" for term in ("csd", "fcd") for name, value in options.items())


GRID: dict[str, Arm] = {
    "calibrated": Arm("what `calibrate` says", _contrast(weight=10, len_norm="anchor", margin=0.5, beta=3)),
    **{
        f"{name}-{value}": Arm(f"{name} {value}", _contrast(**{name: value}))
        for name, values in (("weight", (0.3, 3)), ("margin", (1, 10)), ("beta", (0.1, 1)))
        for value in values
    },
}
"""The options that `cfvlm-ds calibrate runs/learning/base runs/learning/world/train.jsonl --limit 1000` recommends, and settings that a
user would try without it, one changed at a time."""
SHARP = {
    f"sharp-{csd}-{fcd}": Arm(
        f"beta 1, margins {csd} and {fcd}", (*_contrast(beta=1), f"--objective.csd.margin={csd}", f"--objective.fcd.margin={fcd}")
    )
    for csd, fcd in ((1, 1), (1, 5), (3, 3), (5, 1))
}
"""Links whose gradient vanishes at the margin; margins 1 and 1, and later 1 and 5, were once the default."""
LONGER = {
    "calibrated-long": Arm(
        "what `calibrate` says of long captions",
        _contrast(weight=12, len_norm="anchor", margin=0.076, beta=20),
    ),
}
"""Its recommendation for the same rows with 14 additional statements (`train_more14.jsonl`)."""
KNOWN = ARMS | GRID | SHARP | LONGER


@dataclass(frozen=True)
class Job:
    """One training run.

    ``capability`` is ATEN_CPU_CAPABILITY, which together with ``threads`` determines how sums are rounded. ``clock`` is the training time
    in steps of the default objective. ``groups`` is the number of training groups (0: all of the world; a larger number needs a larger
    world), and ``noise`` the percentage of groups whose texts are exchanged. ``more`` is the number of true statements that are added to
    every caption, including those of the tests.
    """

    arm: str
    rate: str
    seed: int
    capability: str = ""
    threads: int = 1
    clock: int = STEPS
    groups: int = 0
    noise: int = 0
    more: int = 0

    @property
    def name(self) -> str:
        parts = [self.arm, self.rate, f"seed{self.seed}", self.capability, f"{self.threads}threads" if self.threads > 1 else ""]
        parts += [f"clock{self.clock}" if self.clock != STEPS else "", f"{self.groups}groups" if self.groups else ""]
        parts += [f"noise{self.noise}" if self.noise else "", f"more{self.more}" if self.more else ""]
        return "-".join(part for part in parts if part)

    def world(self, out: Path) -> Path:
        """Return the folder of the world with the training groups."""
        parts = [f"{KNOWN[self.arm].counterfactuals}" if KNOWN[self.arm].counterfactuals > 1 else ""]
        parts += [f"of-{self.groups}" if self.groups > WORLD else ""]
        return out / "-".join(["world", *(part for part in parts if part)])

    def rows(self, out: Path) -> Path:
        """Return the training manifest."""
        fewer = f"{self.groups}" if 0 < self.groups < WORLD else ""
        parts = [KNOWN[self.arm].negatives, fewer, f"noise{self.noise}" if self.noise else ""]
        parts += [f"more{self.more}" if self.more else ""]
        return self.world(out) / f"{'_'.join(['train', *(part for part in parts if part)])}.jsonl"

    def tests(self, out: Path, split: str) -> Path:
        """Return the manifest of an evaluation split; only captions become longer."""
        name = split if split == VALIDATION else f"test_{split}"
        return out / "world" / f"{name}{f'_more{self.more}' if self.more and split in CAPTIONS else ''}.jsonl"


def rows_of(job: Job, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run, made from those of the world. The exchanged texts depend only on the ids and the percentage."""
    for place, row in enumerate(rows):
        if job.groups and place >= job.groups:
            return
        if random.Random(f"noise {row['id']}").random() < job.noise / 100:
            row = exchanged(row)
        row = lengthened(row, job.more)
        yield with_negatives(row, KNOWN[job.arm].negatives) if KNOWN[job.arm].negatives else row


def lengthened(row: dict[str, Any], more: int) -> dict[str, Any]:
    """Return a row whose captions also say of ``more`` things that they are absent, before and after the original text.

    The statements are the same in all captions and true of all pictures. Answers to questions are unchanged.
    """
    captions = [text for text in row["texts"] if "key" in text]
    said = " ".join(text["text"] for text in captions)
    absent = [f"There is no {colour} {kind}." for colour in COLOURS for kind in KINDS if kind not in said]
    draw = random.Random(f"more {row['id']}")
    chosen, place = draw.sample(absent, more), draw.randint(0, more)
    longer = [text | {"text": " ".join([*chosen[:place], text["text"], *chosen[place:]])} for text in captions]
    return row | {"texts": [*longer, *row["texts"][len(captions) :]]}


def exchanged(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its captions, and the two answers to each question, exchanged, so that all cells of its truth table are wrong."""
    return row | {"texts": [row["texts"][k ^ 1] | {"id": text["id"]} for k, text in enumerate(row["texts"])]}


def with_negatives(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a row with only its false ``texts``, on the factual image, or only its edited ``images``, with the texts that are true of the
    factual one.
    """
    first = row["images"][0]
    true = {text for image, text, value in row["match"] if image == first["id"] and value}
    kept = {"images": row["images"], "texts": [text for text in row["texts"] if text["id"] in true]}
    if kind == "texts":
        kept = {"images": [first], "texts": row["texts"]}
    names = {part["id"] for each in kept.values() for part in each}
    edits = [
        {key: value for key, value in edit.items() if key != ("image" if kind == "texts" else "text")}
        for edit in row["edits"]
        if kind == "images" or edit["type"] != "sham"
    ]
    return row | kept | {"match": [cell for cell in row["match"] if {cell[0], cell[1]} <= names], "edits": edits}
