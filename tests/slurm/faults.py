"""The long fault campaign: one job of eight ranks of ZeRO-3 on a real Slurm meets one fault after the other, and an undisturbed job none.

Its losses and weights must be the other's, bit for bit. ``make test-long`` prints a Markdown table for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parent.parent / part) for part in ("", "../benchmarks"))

import torch
from conftest import build_test_model, write_manifest
from safetensors.torch import load_file
from slurm.cluster import Cluster, wait_until
from slurm.jobs import Job, submit

SAVE_STEPS = 5
AFTER_SAVE = 3
"""A fault comes so many steps after a checkpoint: what a start without notice trains again."""

REPEATED = random.Random(0)


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
    node = job.nodes[3]
    job.cluster.power_off(node)
    time.sleep(10)
    job.cluster.power_on(node)


def lost(job: Job) -> None:
    """power cut of one node that stays away; a ninth node is free"""
    job.cluster.power_off(job.nodes[4])


def controller(job: Job) -> None:
    """slurmctld restarted under the running job"""
    job.cluster.restart_controller()


def requeued(job: Job) -> None:
    """`scontrol requeue` by hand"""
    job.cluster.run("scontrol", "requeue", job.id)


def preempted(job: Job) -> None:
    """a job of higher priority takes one of its nodes (`GraceTime` 120 s)"""
    job.cluster.run("sbatch", "--partition=urgent", f"--nodelist={job.nodes[1]}", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")


def drained(job: Job) -> Callable[[], object]:
    """one node set to drain, then USR1: the job moves to the ninth node"""
    node = job.nodes[5]
    job.cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    job.usr1()
    return lambda: job.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")  # else too few are left for the next fault


FAULTS: tuple[Callable[[Job], Callable[[], object] | None], ...] = (
    usr1, killed, stopped, controller, requeued, preempted, power, drained, lost,
)  # fmt: skip
"""In their order; the last one costs the cluster a node. What one returns is done when the job goes on."""


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
    """Run the undisturbed job and one that meets the faults named (default all); exit code 1 where one cost more than a start, or other
    losses or weights came out."""
    chosen = [fault for fault in FAULTS if not names or fault.__name__ in names]
    steps = SAVE_STEPS * (len(chosen) + 1) + AFTER_SAVE
    with tempfile.TemporaryDirectory(prefix="cfvlm_ds-faults-") as folder:
        work = Path(folder)
        given = {"config": "tests/support/train.yaml", "deepspeed": "tests/support/z3_partitioned.json", "train.max_steps": str(steps)}
        given |= {"data.train": str(write_manifest(work / "train.jsonl", 48)), "train.per_device_train_batch_size": "2"}
        given |= {"model.name_or_path": str(build_test_model(work / "model")), "train.save_steps": str(SAVE_STEPS), "train.export": "true"}
        given |= {"train.hang_timeout_s": "20"}
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        (work / "cluster").mkdir()
        cluster = Cluster(work / "cluster", size=9)
        try:
            cluster.start()
            began = time.monotonic()
            whole = submit(cluster, work / "whole", options)
            assert whole.end()["JobState"] == "COMPLETED", whole.log
            print(f"{steps} steps without a fault: {time.monotonic() - began:.0f} s\n", flush=True)
            done = _struck(submit(cluster, work / "struck", options), chosen, whole)
        finally:
            cluster.stop()
    sys.exit(0 if done else 1)


def _struck(job: Job, faults: Sequence[Callable[[Job], Callable[[], object] | None]], whole: Job) -> bool:
    print("| fault | starts more | steps trained again | s to two steps more |\n|---|---:|---:|---:|", flush=True)
    starts = [int(job.record["Restarts"])]
    for number, fault in enumerate(faults, 1):
        job.reach(SAVE_STEPS * number + AFTER_SAVE)
        began = time.monotonic()
        undo = fault(job)
        if fault is not controller:
            wait_until(lambda: int(job.record["Restarts"]) > starts[-1], 900, f"start after: {fault.__doc__}")
        reached = len(job.losses)
        job.trains(int(job.record["Restarts"]))  # the ranks of the start before may go on for a while
        job.reach(reached + 2)
        seconds = time.monotonic() - began
        if undo is not None:
            undo()
        starts.append(int(job.record["Restarts"]))
        again = sum(len(job.trained_again(start)) for start in range(starts[-2] + 1, starts[-1] + 1))
        print(f"| {fault.__doc__} | {starts[-1] - starts[-2]} | {again} | {seconds:.0f} |", flush=True)
    state = job.end()["JobState"]
    exports = [run.run_dir / "export" / "model.safetensors" for run in (job, whole)]
    other = next((step for step, (ours, its) in enumerate(zip(job.losses, whole.losses, strict=False), 1) if ours != its), None)
    same = other is None and len(job.losses) == len(whole.losses) and all(path.exists() for path in exports) and _equal(*exports)
    said = "the same bits" if same else f"DIFFERENT, losses from step {other}" if other else "DIFFERENT"
    print(f"\n{len(faults)} faults to one job, {state}, {starts[-1] + 1} starts: losses and weights are {said}", flush=True)
    return same and state == "COMPLETED" and starts[-1] == len([fault for fault in faults if fault is not controller])


def _equal(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tests/slurm/faults.py usr1 killed")
    cases = [fault.__name__ for fault in FAULTS]
    parser.add_argument("names", nargs="*", metavar="fault", help=f"those that the job meets (default all): {', '.join(cases)}")
    given = parser.parse_args()
    if unknown := set(given.names) - set(cases):
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    main(given.names)
