"""Training runs that each write watched.json: how often the vision tower's modules ran, and how often ZeRO-3 gathered the tower's weights,
before and after the feature cache was filled.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conftest import write_json
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from cfvlm_ds import engine
from cfvlm_ds.cli.train import run
from cfvlm_ds.training import run as training

GATHER = "_PartitionedParameterCoordinator__all_gather_params"
initialize, precompute, gather = engine.initialize, training.precompute_features, getattr(PartitionedParameterCoordinator, GATHER)
seen: dict[str, Counter[str]] = {}
names: dict[int, str] = {}
phase = "before"


def watched(*arguments):  # type: ignore[no-untyped-def]
    ds_engine = initialize(*arguments)
    scorer = ds_engine.module
    names.update({id(p): name for name, p in scorer.model.named_parameters() if scorer.family.module_of(name) == "vision_tower"})
    for name, module in scorer.model.named_modules():
        parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if any(scorer.family.module_of(parameter) == "vision_tower" for parameter in parameters):
            module.register_forward_hook(lambda *_: seen[phase].update(["runs"]))
    return ds_engine


def filled(*arguments):  # type: ignore[no-untyped-def]
    global phase
    cache = precompute(*arguments)
    phase = "after"
    return cache


def gathered(self, params, forward):  # type: ignore[no-untyped-def]
    seen[phase].update(names[id(p)] for p in params if id(p) in names)
    return gather(self, params, forward)


def train_all(trainings: Sequence[list[str]]) -> None:
    """Execute training runs like ``forkserver_ranks.train_all``."""
    global phase
    engine.initialize, training.precompute_features = watched, filled
    setattr(PartitionedParameterCoordinator, GATHER, gathered)
    for arguments in trainings:
        phase = "before"
        seen.update(before=Counter(), after=Counter())
        names.clear()
        run(arguments)
        write_json(Path(arguments[arguments.index("--train.output_dir") + 1]) / "watched.json", seen)
