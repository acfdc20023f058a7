"""``cfvlm-ds data propose``, ``edit``, ``verify``, ``select``, ``audit``, ``run``, ``status`` and ``sample``: commands for creating and
checking groups.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cfvlm_ds.cli.options import ImageLimits, Positive, Reading, add_function, model_named, say
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.counterfactuals.options import AuditOptions, EditOptions, ProposeOptions, SampleOptions, SelectOptions, VerifyOptions

if TYPE_CHECKING:
    from cfvlm_ds.core.config import ModelConfig
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.counterfactuals.authors import Author
    from cfvlm_ds.counterfactuals.verify import Score


ALONE = ("propose", "edit", "verify", "select", "audit", "run", "sample")
"""Commands that run in a single process."""


def add(data: Any) -> None:
    """Register these commands as subcommands of ``data``."""
    for function in (_propose, _edit, _verify, _select, _audit, _run, _status, _sample):
        add_function(data, function)


def _shard(text: str) -> tuple[int, int | None]:
    """Parse I/N into a shard's index and the number of shards: 3/64 is the fourth of 64 shards. N is None if only I is given."""
    number, slash, of = text.partition("/")
    if not number.isdecimal() or len(text) > 12 or (slash and not (of.isdecimal() and int(number) < int(of))):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/8, not {text!r}")
    return int(number), int(of) if slash else None


Shard = Annotated[tuple[int, int | None], ("type", _shard), ("metavar", "I/N")]


@dataclass(frozen=True)
class Part:
    """One process's share of the work.

    Args:
        shard: shard to process, I/N with I from 0 to N-1, or only I if the work folder already records N. Run one process per shard.
    """

    shard: Shard | None = None


def _propose(manifest: str, *, out: str, options: ProposeOptions, part: Part, reading: Reading) -> None:
    """Propose counterfactual captions that differ in one detail.

    Example: cfvlm-ds data propose captions.jsonl --out W --with rules,mine --types colour,count,relation

    Args:
        manifest: captioned pictures, in any known format.
        out: work folder, created if necessary.
    """
    from cfvlm_ds.counterfactuals.propose.step import propose
    from cfvlm_ds.data import open_groups

    number, of = part.shard or (0, 1)
    store = open_groups(manifest, reading.root, reading.format, progress=say)
    _print_done("propose", propose(store, Path(out), options, number, say, of))


def _edit(work: str, *, options: EditOptions, part: Part) -> None:
    """Edit the pictures according to the proposals.

    Example: cfvlm-ds data edit W --with flip,diffusers --model DIR --attempts 4

    Args:
        work: work folder that `data propose` created.
    """
    from cfvlm_ds.counterfactuals.edit.step import edit

    number, of = part.shard or (0, None)
    _print_done("edit", edit(Path(work), options, number, say, of))


def _verify(
    work: str,
    *,
    options: VerifyOptions,
    calibrate: str | None = None,
    precision: float = 0.95,
    rule: Literal["match", "likelihood"] = "match",
    part: Part,
) -> None:
    """Score each candidate's 2 x 2 matrix (original and edited picture, original and edited text), and compare the two pictures.

    Example: cfvlm-ds data verify W --scorer Qwen/Qwen2.5-VL-7B-Instruct

    Args:
        work: work folder that `data propose` created.
        calibrate: file with labels of verified candidates, one {"edit": ID, "attempt": 0, "good": true} per line. The thresholds `margin`
            and `drop` are fitted to the labels and written to W/thresholds.json.
        precision: minimum precision of the fitted thresholds on the labelled candidates.
        rule: scores that the thresholds apply to: match (a yes/no question) or likelihood (the text as a caption).
    """
    from cfvlm_ds.counterfactuals import verify as step
    from cfvlm_ds.counterfactuals.history import thresholds_of
    from cfvlm_ds.counterfactuals.work_folder import WorkFolder

    folder, (number, of) = WorkFolder.open(Path(work)), part.shard or (0, None)
    if calibrate:
        if (options, part) != (VerifyOptions(), Part()):
            raise ConfigError("--calibrate uses existing scores of all shards; leave out the scorer's options and --shard")
        if not 0 < precision <= 1:
            raise ConfigError(f"--precision must be greater than 0 and at most 1, not {precision}")
        print(step.calibrate(folder.path, Path(calibrate), thresholds_of(folder, rule=rule), precision))
        print(f"wrote {folder.path / 'thresholds.json'}; `data select` uses it")
        return
    done = folder.finished("verify", number, of, options)
    load, identity = _scoring(options.scorer, options.batch_size) if options.scorer and done is None else (None, None)
    _print_done("verify", step.verify(folder.path, options, number, say, load and load(), of, identity))
    if not options.scorer:
        print(
            f"no --scorer was given, so only pixels were compared: review the texts with `cfvlm-ds data view {printable(work)} --out PAGE`"
        )


