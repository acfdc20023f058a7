"""Imports go to a lower floor only; heavy packages are imported in their own rooms only (docs/architecture.md shows the floors)."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, draw, write_rows

from cfvlm_ds.core.versions import version
from cfvlm_ds.deepspeed_compat.versions import KNOWN, unknown_version

PACKAGE = REPO / "cfvlm_ds"
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| (\d) \| (.+?) \|", PAGE, re.MULTILINE)
FLOOR = {room: int(floor) for floor, rooms in ROWS for room in re.findall(r"`(\w+)`", rooms)}
"""Room -> floor, from the page that a newcomer reads."""
ONLY_IN = {
    "deepspeed": {"engine", "deepspeed_compat"},
    "mlflow": {"tracking"},
    "matplotlib": {"tracking"},
    "diffusers": {"counterfactuals"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Modules, of this package by their full names, that a file imports at its top or within its functions."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = str(node.module)
            for alias in node.names:
                yield inner if (inner := f"{module}.{alias.name}") in MODULES else module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == PACKAGE.name and rest:
            if rest[0] == own:
                assert path.name == "__init__.py" or len(rest) > 1, f"{path} imports the door of its own room"
            else:
                assert FLOOR[rest[0]] < FLOOR[own], f"{path} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[rest[0]]})"
        if top in ONLY_IN:
            assert own in ONLY_IN[top], f"{path} imports {top}"


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: {other for other in imports(path) if other in MODULES and other != name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def at_once(path: Path) -> Iterator[str]:
    """Modules that a file imports when it is imported, with the packages that they are in."""
    tree = ast.Module([node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for node in tree.body:
        assert isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names:
            parts = (alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}").split(".")
            yield from (name for k in range(len(parts)) if (name := ".".join(parts[: k + 1])) in MODULES)


def test_training_opens_stores_and_loads_nothing_that_reads_other_data():
    """Formats, containers and the hub's client come with the first data set that is no store."""
    loaded, waiting = set[str](), ["cfvlm_ds.training.run", "cfvlm_ds.cli.train"]
    while waiting:
        if (name := waiting.pop()) not in loaded:
            loaded.add(name)
            waiting.extend(at_once(MODULES[name]))
    assert "cfvlm_ds.data.stored" in loaded and len(loaded) > 100
    other = ("cfvlm_ds.data.formats", "cfvlm_ds.data.containers", "cfvlm_ds.data.prepare")
    assert not [name for name in loaded if name.startswith(other)]


def test_every_room_has_a_floor_and_one_sentence_at_its_door():
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES} == set(FLOOR)
    for room in FLOOR:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())), f"{room} says nothing at its door"


def test_every_file_that_the_page_names_is_there():
    named = re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", PAGE)
    assert len(named) > 20 and not [name for name in named if not (PACKAGE / name).exists() and not (PACKAGE.parent / name).exists()]


def stored_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        for target in targets:
            yield from (part for part in ast.walk(target) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store))


