"""What mkdocs needs to know of this repository: pages from outside docs/, links to them, and the reference of all options.

The pages of the root keep the links that work where they are read as files; here each is found again at its place in the site, and one that
leads nowhere is a warning, which `mkdocs build --strict` makes an error. So is a file in backquotes that the repository does not have.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import posixpath
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the options of this checkout, whatever is installed
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/TRIALS.md")
HISTORY = ("CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/TRIALS.md")
"""Pages that may name files which are no more."""

log = logging.getLogger("mkdocs.hooks.cfvlm_ds")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)(#[^)\s\"]*)?")
_PATH = re.compile(r"`((?:cfvlm_ds|tests|slurm|examples|docs|benchmarks|ds_configs)/[\w./-]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of the root join those of docs/."""
    for page in ROOT_PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Generated parts filled in, links put right, files that are named looked for."""
    uri = page.file.src_uri
    if uri not in HISTORY:
        for named in _PATH.findall(markdown):
            if not (ROOT / named).exists():
                log.warning("%s names `%s`, which is not there", uri, named)
    parts = _FENCE.split(markdown)
    text = "".join(part if part.startswith("```") else _LINK.sub(lambda link: _relinked(link, uri), part) for part in parts)
    return text.replace("<!-- generated: options -->", options()) if uri == "configuration.md" else text


def _relinked(link: re.Match[str], uri: str) -> str:
    """A link from a file of the repository to another one, as a link from page to page."""
    before, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    source = uri if uri in ROOT_PAGES else f"docs/{uri}"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / found).is_file():
        log.warning("%s links to %s, which is not there", source, target)
    elif found in ROOT_PAGES or found.startswith("docs/"):
        there = found if found in ROOT_PAGES else found.removeprefix("docs/")
        return f"{before}{os.path.relpath(there, posixpath.dirname(uri) or '.')}{anchor}"
    else:
        log.warning("%s links to %s, which is no page; name it in backquotes", source, target)
    return link[0]


def options() -> str:
    """A table of every option: of each section of the run's configuration, then of each term of the objective."""
    from cfvlm_ds.core.config import SECTIONS
    from cfvlm_ds.objectives import OBJECTIVES

    tables = [_section(f"{name}.", section, None) for name, section in SECTIONS.items()]
    return "\n".join(tables + [_section(f"objective.{name}.", term, "confirm") for name, term in OBJECTIVES.items()])


def _section(prefix: str, section: Any, kind: str | None) -> str:
    """A heading, what the section is, a row for each of its options, and the sections inside it. ``kind`` is what options that declare
    none have."""
    said: dict[str, str] = {}
    for each in reversed(section.__mro__):
        said |= _arguments(each)
    hints, rows, inside = typing.get_type_hints(section), [], []
    for option in dataclasses.fields(section):
        if option.name not in said:
            raise PluginError(f"{section.__name__}.{option.name} has no sentence under Args, and the reference of options needs one")
        hint, own = hints[option.name], option.metadata.get("on_resume") or kind
        nested = next(filter(dataclasses.is_dataclass, _parts(hint)), None)
        kinds = {typing.get_origin(part) for part in _parts(hint)}  # several by name, or in a list
        several = "NAME." if dict in kinds else f"{nested.__name__.upper()}." if nested and list in kinds else ""
        if nested:
            inside.append(_section(f"{prefix}{option.name}.{several}", nested, own))
        if not nested or several:
            rows.append(_row(prefix, option, hint, said[option.name], own or "ignored"))
    table = "| option | type | default | range | on resume | |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return f"### {prefix.rstrip('.')}\n\n{_plain(inspect.getdoc(section).split('Args:')[0])}\n\n{table}\n" + "\n".join(inside)


def _row(prefix: str, option: Any, hint: Any, sentence: str, kind: str) -> str:
    from cfvlm_ds.core.strict import TERM

    made = option.default_factory is not dataclasses.MISSING
    default = option.default_factory() if made else option.default
    shown = "required" if default is dataclasses.MISSING else "none" if default in (None, "", {}) else f"`{_written(default)}`"
    within = TERM.get(option.name) if prefix.startswith("objective.") else option.metadata.get("within")
    cells = (f"`{prefix}{option.name}`", _type(hint), shown, _range(within), kind, _plain(sentence))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _arguments(section: type) -> dict[str, str]:
    """The sentences under ``Args:`` of a class's own docstring."""
    _, _, listed = inspect.cleandoc(section.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parts(hint: Any) -> list[Any]:
    return [hint, *(part for each in typing.get_args(hint) for part in _parts(each))]


def _type(hint: Any) -> str:
    """A type as a person says it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{_written(value)}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return f"list of {typing.get_args(hint)[0].__name__.upper()}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", list: "list of texts", dict: "names with values"}
    return names.get(typing.get_origin(hint) or hint) or hint.__name__


def _written(value: Any) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _range(within: tuple[float, float] | None) -> str:
    if within is None:
        return ""
    low, high = within
    return f"at least {low:g}" if high >= _ENDLESS else f"{low:g} to {high:.10g}"


_ENDLESS = 2**53


def _plain(text: str) -> str:
    """A docstring's text on one line, in Markdown's own quotes."""
    return " ".join(text.replace("``", "`").split())
