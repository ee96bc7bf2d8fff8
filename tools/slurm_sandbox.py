#!/usr/bin/env python3
"""A real Slurm of several virtual nodes on one machine: no systemd, no root needed, everything in one folder.

    tools/slurm_sandbox.py up --nodes 4 --gpus-per-node 8     start (seconds), print how to use it
    eval "$(tools/slurm_sandbox.py env)"                      point sinfo, sbatch, astro-hpc ... at it
    tools/slurm_sandbox.py status
    tools/slurm_sandbox.py down                               stop; no process is left, the folder is removed

For trying launches and for tests. CPUs, memory and GPUs of the nodes are pretended: jobs really run, on this machine.
Several sandboxes live side by side, each in its own --dir. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "ASTRO_HPC_SLURM_SANDBOX"
"""Environment variable of the daemons and of all jobs' tasks: `down` finds a sandbox's processes by it."""
PARTITIONS = ("batch", "urgent")
_SOCKET_PATH_LIMIT = 100  # of 107 characters that a Unix socket's path may have
_PR_SET_PDEATHSIG = 1

SLURM_CONF = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmdLogFile={dir}/log/slurmd-%n.log
SlurmdSpoolDir={dir}/spool/%n
# Neither cgroups nor systemd: processes are tracked by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={dir}/mark.sh
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# What a busy cluster does: requeue, preempt by partition, refuse at once what can't run.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
MaxArraySize={max_array_size}
MaxJobCount=20000
MinJobAge={min_job_age}
# Quick, because jobs are short: failures are noticed and slots refilled within seconds.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=20
KillWait={kill_wait}
MessageTimeout=30
GresTypes=gpu
{accounting}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=00:10:00 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 DefaultTime=00:10:00 PriorityTier=10 PreemptMode=off State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
DbdHost=localhost
DbdPort={ports[1]}
SlurmUser={user}
LogFile={dir}/log/slurmdbd.log
PidFile={dir}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[2]}
StorageUser=slurm
StoragePass=sandbox
StorageLoc=slurm_acct_db
"""


class SandboxError(Exception):
    """One line: what is wrong and how to mend it."""


