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
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_WIDENED = {torch.matmul, torch.Tensor.matmul, _ATTENTION}
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
        self._widen = not has_fast_bf16()  # a matrix product with a weight, and attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._widen and func in _WIDENED and args[1].dtype is torch.bfloat16:
            return self._in_float32(func, args, kwargs or {})
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

    @staticmethod
    def _in_float32(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        if func is _ATTENTION:
            return func(*(arg.float() for arg in args), **kwargs).bfloat16()
        left, right = args
        # Rows first: a product with a tensor of odd strides would become one small product a row.
        rows = left.reshape(-1, left.shape[-1]).float()
        return torch.mm(rows, right.float()).bfloat16().view(*left.shape[:-1], right.shape[1])


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _with_mode(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A custom function's `backward` under the mode: autograd doesn't carry function modes over."""

    def wrapped(ctx: Any, *gradients: Any) -> Any:
        with _CudaMeansCpu():
            return backward(ctx, *gradients)

    return staticmethod(wrapped)  # type: ignore[return-value]


def _keeping_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer's restoring of one parameter, given the `step` that only torch's AdamW has."""

    def wrapped(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]})

    return wrapped


@contextlib.contextmanager
def megatron_device() -> Iterator[None]:
    """Run Megatron code inside this block; on CPU it redirects CUDA calls. Blocks may nest (one thread)."""
    global _depth
    if not on_cpu() or _depth:
        yield
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear
    from megatron.core.tensor_parallel.random import CheckpointFunction as Recompute

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
                (Linear, "backward", _with_mode(Linear.backward)),
                (Recompute, "backward", _with_mode(Recompute.backward)),
                (
                    DistributedOptimizer,
                    "_set_main_param_and_optimizer_states",
                    _keeping_step(DistributedOptimizer._set_main_param_and_optimizer_states),
                ),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(_CudaMeansCpu())
            yield
    finally:
        _depth -= 1
