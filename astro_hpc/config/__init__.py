"""The typed configuration of a run."""

from astro_hpc.config.base import ConfigError, Section
from astro_hpc.config.loading import load_config
from astro_hpc.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "Section", "load_config"]