def _select(work: str, *, out: str, options: SelectOptions) -> None:
    """Write the best candidates as groups, and report why the others were dropped.

    Example: cfvlm-ds data select W --out groups.jsonl

    Args:
        work: work folder that `data propose` created.
        out: file to write the groups to.
    """
    from cfvlm_ds.counterfactuals.select import select

    survival = select(Path(work), Path(out), options, say)
    print(survival.table())
    print(survival.summary())
    _print_roots(survival.roots)


def _audit(manifest: list[str], *, out: str = "audit", options: AuditOptions, reading: Reading) -> None:
    """Report duplicates, leaks between splits, and shortcuts: cues by which an edited text or picture can be recognised on its own.

    Example: cfvlm-ds data audit train.jsonl test.jsonl --out audit

    Args:
        manifest: one or more manifests; several are treated as splits of one data set.
        out: folder for an HTML page and report.md.
    """
    from cfvlm_ds.counterfactuals.audit.report import audit, write_report
    from cfvlm_ds.page import refuse_foreign_folder

    folder = refuse_foreign_folder(Path(out))
    score = _scoring(options.scorer, 16)[0]() if options.scorer else None
    findings, sets = audit(manifest, reading.root, reading.format, options, say, score)
    write_report(findings, sets, folder, say)
    print(findings.markdown())
    print(f"wrote {folder}: index.html and report.md")
    if options.strict and findings.faults:
        sys.stdout.flush()
        sys.exit(1)


def _run(*, config: str, part: Part) -> None:
    """Run the steps propose, edit and verify on one shard of a plan. Without --shard, run them on every shard in turn, and then run select.

    Example: cfvlm-ds data run --config examples/build_coco.yaml --shard 3/64

    Args:
        config: YAML file with the plan, which sets the options of every step.
    """
    from cfvlm_ds.core.run_folder import named_model, refuse_absent
    from cfvlm_ds.counterfactuals.plan import read_plan
    from cfvlm_ds.counterfactuals.propose.step import propose
    from cfvlm_ds.data import open_groups

    plan = read_plan(config)
    plan.check()
    if plan.verify.scorer:
        refuse_absent(named_model(plan.verify.scorer).name_or_path, f"{config}: verify.scorer: ")
    shard = part.shard
    if shard is not None and (shard[1] not in (None, plan.shards) or shard[0] >= plan.shards):
        raise ConfigError(f"--shard: the plan {config} has shards 0 to {plan.shards - 1}; give one of them, or I/{plan.shards}")
    for number in range(plan.shards) if shard is None else [shard[0]]:
        store = open_groups(plan.data, plan.root, plan.format, progress=say)
        _print_done("propose", propose(store, Path(plan.out), plan.propose, number, say, plan.shards))
        _edit(plan.out, options=plan.edit, part=Part((number, plan.shards)))
        _verify(plan.out, options=plan.verify, part=Part((number, plan.shards)))
    if plan.groups and shard is None:
        _select(plan.out, out=plan.groups, options=plan.select)


def _status(work: str) -> None:
    """Print a work folder's progress and its unfinished shards.

    Example: cfvlm-ds data status W

    Args:
        work: work folder of `data propose` or `data sample`.
    """
    from cfvlm_ds.counterfactuals.status import status

    print(status(Path(work)))


def _sample(
    model: str,
    manifest: str,
    *,
    out: str,
    options: SampleOptions,
    limit: Positive | None = None,
    part: Part,
    reading: Reading,
    limits: ImageLimits,
) -> None:
    """Sample texts about pictures from a model, label them with a separate judge, and write groups of true and false texts.

    Example: cfvlm-ds data sample runs/mine captions.jsonl --out W --judge my_judge:is_true

    Args:
        model: model folder or hub name, run folder, folder of adapters, or address of an OpenAI-compatible server, such as
            http://node7:8000/v1.
        manifest: pictures with true texts, in any known format; only the first image of a group is used.
        out: work folder, created if necessary; groups are written to OUT/groups.jsonl.
        limit: use only the first N groups.
    """
    from cfvlm_ds.counterfactuals.sample import GROUPS, sample
    from cfvlm_ds.data import sound_groups

    number, of = part.shard or (0, 1)
    store = sound_groups(manifest, reading.root, reading.format, limit, say)
    identity, load = author(model, options, limits, reading.max_pixels, say)
    (done,), counts = sample(store, Path(out), options, identity, load, [number], say, of)
    _print_done("sample", done)
    if counts is None:
        print(f"other shards are not finished; `cfvlm-ds data status {out}` lists them, and the last one writes {GROUPS}")
        return
    for name, count in counts.items():
        print(f"{count:>9} {name}")
    print(f"wrote {Path(out) / GROUPS}: {counts['groups']} groups")
    _print_roots(list(map(str, store.roots)))


