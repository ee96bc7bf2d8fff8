"""Servers that a Slurm job starts on nodes of its own, and tells its stage of through the environment.

They are how this one job is carried out and no part of the run's configuration, whose `inference.num_servers` says
how many there are on each such node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from astro_hpc.config.schema import InferenceConfig

ADDRESSES = "ASTRO_HPC_SERVERS"
"""Their addresses, separated by commas. They may still be loading the model."""
KEY = "ASTRO_HPC_SERVERS_KEY"
"""Their API key; made up by the job."""


def job_servers(cfg: InferenceConfig, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Addresses of the servers that the job has started in place of those that `num_servers` would start here."""
    if cfg.num_servers is None:
        return []
    return [address for address in environ.get(ADDRESSES, "").split(",") if address]


def started_here(cfg: InferenceConfig, environ: Mapping[str, str] = os.environ) -> int:
    """How many servers an engine of `cfg` starts on this machine."""
    return 0 if job_servers(cfg, environ) else cfg.num_servers or 0
