"""What torch's AdamW needs inside Megatron's optimizer: its fallback without Transformer Engine or Apex."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def _torch_adamws(optimizer: Any) -> Iterator[torch.optim.AdamW]:
    """The torch AdamWs inside Megatron's optimizer: its fallback without Transformer Engine or Apex."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(inner.optimizer, torch.optim.AdamW):
            yield inner.optimizer


def use_fused_adamw(optimizer: Any) -> None:
    """Update each tensor in one pass instead of one a term."""
    for adamw in _torch_adamws(optimizer):
        for group in [*adamw.param_groups, adamw.defaults]:
            group["fused"], group["foreach"] = True, False


def prime_adamw(optimizer: Any) -> None:
    """Give torch's AdamW its state before loading: Megatron asks for moments but would leave out the step."""
    for adamw in _torch_adamws(optimizer):
        for group in adamw.param_groups:
            for parameter in group["params"]:
                if not adamw.state[parameter]:
                    adamw.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def unshare_steps(optimizer: Any) -> None:
    """Give each parameter its own step: a tensor shared by all would be counted up once a parameter."""
    for adamw in _torch_adamws(optimizer):
        for state in adamw.state.values():
            state["step"] = state["step"].clone()
