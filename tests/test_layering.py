"""Imports go to a lower layer only; heavy packages are imported in their own place only (DESIGN: layout and layers)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cfvlm_ds"
LAYERS = [
    {"errors", "hints", "reading", "templates", "versions"},
    {"groups", "config", "stopping", "run_files"},
    {"distributed"},
    {"likelihood", "attention", "figures", "heartbeat", "ds_config", "prompts", "untrusted"},
    {"run_folder"},
    {"models", "data", "scenes", "cluster", "reshard", "run_lock", "ds_check"},
    {"objectives", "collate", "engine", "checkpoint", "tracking"},
    {"memory", "validation", "self_check"},
    {"evaluation", "export", "preflight", "dry_run", "step", "tower_pass", "changes"},
    {"resume"},
    {"training"},
    {"cli"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {"deepspeed": {"engine", "ds_check", "checkpoint", "export", "dry_run"}, "mlflow": {"tracking"}, "matplotlib": {"figures"}}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, relative imports resolved."""
    module = ["cfvlm_ds", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: -node.level]) + "." if node.level else ""
            yield from (f"{base}{node.module}" if node.module else f"{base}{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = part(path)
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "cfvlm_ds" and len(pieces) > 1:
            if pieces[1] == own:
                assert path.name == "__init__.py" or len(pieces) > 2, f"{path} imports its own package's __init__"
            else:
                # An __init__ that gathers lower files may be imported by a sibling of a higher layer only.
                assert LAYER[pieces[1]] < LAYER[own], f"{path} (layer {LAYER[own]}) imports {name}"
        if pieces[0] in ONLY_IN:
            assert own in ONLY_IN[pieces[0]], f"{path} imports {pieces[0]}"


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in FILES} == set(LAYER)


def test_importing_the_package_needs_torch_alone() -> None:
    code = "import sys, cfvlm_ds; print([m for m in ('transformers', 'deepspeed', 'mlflow', 'PIL', 'matplotlib') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
