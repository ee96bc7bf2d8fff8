"""What this machine or node has and lacks for a run, with the remedy: `astro-hpc doctor`.

A check looks and never changes anything; it yields rows. Those that need a configuration are asked only with one.
New kinds of checks (a cluster's, say) are a function more in `examine`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from astro_hpc.config import ConfigError, RunConfig
from astro_hpc.launch import checks, run_checks
from astro_hpc.launch.checks import Check
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.cluster_checks import cluster_checks
from astro_hpc.launch.node import NodeLimits, check_node, print_reports
from astro_hpc.model.libraries import this_machine
from astro_hpc.run.process import EXIT_BAD_NODE


def examine(cfg: RunConfig | None, cluster: ClusterConfig | None = None) -> list[Check]:
    """All checks, in the order in which their remedies are best taken."""
    folder = cfg.runs_dir if cfg is not None else Path.cwd()
    rows = [*cluster_checks(cluster, folder)] if cluster is not None else []
    rows += [*checks.python_version(), *checks.torch_build()]
    if importlib.util.find_spec("torch") is None:
        return rows  # nothing below can be asked without it
    machine = this_machine()
    rows += [*checks.accelerator(machine, cfg), *checks.megatron_core(), *checks.kernels(machine, cfg)]
    rows += [*checks.vllm_build(machine, cfg), *checks.packages(cfg)]
    shape = None
    if cfg is not None:
        model = run_checks.Model(cfg)
        shape = model.shape
        rows += [*model.rows, *run_checks.inputs(cfg), *run_checks.reinforcement(cfg)]
        rows += [*run_checks.parallel_sizes(cfg, machine, shape), *run_checks.arithmetic(cfg, machine, shape)]
    return [*rows, *run_checks.memory(cfg, machine, shape), *run_checks.disk(cfg, shape)]


def examine_node(nodes: str | None, folder: Path | None, limits: NodeLimits, as_json: bool) -> int:
    """Check this node, print what was found, and return the exit code.

    Raises:
        ConfigError: several nodes have no folder to meet in, or this one isn't among them.
    """
    own = os.environ.get("SLURMD_NODENAME") or platform.node()
    names = nodes.split(",") if nodes else [own]
    if own not in names:
        raise ConfigError(f"--nodes {nodes}: this is {own}; give the names that Slurm has for the job's nodes")
    if folder is None and len(names) > 1:
        raise ConfigError("--nodes: several nodes need --folder, a folder that all of them see")
    with contextlib.ExitStack() as held:
        place = folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        reports = check_node(own, names, place, limits)
    print_reports(reports, as_json)
    verdicts = {report.verdict for report in reports}
    return EXIT_BAD_NODE if "bad" in verdicts else int("unsure" in verdicts)


def print_checks(rows: list[Check]) -> None:
    """A line a check, the remedy under it; colours on a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colours = {"pass": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(row.name) for row in rows)
    for row in rows:
        console.print(f"[{colours[row.status]}]{row.status}[/]  {escape(row.name):<{width}}  {escape(row.found)}")
        if row.remedy:
            console.print(f"      {'':<{width}}  -> {escape(row.remedy)}")
    counts = {status: sum(row.status == status for row in rows) for status in colours}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def as_json(rows: list[Check]) -> dict[str, Any]:
    """{"ok": bool, "checks": [{"name", "status", "found", "remedy"}]}."""
    return {"ok": healthy(rows), "checks": [asdict(row) for row in rows]}


def healthy(rows: list[Check]) -> bool:
    """Whether nothing fails."""
    return all(row.status != "fail" for row in rows)
