"""The data sets of a run, as MLflow lists them beside it: by name, digest, place and size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cfvlm_ds.tracking.metrics_log import say

_MAX_NAME_CHARS, _MAX_DIGEST_CHARS, _MAX_SOURCE_CHARS = 500, 36, 10_000
_NOT_TAKEN = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""What a server says that is older than data sets, or does not like these."""


def log_inputs(client: Any, run: Any, inputs: Sequence[Mapping[str, Any]]) -> None:
    """Log the data sets that the run does not have yet: a start that goes on has the same, or others besides. Raises MlflowException where
    the server may take them later."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    there = getattr(run.inputs, "dataset_inputs", None) or ()
    known = {(each.dataset.name, each.dataset.digest, *(tag.value for tag in each.tags)) for each in there}
    new = []
    for each in inputs:
        name, digest = each["name"][:_MAX_NAME_CHARS], each["digest"][:_MAX_DIGEST_CHARS]
        if (name, digest, each["context"]) not in known:
            source = json.dumps({"uri": each["source"][:_MAX_SOURCE_CHARS]})
            profile = json.dumps({"num_groups": each["groups"], "num_rows": each["groups"]})
            dataset = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
            new.append(DatasetInput(dataset=dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, each["context"])]))
    try:
        if new:
            client.log_inputs(run.info.run_id, datasets=new)
    except MlflowException as error:
        if error.error_code not in _NOT_TAKEN:
            raise
        say(f"MLflow refuses the run's data sets ({' '.join(str(error).split())[:300]})")