def of_self(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


OF_LIBRARIES = {
    "ctx.cap",
    "ctx.forest",
    "ctx.scale",
    "processor.image_processor.size",
    "images.size",
    "member.size",
    "scoring.weight",
    "module.forward",
}


def test_no_object_is_finished_from_outside():
    """No attribute that a class of this package has is assigned but by its own methods; those of the libraries' objects may be."""
    trees = {path: parsed(path) for path in FILES}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {each.attr for found in classes for each in stored_attributes(found) if of_self(each)}
    own |= {n.target.id for found in classes for n in ast.walk(found) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert {"_waited", "step", "offset"} <= own
    stored = [(path, each) for path, tree in trees.items() for each in stored_attributes(tree) if not of_self(each)]
    outside = [f"{path}:{each.lineno}: {ast.unparse(each)}" for path, each in stored if each.attr in own]
    assert not [place for place in outside if place.split(": ")[1] not in OF_LIBRARIES]


INTERNAL = re.compile(
    r"ds_(tensor|shape|numel|id|status|process_group|active_sub_modules)|(fp32_)?\w*flat_groups|\w*partition\w*_groups\w*"
)


def beyond_public(path: Path) -> Iterator[str]:
    """Uses of DeepSpeed beside its public interface: what is imported from below it, private attributes, what it puts on parameters."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("deepspeed."))
        elif isinstance(node, ast.ImportFrom):
            yield from (str(node.module) for _ in node.names if str(node.module).split(".")[0] == "deepspeed")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and INTERNAL.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            private = re.search(r"(engine|optimizer|coordinator|zero|writer|reader)$", owner) and node.attr.startswith("_")
            other = owner == "deepspeed" and node.attr not in ("initialize", "init_distributed", "DeepSpeedConfig")
            if private or other or INTERNAL.fullmatch(node.attr):
                yield f"{owner}.{node.attr}"


def test_what_deepspeed_does_not_offer_is_used_in_one_place():
    found = {path: list(beyond_public(path)) for path in FILES}
    assert len([use for path, uses in found.items() if path.parent.name == "deepspeed_compat" for use in uses]) > 20
    assert not {path: uses for path, uses in found.items() if uses and path.parent.name != "deepspeed_compat"}


LOADS_BY_NAME = re.compile(r"from_pretrained|from_config|from_single_file|pipeline|load_dataset\w*|get_dataset_\w+|load_metric")
"""Functions of transformers, diffusers and datasets that may run code of what they load, or ask whether to."""
RUNS_CODE = {"torch.hub.load", "hub.load", "pickle.load", "pickle.loads", "yaml.load", "runpy.run_path", "eval", "exec", "__import__"}
SAFE = {"peft.PeftConfig.from_pretrained"}
"""Reads a JSON file, and has no such argument."""


def test_whatever_is_loaded_runs_no_code_of_its_own():
    """Nothing is unpickled, and no loader is left to ask whether to run the code of a folder or a repository."""
    refused: dict[str, dict[str, object]] = {"torch.load": {"weights_only": True}, "np.load": {"allow_pickle": False}}
    found, wrong = set(), []
    for path in FILES:
        for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name in SAFE:
                continue
            if LOADS_BY_NAME.fullmatch(name.rpartition(".")[2]):
                found.add(name)
                wanted: dict[str, object] = {"trust_remote_code": False}
            else:
                wanted = refused.get(name, {})
            given = {each.arg: each.value.value for each in call.keywords if isinstance(each.value, ast.Constant)}
            if name in RUNS_CODE or not wanted.items() <= given.items():
                wrong.append(f"{path}:{call.lineno}: {name}")
    assert not wrong
    assert {"AutoModelForImageTextToText.from_pretrained", "diffusers.DiffusionPipeline.from_pretrained"} <= found


def test_this_version_of_deepspeed_has_been_read():
    sentence = unknown_version(version("deepspeed"))
    assert sentence is None, sentence
    assert f'"deepspeed{KNOWN}"' in (PACKAGE.parent / "pyproject.toml").read_text()
    assert [unknown_version(each) is None for each in ("0.19.8", "0.19.10+cu130", "0.19.7", "0.20.0", "0.20.0.dev1", "none")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert "0.21.3 is installed" in str(unknown_version("0.21.3")) and f"'deepspeed{KNOWN}'" in str(unknown_version("0.21.3"))


def test_a_check_of_data_imports_neither_torch_nor_transformers(tmp_path):
    """1.5 s of processor time for 1,000 rows, where both take six more."""
    draw(tmp_path / "a.png", [("red", "circle"), ("blue", "square")])
    write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "caption": "a red circle"}])
    code = f"import sys; from cfvlm_ds.cli.main import main; main(['data', 'check', {str(tmp_path / 'rows.jsonl')!r}]); "
    code += "print([m for m in ('torch', 'transformers', 'deepspeed', 'mlflow') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]" and "problems         none" in printed


def test_commands_start_without_torch_and_objectives_need_it_alone():
    """What nobody uses yet is not imported: --help in 0.2 s where torch takes 2 and transformers 4 more."""
    heavy = "[m for m in ('torch', 'transformers', 'deepspeed', 'mlflow', 'PIL', 'matplotlib') if m in sys.modules]"
    code = f"import sys, cfvlm_ds.cli.main; print({heavy}); from cfvlm_ds import *; print({heavy}, weighted_loss.__name__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["[]", "['torch'] weighted_loss"]