@dataclass
class Sandbox:
    """One running Slurm.

    Attributes:
        dir: everything of it: configuration, logs, spool, keys, database.
        num_nodes: virtual nodes, named n1, n2, ...
        gpus_per_node: pretended GPUs of each (device files that are /dev/null).
        accounting: with slurmdbd and MariaDB, so that sacct works.
        die_with_parent: all of it ends when the process that started it does, kill -9 included.
    """

    dir: Path
    num_nodes: int = 4
    gpus_per_node: int = 8
    cpus_per_node: int = 64
    accounting: bool = False
    die_with_parent: bool = False
    max_array_size: int = 1001
    min_job_age: int = 300
    kill_wait: int = 5
    slurmd_timeout: int = 20
    daemons: dict[str, int] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """Names of the virtual nodes."""
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def env(self) -> dict[str, str]:
        """What Slurm's commands need to find this sandbox."""
        return {"SLURM_CONF": str(self.dir / "slurm.conf")}

    # --- up ---------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start everything and wait until all nodes are idle; on failure nothing is left."""
        check_installed(self.accounting)
        if len(str(self.dir / "munge" / "socket")) > _SOCKET_PATH_LIMIT:
            raise SandboxError(f"{self.dir}: too long a path for a socket; give a shorter --dir")
        if self.dir.exists() and any(self.dir.iterdir()):
            if processes_of(self.dir):
                raise SandboxError(f"{self.dir}: a sandbox runs there already; `down` stops it")
            if not (self.dir / "sandbox.json").exists():
                raise SandboxError(f"{self.dir}: is in use by something else; give another --dir")
            shutil.rmtree(self.dir)  # what a killed sandbox left
        try:
            self._write_files()
            if self.die_with_parent:
                self._start_reaper()
            self._start_munged()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_for("nodes to be idle", lambda: set(self.node_states().values()) == {"idle"})
        except BaseException as error:
            tail = self._log_tail()
            self.down()
            if isinstance(error, SandboxError) and tail:
                raise SandboxError(f"{error}; the logs end with\n{tail}") from None
            raise

    def start_controller(self) -> None:
        """Start slurmctld, for instance again after it was killed; it knows its jobs from its folder."""
        self.start_daemon("slurmctld", [find("slurmctld"), "-D"])

    def start_node(self, node: str) -> None:
        """Start one node's slurmd, for instance again after it was killed."""
        slurmd = [find("slurmd"), "-D", "-N", node]
        if _can_unshare():  # then `hostname` says n1 and n1 resolves, as on a cluster
            script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
            slurmd = ["unshare", "-m", "-u", "sh", "-c", script, "sh", node, str(self.dir / "hosts"), *slurmd]
        self.start_daemon(f"slurmd-{node}", slurmd)

    def start_daemon(self, name: str, command: Sequence[str | Path]) -> None:
        """Start a process of the sandbox; its output goes to log/NAME.out."""
        with open(self.dir / "log" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                env={**_clean_environment(), **self.env, MARKER: str(self.dir)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.dir,
                start_new_session=True,
                preexec_fn=_die_with_parent if self.die_with_parent else None,
            )
        self.daemons[name] = process.pid
        self._children[name] = process
        self._save()

    def _start_reaper(self) -> None:
        """`down`, once this process has ended, however: the daemons die with it, but jobs would outlive them."""
        parent_ended, self._held_open = os.pipe()
        down = [sys.executable, str(Path(__file__).resolve()), "down", "--dir", str(self.dir)]
        reaper = subprocess.Popen(
            ["sh", "-c", 'read -r _; exec "$@"', "sh", *down],
            env=_clean_environment(),
            stdin=parent_ended,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        os.close(parent_ended)
        self._reaper.append(reaper)

    def _write_files(self) -> None:
        for folder in ("state", "log", "munge", "gpus", *(f"spool/{node}" for node in self.nodes)):
            (self.dir / folder).mkdir(parents=True, exist_ok=True)
        (self.dir / "munge").chmod(0o755 if os.getuid() == 0 else 0o700)
        self._save()
        for number in range(self.gpus_per_node):
            (self.dir / "gpus" / f"gpu{number}").symlink_to("/dev/null")
        with ExitStack() as held:  # all at once, so that they differ
            sockets = [held.enter_context(socket.socket()) for _ in range(3 + self.num_nodes)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        host = socket.gethostname().partition(".")[0]
        gres = f" Gres=gpu:{self.gpus_per_node}" if self.gpus_per_node else ""
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus_per_node} "
            f"RealMemory=64000{gres}"
            for node, port in zip(self.nodes, ports[3:], strict=True)
        ]
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.accounting:
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
                f"AccountingStoragePort={ports[1]}\nAccountingStoragePass={self.dir}/munge/socket\n"
                "AccountingStoreFlags=job_comment"
            )
        values = {"dir": self.dir, "user": getpass.getuser(), "ports": ports, "host": host}
        limits = {
            name: getattr(self, name) for name in ("max_array_size", "min_job_age", "kill_wait", "slurmd_timeout")
        }
        text = SLURM_CONF.format(**values, **limits, nodes="\n".join(nodes), accounting=accounting)
        (self.dir / "slurm.conf").write_text(text)
        (self.dir / "mark.sh").write_text(f"#!/bin/sh\necho export {MARKER}={self.dir}\n")
        (self.dir / "mark.sh").chmod(0o755)
        (self.dir / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gpus = f"Name=gpu File={self.dir}/gpus/gpu[0-{self.gpus_per_node - 1}]\n" if self.gpus_per_node else ""
        (self.dir / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        (self.dir / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (self.dir / "slurmdbd.conf").chmod(0o600)
        own = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.dir / "hosts").write_text(Path("/etc/hosts").read_text() + own)
        self._database_port = ports[2]

    def _start_munged(self) -> None:
        munge = self.dir / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
        self.start_daemon("munged", [find("munged"), "-F", "--force", f"--socket={munge / 'socket'}", *files])
        self.wait_for("munged", (munge / "socket").exists)

    def _start_accounting(self) -> None:
        data, own_socket = self.dir / "database", self.dir / "munge" / "database.socket"
        user = [f"--user={getpass.getuser()}"]
        common = ["--no-defaults", f"--datadir={data}", *user]
        install = [find("mariadb-install-db"), *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
        self._run(install, "MariaDB's first set-up")
        small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
        listen = [f"--socket={own_socket}", f"--port={self._database_port}", "--bind-address=127.0.0.1"]
        pid = f"--pid-file={self.dir / 'mariadbd.pid'}"
        self.start_daemon("mariadbd", [find("mariadbd"), *common, *listen, *small, pid])
        self.wait_for("MariaDB", own_socket.exists)
        grant = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'sandbox'; CREATE USER slurm@localhost IDENTIFIED BY "
        grant += "'sandbox'; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO "
        grant += "slurm@localhost;"
        client = [find("mariadb"), "--no-defaults", f"--socket={own_socket}", "--user=root", "-e", grant]
        self._run(client, "MariaDB's users")
        self.start_daemon("slurmdbd", [find("slurmdbd"), "-D"])

        def registered() -> bool:
            self.run("sacctmgr", "-i", "add", "cluster", "sandbox", check=False)
            return "sandbox" in self.run("sacctmgr", "-nP", "show", "cluster", "format=cluster", check=False)

        self.wait_for("slurmdbd", registered)
        self.run("sacctmgr", "-i", "add", "account", "research", "cluster=sandbox", check=False)
        me = ["add", "user", getpass.getuser(), "account=research", "cluster=sandbox"]
        self.run("sacctmgr", "-i", *me, check=False)

    # --- asking -----------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60) -> str:
        """Run one of Slurm's commands against this sandbox; its standard output."""
        program = find(str(command[0]))
        result = subprocess.run(
            [program, *map(str, command[1:])],
            env={**_clean_environment(), **self.env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode != 0:
            raise SandboxError(f"{' '.join(map(str, command))}: {result.stderr.strip() or result.returncode}")
        return result.stdout

    def node_states(self) -> dict[str, str]:
        """State of every node as sinfo names it, for instance `idle`."""
        lines = self.run("sinfo", "-hN", "-p", PARTITIONS[0], "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines) if lines else {"": "unknown"}

    def wait_for(self, what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
        """Poll until `ready`; fails at once when a daemon has ended."""
        deadline = time.monotonic() + seconds
        while not ready():
            for name, child in self._children.items():
                if child.poll() is not None:
                    raise SandboxError(f"{name} ended with code {child.returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise SandboxError(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.05)

    def _run(self, command: Sequence[str | Path], what: str) -> None:
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=120, check=False, cwd=self.dir
        )
        if result.returncode != 0:
            raise SandboxError(f"{what} failed: {(result.stderr or result.stdout).strip()[-400:]}")

    def _log_tail(self) -> str:
        lines: list[str] = []
        for log in sorted((self.dir / "log").glob("*")) if self.dir.exists() else []:
            text = log.read_text(errors="replace").splitlines()
            lines += [f"{log.name}: {line}" for line in text if "error" in line.lower() or "fatal" in line.lower()][-3:]
        return "\n".join(lines[-12:])

    # --- down -------------------------------------------------------------------------------------------------

    def kill_daemon(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal one daemon, for instance `slurmd-n2`, and wait for its end: a fault to inject."""
        child = self._children.pop(name)
        child.send_signal(number)
        child.wait(timeout=20)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and all that runs on it, as a power cut does; `start_node` brings it back."""
        slurmd = self._children[f"slurmd-{node}"].pid
        own = os.stat("/proc/self/ns/mnt").st_ino
        namespace = os.stat(f"/proc/{slurmd}/ns/mnt").st_ino
        self.kill_daemon(f"slurmd-{node}")
        for pid in processes_of(self.dir):
            with suppress(OSError):
                there = os.stat(f"/proc/{pid}/ns/mnt").st_ino == namespace != own
                named = f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if there or named:
                    os.kill(pid, signal.SIGKILL)

    def down(self, keep: bool = False) -> None:
        """End every process of the sandbox, jobs included, and remove its folder unless `keep`.

        Nothing in it is worth an orderly end, so all are killed, in rounds: a dying daemon may still start one.
        """
        deadline = time.monotonic() + 20
        while alive := processes_of(self.dir):
            if time.monotonic() > deadline:
                raise SandboxError(f"{self.dir}: processes {alive} don't end; look at them with ps")
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for child in self._children.values():
            child.wait()  # or it stays as a zombie
        self._children.clear()
        if not keep:
            shutil.rmtree(self.dir, ignore_errors=True)
        while self._reaper:
            reaper = self._reaper.pop()
            reaper.kill()
            reaper.wait()
            os.close(self._held_open)

    # --- remembering ------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        self.dir = self.dir.absolute()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper: list[subprocess.Popen[bytes]] = []  # one at most
        self._held_open = -1  # a pipe's end: the reaper sees it close when this process ends
        self._database_port = 0

    def _save(self) -> None:
        names = ("num_nodes", "gpus_per_node", "cpus_per_node", "accounting", "max_array_size", "daemons")
        (self.dir / "sandbox.json").write_text(json.dumps({name: getattr(self, name) for name in names}, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Sandbox:
        """The sandbox in `folder`, started by another process."""
        path = folder / "sandbox.json"
        if not path.exists():
            raise SandboxError(f"{folder}: no sandbox there; `up` starts one")
        return cls(folder, **json.loads(path.read_text()))


def check_installed(accounting: bool = False) -> None:
    """Raise `SandboxError` that names the Debian packages when a program is missing."""
    wanted = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"}
    if accounting:
        wanted |= {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
    missing = {program: package for program, package in wanted.items() if _which(program) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise SandboxError(f"{', '.join(missing)} not found; install with: apt-get install -y {packages}")


def find(program: str) -> str:
    """Path of a program; daemons lie in sbin, which isn't on every user's PATH."""
    path = _which(program)
    if path is None:
        raise SandboxError(f"{program} not found")
    return path


def processes_of(folder: Path) -> list[int]:
    """Every live process that carries the sandbox's mark in its environment, or whose parent does."""
    mark = f"{MARKER}={folder.absolute()}".encode()
    marked, parents = set(), {}
    for pid, parent, environment in _all_processes():
        parents[pid] = parent
        if mark in environment.split(b"\0"):
            marked.add(pid)
    return sorted(pid for pid in parents if pid in marked or _descends(pid, parents, marked))


def _descends(pid: int, parents: dict[int, int], marked: set[int]) -> bool:
    while (pid := parents.get(pid, 0)) > 1:
        if pid in marked:
            return True
    return False


def _all_processes() -> Iterator[tuple[int, int, bytes]]:
    """(pid, parent's pid, environment) of what this user may see; zombies are left out."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                yield int(entry.name), int(fields[1]), (entry / "environ").read_bytes()
        except OSError:
            continue


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


def _can_unshare() -> bool:
    if os.getuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True, check=False).returncode == 0


def _clean_environment() -> dict[str, str]:
    """This process's environment without what an enclosing Slurm job, or another sandbox, put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN")) and k != MARKER}
    return {**kept, "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def default_dir() -> Path:
    """One sandbox a user when no --dir is given."""
    return Path(tempfile.gettempdir()) / f"astro-hpc-slurm-{getpass.getuser()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "start it"),
        ("env", "print shell lines that point Slurm's commands at it"),
        ("status", "daemons, nodes, queue"),
        ("down", "stop it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--dir", type=Path, default=default_dir(), help="its folder (default: %(default)s)")
        if name == "up":
            command.add_argument("--nodes", type=int, default=4)
            command.add_argument("--gpus-per-node", type=int, default=8, help="pretended; 0: none")
            command.add_argument("--cpus-per-node", type=int, default=64, help="pretended")
            command.add_argument("--accounting", action="store_true", help="slurmdbd and MariaDB: sacct works")
        if name == "down":
            command.add_argument("--keep", action="store_true", help="leave the folder, for its logs")
    arguments = parser.parse_args()
    try:
        return COMMANDS[arguments.command](arguments)
    except SandboxError as error:
        print(f"slurm_sandbox: {error}", file=sys.stderr)
        return 2


def _up(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    if not 1 <= arguments.nodes <= 64 or not 0 <= arguments.gpus_per_node <= 64:
        raise SandboxError("--nodes must be from 1 to 64 and --gpus-per-node from 0 to 64")
    sandbox = Sandbox(
        arguments.dir, arguments.nodes, arguments.gpus_per_node, arguments.cpus_per_node, arguments.accounting
    )
    sandbox.up()
    print(f"{sandbox.num_nodes} nodes are ready after {time.monotonic() - started:.1f} s in {sandbox.dir}")
    print(f'use it:  eval "$({sys.argv[0]} env --dir {sandbox.dir})" && sinfo')
    return 0


def _env(arguments: argparse.Namespace) -> int:
    for name, value in Sandbox.load(arguments.dir).env.items():
        print(f"export {name}={value}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    sandbox = Sandbox.load(arguments.dir)
    alive = processes_of(sandbox.dir)
    for name, pid in sandbox.daemons.items():
        print(f"{name:12} {'running' if pid in alive else 'ended'}  pid {pid}")
    if sandbox.daemons.get("slurmctld") not in alive:
        print("slurmctld does not run; `down`, then `up`")
        return 1
    print(sandbox.run("sinfo", "-N", "-p", PARTITIONS[0], "-o", "%6N %10T %4c %G"), end="")
    print(sandbox.run("squeue"), end="")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    Sandbox.load(arguments.dir).down(keep=arguments.keep)
    print(f"{arguments.dir}: stopped")
    return 0


COMMANDS = {"up": _up, "env": _env, "status": _status, "down": _down}

if __name__ == "__main__":
    sys.exit(main())
