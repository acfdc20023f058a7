"""The plan of a whole campaign in one YAML: the data, the work folder, and the options of every step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.reading import read_yaml
from cfvlm_ds.core.shipped import found as shipped_file
from cfvlm_ds.core.shipped import refuse_no_file
from cfvlm_ds.counterfactuals.options import EditOptions, ProposeOptions, SelectOptions, VerifyOptions
from cfvlm_ds.counterfactuals.work_folder import MAX_SHARDS, WorkFolder

T = TypeVar("T")
WITH = {"with": "back_ends"}
"""Names that an option has for people, since Python keeps the word for itself."""


@dataclass(frozen=True)
class Plan:
    """A campaign.

    Args:
        data: captions and pictures, in any known format.
        out: work folder.
        groups: file that `select` writes.
        root: folders of the pictures.
        format: format of the data.
        shards: parts that the work is cut in.
        propose: options of `data propose`.
        edit: options of `data edit`.
        verify: options of `data verify`.
        select: options of `data select`.
    """

    data: str
    out: str
    groups: str = ""
    root: list[str] | None = None
    format: str = "auto"
    shards: int = 1
    propose: ProposeOptions = field(default_factory=ProposeOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    select: SelectOptions = field(default_factory=SelectOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigError(f"shards {self.shards}: it is 1 to {MAX_SHARDS}")
        for option in ("data", "out"):
            if not getattr(self, option):
                raise ConfigError(f"{option} is empty; the captions and the work folder are needed")

    def check(self) -> None:
        """Raise ConfigError for what a later step would refuse, when all that comes before it is done: options that are wrong, or other
        ones than it was begun with."""
        from cfvlm_ds.counterfactuals import verify
        from cfvlm_ds.counterfactuals.edit import step as edit
        from cfvlm_ds.counterfactuals.propose import PROPOSERS
        from cfvlm_ds.counterfactuals.propose import step as propose
        from cfvlm_ds.counterfactuals.select import checked as check_select

        propose.named(self.propose.back_ends, PROPOSERS, "propose.with")
        propose.read_words(self.propose.words)
        edit.checked(self.edit)
        if self.groups:
            check_select(Path(self.groups), self.select, self.data)
        if (Path(self.out) / "run.json").exists():
            work = WorkFolder.open(Path(self.out))
            work.refuse_other("propose", propose.settings_of(self.propose))
            work.refuse_other("edit", edit.settings_of(self.edit))
            work.refuse_other("verify", verify.settings_of(self.verify))


_SECTIONS = {"propose": ProposeOptions, "edit": EditOptions, "verify": VerifyOptions, "select": SelectOptions}


def read_plan(file: str) -> Plan:
    """The plan of a YAML file, of the user's own or one that comes with the package. Raises ConfigError naming the key."""
    path = shipped_file(file, "examples")
    refuse_no_file(file, path, "examples")
    try:
        value = read_yaml(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); write YAML as in examples/build_coco.yaml") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: it holds a {type(value).__name__}; write YAML as in examples/build_coco.yaml")
    given = dict(value)
    for name, section in _SECTIONS.items():
        inside = given.get(name) or {}
        if not isinstance(inside, Mapping):
            raise ConfigError(f"{path}: {name} is a {type(inside).__name__}; write its options below it, as in examples/build_coco.yaml")
        given[name] = of_section(section, inside, f"{path}: {name}.")
    if isinstance(given.get("root"), str):
        given["root"] = [given["root"]]
    plan = of_section(Plan, given, f"{path}: ")
    if plan.propose.shards != 1:
        raise ConfigError(f"{path}: propose.shards is said as shards, once for all steps")
    return dataclasses.replace(plan, propose=dataclasses.replace(plan.propose, shards=plan.shards))


def of_section(section: type[T], given: Mapping[Any, Any], where: str) -> T:
    """A dataclass of options from plain values. Raises ConfigError for an unknown key or a value of another type."""
    known = {each.name: each for each in dataclasses.fields(section)}  # type: ignore[arg-type]
    people = {name: name for name in known} | {name: own for name, own in WITH.items() if own in known}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in people:
            near = difflib.get_close_matches(str(key), people, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(people))}"
            raise ConfigError(f"{where}{key}: no such option; {hint}")
        values[people[key]] = _typed(value, known[people[key]], f"{where}{key}")
    for each in known.values():
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and each.name not in values:
            raise ConfigError(f"{where}{each.name}: it is needed")
    try:
        return section(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{str(error).removeprefix('--')}") from error


def _typed(value: Any, option: dataclasses.Field[Any], where: str) -> Any:
    kind = str(option.type)
    if kind == "str" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ",".join(value)
    right = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "float | None": value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        "list[str] | None": value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
    }
    if not right.get(kind, True):
        raise ConfigError(f"{where}: {value!r} is no {kind}; correct it")
    return float(value) if kind.startswith("float") and value is not None else value
