"""The long fault campaign: eight ranks of ZeRO-3 on a real Slurm, one fault each, judged by the weights of an undisturbed run.

``make test-long`` prints a Markdown table for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import build_test_model, write_manifest
from safetensors.torch import load_file
from slurm.cluster import Cluster, wait_until
from slurm.jobs import Job, submit

STEPS = 24
REPEATED = random.Random(0)


def nothing(job: Job) -> None:
    """none"""


def usr1(job: Job) -> None:
    """USR1 to the script, as before a time limit"""
    job.usr1()


def killed(job: Job) -> None:
    """kill -9 of a random rank"""
    os.kill(_pids(job)[REPEATED.randrange(8)], 9)


def stopped(job: Job) -> None:
    """SIGSTOP of rank 0 (`train.hang_timeout_s` 20)"""
    os.kill(_pids(job)[0], 19)
    wait_until(lambda: (job.run_dir / "heartbeat" / "hang.txt").exists(), 600, "a sentence about the hang")
    print((job.run_dir / "heartbeat" / "hang.txt").read_text().strip(), file=sys.stderr)


def power(job: Job) -> None:
    """power cut of one node, back after 10 s"""
    job.cluster.power_off("node4")
    time.sleep(10)
    job.cluster.power_on("node4")


def lost(job: Job) -> None:
    """power cut of one node that stays away; a ninth node is free"""
    job.cluster.power_off("node5")


def controller(job: Job) -> None:
    """slurmctld restarted under the running job"""
    job.cluster.restart_controller()


def requeued(job: Job) -> None:
    """`scontrol requeue` by hand"""
    job.cluster.run("scontrol", "requeue", job.id)


def preempted(job: Job) -> None:
    """a job of higher priority takes one of its nodes (`GraceTime` 120 s)"""
    job.cluster.run("sbatch", "--partition=urgent", "--nodelist=node2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")


def drained(job: Job) -> None:
    """one node set to drain, then USR1: the job moves to the ninth node"""
    job.cluster.run("scontrol", "update", "NodeName=node6", "State=DRAIN", "Reason=test")
    job.usr1()


FAULTS = (nothing, usr1, killed, stopped, controller, requeued, preempted, power, drained, lost)  # the last one costs the cluster a node


def _pids(job: Job) -> list[int]:
    """The ranks' process numbers as this machine counts them; each node counts its own."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(part.split("=", 1) for part in path.read_text().split("\0") if "=" in part)
            words = path.with_name("cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("SLURM_JOB_ID") == job.id and "train.py" in words and str(job.run_dir) in words and words[0].endswith("python"):
            found.setdefault(int(variables["SLURM_PROCID"]), int(path.parent.name))
    return [found[rank] for rank in sorted(found)]


def main(names: list[str]) -> None:
    """Run the undisturbed case and those named (default all); exit code 1 where one cost more than a start, or other weights."""
    chosen = [fault for fault in FAULTS if fault is nothing or not names or fault.__name__ in names]
    with tempfile.TemporaryDirectory(prefix="cfvlm_ds-faults-") as folder:
        work = Path(folder)
        given = {"config": "tests/support/train.yaml", "deepspeed": "tests/support/z3_partitioned.json", "train.max_steps": str(STEPS)}
        given |= {"data.train": str(write_manifest(work / "train.jsonl", 48)), "train.per_device_train_batch_size": "2"}
        given |= {"model.name_or_path": str(build_test_model(work / "model")), "train.save_steps": "10", "train.export": "true"}
        given |= {"train.hang_timeout_s": "20"}
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        (work / "cluster").mkdir()
        cluster = Cluster(work / "cluster", size=9)
        try:
            cluster.start()
            print("| fault | job | starts | steps trained again | time, s | weights |\n|---|---|---:|---:|---:|---|")
            same = [_case(cluster, work, options, fault) for fault in chosen]
        finally:
            cluster.stop()
    sys.exit(0 if all(same) else 1)


def _case(cluster: Cluster, work: Path, options: list[str], fault: Callable[[Job], None]) -> bool:
    began = time.monotonic()
    job = submit(cluster, work / fault.__name__, options)
    if fault is not nothing:
        job.reach(13)
        fault(job)
    state = job.end(1200)
    if fault is drained:
        cluster.run("scontrol", "update", "NodeName=node6", "State=RESUME")  # else too few are left for the next case
    trained = [
        int(step) for path in job.run_dir.glob("slurm/*/*/rank-0.log") for step in re.findall(r"^step (\d+)/", path.read_text(), re.M)
    ]
    export, reference = (run / "export" / "model.safetensors" for run in (job.run_dir, work / "nothing"))
    same = export.exists() and reference.exists() and _equal(export, reference)
    print(
        f"| {fault.__doc__} | {state['JobState']} | {int(state['Restarts']) + 1} | {len(trained) - len(set(trained))} "
        f"| {time.monotonic() - began:.0f} | {'the same bits' if same else 'differ'} |",
        flush=True,
    )
    return same and state["JobState"] == "COMPLETED" and int(state["Restarts"]) < 2


def _equal(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tests/slurm/faults.py usr1 killed")
    cases = [fault.__name__ for fault in FAULTS]
    parser.add_argument("names", nargs="*", metavar="case", help=f"run these beside the undisturbed one (default all): {', '.join(cases)}")
    given = parser.parse_args()
    if unknown := set(given.names) - set(cases):
        parser.error(f"no case is named {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    main(given.names)
