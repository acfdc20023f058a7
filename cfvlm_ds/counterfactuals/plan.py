"""Campaign plan: one YAML file with the data, the work folder and the options of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.shipped import refuse_no_file, resolve_shipped
from cfvlm_ds.core.strict import build, dotted, read_options
from cfvlm_ds.counterfactuals.options import EditOptions, ProposeOptions, SelectOptions, VerifyOptions, named
from cfvlm_ds.counterfactuals.work_folder import MAX_SHARDS, STEPS, WorkFolder


@dataclass(frozen=True)
class Plan:
    """Data, work folder and step options of a campaign, which makes groups from one data set.

    Args:
        data: captions and pictures, in any supported format.
        out: work folder.
        groups: file that `select` writes.
        root: folders of the pictures.
        format: format of the data.
        shards: number of parts into which the work is divided.
        propose: options of `data propose`.
        edit: options of `data edit`.
        verify: options of `data verify`.
        select: options of `data select`.
    """

    data: str = ""
    out: str = ""
    groups: str = ""
    root: list[str] | None = None
    format: str = "auto"
    shards: int = field(default=1, metadata={"within": (1, MAX_SHARDS)})
    propose: ProposeOptions = field(default_factory=ProposeOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    select: SelectOptions = field(default_factory=SelectOptions)

    def __post_init__(self) -> None:
        for option in ("data", "out"):
            if not getattr(self, option):
                raise ConfigError(f"{option} is empty; name the captions and the work folder")

    def check(self) -> None:
        """Raise ConfigError for options that a step would later refuse, because they are invalid or differ from the recorded ones."""
        from cfvlm_ds.counterfactuals.edit import step as edit
        from cfvlm_ds.counterfactuals.propose import PROPOSERS
        from cfvlm_ds.counterfactuals.propose import step as propose
        from cfvlm_ds.counterfactuals.select import checked as check_select

        named(self.propose.back_ends, PROPOSERS, "propose.with")
        propose.read_words(self.propose.words)
        edit.checked(self.edit)
        if self.groups:
            check_select(Path(self.groups), self.select, self.data)
        if (Path(self.out) / "run.json").exists():
            work = WorkFolder.open(Path(self.out))
            for step in STEPS:
                work.refuse_other(step, getattr(self, step))


def read_plan(file: str) -> Plan:
    """Read a plan from the user's YAML file or from an example in the package. An option without a value keeps its default. Raises
    ConfigError naming the invalid key.
    """
    path = resolve_shipped(file, "examples")
    refuse_no_file(file, path)
    listed = read_options(path, "write YAML as in examples/build_coco.yaml")
    for section in (value for value in listed.values() if isinstance(value, dict)):  # join names with commas, as on the command line
        section |= {name: ",".join(map(str, value)) for name, value in section.items() if isinstance(value, list)}
    if isinstance(listed.get("root"), str):
        listed["root"] = [listed["root"]]
    options = {name: _given(value) for name, value in listed.items() if value is not None}
    try:
        plan: Plan = build(Plan, options, known=[option.replace("back_ends", "with") for option, *_ in dotted(Plan)])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def _given(value: Any) -> Any:
    """If ``value`` is a section, remove its empty options and rename ``with`` to ``back_ends``. Any other value is returned unchanged."""
    if not isinstance(value, Mapping):
        return value
    return {{"with": "back_ends"}.get(name, name): option for name, option in value.items() if option is not None}
