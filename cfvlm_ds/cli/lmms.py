"""``cfvlm-ds lmms_args``, and what lmms-eval finds when this package is installed beside it: a model named ``cfvlm_ds``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfvlm_ds.cli.options import ImageLimits, add_function, model_named
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError

NAME = "cfvlm_ds"


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    add_function(commands, _lmms_args)


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` names; lmms-eval calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path="cfvlm_ds.cli.lmms_model.LmmsModel")


def checked_model(name: str, identity: str, limits: ImageLimits) -> tuple[ModelConfig, Path | None]:
    """The model of lmms-eval's arguments, and its adapters.

    lmms-eval keeps answers by a model's name and arguments, and would serve those of weights that have been replaced since. So the
    arguments have the ``identity`` of what they name. Raises ConfigError where it is absent or another one's.
    """
    if not name:
        raise ConfigError("the model's arguments lack pretrained=MODEL; `cfvlm-ds lmms_args MODEL` prints them")
    model, adapter = model_named(name, limits)
    if (found := _identity(model, adapter)) != identity:
        wrong = f"identity={identity} is not that of {name} as it is now" if identity else "the model's arguments lack its identity"
        raise ConfigError(f"{wrong}, and lmms-eval keeps answers by these arguments; `cfvlm-ds lmms_args` prints them: identity={found}")
    return model, adapter


def _identity(model: ModelConfig, adapter: Path | None) -> str:
    """Weights, adapters, and what turns pictures and texts into inputs, in few letters; the first is none of a number's, as lmms-eval
    would read one."""
    import hashlib
    import json

    from cfvlm_ds.models import adapter_fingerprint, fingerprint, load_config

    load_config(model.name_or_path)  # which says what is no model
    parts = fingerprint(model) | ({} if adapter is None else {"adapter": adapter_fingerprint(adapter)})
    return "w" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _lmms_args(model: str, *, limits: ImageLimits) -> None:
    """Print the arguments by which lmms-eval asks a model: lmms-eval --model cfvlm_ds --model_args "$(cfvlm-ds lmms_args runs/mine)" ...

    Example: cfvlm-ds lmms_args runs/mine

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
    """
    if set(model) & set(",={}[]\"'") or model != model.strip():
        raise ConfigError(f"{model}: lmms-eval's arguments take no such letters in a value; give the folder another name")
    given = {name: value for name, value in vars(limits).items() if value}
    found = {"pretrained": model, "identity": _identity(*model_named(model, limits)), **given}
    print(",".join(f"{name}={value}" for name, value in found.items()))
