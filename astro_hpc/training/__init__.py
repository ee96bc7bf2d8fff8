"""Training on packed sequences: data, the Megatron train step, checkpoints, the SFT loop."""

import astro_hpc.model  # noqa: F401 - sets the environment before torch is imported
