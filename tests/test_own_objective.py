"""What a researcher's own script can do without touching the package: CONTRIBUTING's objective, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import REPO, losses, metrics, run_ranks, train_arguments


def test_the_objective_of_the_page_trains(model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    """At most 40 lines, of which two methods are needed; beside the package's own terms, with its options on the command line."""
    (block,) = re.findall(r"```python\n(.*?)```", (REPO / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 40 and block.count("    def ") == 2
    script, called = tmp_path / "mine.py", re.compile(r"^run\(\[.*\]\)$", re.MULTILINE)
    assert called.search(block)
    script.write_text(called.sub("import sys\nrun(sys.argv[1:])", block))
    options = train_arguments(model_dir, manifests, tmp_path / "run", "--train.max_steps", "3", "--objective.softmax.weight", "0.5")
    ((code, said),) = run_ranks(1, "forked:script", str(script), options, said=tmp_path / "said")
    assert code == 0, said
    assert all({"loss/softmax", "loss/align"} <= row.keys() for row in metrics(tmp_path / "run") if "loss" in row)
    assert len(losses(tmp_path / "run")) == 3
