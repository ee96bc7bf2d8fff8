"""astro_hpc: teaching language models to reason by search, from Monte-Carlo trees to reinforcement learning."""

__version__ = "0.1.0"
