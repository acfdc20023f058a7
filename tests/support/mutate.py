"""Mutation testing: single changes of the code, drawn by a seed, and the tests that fail on each.

    pip install pytest-cov
    python tests/support/mutate.py --out mutants --count 300 cfvlm_ds/{objectives,batching,models,training,checkpoint}

A change replaces one operator, bound, sign, constant or condition. The unit tests run once with coverage; a change is then tried on the
tests that execute its line, the fastest first, at most a minute of them. ``survivors.txt`` lists the changes on which no test fails.
A killed campaign continues.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
TESTS_S = 60
"""Duration of the tests that a change is tried on."""
TIMEOUT_S = 300
OPPOSITE: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add},
    **{ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv},
}


@dataclass(frozen=True)
class Mutant:
    """A change of the source text between two positions of a line; ``col`` and ``end`` are offsets in UTF-8."""

    path: str
    line: int
    col: int
    end: int
    old: str
    new: str


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every change of a file. Annotations, raised errors, assertions and calls that print are left alone."""
    source = path.read_text()
    lines = source.encode().splitlines()

    def change(node: ast.expr, new: ast.expr) -> Iterator[Mutant]:
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            old = lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
            text = ast.unparse(new)
            yield Mutant(str(path.relative_to(REPO)), node.lineno, node.col_offset, node.end_col_offset, old, f"({text})")

    def visit(node: ast.AST) -> Iterator[Mutant]:
        match node:
            case ast.Raise() | ast.Assert() | ast.AnnAssign(value=None) | ast.JoinedStr():
                return
            case ast.Compare(left, [op], rest) if type(op) in OPPOSITE:
                yield from change(node, ast.Compare(left, [OPPOSITE[type(op)]()], rest))  # type: ignore[list-item]
            case ast.BoolOp(op, values):
                yield from change(node, ast.BoolOp(OPPOSITE[type(op)](), values))  # type: ignore[arg-type]
            case ast.BinOp(left, op, right) if type(op) in OPPOSITE and not isinstance(left, ast.Constant | ast.JoinedStr):
                yield from change(node, ast.BinOp(left, OPPOSITE[type(op)](), right))  # type: ignore[arg-type]
            case ast.UnaryOp(ast.USub() | ast.Not(), operand):
                yield from change(node, operand)
            case ast.Constant(bool(value)):
                yield from change(node, ast.Constant(not value))
            case ast.Constant(int(value) | float(value)):
                yield from change(node, ast.Constant(value + 1))
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
                yield from change(test, ast.UnaryOp(ast.Not(), test))
        hidden = {id(getattr(node, name, None)) for name in ("annotation", "returns")}
        for child in ast.iter_child_nodes(node):
            if id(child) not in hidden and not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                yield from visit(child)

    yield from visit(ast.parse(source))


def covering_tests(out: Path) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """Run the unit tests once with coverage; return (file, line) -> tests that execute it, and test -> seconds.

    The tests of a line that is executed at import are those that execute any line of the file.
    """
    data, times = out / "coverage", out / "times.xml"
    if not times.is_file():
        settings = out / "coveragerc"
        settings.write_text(f"[run]\nsource = cfvlm_ds\ndata_file = {data}\ncore = ctrace\n")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/unit", "--cov", "--cov-context=test"]
        subprocess.run([*command, f"--cov-config={settings}", "--cov-report=", f"--junitxml={times}"], cwd=REPO, check=False)
    seconds = {}
    for case in ElementTree.parse(times).iter("testcase"):
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        seconds[test] = float(case.get("time", 0))
    covered: dict[tuple[str, int], set[str]] = {}
    from coverage.numbits import numbits_to_nums

    with sqlite3.connect(data) as database:
        tables = "line_bits join file on file.id = file_id join context on context.id = context_id"
        rows = database.execute(f"select file.path, context.context, numbits from {tables}").fetchall()
    at_import = list[tuple[str, int]]()
    for path, context, bits in rows:
        places = [(os.path.relpath(path, REPO), line) for line in numbits_to_nums(bits)]
        test = context.rpartition("|")[0]
        if test in seconds:
            for place in (*places, (places[0][0], 0)):
                covered.setdefault(place, set()).add(test)
        elif not context:
            at_import += places
    for place in at_import:
        covered.setdefault(place, covered.get((place[0], 0), set()))
    return covered, seconds


def survives(mutant: Mutant, tests: list[str], copy: Path) -> bool:
    """Return True if all tests pass with the change made in a copy of the repository."""
    path = copy / mutant.path
    source = path.read_bytes()
    lines = source.splitlines(keepends=True)
    at = mutant.line - 1
    lines[at] = lines[at][: mutant.col] + mutant.new.encode() + lines[at][mutant.end :]
    path.write_bytes(b"".join(lines))
    try:
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={copy}.tmp", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_bytes(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    covered, seconds = covering_tests(out)
    files = sorted(path.resolve() for folder in options.folders for path in folder.rglob("*.py"))
    drawn = random.Random(options.seed).sample([mutant for path in files for mutant in mutants(path)], options.count)
    record = out / "results.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    results = {Mutant(**{key: value for key, value in row.items() if key != "result"}): row["result"] for row in done}
    copies = [out / f"copy{worker}" for worker in range(options.workers)]
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", out.name))

    def run(worker: int) -> None:
        for mutant in drawn[worker :: options.workers]:
            if mutant in results:
                continue
            begun = time.monotonic()
            tests = sorted(covered.get((mutant.path, mutant.line), ()), key=lambda test: seconds[test])
            sums = itertools.accumulate(seconds[test] for test in tests)
            tests = tests[: max(1, sum(total <= TESTS_S for total in sums))]
            result = "not executed" if not tests else "survived" if survives(mutant, tests, copies[worker]) else "killed"
            results[mutant] = result
            with record.open("a") as file:
                file.write(json.dumps({**asdict(mutant), "result": result}) + "\n")
            place = f"{mutant.path}:{mutant.line} {mutant.old} -> {mutant.new}"
            print(f"{len(results)} of {len(drawn)}: {result} {place} ({len(tests)} tests, {time.monotonic() - begun:.0f} s)", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(run, range(options.workers)))
    for folder in sorted({Path(mutant.path).parts[1] for mutant in drawn}):
        print(folder, dict(Counter(results[mutant] for mutant in drawn if Path(mutant.path).parts[1] == folder)))
    lines = [f"{m.path}:{m.line}: {m.old} -> {m.new}: {results[m]}" for m in drawn if results[m] != "killed"]
    (out / "survivors.txt").write_text("\n".join(sorted(lines)) + "\n")
    print(f"{len(drawn) - len(lines)} of {len(drawn)} killed; the others: {out / 'survivors.txt'}")


if __name__ == "__main__":
    main()