def author(
    model: str, options: SampleOptions, limits: ImageLimits, max_pixels: int, say: Say, world: World | None = None
) -> tuple[dict[str, Any], Callable[[], tuple[Author, Score | None]]]:
    """Return the identity (names and hashes) of a model that writes texts and of the scorer that judges them, and a cached function that
    loads both. Raises ConfigError if an option does not apply to the model, or if the scorer is the model itself.
    """
    from cfvlm_ds.cli.models import load_scorer
    from cfvlm_ds.counterfactuals.authors import LocalAuthor, ServerAuthor
    from cfvlm_ds.counterfactuals.work_folder import sha256_of_file
    from cfvlm_ds.models import model_folder

    identity: dict[str, Any] = {"model": model}
    if model.startswith(("http://", "https://")):
        if limits != ImageLimits():
            raise ConfigError(f"--min_pixels, --max_pixels and --max_tiles do not apply to the server {model}; set limits there")
        server = ServerAuthor(model, options, max_pixels)
        write: Callable[[], Author] = lambda: server  # noqa: E731
    else:
        if options.served_model:
            raise ConfigError(f"--served_model applies to a server, but {model} is no address such as http://node7:8000/v1")
        config, adapter = model_named(model, limits)
        identity |= _hashes(config, adapter, say)
        writing = model_folder(config.name_or_path) / "generation_config.json"  # sets the repetition penalty, for example
        identity |= {"writing": sha256_of_file(writing)} if writing.is_file() else {}

        def write() -> Author:
            scorer, collator, where = load_scorer(config, adapter, max_pixels=max_pixels, world=world)
            return LocalAuthor(scorer.model, collator, where)

    if not options.scorer:
        return identity, functools.cache(lambda: (write(), None))
    load_score, judge = _scoring(options.scorer, 1, world)
    if all(identity.get(name) == judge.get(name) for name in ("weights", "adapter")):
        raise ConfigError(f"--scorer {options.scorer} is the model that writes; its judge must be another model")
    return identity | {"judged_by": judge}, functools.cache(lambda: (write(), load_score()))


def _hashes(config: ModelConfig, adapter: Path | None, say: Say) -> dict[str, str]:
    from cfvlm_ds.models import adapter_fingerprint, fingerprint

    return {**fingerprint(config, say=say), **({"adapter": adapter_fingerprint(adapter)} if adapter else {})}


def _print_roots(roots: Sequence[str]) -> None:
    if roots:
        words = shlex.join(word for root in roots for word in ("--root", root))
        print(f"their pictures are in other folders; read the groups with {printable(words)}, or list them in data.root")
    else:
        print("their pictures are given relative to the file, which therefore needs no --root or data.root")


def _scoring(name: str, batch_size: int, world: World | None = None) -> tuple[Callable[[], Score], dict[str, Any]]:
    """Return a function that loads a model and returns the function that scores groups with it. Also return a dict that identifies the
    model by its name and hashes.
    """
    from cfvlm_ds.cli.models import load_scorer
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.data.decoding import MAX_PIXELS
    from cfvlm_ds.evaluation import Batching, score_groups

    class Quiet(World):
        """A ``World`` of one rank that prints only warnings, because the calling step reports its own progress."""

        def say(self, message: str) -> None:
            if message.startswith("warning: "):
                super().say(message)

    model, adapter = model_named(name)

    def load() -> Score:
        scorer, collator, where = load_scorer(model, adapter, max_pixels=MAX_PIXELS, world=world)
        batching = Batching(batch_size, remedy=f"lower --batch_size ({batch_size})")
        return lambda groups: score_groups(scorer, collator, groups, Quiet(0, 1, where.device), batching)

    return load, {"model": name, **_hashes(model, adapter, say)}


def _print_done(step: str, done: dict[str, Any]) -> None:
    counts = [f"{count:>9,}  {one_line(name, 100)}" for name, count in sorted(done["counts"].items(), key=lambda entry: -entry[1])]
    more = [f"{len(counts) - 12:>9,}  more counts (`cfvlm-ds data status`)"] * (len(counts) > 12)
    print("\n".join([f"{step}: {done['records']:,} records", *counts[:12], *more]))
