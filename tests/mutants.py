"""Mutation campaign: single changes of operators, bounds, signs and conditions of the trainer, each of which some test should notice.

    pip install coverage
    python tests/mutants.py map WORK              # which tests execute which lines: half an hour of two cores
    python tests/mutants.py run WORK --count 300  # an hour of two cores; can be killed and goes on
    python tests/mutants.py run WORK --count 300 --budget 400  # tries the survivors again, with more tests
    python tests/mutants.py report WORK

A mutant is killed if a test fails or takes three times its time. It meets the tests that execute its statement, fastest first, up to
``--budget`` seconds, and from 100 s on also the whole files of these tests, because the tests of a file share what one of them has trained.
Statements that only other processes execute meet the tests in ``distributed``.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("objectives", "batching", "models", "training", "checkpoint")
RC = """[run]
include = {include}
data_file = {work}/coverage
parallel = true
context = ${{PYTEST_CURRENT_TEST-}}
patch = subprocess, fork, _exit
"""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "clamp_min": "clamp_max",
    "argmax": "argmin",
    "floor": "ceil",
    "ceil": "floor",
}


def pytest_runtest_protocol(item) -> None:
    """Attribute the lines that this process executes from here on to the test (this file is the plugin of ``map``)."""
    import coverage

    if current := coverage.Coverage.current():
        current.switch_context(item.nodeid)


def mutations(tree: ast.AST) -> Iterator[tuple[ast.AST, str, Callable[[], None], Callable[[], None]]]:
    """Yield each mutation's node, its name, and the functions that apply it to ``tree`` and take it back."""

    def change(node: ast.AST, field: str, new: object) -> tuple[Callable[[], None], Callable[[], None]]:
        old = getattr(node, field)
        return lambda: setattr(node, field, new), lambda: setattr(node, field, old)

    skipped: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        apart = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
            apart = list(ast.iter_child_nodes(node))
        skipped |= {id(inner) for part in apart if part is not None for inner in ast.walk(part)}
        if isinstance(node, ast.Compare):
            for k, op in enumerate(node.ops):
                if new := SWAPS.get(type(op)):
                    swapped = [*node.ops[:k], new(), *node.ops[k + 1 :]]
                    yield node, f"{type(op).__name__} -> {new.__name__}", *change(node, "ops", swapped)
        elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and (new := SWAPS.get(type(node.op))):
            if not any(isinstance(side, (ast.JoinedStr, ast.List, ast.Tuple)) for side in ast.iter_child_nodes(node)):
                yield node, f"{type(node.op).__name__} -> {new.__name__}", *change(node, "op", new())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            new_op = ast.UAdd() if isinstance(node.op, ast.USub) else None
            yield (
                node,
                f"without {type(node.op).__name__}",
                *(change(node, "op", new_op) if new_op else change(node, "operand", ast.UnaryOp(ast.Not(), node.operand))),
            )
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            yield node.test, "condition negated", *change(node, "test", ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            new_value = not node.value if isinstance(node.value, bool) else node.value + 1
            yield node, f"{node.value} -> {new_value}", *change(node, "value", new_value)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in NAMES:
                yield node, f"{name} -> {NAMES[name]}", *change(node.func, "id" if isinstance(node.func, ast.Name) else "attr", NAMES[name])


def sources() -> list[Path]:
    return [path.relative_to(REPO) for folder in FOLDERS for path in sorted((REPO / "cfvlm_ds" / folder).rglob("*.py"))]


def map_lines(work: Path) -> None:
    """Run all tests under coverage; write ``lines.json`` (file, line -> tests) and ``seconds.json`` (test -> duration, if it passes)."""
    import coverage

    work.mkdir(parents=True, exist_ok=True)
    include = ",".join(f"{REPO}/cfvlm_ds/{folder}/*" for folder in FOLDERS)
    (work / "coverage.cfg").write_text(RC.format(include=include, work=work))
    rc = ["--rcfile", str(work / "coverage.cfg")]
    paths = os.pathsep.join([str(REPO / "tests"), str(REPO)])
    tests = ["-m", "pytest", "-q", "-p", "mutants", "-n", "2", "--dist", "loadfile", "--junitxml", str(work / "junit.xml")]
    command = [sys.executable, "-m", "coverage", "run", *rc, *tests, "--ignore", "tests/slurm"]
    subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": paths})
    subprocess.run([sys.executable, "-m", "coverage", "combine", "--quiet", *rc, str(work)], cwd=REPO)
    seconds: dict[str, float] = collections.Counter()
    failed = set()
    for case in ElementTree.parse(work / "junit.xml").iter("testcase"):
        test = case.attrib["classname"].replace(".", "/") + ".py::" + case.attrib["name"].partition("[")[0]
        seconds[test] += float(case.attrib["time"])
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(test)
    (work / "seconds.json").write_text(json.dumps({test: s for test, s in seconds.items() if test not in failed}, indent=1))
    data = coverage.CoverageData(str(work / "coverage"))
    data.read()
    lines = {}
    for path in sources():
        by_line = data.contexts_by_lineno(str(REPO / path))
        lines[str(path)] = {n: sorted({c.partition(" ")[0].partition("[")[0] for c in contexts} - {""}) for n, contexts in by_line.items()}
    (work / "lines.json").write_text(json.dumps(lines))
    print(f"{len(seconds)} tests, of which {len(failed)} fail without a mutant and are not used: {sorted(failed)}")


def draw(seed: int, count: int) -> list[tuple[str, int, str, int]]:
    """Return ``count`` mutants drawn from all of them: file, its number in the file, the name and the line."""
    found = []
    for path in sources():
        for k, (node, name, _, _) in enumerate(mutations(ast.parse((REPO / path).read_text()))):
            found.append((str(path), k, name, node.lineno))
    print(f"{len(found)} mutants in {len(sources())} files")
    return random.Random(seed).sample(found, count)


def run_worker(work: Path, tree: Path, queue: list[tuple[str, int, str, int]], out: Path, budget: float) -> None:
    """Try the mutants of a queue in ``tree``; append a record of each to ``out``."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.deepspeed  # noqa: F401
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401

    lines, seconds = (json.loads((work / name).read_text()) for name in ("lines.json", "seconds.json"))
    files = collections.Counter()
    for test, s in seconds.items():
        files[test.partition("::")[0]] += s
    for path, k, name, line in queue:
        source = (tree / path).read_text()
        syntax = ast.parse(source)
        node, _, apply, _ = list(mutations(syntax))[k]
        executed = {test for n in statement_lines(syntax, node) for test in lines[path].get(str(n), [])}
        apply()
        tests = [test for test in executed or seconds if test in seconds and (executed or "/distributed/" in test)]
        began = time.monotonic()
        record = {
            "path": path,
            "number": k,
            "line": line,
            "name": name,
            "text": source.splitlines()[line - 1].strip(),
            "tests": len(tests),
            "killed": None,
            "budget": budget,
        }
        (tree / path).write_text(ast.unparse(ast.fix_missing_locations(syntax)))
        try:
            chosen_files = choose({t.partition("::")[0] for t in tests}, files, budget) if budget >= 100 else []
            for chosen in (choose(tests, seconds, budget), chosen_files):
                expected = sum((seconds | files)[test] for test in chosen)
                if chosen and (killed := run_tests(tree, chosen, 3 * expected + 60)):
                    record["killed"] = killed
                    break
        finally:
            (tree / path).write_text(source)
        record["seconds"] = round(time.monotonic() - began, 1)
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def statement_lines(tree: ast.AST, node: ast.AST) -> range:
    """Return the lines of the innermost simple statement, or head of a compound one, that holds ``node``.

    A module's, class's or ``def``'s own lines are executed by an import, for no test: it is then all lines of the file.
    """
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    above = [node]
    while above[-1] in parents:
        above.append(parents[above[-1]])
    statement = next(n for n in above if isinstance(n, ast.stmt))
    within = above[above.index(statement) + 1 :]
    if isinstance(statement, ast.FunctionDef) or not any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in within):
        return range(1, 10**4)
    head = getattr(statement, "body", None)
    return range(statement.lineno, head[0].lineno if head else (statement.end_lineno or statement.lineno) + 1)


def choose(tests, seconds: dict[str, float], limit: float) -> list[str]:
    """Return the fastest tests that take ``limit`` seconds together, at least one."""
    chosen: list[str] = []
    for test in sorted(tests, key=lambda test: seconds[test]):
        if chosen and sum(seconds[c] for c in chosen) + seconds[test] > limit:
            break
        chosen.append(test)
    return chosen


class InOrder:
    """Plugin of pytest that runs tests in the order of ``names``, test functions or files."""

    def __init__(self, names: list[str]):
        self.names = names

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: next(k for k, name in enumerate(self.names) if item.nodeid.startswith(name)))


def run_tests(tree: Path, tests: list[str], limit: float) -> str | None:
    """Run tests in a child of this process, which has imported the libraries; return what fails: a line of pytest, "time", or None."""
    report = tree / "report.txt"
    if (child := os.fork()) == 0:
        os.setsid()
        os.chdir(tree)
        with report.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(int(pytest.main(["-x", "-q", "--no-header", "--tb", "line", "-p", "no:cacheprovider", *tests], [InOrder(tests)])))
    deadline = time.monotonic() + limit
    status = None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return "time"
    if status == 0:
        return None
    failures = [line for line in report.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0][:200] if failures else f"status {status}"


def run(work: Path, seed: int, count: int, workers: int, budget: float) -> None:
    """Draw mutants and try those that were not killed or tried with this budget, in ``workers`` copies of the committed tree."""
    done = {(r["path"], r["number"]) for r in records(work) if r["killed"] or r["budget"] >= budget}
    queue = [mutant for mutant in draw(seed, count) if mutant[:2] not in done]
    children = []
    for k in range(workers):
        tree = work / f"tree{k}"
        if not tree.exists():
            subprocess.run(["git", "clone", "--quiet", "--local", str(REPO), str(tree)], check=True)
        env = os.environ | {"PYTHONPATH": str(tree), "TORCH_EXTENSIONS_DIR": str(work / f"extensions{k}")}
        (work / f"queue{k}.json").write_text(json.dumps(queue[k::workers]))
        children.append(
            subprocess.Popen([sys.executable, __file__, "work", str(work), "--worker", str(k), "--budget", str(budget)], env=env)
        )
    for child in children:
        child.wait()


def records(work: Path) -> list[dict]:
    """Return each mutant's record: of its kill, or else its last one."""
    found = [json.loads(line) for path in sorted(work.glob("records*.jsonl")) for line in path.read_text().splitlines()]
    return list({(r["path"], r["number"]): r for r in sorted(found, key=lambda r: (bool(r["killed"]), r["budget"]))}.values())


def report(work: Path) -> None:
    """Print the share of killed mutants per folder and every survivor."""
    by_folder = collections.defaultdict(list)
    for record in records(work):
        by_folder[record["path"].split("/")[1]].append(record)
    print("| folder | mutants | killed | % | line not executed by a test |\n|---|---|---|---|---|")
    for folder, found in [*sorted(by_folder.items()), ("all", records(work))]:
        killed = sum(bool(r["killed"]) for r in found)
        print(f"| {folder} | {len(found)} | {killed} | {100 * killed / len(found):.1f} | {sum(not r['tests'] for r in found)} |")
    for record in sorted(records(work), key=lambda r: (r["path"], r["line"])):
        if not record["killed"]:
            print(f"{record['path']}:{record['line']}  {record['name']}  ({record['tests']} tests)  {record['text']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["map", "run", "report", "work"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests per mutant (default 20)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work.resolve()
    if args.step == "map":
        map_lines(folder)
    elif args.step == "run":
        run(folder, args.seed, args.count, args.workers, args.budget)
    elif args.step == "report":
        report(folder)
    else:
        k = args.worker
        queue = json.loads((folder / f"queue{k}.json").read_text())
        run_worker(folder, folder / f"tree{k}", queue, folder / f"records{k}.jsonl", args.budget)
