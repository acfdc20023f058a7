"""Picture editors, which change only what a counterfactual caption requires."""

from __future__ import annotations

from collections.abc import Callable

from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.edit.diffusion import Diffusers
from cfvlm_ds.counterfactuals.edit.flip import Flip
from cfvlm_ds.counterfactuals.edit.outside import Command, Folder, TextAlone
from cfvlm_ds.counterfactuals.options import EditOptions

EDITORS: dict[str, Callable[[EditOptions], Editor]] = {
    "flip": Flip,
    "folder": Folder,
    "none": TextAlone,
    "diffusers": Diffusers,
    "command": Command,
}
"""Editors by name. A user's script can add one with ``EDITORS["my_editor"] = ...``."""
