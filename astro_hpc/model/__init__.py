"""The Llama model on Megatron-Core: shapes, layer specs, parallel state, precision, and the CPU device."""

import os
import sys
import warnings
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Megatron's jit_fuser is torch.compile, which on a CPU costs minutes for nothing. Read when torch is imported.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # Installed where there is no GPU, Transformer Engine raises what Megatron's own guard doesn't catch: hide it.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # What Megatron says at each import where there is no GPU.
    for _message in ("(Transformer Engine and )?Apex (is|are) not installed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=_message, category=UserWarning)

# Megatron-Core 0.16 calls these itself; a user can do nothing about them.
for _message in (
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message, category=FutureWarning)
for _message in ("The .grad attribute of a Tensor that is not a leaf", "If you are using transformer_engine as the"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
