"""Jobs of slurm/train_8node.sh on the test cluster: submitted with the tests' environment, watched through the run folder."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.cluster import LIVE, Cluster, wait_until

REPO = Path(__file__).resolve().parent.parent.parent
# Eight ranks on two cores: no compiler that is not used, and time for everybody.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
ENVIRONMENT |= {"PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@dataclass
class Job:
    """A submitted job with its run folder."""

    cluster: Cluster
    id: str
    run_dir: Path

    @property
    def log(self) -> str:
        """What slurm/launch.sh and rank 0 have said."""
        path = self.run_dir.with_suffix(".log")
        return path.read_text() if path.exists() else ""

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far."""
        path = self.run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
        return [row["loss"] for row in rows if "loss" in row]

    @property
    def record(self) -> dict[str, str]:
        """What the controller says of it: JobState, Restarts, ..."""
        return self.cluster.job(self.id)

    @property
    def nodes(self) -> list[str]:
        """Where it runs."""
        return self.cluster.run("scontrol", "show", "hostnames", self.record["NodeList"]).split()

    def trained_again(self, start: int) -> set[int]:
        """The steps of one start, counted from 0, that an earlier one had trained."""
        return self.trained(start) & set().union(*map(self.trained, range(start)))

    def trained(self, start: int) -> set[int]:
        """The steps of one start, counted from 0."""
        log = self.run_dir / "slurm" / self.id / str(start) / "rank-0.log"
        return set(map(int, re.findall(r"^step (\d+)/", log.read_text(), re.M))) if log.exists() else set()

    def trains(self, start: int, seconds: float = 900) -> None:
        """Wait until that start has trained a step, or the job has ended."""
        wait_until(lambda: self.trained(start) or not self.alive(), seconds, f"a step of start {start} of {self.run_dir.name}")

    def reach(self, step: int, seconds: float = 900) -> None:
        """Wait until ``step`` steps are recorded; fails at once when the job has ended without them."""
        wait_until(lambda: len(self.losses) >= step or not self.alive(), seconds, f"step {step} of {self.run_dir.name}")
        if len(self.losses) < step:
            raise AssertionError(f"ended before step {step}:\n{self.log}")

    def alive(self) -> bool:
        """Whether Slurm still has something to do for it."""
        return self.record["JobState"] in LIVE

    def end(self, seconds: float = 1200) -> dict[str, str]:
        """The controller's record once the job has ended."""
        return self.cluster.finish(self.id, seconds)

    def usr1(self) -> None:
        """What ``#SBATCH --signal=B:USR1@300`` does."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)


def sbatch(cluster: Cluster, log: Path, options: Sequence[str], script: str, *arguments: str, root: Path = REPO, **environment: str) -> str:
    """``sbatch OPTIONS slurm/SCRIPT ARGUMENTS`` from the repository, or another folder with such scripts, with one rank per node and no
    GPUs; the job's id."""
    exported = ",".join(f"{name}={value}" for name, value in (ENVIRONMENT | environment).items())
    pattern = str(log).replace("%", "%%")
    place = ["--gpus-per-node=0", "--ntasks-per-node=1", f"--chdir={root}", f"--output={pattern}", f"--export={exported}"]
    return cluster.run("sbatch", "--parsable", *place, *options, str(root / "slurm" / script), *arguments).strip()


def submit(
    cluster: Cluster,
    run_dir: Path,
    train: Sequence[str],
    *options: str,
    script: str = "train_8node.sh",
    root: Path = REPO,
    **environment: str,
) -> Job:
    """A training job that writes to ``run_dir``, its log beside it."""
    arguments = [*train, "--train.output_dir", str(run_dir)]
    return Job(cluster, sbatch(cluster, run_dir.with_suffix(".log"), options, script, *arguments, root=root, **environment), run_dir)
