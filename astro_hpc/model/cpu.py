"""Everything that Megatron-Core needs changed to run where there is no CUDA, and nothing else.

Megatron writes `torch.cuda.*` and `device="cuda"` in many places. `megatron_device()` redirects them to the CPU
for as long as its block runs; where CUDA is present it does nothing. It is scoped because a function mode taxes every
torch call of its thread: left on, it slows an inference engine in the same process by about a sixth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.nn.functional.linear}
_depth = 0


def on_cpu() -> bool:
    """Whether training runs on the CPU: there is no CUDA device."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device that tensors of this rank live on."""
    return _CPU if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites literal CUDA devices, `.cuda()`, pinned memory and CUDA type names.

    On a CPU without bfloat16 matrix instructions it also multiplies bfloat16 matrices in float32 and rounds the
    result: several times faster there, and no less exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self._widen = not has_fast_bf16()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._widen and func in _MATMULS and args[0].dtype is torch.bfloat16 and args[1].dtype is torch.bfloat16:
            return func(args[0].float(), args[1].float(), *args[2:]).bfloat16()
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if kwargs:
            if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return func(*args, **kwargs) if kwargs else func(*args)


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


@contextlib.contextmanager
def megatron_device() -> Iterator[None]:
    """Run Megatron code inside this block; on CPU it redirects CUDA calls. Blocks may nest (one thread)."""
    global _depth
    if not on_cpu() or _depth:
        yield
        return
    from megatron.core.tensor_parallel import random as megatron_random

    _depth += 1
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in (
                (torch.cuda, "current_device", lambda: _CPU),
                (torch.cuda, "synchronize", lambda *_: None),
                (torch.cuda, "get_rng_state", _get_rng_state),
                (torch.cuda, "manual_seed", torch.manual_seed),
                (megatron_random, "_get_cuda_rng_state", _get_rng_state),
                (megatron_random, "_set_cuda_rng_state", _set_rng_state),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(_CudaMeansCpu())
            yield
    finally:
        _depth -= 1
