"""What is wrong with an option, in one sentence: what the parser says of it is written for programmers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from cfvlm_ds.core.data_config import EvaluationSet, Source
from cfvlm_ds.core.nearest_option import nearest

SPLITS = (
    "give NAME: PATH, or NAME: {path: PATH, root: FOLDER, format: NAME} with any of the last two, or NAME: {benchmark: NAME, root: FOLDER}"
)


_SOURCES = "give FILE, or a list of {path: FILE, weight: NUMBER, root: FOLDER, format: NAME} with any of the last three"


def one_sentence(message: str, names: Sequence[str], file: str) -> str:
    """jsonargparse's message on one line, in the words of YAML, with the nearest valid option where the user named an unknown one.

    ``names`` are all options, and ``file`` is the last file of options that was given.
    """
    message = " ".join(message.split())
    if f"'{EvaluationSet.__module__}.{EvaluationSet.__name__}'" in message:  # pages about classes that nobody named
        return f"data.evaluation: an entry is not a manifest; {SPLITS}"
    if f"[{Source.__module__}.{Source.__name__}]" in message:
        return _about_a_source(message)
    if message.startswith("Unexpected config:"):
        return f"{file}: no options in it; write YAML as in examples/"
    if plain := re.match(r"(?:Parser key )?\"?([\w.]+)\"?: Unable to load config '(.*?)' - ", message):
        section, value = plain[1], plain[2]
        inside = _MEANT.get(section.rpartition(".")[2])
        return f"{section} is a section of options, not {value!r}; " + (f"set {section}.{inside} to it" if inside else "see --help")
    if lone := re.match(r"argument (--[\w.]+): expected one argument", message):
        return f"{lone[1]} needs a value; write {lone[1]} VALUE, which is true or false where the option is a switch"
    unknown = re.search(r"(?:[Uu]nrecognized arguments:|[Kk]ey|[Oo]ption) '?-{0,2}([\w.-]+)'?", message)
    if not unknown or unknown[1] in names:
        return _of_another_type(message.removeprefix("Parser key ").replace('"', ""))
    # A key of a YAML section is reported beside its section; one that was given without any is compared with the last parts of options.
    section = re.search(r"Group '([\w.]+)'|Parser key \"([\w.]+)\"", message)
    option = f"{section[1] or section[2]}.{unknown[1]}" if section else unknown[1]
    if option.endswith((".yaml", ".yml")):
        return f"unknown option {option!r}; a file of options is given by --config {option}"
    near = nearest(option, names)
    return f"unknown option {option!r}" + (f"; did you mean {near!r}?" if near else "; see --help")


_MEANT = {"model": "name_or_path", "data": "train", "lora": "rank"} | dict.fromkeys(
    ("vision_tower", "projector", "language_model"), "tuning"
)
"""The option of a section that somebody means who gives the section a value."""


def _about_a_source(message: str) -> str:
    stranger = re.search(r"Option '(\w+)' is not accepted", message)
    wrong = re.search(r'Parser key "?(\w+)"?: .*? Given value: (.*?) - Expected', message)
    if stranger:
        near = nearest(f"data.train.{stranger[1]}", [f"data.train.{each.name}" for each in fields(Source)])
        said = f"a source has no {stranger[1]!r}" + (f"; did you mean {near.rpartition('.')[2]!r}?" if near else "")
    elif wrong:
        said = f"{wrong[1]} of a source cannot be {wrong[2]}"
    else:
        said = "a source has no path" if "required: path" in message else "an entry is not a source"
    return f"data.train: {said}; {_SOURCES}"


def _of_another_type(message: str) -> str:
    """``OPTION: expected a number, got fast`` for a message about Python's types; any other as it is."""
    wanted = re.search(r"Subtypes: \[(.*?)\] Errors: |: Expected a (.*?)\. Got value: ", message)
    option, _, _ = message.partition(": ")
    _, got, value = message.rpartition("iven value: " if wanted and wanted[1] else "Got value: ")
    if not wanted or not got:
        return message
    if option == "data.evaluation":
        return f"data.evaluation: {value} has no name; {SPLITS}"
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", wanted[2] or "")
    kinds = choices[1].replace("'", "").split(", ") if choices else [_KINDS.get(kind, kind) for kind in _split(wanted[1] or wanted[2])]
    expected = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    return f"{option}: expected {expected}, got {value}"


def _split(types: str) -> list[str]:
    return re.split(r", (?![^\[]*\])", types)


_KINDS = {
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'dict'>": "NAME: VALUE",
    "<class 'list'>": "a list",
    "<class 'NoneType'>": "null",
    "list[str]": "a list of texts",
}
