"""What our servers add to vLLM's own, through the hooks that vLLM has for it."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN_PATHS = ("/health", "/ping")


class GuardAllPaths:
    """ASGI middleware: the API key is asked for everywhere. vLLM guards its public paths only, not those for weights.

    Without a key in VLLM_API_KEY nothing is guarded.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        self._app = app
        self._wanted = hashlib.sha256(f"Bearer {key}".encode()).digest() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass on what is open or carries the key; answer 401 to the rest."""
        if self._wanted is None or scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if secrets.compare_digest(hashlib.sha256(given).digest(), self._wanted):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})


class WeightUpdates:
    """Extension of vLLM's worker: replaces the weights, on CPU too, and tells which ones it has."""

    def load_weights_folder(self: Any, weights_path: str) -> None:
        """Load the safetensors of a Hugging Face folder into the live model; the caller clears the prefix cache."""
        self.reload_weights(weights_path=weights_path)
        if self.device.type == "cpu":
            repack_head(self.get_model())

    def receive_weights(
        self: Any, host: str, port: int, first_rank: int, world_size: int, tensors: list[Any], seconds: float
    ) -> None:
        """Load weights that come over the network (`inference.buckets`) into the live model.

        Args:
            host, port: where the processes meet.
            first_rank: of this server's workers; rank 0 sends.
            tensors: what is sent, as `TensorInfo.to_json` gives it.
            seconds: how long to wait for the others.
        """
        from astro_hpc.inference.buckets import Group, TensorInfo, join_store

        store = join_store(host, port, world_size, seconds)
        group = Group(store, first_rank + self.rank, world_size, self.device, seconds)
        announced = [TensorInfo.from_json(row) for row in tensors]
        self.reload_weights(weights_iterator=group.receive(announced))
        if self.device.type == "cpu":
            repack_head(self.get_model())

    def weight_digests(self: Any, layer: int, columns: list[int]) -> dict[str, str]:
        """Hashes of parts of this worker's weights; see `inference.probe.engine_digests`."""
        from astro_hpc.inference.probe import engine_digests

        return engine_digests(self.get_model(), layer, columns)


def repack_head(model: Any) -> None:
    """Renew the packed copy that CPU kernels keep of an output head.

    vLLM 0.32 repacks each layer that it loads, but a tied head isn't loaded: it shares the embedding's tensor, and
    would go on multiplying by its packed copy of the old one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
