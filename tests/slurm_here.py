"""A Slurm of one node on this machine, from Debian's slurm-wlm and munge, in folders of its own.

Any user may start it; nothing outside its folder is touched, and it listens on 127.0.0.1 only. The node says
it has 8 cores and 2 GPUs (``/dev/null``), whatever the machine has.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
_PATHS = ("/usr/sbin", "/usr/local/sbin")

_CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 Gres=gpu:2
PartitionName=day Default=YES Nodes=ALL MaxTime=INFINITE
PartitionName=closed Nodes=ALL State=DOWN
"""


def missing() -> list[str]:
    """Programs of Slurm that are not on this machine."""
    return [name for name in NEEDED if _which(name) is None]


class Slurm:
    """A running Slurm; its environment is what a client needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    def running(self) -> list[str]:
        """Numbers of the jobs that run."""
        return self("squeue", "-h", "-t", "R", "-o", "%i").split()

    def end_walltime(self, job: str) -> None:
        """Let a job's walltime be over; Slurm looks every 30 s."""
        self("scontrol", "update", f"jobid={job}", "EndTime=now+1")


@contextlib.contextmanager
def slurm_here(folder: Path) -> Iterator[Slurm]:
    """Start Slurm in `folder`, and stop it and its jobs on leaving."""
    folder.mkdir(parents=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(2)
    conf = _CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    files = {"socket": "munge.sock", "key-file": key.name, "seed-file": "munge.seed", "log-file": "munge.log"}
    slurm = Slurm(folder)
    environment = os.environ | slurm.environment
    commands = [
        # --force: the folder above may be writable for others, as /tmp is.
        ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    commands[0].append(f"--pid-file={folder / 'munged.pid'}")
    started: list[subprocess.Popen] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as out:
                program = _which(command[0])
                process = subprocess.Popen(
                    [program, *command[1:]], env=environment, stdout=out, stderr=subprocess.STDOUT
                )
            started.append(process)
            if command[0] == "munged":
                _until((folder / "munge.sock").exists, started, folder)
        _until(lambda: "idle" in slurm("sinfo", "-h", "-o", "%T"), started, folder)
        yield slurm
    finally:
        with contextlib.suppress(Exception):
            slurm("scancel", "--signal=KILL", "--full", "-u", getpass.getuser())
            slurm("scancel", "-u", getpass.getuser())
            _until(lambda: not slurm("squeue", "-h"), started, folder)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(ready, started: list[subprocess.Popen], folder: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        with contextlib.suppress(subprocess.CalledProcessError):
            if ready():
                return
        time.sleep(0.05)
    logs = [
        path.read_text(errors="replace")[-1500:] for path in [*folder.glob("*.out"), *folder.glob("*.log")]
    ]
    raise RuntimeError("Slurm did not start:\n" + "\n".join(logs))


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *_PATHS]))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
