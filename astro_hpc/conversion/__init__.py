"""Hugging Face <-> Megatron: names and layouts, streaming import and export."""

import astro_hpc.model  # noqa: F401 - sets the environment before torch is imported
