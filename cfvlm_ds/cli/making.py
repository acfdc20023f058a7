"""``cfvlm-ds data propose``, ``edit``, ``verify``, ``select``, ``audit``, ``run`` and ``status``: counterfactual groups from captions and
pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvlm_ds.cli.options import add_command, add_data_options, model_named, values_of
from cfvlm_ds.core.config import IMAGE_LIMITS
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.options import sentences
from cfvlm_ds.core.ranks import num_ranks, own_rank
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.core.untrusted import refuse_one_file
from cfvlm_ds.core.verbosity import shows_progress
from cfvlm_ds.counterfactuals.options import AuditOptions, EditOptions, ProposeOptions, SelectOptions, VerifyOptions

if TYPE_CHECKING:
    from cfvlm_ds.counterfactuals.plan import Plan
    from cfvlm_ds.counterfactuals.scorer import RankedScorer

_WORK = "work folder that `data propose` began"


def add(data: Any) -> None:
    """Add the commands to those of ``data``."""
    example = "cfvlm-ds data propose captions.jsonl --out W --with rules,mine --types colour,count,relation"
    command = add_command(data, "propose", _propose, "propose counterfactual captions that differ in one thing", example)
    command.add_argument("manifest", help="captions and pictures, in any known format")
    command.add_argument("--out", required=True, help="work folder, made where it is not there")
    _add_section(command, "propose")
    _add_shard(command)
    add_data_options(command)

    command = add_command(
        data, "edit", _edit, "edit the pictures as proposed", "cfvlm-ds data edit W --with flip,diffusers --model DIR --attempts 4"
    )
    command.add_argument("work", help=_WORK)
    _add_section(command, "edit")
    _add_shard(command)

    example = "cfvlm-ds data verify W --scorer Qwen/Qwen2.5-VL-7B-Instruct"
    command = add_command(data, "verify", _verify, "score every candidate's 2 x 2 matrix, and compare its pictures", example)
    command.add_argument("work", help=_WORK)
    _add_section(command, "verify")
    text = (
        'fit margin and drop to labels ({"edit": ID, "attempt": 0, "good": true} a line) of what was verified, and write W/thresholds.json'
    )
    command.add_argument("--calibrate", metavar="FILE", help=text)
    command.add_argument("--precision", type=float, default=0.95, help="that they reach (default 0.95)")
    command.add_argument("--rule", default="match", help="scores that it is fitted to: match, likelihood, both (default match)")
    _add_shard(command)

    command = add_command(
        data,
        "select",
        _select,
        "write groups of the best candidates, and what became of the others",
        "cfvlm-ds data select W --out groups.jsonl",
    )
    command.add_argument("work", help=_WORK)
    command.add_argument("--out", required=True, help="file of groups to write")
    command.add_argument("--figure", metavar="FILE.png", help="draw what became of the candidates")
    _add_section(command, "select")

    example = "cfvlm-ds data audit train.jsonl test.jsonl --against /data/benchmarks --out audit"
    command = add_command(data, "audit", _audit, "what could be learnt without looking, what is there twice, what leaks", example)
    command.add_argument("manifest", nargs="+", help="groups; several are the splits of one set")
    command.add_argument("--out", default="audit", help="folder of the page; OUT.md and OUT.json lie beside it (default audit)")
    _add_section(command, "audit")
    add_data_options(command)

    text = "propose, edit and verify one shard of a plan; without --shard all of them one after the other, and select"
    command = add_command(data, "run", _run, text, "cfvlm-ds data run --config examples/build_coco.yaml --shard 3/64")
    command.add_argument("--config", required=True, help="YAML of the plan")
    _add_shard(command)

    text = "how far a work folder is, and which shards are missing"
    command = add_command(data, "status", _status, text, "cfvlm-ds data status W --check")
    command.add_argument("work", help=_WORK)
    text = "also compare what is there with what was written, journals by sha256 and tars by length; exit code 1 where a shard is damaged"
    command.add_argument("--check", action="store_true", help=text)


def _add_shard(command: argparse.ArgumentParser) -> None:
    text = "the shard to work on, I of 0 to N-1, or I alone where N is known; the others are for other processes, at the same time or not"
    command.add_argument("--shard", type=_shard_or_number, metavar="I/N", help=text)


def _shard_or_number(text: str) -> tuple[int, int | None]:
    """An argument's type: 3/64 is the fourth of 64 parts, 3 the fourth of as many as there are."""
    number, slash, of = text.partition("/")
    if not number.isdecimal() or len(text) > 12 or (slash and not (of.isdecimal() and int(number) < int(of))):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/8, not {text!r}")
    return int(number), int(of) if slash else None


