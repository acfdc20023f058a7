"""The scripts in slurm/ on a real Slurm (slurm/cluster.py): ranks of ZeRO-3, stopped, bereft of a node, and ending all the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, draw, free_port, losses, many_rows, read_json, run_ranks, write_rows
from safetensors.torch import load_file
from slurm.cluster import Cluster, wait_until
from slurm.jobs import ENVIRONMENT, sbatch, submit

from cfvlm_ds.cli.main import main
from cfvlm_ds.cluster.node_check import gpu_fault
from cfvlm_ds.cluster.signals import EXIT_DISK_FULL

STEPS = 10
OLD_ENV = """#!/bin/sh
case "$1" in --block-signal*) echo "env: unrecognized option '$1'" >&2; exit 125 ;; esac
exec /usr/bin/env "$@"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def options(model_dir, manifests):
    """A training whose weights are written at the end."""
    support = REPO / "tests" / "support"
    given = {
        "config": str(support / "train.yaml"),
        "deepspeed": str(support / "z3_partitioned.json"),
        "data.train": str(manifests["train"]),
    }
    given |= {"model.name_or_path": str(model_dir), "train.per_device_train_batch_size": "2"}
    given |= {"train.max_steps": str(STEPS), "train.save_steps": "4", "train.export": "true"}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize(("nodes", "lost"), [(2, False), pytest.param(2, True, marks=pytest.mark.long)])
