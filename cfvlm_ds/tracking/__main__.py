"""``python -m cfvlm_ds.tracking RUN_DIR``: deliver to MLflow what it lacks of a run that has ended."""

from __future__ import annotations

import sys
from pathlib import Path

from cfvlm_ds.tracking.mlflow_delivery import deliver

if len(sys.argv) != 2:
    sys.exit("usage: python -m cfvlm_ds.tracking RUN_DIR")
sys.exit(0 if deliver(Path(sys.argv[1])) else 1)