SECTIONS = {"propose": ProposeOptions, "edit": EditOptions, "verify": VerifyOptions, "select": SelectOptions, "audit": AuditOptions}


def _add_section(command: argparse.ArgumentParser, name: str) -> None:
    """An option for each field of a step's options, with the sentence that its class has for it."""
    section = SECTIONS[name]
    said = sentences(section)
    for each in dataclasses.fields(section):
        option, text = f"--{each.name}".replace("--back_ends", "--with"), said[each.name]
        if each.type == "bool":
            command.add_argument(option, dest=each.name, action="store_true", help=text)
        else:
            shown = f" (default {each.default})".replace("%", "%%") if each.default not in (None, "") else ""
            types: dict[Any, Callable[[str], Any]] = {"int": int, "float": float, "float | None": float, "str": str}
            command.add_argument(option, dest=each.name, type=types[each.type], default=each.default, help=text + shown)


def _values(arguments: argparse.Namespace, name: str) -> Any:
    return SECTIONS[name](**values_of(arguments, SECTIONS[name]))


# what the commands do -------------------------------------------------------------------------------------------------------------------


def _propose(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.counterfactuals.propose.step import propose

    _one_process("propose")
    shard, of = arguments.shard or (0, None)
    store = _opened(arguments.manifest, arguments.root, arguments.format)
    _print_done("propose", propose(store, Path(arguments.out), _values(arguments, "propose"), shard, _say, of or 1))


def _edit(arguments: argparse.Namespace) -> None:
    _one_process("edit")
    _edited(Path(arguments.work), _values(arguments, "edit"), arguments.shard)


def _edited(work: Path, options: EditOptions, shard: tuple[int, int | None] | None) -> None:
    from cfvlm_ds.counterfactuals.edit.step import edit

    number, of = shard or (0, None)
    _print_done("edit", edit(work, options, number, _say, of))


def _verify(arguments: argparse.Namespace) -> None:
    options = _values(arguments, "verify")
    if arguments.calibrate:
        from cfvlm_ds.counterfactuals.history import thresholds_of
        from cfvlm_ds.counterfactuals.verify import calibrate
        from cfvlm_ds.counterfactuals.work_folder import WorkFolder

        if not 0 < arguments.precision <= 1:
            raise ConfigError(f"--precision {arguments.precision}: a share from above 0 to 1")
        start = thresholds_of(WorkFolder.open(Path(arguments.work)), rule=arguments.rule)
        print(calibrate(Path(arguments.work), Path(arguments.calibrate), start, arguments.precision))
        print(f"wrote {Path(arguments.work) / 'thresholds.json'}, which select takes")
        return
    _verified(Path(arguments.work), options, arguments.shard)


def _verified(work: Path, options: VerifyOptions, shard: tuple[int, int | None] | None) -> None:
    from cfvlm_ds.counterfactuals.verify import settings_of, verify
    from cfvlm_ds.counterfactuals.work_folder import WorkFolder

    number, of = shard or (0, None)
    done = WorkFolder.open(work).finished("verify", number, of, settings_of(options))
    score, identity = _scoring(options.scorer, options.batch_size) if options.scorer and done is None else (None, None)
    if score is None:
        if own_rank() == 0:
            _print_done("verify", verify(work, options, number, _say, None, of))
    elif score.world.is_main:
        try:
            _print_done("verify", verify(work, options, number, _say, score, of, identity))
        finally:
            score.end()
    else:
        score.follow()


def _select(arguments: argparse.Namespace) -> None:
    _one_process("select")
    _selected(Path(arguments.work), Path(arguments.out), _values(arguments, "select"), arguments.figure)


def _selected(work: Path, out: Path, options: SelectOptions, figure: str | None = None) -> None:
    from cfvlm_ds.counterfactuals.select import KEPT, select

    if figure is not None:
        from cfvlm_ds.tracking.data_figure import figure_file

        figure_file(figure, "--figure")
    survival = select(work, out, options, _say, *([Path(figure)] if figure is not None else []))
    print(survival.table())
    print("\n" + survival.captions())
    for name, count in survival.files.items():
        print(f"wrote {name}: {count} groups")
    if survival.roots:
        print(f"their pictures lie in several folders; read them with {printable(' '.join(f'--root {root}' for root in survival.roots))}")
    if figure is not None:
        from cfvlm_ds.tracking.data_figure import data_figure

        kept = {kind: counts[KEPT] for kind, counts in survival.by_type.items()}
        with whole_file(Path(figure)) as file:
            data_figure(file, [], [("what became of the edits", "edits", survival.total), ("kept", "edits", kept)])
        print(f"wrote {figure}")


def _audit(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.counterfactuals.audit.refine import refined_file
    from cfvlm_ds.counterfactuals.audit.report import audit, report_files, write_report

    _one_process("audit")
    options, out = _values(arguments, "audit"), Path(arguments.out)
    refuse_one_file(*report_files(out), *([Path(options.refine)] if options.refine else []))
    if options.refine:
        if Path(os.path.realpath(options.refine)).is_relative_to(os.path.realpath(out)):
            raise ConfigError(
                f"--refine {options.refine} lies in the folder of the page, {out}, which is replaced as a whole; name another"
            )
        refined_file(Path(options.refine), *arguments.manifest, *options.against.split(","))
    score = _scoring(options.scorer, 16)[0] if options.scorer else None
    found, sets = audit(arguments.manifest, arguments.root, arguments.format, options, _say, score)
    write_report(found, sets, out, _say)
    print(found.markdown())
    print(f"wrote {out.with_name(out.name + '.md')}, {out.with_name(out.name + '.json')} and {out / 'index.html'}")
    if options.strict and found.faults:
        sys.stdout.flush()
        sys.exit(1)


def _run(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.core.run_folder import named_model, refuse_absent
    from cfvlm_ds.counterfactuals.plan import read_plan

    _one_process("run")
    plan = read_plan(arguments.config)
    plan.check()
    if plan.verify.scorer:
        refuse_absent(named_model(plan.verify.scorer).name_or_path, f"{arguments.config}: verify.scorer: ")
    if arguments.shard is not None:
        shard, of = arguments.shard
        if of not in (None, plan.shards):
            raise ConfigError(f"--shard {shard}/{of}: the plan {arguments.config} has {plan.shards} shards; say I/{plan.shards}")
        if shard >= plan.shards:
            raise ConfigError(f"--shard {shard}: the plan {arguments.config} has shards 0 to {plan.shards - 1}")
        _one_shard(plan, shard)
        return
    for shard in range(plan.shards):
        _one_shard(plan, shard)
    if plan.groups:
        _selected(Path(plan.out), Path(plan.groups), plan.select)


def _one_shard(plan: Plan, shard: int) -> None:
    from cfvlm_ds.counterfactuals.propose.step import propose

    store = _opened(plan.data, plan.root, plan.format)
    _print_done("propose", propose(store, Path(plan.out), plan.propose, shard, _say, plan.shards))
    _edited(Path(plan.out), plan.edit, (shard, plan.shards))
    _verified(Path(plan.out), plan.verify, (shard, plan.shards))


def _status(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.counterfactuals.status import status

    found = status(Path(arguments.work), arguments.check)
    print(found.text)
    if found.damaged:
        sys.stdout.flush()
        sys.exit(1)


def _opened(manifest: str, root: Any, format: str) -> Any:
    from cfvlm_ds.data.manifest import open_groups

    return open_groups(manifest, root, format, progress=_say)


def _scoring(name: str, batch_size: int) -> tuple[RankedScorer, dict[str, Any]]:
    """What scores groups with a model, and which weights do."""
    from cfvlm_ds.cli.models import load_scorer
    from cfvlm_ds.counterfactuals.scorer import RankedScorer
    from cfvlm_ds.data.decoding import MAX_PIXELS
    from cfvlm_ds.models import fingerprint

    model, adapter = model_named(name, dict.fromkeys(IMAGE_LIMITS))
    scorer, collator, world = load_scorer(model, adapter, max_pixels=MAX_PIXELS)
    identity: dict[str, Any] = {"model": name, **fingerprint(model)}
    return RankedScorer(scorer, collator, world, batch_size), identity | ({"adapter": str(adapter)} if adapter else {})


def _one_process(command: str) -> None:
    """Raise ConfigError where a launcher has started several: they would do the same work side by side."""
    if num_ranks() > 1:
        raise ConfigError(f"data {command} is for one process, and {num_ranks()} were started; several ranks are for data verify --scorer")


def _say(line: str) -> None:
    if shows_progress() or line.startswith(("warning: ", "note: ")):
        print_line(line)


def _print_done(step: str, done: dict[str, Any]) -> None:
    counts = ", ".join(f"{count} {one_line(name, 100)}" for name, count in sorted(done["counts"].items(), key=lambda each: -each[1])[:8])
    print(f"{step}: {done['records']} records: {counts or 'nothing'}")