def test_a_signal_and_a_lost_node_change_nothing(nodes, lost, cluster, options, tmp_path):
    """USR1 as before a time limit, later a power cut of one node: a requeue each, one MLflow run, and the losses and weights of as many
    ranks that nothing happens to. An option with spaces and a dollar sign comes along, a run folder that would be a pattern to srun, and an
    `env` of before coreutils 8.31.

    Where no node is lost, the job has a spare one. At first its second node has other code than the first, and is named and left out."""
    from mlflow import MlflowClient

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "env").write_text(OLD_ENV)
    (tmp_path / "old" / "env").chmod(0o755)
    options = [*options, "--train.per_device_train_batch_size", str(16 // nodes)]
    tracked = [*options, "--tracking.enabled", "true", "--tracking.experiment", "two words; $HOME 'quoted'"]
    given = {"PATH": f"{tmp_path / 'old'}:{ENVIRONMENT['PATH']}", "CFVLM_SPARE_NODES": str(int(not lost))}
    names = [f"node{n + 1}" for n in range(nodes + (not lost))]
    other = REPO / "cfvlm_ds" / "tracking" / "figures.py"
    if not lost:
        cluster.mount("node2", REPO / "cfvlm_ds" / "core" / "parsing.py", other)
    place = [f"-N{len(names)}", *([] if lost else [f"--nodelist={','.join(names)}"])]
    job = submit(cluster, tmp_path / "100% run-%t", tracked, *place, **given)
    job.reach(2)
    assert cluster.job(job.id)["NumCPUs"] == str(8 * len(names)), "eight for each task"
    assert f"start 1, on {' '.join(names)}" in job.log
    if not lost:
        assert re.search(r"bad node node2: it has code [0-9a-f]{12}, but node1 has code [0-9a-f]{12}\n", job.log)
        assert "training on node1 node3\n" in job.log
    assert sorted(path.name for path in (job.run_dir / "slurm" / job.id / "0").glob("rank-*")) == [f"rank-{r}.log" for r in range(nodes)]
    assert "experiment: two words; $HOME 'quoted'\n" in (job.run_dir / "config.yaml").read_text(), "quoting survives"
    job.usr1()
    wait_until(lambda: "requeue: stopped on request" in job.log, 900, "requeue")
    if not lost:
        cluster.unmount("node2", other)
    stopped = len(job.losses)
    assert f"stopped after step {stopped} of {STEPS}: a signal was received" in job.log and (job.run_dir / f"checkpoint-{stopped}").exists()
    first = read_json(job.run_dir / ".mlflow_delivery.json")["run_id"]
    if lost:
        job.reach(stopped + 2)
        cluster.power_off(f"node{nodes}")
        time.sleep(1)
        cluster.power_on(f"node{nodes}")
    # Slurm waits a minute for a lost node's part of the step: time to see what nothing happens to.
    ended = run_ranks(nodes, "forkserver_ranks:train_script", [*options, "--train.output_dir", str(tmp_path / "whole")])
    assert [code for code, _ in ended] == [0] * nodes, ended[0]
    state = job.end()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert re.search(rf"{len(names)} nodes with python [\d.]+, torch [\d.+cpu]+, transformers .*, code [0-9a-f]{{12}}\n", job.log)
    assert lost or "training on node1 node2\n" in job.log
    starts = 2 + lost
    assert int(state["Restarts"]) >= starts - 1 and f"start {starts}, on" in job.log
    assert job.losses == losses(tmp_path / "whole") and len(job.losses) == STEPS and (job.run_dir / "finished.json").exists()
    ours, theirs = (load_file(run_dir / "export" / "model.safetensors") for run_dir in (job.run_dir, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    client = MlflowClient(f"sqlite:///{job.run_dir}/mlflow.db")
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (found.info.run_id, found.info.status) == (first, "FINISHED")
    assert [point.step for point in client.get_metric_history(found.info.run_id, "Main/loss")] == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_signal_during_the_data_check_is_no_failure(cancelled, cluster, options, manifests, tmp_path):
    """USR1 or `scancel` on two nodes whose ranks look at the rows in processes of their own; after USR1 the next start trains."""
    data = ["--data.train", str(many_rows(manifests["train"], 1 << 16)), "--train.max_steps", "1", "--train.export", "false"]
    job = submit(cluster, tmp_path / "run", [*options, *data], "-N2")
    wait_until(lambda: "checking rows" in job.log or not job.alive(), 600, "data check")
    if cancelled:
        cluster.run("scancel", job.id)
        assert job.end()["JobState"] == "CANCELLED" and not (job.run_dir / "run.lock").exists()
        said = "".join(path.read_text() for path in job.run_dir.glob("slurm/*/0/rank-*.log"))
        assert job.log.count("Exited with exit code 85") == 2 and "Traceback" not in said, job.log
        assert "stopped by a signal; the same command continues\n" in said
        return
    job.usr1()
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1") and (job.run_dir / "finished.json").exists(), job.log
    assert "requeue: stopped on request" in job.log and "lost a process" not in job.log


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """What `cfvlm-ds init` writes: its jobs find this Python without the PATH of whoever submits them."""
    main(["init", str(folder := tmp_path_factory.mktemp("copies") / "my runs")])
    return folder


BARE = "/usr/bin:/bin:/usr/sbin:/sbin"


@pytest.mark.long
def test_two_jobs_of_one_gpu_share_a_node(cluster, options, tmp_path):
    one_step = [*options, "--train.max_steps", "1", "--train.export", "false"]
    jobs = [submit(cluster, tmp_path / name, one_step, "--nodelist=node1", script="train_1gpu.sh") for name in ("a", "b")]
    wait_until(lambda: all(job.record["JobState"] == "RUNNING" for job in jobs), 300, "both jobs")
    for job in jobs:
        state = job.end()
        assert (state["JobState"], state["NumCPUs"], len(job.losses)) == ("COMPLETED", "8", 1), job.log


def test_bad_options_end_a_job_before_any_rank_starts(cluster, options, tmp_path):
    job = submit(cluster, tmp_path / "run", [*options, "--train.max_stepz", "3"], script="train_1node.sh")
    state = job.end()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "unknown option 'train.max_stepz'; did you mean 'train.max_steps'?" in job.log


def test_a_model_is_evaluated(cluster, copies, model_dir, manifests, tmp_path):
    arguments = [str(model_dir), str(manifests["test"]), "--out", str(tmp_path / "a b" / "results.json")]
    job = sbatch(cluster, tmp_path / "log", [], "evaluate.sh", *arguments, root=copies, PATH=BARE)
    state = cluster.finish(job, 600)
    said = (tmp_path / "log").read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert (
        f"job {job}, start 1, on node" in said
        and "| test | mean of edit types, blank image |" in said
        and (tmp_path / "a b" / "results.json").exists()
    )


@pytest.mark.long
def test_benchmarks_go_on_after_a_requeue(cluster, copies, model_dir, tmp_path):
    """Two tasks share the items; USR1 as before a time limit; the next start scores what is left, and the results are those of one task."""
    pope = tmp_path / "benchmarks" / "pope"
    (pope / "output" / "coco").mkdir(parents=True)
    pictures = [draw(pope / "val2014" / f"{n}.png", [("red", "circle"), ("blue", "square")]).name for n in range(500)]
    for split in ("random", "popular", "adversarial"):
        rows = [{"question_id": n, "image": name, "text": f"Is it red {n}?", "label": "yes"} for n, name in enumerate(pictures)]
        write_rows(pope / "output" / "coco" / f"coco_pope_{split}.json", rows)
    options = ["--benchmarks", "pope", "--benchmark_root", str(pope.parent), "--batch_size", "1", "--num_workers", "0", "--draws", "5"]
    out = tmp_path / "two words"
    job = sbatch(cluster, tmp_path / "log", ["-N2"], "evaluate.sh", str(model_dir), *options, "--out", str(out), root=copies, PATH=BARE)
    scored = out / "pope" / "yes_no" / "scores.jsonl"
    wait_until(lambda: scored.exists() and len(scored.read_text().splitlines()) > 5, 300, "scores")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    state = cluster.finish(job, 900)
    said = (tmp_path / "log").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "requeue: the time limit is near" in said and "items are on disk; only the others are computed" in said
    main(["evaluate", str(model_dir), *options, "--out", str(tmp_path / "alone")])
    for name in ("results.json", "items.jsonl"):
        assert (out / "pope" / "yes_no" / name).read_bytes() == (tmp_path / "alone" / "pope" / "yes_no" / name).read_bytes()


def sourced(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Bash that has read slurm/launch.sh; what ``srun`` and ``apptainer`` are given, they print."""
    (folder / "srun").write_text('#!/bin/sh\nif [ "$1" = --help ]; then echo "$SRUN_HELP"; else printf "<%s>" srun "$@"; fi\n')
    (folder / "apptainer").write_text("#!/bin/sh\n")
    for name in ("srun", "apptainer"):
        (folder / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "HOME": str(folder), "PATH": f"{folder}:/usr/bin:/bin", "SRUN_HELP": "--ntasks"} | variables
    command = ["bash", "-c", f"source slurm/launch.sh; {script}"]
    return subprocess.run(command, cwd=REPO, env=given, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("code", "pause", "most", "why"),
    [(EXIT_DISK_FULL, 0.5, 3, "a disk was full"), (1, 0, 2, "a rank failed, see {}/run/slurm/7/{}")],
)
def test_starts_are_bounded(code, pause, most, why, tmp_path):
    """The whole of ``launch`` with programs in place of Slurm's, of which the training leaves as one does that finds a disk full, after a
    pause, or as one that crashes. Three starts without progress are the most by default; a new checkpoint begins the count anew, and so
    does a sampled picture."""
    for name, text in {
        "srun": f"""case "$*" in
            *output_dir*) echo {tmp_path}/run ;;
            *"cluster check"*) echo ok >{tmp_path}/run/slurm/7/$SLURM_RESTART_COUNT/nodes/localhost ;;
            *train.py*) echo FloatingPointError: of rank 0 >{tmp_path}/run/slurm/7/$SLURM_RESTART_COUNT/rank-0.log; exit {code} ;;
        esac""",
        "scontrol": f"""case "$*" in "show hostnames"*) echo localhost ;; requeue*) echo again >>{tmp_path}/requeued ;; esac""",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_PARTITION": "x", "SLURM_NTASKS": "1"}
    given |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "CFVLM_FULL_DISK_PAUSE_S": str(pause)}
    given |= {} if most == 3 else {"CFVLM_MAX_STARTS": str(most)}
    for start, step in enumerate([-1] * most + [4] * 2 * most):
        if step == 4:
            (tmp_path / "run" / "checkpoint-4").mkdir(exist_ok=True)
        if start == 2 * most:
            (tmp_path / "run" / "sampled-1" / "sample").mkdir(parents=True)
            (tmp_path / "run" / "sampled-1" / "sample" / "shard-00003.jsonl").write_text("{}\n")
        before = time.monotonic()
        command = ["bash", "-c", "source slurm/launch.sh; launch"]
        environment = given | {"SLURM_RESTART_COUNT": str(start)}
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code and "input" not in done.stdout and time.monotonic() - before > pause, done
        reason = why.format(tmp_path, start)
        bound = f"giving up: {reason}; {most} starts in a row have made no progress beyond step {step} (CFVLM_MAX_STARTS={most})\n"
        assert (bound in done.stdout) == (start % most == most - 1), done
        assert done.stdout.count("FloatingPointError: of rank 0\n") == 1 + (code == 1), "as rank 0 says it, and as the reason"
    assert (tmp_path / "requeued").read_text() == "again\n" * 3 * (most - 1)


def test_secrets_are_read_through_a_link_to_a_file_that_is_closed_to_others(tmp_path):
    (secrets := tmp_path / "stored").write_text("TOKEN=abc\n")
    (link := tmp_path / "link").symlink_to(secrets)
    for mode, code, said in ((0o600, 0, "abc\n"), (0o640, 2, f"error: other users can read {link}; run chmod 600 on it\n")):
        secrets.chmod(mode)
        done = sourced('bash -c "echo \\$TOKEN"', tmp_path, CFVLM_SECRETS=str(link))
        assert done.returncode == code and done.stdout.endswith(said), done


def test_steps_run_in_a_container_by_pyxis_or_apptainer(tmp_path):
    """Only their command lines: neither is here. The caches are mounted, and the signal's shield is around the container."""
    image, train = "/shared/a b.sif", "shield=(shield); step --ntasks=2 -- python train.py 'a b'"
    mounts = f"{REPO}:{REPO},{tmp_path}/.cache/huggingface:{tmp_path}/.cache/huggingface,/tmp:/tmp"
    common = "<srun><--export=ALL><--kill-on-bad-exit=1>"
    pyxis = sourced(train, tmp_path, CONTAINER_IMAGE=image, SRUN_HELP="      --container-image=[USER@]")
    options = f"<--container-image={image}><--container-name=cfvlm_ds-7><--container-mounts={mounts}><--container-workdir={REPO}>"
    assert pyxis.stdout == f"{common}{options}<--ntasks=2><shield><python><train.py><a b>", pyxis
    assert (tmp_path / ".cache" / "huggingface").is_dir(), "what is mounted has to be there"
    apptainer = sourced(train, tmp_path, CONTAINER_IMAGE=image, SLURM_GPUS_ON_NODE="8")
    command = f"<apptainer><exec><--bind><{mounts}><--pwd><{REPO}><--nv><{image}><python><train.py><a b>"
    assert apptainer.stdout == f"{common}<--ntasks=2><shield>{command}", apptainer
    named = sourced(
        train, tmp_path, CONTAINER_IMAGE=image, CONTAINER_RUNTIME="apptainer", CONTAINER_MOUNTS="/x:/x", SRUN_HELP="--container-image"
    )
    assert f"<apptainer><exec><--bind></x:/x><--pwd><{REPO}><{image}>" in named.stdout, "without GPUs no --nv"
    assert sourced(train, tmp_path).stdout == f"{common}<--ntasks=2><shield><python><train.py><a b>"
    wrong = sourced(train, tmp_path, CONTAINER_IMAGE=image, CONTAINER_RUNTIME="docker")
    assert wrong.returncode == 2 and "error: no runtime for CONTAINER_IMAGE: docker; set CONTAINER_RUNTIME" in wrong.stdout


