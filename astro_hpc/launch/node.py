"""Whether the nodes of a job are fit for it: `astro-hpc doctor --node`, one process a node, before the stage starts.

Every node looks at itself and leaves what it found in a folder of the shared file system; that the others find it there
is a part of the check. The first node then says in one line a node which are `ok` and which are `bad`; the job script
puts bad ones on the run's exclude list.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.launch.checks import GB, Check
from astro_hpc.run.files import write_json_atomic

_POLL_SECONDS = 0.1
_REDUCED_NUMBERS = 1 << 20
"""float32 numbers of the all-reduce: 4 MB."""
_FIELDS = ("index", "memory.total", "memory.free", "ecc.errors.uncorrected.volatile.total")


@dataclass(frozen=True)
class NodeLimits:
    """What a node must have; see `NodeCheckConfig` of cluster files.

    Attributes:
        disk: folder on the node's own disk; variables of the environment are put in.
        min_disk_gb: free there, in 1e9 bytes.
        min_free_gpu_memory: share of each GPU's memory.
        max_clock_skew: seconds between two nodes' clocks.
        wait: seconds for the other nodes.
        all_reduce: whether several nodes try one.
    """

    disk: str = "/tmp"
    min_disk_gb: float = 1.0
    min_free_gpu_memory: float = 0.9
    max_clock_skew: float = 10.0
    wait: float = 120.0
    all_reduce: bool = True


@dataclass
class NodeReport:
    """What is known of one node after the check.

    Attributes:
        verdict: `ok`; `bad`: it is at fault; `unsure`: something fails, and no single node can be named.
        reason: of a verdict that isn't `ok`.
        checks: rows of the node itself; none of a node that wasn't heard of.
    """

    node: str
    verdict: str
    reason: str = ""
    checks: list[Check] = field(default_factory=list)

    def line(self) -> str:
        """As the job script reads it: verdict, node, reason."""
        return " ".join(part for part in (self.verdict, self.node, self.reason) if part)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def check_node(node: str, nodes: Sequence[str], folder: Path, limits: NodeLimits) -> list[NodeReport]:
    """Check this node, together with the job's others where there are any.

    Args:
        node: this one's name, one of `nodes`.
        folder: on the shared file system, of this attempt alone; made when absent.

    Returns:
        On the first of `nodes` one report a node; elsewhere this node's own, and the first's where that is silent. A
        node is bad when a check of its own fails, when nothing was heard of it in time, or when its clock is off.
    """
    rows = [*local_disk(limits), *gpus(limits)]
    canary = {"node": node, "time": time.time(), "checks": [asdict(row) for row in rows]}
    try:
        write_json_atomic(folder / f"{node}.json", canary)
    except OSError as error:
        rows.append(Check("shared folder", "fail", f"{folder}: {error.strerror}", "mount it on this node"))
        return [_judge(node, rows)]
    own = _judge(node, rows)
    if len(nodes) == 1:
        return [own]
    seen = _wait_for(nodes, folder, limits.wait)
    others, first = {*seen} - {node}, nodes[0]
    silent = f"nothing heard from it within {limits.wait:.0f} s"
    if own.verdict == "ok" and not others and (node != first or len(nodes) > 2):
        # Either this one sees no shared folder, which the others will say, or they have all gone.
        return [NodeReport(node, "unsure", f"{folder}: nothing that other nodes write is seen here", rows)]
    if first not in seen and node != first:  # it would speak for all
        return [NodeReport(first, "bad", silent), own]
    reports = _judge_all(nodes, seen, limits, silent)
    if limits.all_reduce and all(report.verdict == "ok" for report in reports):
        why = _all_reduce(nodes.index(node), len(nodes), folder, limits.wait)
        if why:
            found = f"all-reduce over {len(nodes)} nodes: {why}"
            reports = [
                NodeReport(each, "unsure", found, report.checks) for each, report in zip(nodes, reports, strict=True)
            ]
    return reports if node == nodes[0] else [report for report in reports if report.node == node]


def _judge(node: str, rows: list[Check]) -> NodeReport:
    failed = [f"{row.name}: {row.found}" for row in rows if row.status == "fail"]
    return NodeReport(node, "bad" if failed else "ok", "; ".join(failed), rows)


def _judge_all(
    nodes: Sequence[str], seen: dict[str, dict[str, Any]], limits: NodeLimits, silent: str
) -> list[NodeReport]:
    """Of every node, by what it left. A clock is held against the middle of all, so that one that is off stands out."""
    clocks = sorted(float(each["skew"]) for each in seen.values())
    middle = clocks[len(clocks) // 2]
    reports = []
    for node in nodes:
        if node not in seen:
            reports.append(NodeReport(node, "bad", silent))
            continue
        rows = [Check(**row) for row in seen[node]["checks"]]
        off = float(seen[node]["skew"]) - middle
        if abs(off) > limits.max_clock_skew:
            rows.append(Check("clock", "fail", f"{off:+.0f} s against the other nodes", "start chronyd or ntpd on it"))
        reports.append(_judge(node, rows))
    return reports


def _wait_for(nodes: Sequence[str], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """What each node left, as far as it came in time; `skew` is its clock less the file server's."""
    seen: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    while len(seen) < len(nodes) and time.monotonic() < deadline:
        for node in nodes:
            path = folder / f"{node}.json"
            with contextlib.suppress(OSError, json.JSONDecodeError):
                if node not in seen:
                    os.listdir(folder)  # a network file system may remember that the file wasn't there
                    values = json.loads(path.read_text())
                    seen[node] = {**values, "skew": values["time"] - path.stat().st_mtime}
        if len(seen) < len(nodes):
            time.sleep(_POLL_SECONDS)
    return seen


