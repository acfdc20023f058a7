"""Repeated kill -9 of a random rank at random times during one run, until the run ends. Part of ``make test-long``.

Every round restarts the training and kills one rank some steps later, or during the start. The last checkpoint is compared bit for bit with
that of an uninterrupted run. The script prints a row for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parent.parent / part) for part in ("", "unit", "../benchmarks"))

import forkserver_ranks
import torch
from conftest import build_test_model, losses, train_arguments, write_manifest

SAVE_STEPS = 2
PEERS_END_S = 30.0
"""Time in seconds after which the peers of a dead rank are terminated, as a launcher would do. A rank that has not joined the process group
yet would wait for its peers for half an hour.
"""


def main(ranks: int, rounds: int, seed: int) -> None:
    chance, steps = random.Random(seed), SAVE_STEPS * rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, manifest = build_test_model(folder / "model"), write_manifest(folder / "train.jsonl", 48)
        options = {"max_steps": steps, "save_steps": SAVE_STEPS, "per_device_train_batch_size": max(1, 16 // ranks)}
        given = [part for option, value in options.items() for part in (f"--train.{option}", str(value))]
        train = {run_dir: train_arguments(model, {"train": manifest}, folder / run_dir, *given) for run_dir in ("whole", "killed")}
        started = time.monotonic()
        processes = forkserver_ranks.start(ranks, "cfvlm_ds.cli.train:run", train["whole"], said=folder / "said-whole")
        assert ended(processes) == [0] * ranks, (folder / "said-whole" / "rank-0.log").read_text()
        whole_s, started = time.monotonic() - started, time.monotonic()
        waits, kills, helped = [], 0, 0
        while True:
            before = recorded(folder / "killed")
            processes = forkserver_ranks.start(ranks, "cfvlm_ds.cli.train:run", train["killed"], said=folder / f"said-{kills}")
            if kills == rounds:
                break
            lives = chance.choice((None, *range(2 * SAVE_STEPS)))  # number of steps before the kill; None: during the start
            wait_for(folder / "killed", before, lives, steps, processes)
            time.sleep(chance.uniform(0, whole_s / steps if lives is not None else 5))
            victim = chance.randrange(ranks)
            with contextlib.suppress(ProcessLookupError):  # it has ended: the last step came before the kill
                os.kill(processes[victim].pid or 0, signal.SIGKILL)
            killed_at, kills = time.monotonic(), kills + 1
            codes = ended(processes, PEERS_END_S)
            waits.append(time.monotonic() - killed_at)
            print(
                f"round {kills}: rank {victim} killed, step {recorded(folder / 'killed')}, peers ended in {waits[-1]:.1f} s: {codes}",
                flush=True,
            )
            assert codes[victim] in (-signal.SIGKILL, 0), codes
            helped += -signal.SIGTERM in codes
        assert ended(processes) == [0] * ranks, (folder / f"said-{kills}" / "rank-0.log").read_text()
        resumes = sum("resumed from" in (folder / f"said-{k}" / "rank-0.log").read_text() for k in range(kills + 1))
        same_losses = losses(folder / "killed") == losses(folder / "whole")
        weights = [same(folder / "whole" / f"checkpoint-{steps}", folder / "killed" / f"checkpoint-{steps}", rank) for rank in range(ranks)]
        verdict = "bit-equal" if all(weights) and same_losses else "DIFFERENT"
        print(
            f"| kill -9 of a random rank, {kills} rounds over one {ranks}-rank run of {steps} steps | {resumes} of {kills} restarts "
            f"lived to resume; final weights, moments and losses {verdict} | in {kills - helped} rounds the others ended by themselves; "
            f"{time.monotonic() - started:.0f} s in all against {whole_s:.0f} s uninterrupted |"
        )
        sys.exit(verdict != "bit-equal")


def recorded(run_dir: Path) -> int:
    """Count the steps in a run's metrics."""
    return len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def wait_for(run_dir: Path, before: int, lives: int | None, steps: int, processes: list[ForkServerProcess]) -> None:
    """Wait until the run has recorded ``lives`` steps since its resume, at most until its second-to-last step."""
    newest = max((int(path.name.rsplit("-")[-1]) for path in run_dir.glob("checkpoint-*[0-9]")), default=0)
    while lives is not None and all(process.is_alive() for process in processes):
        if recorded(run_dir) >= min(max(before, newest) + lives, steps - 1):
            return
        time.sleep(0.02)


def ended(processes: list[ForkServerProcess], barrier: float = 3600) -> list[int | None]:
    """Wait for the ranks and return their exit codes. A rank that does not end in time gets SIGTERM."""
    deadline = time.monotonic() + barrier
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.terminate()
            process.join()
    return [process.exitcode for process in processes]


def same(one: Path, other: Path, rank: int) -> bool:
    """Return True if a rank's weights and moments are bit-identical in both checkpoints."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    states = [torch.load(folder / name, weights_only=False)["optimizer_state_dict"] for folder in (one, other)]
    flats = [
        [*s["fp32_flat_groups"], *(e[k] for e in s["optimizer_state_dict"]["state"].values() for k in ("exp_avg", "exp_avg_sq"))]
        for s in states
    ]
    return all(torch.equal(a, b) for a, b in zip(*flats, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tests/support/kill_ranks.py 2 5")
    parser.add_argument("ranks", type=int, nargs="?", default=4, help="default 4")
    parser.add_argument("rounds", type=int, nargs="?", default=30, help="default 30")
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of who is killed, and when (default 0)")
    main(**vars(parser.parse_args()))
