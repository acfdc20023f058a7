"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd per node, each node with its own network, hostname and processes.

A node is `unshare`: its first process is a shell that dies with it, and everything else with that one, so killing it is a power cut. Nodes
also die with the process that started them. They share the file system. Needs root, and the packages of install.sh.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING", "RESIZING", "SUSPENDED", "STOPPED")

CONFIG = """
ClusterName=test
SlurmctldHost=controller({net}.254)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=30
MessageTimeout=5
KillWait=5
CompleteWait=0
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{size}] NodeAddr={net}.[1-{size}] CPUs=64 RealMemory=65536 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""

NODE = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up; ip addr add "$3/24" dev eth0; ip link set eth0 up
shift 3; "$@" & wait $!
"""


class Cluster:
    """``size`` nodes named node1, node2, ...; ``folder`` holds configuration, state and logs."""

    def __init__(self, folder: Path, size: int = 8) -> None:
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(size)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._net = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self._bridge = f"cf{os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle. RuntimeError says what is missing."""
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "setpriv") if shutil.which(name) is None]
        if missing or os.geteuid() != 0:
            raise RuntimeError(f"the Slurm tests need root, and {', '.join(missing) or 'nothing else'}; run tests/slurm/install.sh")
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        hosts = [f"{self._net}.{i + 1} {node}" for i, node in enumerate(self.nodes)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, f"{self._net}.254 controller", ""]))
        config = CONFIG.format(net=self._net, user="root", folder=self.folder, size=len(self.nodes))
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._munge()
        _do("ip", "link", "add", self._bridge, "type", "bridge")
        _do("ip", "addr", "add", f"{self._net}.253/24", "dev", self._bridge)
        _do("ip", "link", "set", self._bridge, "up")
        self._boot("controller", 254, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self.power_on(node)
        wait_until(lambda: len(self.idle()) == len(self.nodes), 60, "idle nodes")

    def stop(self) -> None:
        """Cut everyone's power and remove the bridge."""
        for name in reversed(list(self._processes)):
            self.power_off(name)
        subprocess.run(["ip", "link", "del", self._bridge], stderr=subprocess.DEVNULL, check=False)

    def power_on(self, node: str) -> None:
        """Boot a node."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        number = int(node.removeprefix("node"))
        self._boot(node, number, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def power_off(self, node: str) -> None:
        """Kill every process of a node at once."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()

    def cut(self, node: str) -> None:
        """Unplug a node's network cable; its processes go on."""
        _do("ip", "link", "set", self._link(node), "down")

    def mount(self, node: str, source: Path, target: Path) -> None:
        """Let one node see ``source`` in the place of ``target``."""
        self._inside(node, "mount", "--bind", str(source), str(target))

    def unmount(self, node: str, target: Path) -> None:
        """Undo ``mount``."""
        self._inside(node, "umount", str(target))

    def restart_controller(self) -> None:
        """Stop slurmctld in good order and start it again."""
        self._inside("controller", "kill", "-TERM", (self.folder / "slurmctld.pid").read_text().strip())
        self._processes.pop("controller").wait(30)
        self._boot("controller", 254, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))

    def run(self, *command: str) -> str:
        """A Slurm command from outside the nodes; its output. CalledProcessError shows stderr."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def idle(self) -> set[str]:
        """Nodes that could take a job."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())
        return set()

    def job(self, job: str) -> dict[str, str]:
        """What the controller says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def finish(self, job: str, seconds: float) -> dict[str, str]:
        """Wait for a job's end, requeues included; what the controller says then. The job is cancelled after ``seconds``."""
        try:
            wait_until(lambda: self.job(job)["JobState"] not in LIVE, seconds, f"end of job {job}")
        except TimeoutError:
            self.run("scancel", job)
            raise
        return self.job(job)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *options])
        wait_until((self.folder / "munge.socket").exists, 20, "munged")

    def _boot(self, name: str, number: int, *daemon: str) -> None:
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        inside = ["bash", "-c", NODE, "node", name, str(self.folder), f"{self._net}.{number}", *daemon]
        process = self._spawn(name, ["unshare", *namespaces, *inside])
        link = self._link(name)
        wait_until(lambda: _first_child(process.pid) is not None, 10, f"start of {name}")
        _do("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(_first_child(process.pid)))
        _do("ip", "link", "set", link, "master", self._bridge, "up")

    def _inside(self, name: str, *command: str) -> None:
        _do("nsenter", "--target", str(_first_child(self._processes[name].pid)), "--mount", "--pid", *command)

    def _link(self, name: str) -> str:
        return f"{self._bridge}{name[0]}{name[4:5]}"

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", env=self.environment, start_new_session=True,
            )  # fmt: skip
        self._processes[name] = process
        return process


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll; TimeoutError names what did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def _first_child(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