# --- one node ---------------------------------------------------------------------------------------------------


def local_disk(limits: NodeLimits) -> Iterator[Check]:
    """Room on the node's own disk, by writing there."""
    place = Path(os.path.expandvars(limits.disk))
    try:
        free = shutil.disk_usage(place).free / GB
        probe = place / f".astro-hpc-{os.getpid()}.probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        yield Check("local disk", "fail", f"{place}: {error.strerror}", "mend it, or set node_check.disk")
        return
    found = f"{place}: {free:.1f} GB free"
    if free < limits.min_disk_gb:
        yield Check("local disk", "fail", f"{found} of {limits.min_disk_gb:g} wanted", "clear it, or wait for its jobs")
    else:
        yield Check("local disk", "pass", found)


def gpus(limits: NodeLimits, ask: Callable[[Sequence[str]], str | None] | None = None) -> Iterator[Check]:
    """As many GPUs as Slurm gave, their free memory, and errors that ECC couldn't mend since the driver started."""
    promised = os.environ.get("SLURM_GPUS_ON_NODE", "")
    text = (ask or _nvidia_smi)(_FIELDS)
    if text is None:
        if promised not in ("", "0"):
            yield Check("GPU", "warn", f"Slurm gives {promised}, nvidia-smi isn't there to ask", "install the driver")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if promised.isdigit() and len(rows) < int(promised):
        yield Check("GPU", "fail", f"{len(rows)} of {promised} answer", "a GPU fell off the bus: reboot the node")
    for index, total, free, errors in rows:
        if errors.isdigit() and int(errors) > 0:
            yield Check(f"GPU {index} ECC", "fail", f"{errors} uncorrected errors", "reset or replace the GPU")
        if total.isdigit() and free.isdigit() and int(free) < limits.min_free_gpu_memory * int(total):
            found = f"{free} of {total} MiB free"
            yield Check(f"GPU {index} memory", "fail", found, "somebody's process is left there: end it, reset the GPU")
    if rows:
        yield Check("GPU", "pass", f"{len(rows)} answer")


def _nvidia_smi(fields: Sequence[str]) -> str | None:
    """CSV of the GPUs that this job sees; None where there is no nvidia-smi; empty when it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


# --- all nodes --------------------------------------------------------------------------------------------------


def _all_reduce(rank: int, world_size: int, folder: Path, seconds: float) -> str | None:
    """Sum 4 MB over one process a node, by NCCL where there are GPUs, else gloo; what went wrong, or None."""
    import torch
    from torch import distributed

    timeout = datetime.timedelta(seconds=seconds)
    meeting = folder / "rendezvous.json"
    try:
        if rank == 0:
            host = os.environ.get("MASTER_ADDR") or os.environ.get("SLURMD_NODENAME") or "127.0.0.1"
            store = distributed.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
            write_json_atomic(meeting, {"host": host, "port": store.port})
        else:
            deadline = time.monotonic() + seconds
            while not meeting.exists():
                os.listdir(folder)
                if time.monotonic() > deadline:
                    return "the first node didn't open a port"
                time.sleep(_POLL_SECONDS)
            where = json.loads(meeting.read_text())
            store = distributed.TCPStore(where["host"], where["port"], world_size, timeout=timeout)
        on_gpu = torch.cuda.is_available()
        backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        numbers = torch.full([_REDUCED_NUMBERS], float(rank + 1), device=device)
        distributed.all_reduce(numbers)
        right = bool((numbers == world_size * (world_size + 1) / 2).all())
        distributed.barrier()
        distributed.destroy_process_group()
    except (RuntimeError, OSError, ValueError) as error:  # torch's DistBackendError is a RuntimeError
        return " ".join(str(error).split())[:200]
    return None if right else "the sum is wrong"


def print_reports(reports: Sequence[NodeReport], as_json: bool) -> None:
    """A line a node, or JSON."""
    if as_json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
        return
    # One write: the lines of several nodes go to one file.
    sys.stdout.write("".join(f"{report.line()}\n" for report in reports))
    sys.stdout.flush()
