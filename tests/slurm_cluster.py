"""A Slurm cluster on one machine, with all its state in one folder: `python tests/slurm_cluster.py start FOLDER`, later `stop`.

Node k is a slurmd of its own that answers at 127.0.0.k, which is also its name, so that no host table has to know it.
"""

import argparse
import getpass
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONFIGURATION = """\
ClusterName=dfl
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
# runs meet at a port that follows from the job's number: two clusters of one machine had better not count alike
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its old credentials have expired: two minutes by default, and 5 seconds is the least
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# no control groups, no accounting
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1
ReturnToService=2
SlurmdTimeout={lost_after}
KillWait=15
{nodes}
PartitionName=test Nodes=ALL Default=YES State=UP
"""
_NODE = "NodeName=127.0.0.{k} NodeAddr=127.0.0.{k} NodeHostname=localhost Port={port} CPUs=4"
_LONGEST = 60  # characters of the folder: Slurm keeps sockets in it, whose paths end at 107


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return f"Slurm is not installed (no {', '.join(absent)}); on Debian: apt-get install slurm-wlm munge"
    return None


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def environment(folder: Path) -> dict[str, str]:
    """What every Slurm command of this cluster needs."""
    return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}


def start(folder: Path, nodes: int = 4, proctrack: str = "linuxproc", lost_after: int = 300) -> None:
    """Start munge, the controller and the nodes, and wait until all are idle.

    proctrack: linuxproc signals all processes of a step; pgid, as cgroup does, only what srun itself has started.
    lost_after: seconds of silence after which the controller gives up a node.
    ValueError for a folder with a long path, RuntimeError with the end of the logs when a daemon does not come up.
    """
    folder = folder.resolve()
    if len(str(folder)) > _LONGEST:
        raise ValueError(f"folder = {str(folder)!r} has {len(str(folder))} characters; allowed: at most {_LONGEST}")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge lets everybody come to its socket
    ports = free_ports(nodes + 1)
    lines = [_NODE.format(k=k, port=port) for k, port in enumerate(ports[1:], 1)]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, port=ports[0], user=getpass.getuser(), proctrack=proctrack,
                                                            lost_after=lost_after, nodes="\n".join(lines)))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    _daemon(folder, "munged", *(f"--{option}={folder}/munge.{ending}" for option, ending in files.items()))
    _daemon(folder, "slurmctld")
    for k in range(1, nodes + 1):
        _daemon(folder, "slurmd", "-N", f"127.0.0.{k}")
    _wait(lambda: command(folder, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(nodes), 60, folder, "not all nodes are idle")


def stop(folder: Path) -> None:
    """Cancel all jobs, end the daemons, and then whatever of the cluster is still there."""
    folder = folder.resolve()
    if (folder / "slurmctld.pid").exists():
        command(folder, "scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 30
        while job_processes(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    daemons = [int(path.read_text()) for path in folder.glob("*.pid") if path.read_text().strip()]
    for pid in daemons + job_processes(folder):
        _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in daemons) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in daemons + job_processes(folder):
        _kill(pid, signal.SIGKILL)


def lose(folder: Path, node: str) -> None:
    """A node dies: everything that runs on it is killed at once, and nobody is told."""
    folder = folder.resolve()
    jobs = [pid for pid in job_processes(folder) if f"SLURMD_NODENAME={node}" in _variables(pid)]
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in jobs}
    keepers = [pid for pid in job_processes(folder) if pid in parents]  # a slurmstepd does not say on which node it is
    for pid in [int((folder / f"slurmd-{node}.pid").read_text()), *keepers, *jobs]:
        _kill(pid, signal.SIGKILL)


def command(folder: Path, *words: str) -> str:
    """What a Slurm command of this cluster prints."""
    done = subprocess.run(words, env=os.environ | environment(folder), capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def job_processes(folder: Path) -> list[int]:
    """Processes of this cluster's jobs, by the variables that Slurm gives them, and the slurmstepd that looks after each step."""
    wanted, found = f"SLURM_CONF={folder.resolve()}/slurm.conf", []
    for process in Path("/proc").glob("[0-9]*"):
        variables = _variables(int(process.name))
        if wanted in variables and (words(int(process.name))[:1] == ["slurmstepd:"]
                                    or any(variable.startswith("SLURM_JOB_ID=") for variable in variables)):
            found.append(int(process.name))
    return found


def _variables(pid: int) -> list[str]:
    return _read(pid, "environ").split("\0")


def variables(pid: int) -> dict[str, str]:
    """The environment of a process; none when it has ended."""
    return dict(one.split("=", 1) for one in _variables(pid) if "=" in one)


def words(pid: int) -> list[str]:
    """The command line of a process; none when it has ended."""
    return _read(pid, "cmdline").replace("\0", " ").split()


def _read(pid: int, name: str) -> str:
    """Empty for a process that has ended, or is not ours."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _daemon(folder: Path, *words: str) -> None:
    """They go to the background by themselves; what they have to say stands in the folder."""
    log = folder / f"{words[0]}.start"
    with log.open("a") as file:
        done = subprocess.run(words, env=os.environ | environment(folder), stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {log.read_text()[-2000:]}")


def _wait(ready, seconds: float, folder: Path, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            ends = "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{problem} after {seconds} s\n{ends}")
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """False for a process that has ended and that nobody has waited for, too."""
    return bool(_read(pid, "cmdline"))


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    args = parser.parse_args()
    if missing():
        sys.exit(missing())
    if args.action == "start":
        start(args.folder, args.nodes)
        print(f"export SLURM_CONF={args.folder.resolve()}/slurm.conf")
    else:
        stop(args.folder)


if __name__ == "__main__":
    main()
