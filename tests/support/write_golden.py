"""Writer of tests/golden/train20.json from the plain-torch reference loop (make golden)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parent.parent / part) for part in ("", "unit"))

from conftest import REPO, build_test_model, environment, write_manifest

with tempfile.TemporaryDirectory() as folder:
    model, manifest = build_test_model(Path(folder) / "llava"), write_manifest(Path(folder) / "train.jsonl", 48, 0)
    command = [sys.executable, str(REPO / "tests/support/reference_loop.py"), str(model), str(manifest), "20"]
    printed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    (REPO / "tests/golden/train20.json").write_text(json.dumps([round(loss, 5) for loss in json.loads(printed)]) + "\n")
