"""The Llama model on Megatron-Core: shapes, layer specs, parallel state, precision, and the CPU device."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Megatron's jit_fuser is torch.compile, which on a CPU costs minutes and gives nothing. Read when torch is imported.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