def test_signals_before_python_answers_them_do_not_end_a_rank(tmp_path):
    """The shield of slurm/launch.sh around a program that, as train.py does, first holds signals back and then answers them."""
    (shield,) = re.findall(r"shield=\((sh -c '.*') \"\$PWD\"\)", (REPO / "slurm" / "launch.sh").read_text())
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, sys\nboth = {signal.SIGUSR1, signal.SIGTERM}\nsignal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "print('held', flush=True)\nsys.stdin.readline()\ngot = []\n"
        "for number in both: signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\nprint(*got, flush=True)\n"
    )
    (folder := tmp_path / "a b").mkdir()
    early = f"exec {shield} '{folder}' sh -c 'pwd; kill -USR1 $$; kill -TERM $$; exec {sys.executable} {program}'"
    process = subprocess.Popen(["bash", "-c", early], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and [process.stdout.readline() for _ in range(2)] == [f"{folder}\n", "held\n"]
    process.send_signal(signal.SIGUSR1)
    assert process.communicate("go on\n", timeout=60)[0] == "SIGUSR1\n" and process.returncode == 0


def test_nodes_that_exchange_too_little_are_refused(tmp_path):
    """Two tasks as srun starts them: what the first node measures is printed, and held against the floor of slurm/env.sh."""
    given = dict(os.environ) | ENVIRONMENT | {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given["CFVLM_MIN_GB_S"] = "1e6"
    command = [sys.executable, "-m", "cfvlm_ds", "cluster", "check", str(tmp_path), "--timeout_s", "60"]
    tasks = [
        subprocess.Popen(command, env=given | {"SLURM_PROCID": str(k), "SLURMD_NODENAME": f"node{k}"}, stdout=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert float(re.findall(r"all-reduce between the nodes: ([\d.]+) GB/s", said[0])[0]) > 0
    lines = [(tmp_path / f"node{k}").read_text() for k in range(2)]
    assert all(line.startswith("waited: the nodes exchange ") and "CFVLM_MIN_GB_S is 1e+06" in line for line in lines), lines


@pytest.mark.long
def test_a_node_that_starts_slowly_is_waited_for(cluster, options, tmp_path):
    """As a first import from a shared file system is, or the making of a container: a minute."""
    own = Path(sys.executable).with_name("cfvlm-ds")
    slow = tmp_path / "cfvlm-ds"
    slow.write_text(f'#!/bin/sh\nsleep 60\nexec {sys.executable} -m cfvlm_ds "$@"\n')
    slow.chmod(0o755)
    cluster.mount("node6", slow, own)
    one_step = [*options, "--train.max_steps", "1", "--train.export", "false"]
    job = submit(cluster, tmp_path / "run", one_step, "-N2", "--nodelist=node5,node6")
    state = job.end()
    cluster.unmount("node6", own)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), job.log


def test_missing_gpus_are_named():
    """Where Slurm counts them: a site whose Slurm knows of none has them all the same."""
    assert gpu_fault(torch.cuda.device_count()) is None and gpu_fault(None) is None
    assert gpu_fault(torch.cuda.device_count() + 8).startswith("Slurm allocated ")  # type: ignore[union-attr]


EDITOR = """
import json, pathlib, sys, time
from PIL import Image
told = json.load(open(sys.argv[1]))
while not pathlib.Path(sys.argv[3]).exists(): time.sleep(0.05)
image = Image.open(told["image"])
image.paste((told["seed"] % 256, 0, 0), (8, 8, 24, 24))
image.save(sys.argv[2], "PNG")
"""


@pytest.mark.long
def test_data_are_made_by_an_array_of_which_a_task_is_killed(cluster, manifests, tmp_path):
    """Three shards; a task is requeued in the midst of its pictures. The work folder has the bytes of one that nothing happened to."""
    (tmp_path / "editor.py").write_text(EDITOR)
    gates = {name: tmp_path / f"{name}.go" for name in ("job", "whole")}
    plans = {}
    for name, gate in gates.items():
        command = f"{sys.executable} {tmp_path / 'editor.py'} {{request}} {{output}} {gate}"
        plans[name] = tmp_path / f"{name}.yaml"
        plans[name].write_text(
            f"data: {manifests['test']}\nout: {tmp_path / name}\ngroups: {tmp_path / name}.jsonl\nformat: cfgroup\nshards: 3\n"
            f"edit: {{with: command, command: '{command}', threads: 1}}\nselect: {{rule: checks}}\n"
        )
    job = sbatch(cluster, tmp_path / "log", ["--array=0-2"], "build_data.sh", "--config", str(plans["job"]))
    journal = tmp_path / "job" / "edit" / "shard-00001.jsonl"
    wait_until(journal.exists, 300, "a shard that is edited")
    cluster.run("scontrol", "requeue", f"{job}_1")
    gates["job"].touch()
    gates["whole"].touch()
    done = [tmp_path / "job" / "verify" / f"shard-{shard:05d}.done.json" for shard in range(3)]
    wait_until(lambda: all(path.exists() for path in done), 600, "three shards")
    main(["data", "run", "--config", str(plans["whole"])])
    main(["data", "select", str(tmp_path / "job"), "--out", str(tmp_path / "job.jsonl"), "--rule", "checks"])
    for step in ("propose", "edit", "verify", "pictures"):
        for path in sorted((tmp_path / "whole" / step).iterdir()):
            assert path.read_bytes() == (tmp_path / "job" / step / path.name).read_bytes(), path
    assert (tmp_path / "job.jsonl").read_text().count("\n") == (tmp_path / "whole.jsonl").read_text().count("\n") > 0


def test_a_store_is_prepared_by_an_array(cluster, manifests, tmp_path):
    """Two calls of two tasks: the first looks at the pictures, the second writes the rows."""
    store, options = tmp_path / "store", [str(manifests["test"]), "--out", str(tmp_path / "store")]
    for _ in range(2):
        job = sbatch(cluster, tmp_path / "log", ["--array=0-1"], "prepare_data.sh", *options)
        ended = lambda job=job: not cluster.run("squeue", "-h", "-j", str(job)).strip()  # noqa: E731
        wait_until(ended, 300, "both tasks")
    main(["data", "prepare", str(manifests["test"]), "--out", str(tmp_path / "alone")])
    assert (store / "groups-00000.jsonl").read_bytes() == (tmp_path / "alone" / "groups-00000.jsonl").read_bytes()
    assert read_json(store / "store.json") == read_json(tmp_path / "alone" / "store.json")
