"""Weights in buckets over the network, from the training straight into the workers of vLLM servers.

A group of processes is made for each push: rank 0 sends, the servers' workers receive, over NCCL on GPUs and gloo on
a CPU. A bucket is one broadcast of raw bytes; both sides derive from the list of tensors what is where in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 512 << 20
_ALIGNMENT = 16
"""Tensors begin at multiples of this, so that the bytes can be read as any type where they lie."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on the wire: Hugging Face name, dtype as torch names it (`bfloat16`), whole shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        import torch

        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorInfo:
        """What a tensor is."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> TensorInfo:
        """The inverse of `to_json`."""
        name, dtype, shape = row
        return cls(str(name), str(dtype), tuple(map(int, shape)))

    def to_json(self) -> list[Any]:
        """For a request."""
        return [self.name, self.dtype, list(self.shape)]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring tensors that travel together.

    Attributes:
        starts: byte at which each begins.
        nbytes: of the whole.
    """

    tensors: tuple[TensorInfo, ...]
    starts: tuple[int, ...]
    nbytes: int


def cut_into_buckets(tensors: Iterable[TensorInfo], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """All tensors in their order, in buckets of at most `limit` bytes; a larger tensor has a bucket of its own."""
    held: list[TensorInfo] = []
    starts: list[int] = []
    end = 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if held and start + tensor.nbytes > limit:
            yield Bucket(tuple(held), tuple(starts), end)
            held, starts, start = [], [], 0
        held.append(tensor)
        starts.append(start)
        end = start + tensor.nbytes
    if held:
        yield Bucket(tuple(held), tuple(starts), end)


def fill(bucket: Bucket, tensors: Iterator[tuple[str, torch.Tensor]], buffer: torch.Tensor) -> None:
    """Copy a bucket's tensors, the next ones of `tensors`, into `buffer` ([nbytes] uint8).

    Raises:
        RuntimeError: they are not those that were announced.
    """
    for wanted, start in zip(bucket.tensors, bucket.starts, strict=True):
        name, tensor = next(tensors, ("nothing", None))
        found = None if tensor is None else TensorInfo.of(name, tensor)
        if tensor is None or found != wanted:
            raise RuntimeError(f"the weights to be sent have changed: {found or name} where {wanted} was announced")
        view(buffer, wanted, start).copy_(tensor.detach())


def view(buffer: torch.Tensor, tensor: TensorInfo, start: int) -> torch.Tensor:
    """A tensor where it lies in a bucket's bytes."""
    import torch

    return buffer[start : start + tensor.nbytes].view(getattr(torch, tensor.dtype)).view(tensor.shape)


class Group:
    """The processes of one push."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        device: torch.device,
        seconds: float,
        gloo_address: str | None = None,
    ) -> None:
        """Meet the others at `store`; blocks until all have come.

        Args:
            device: of the buckets; decides between NCCL and gloo.
            seconds: how long to wait for the others, here and in each broadcast.
            gloo_address: of this machine, to listen at; None: what gloo chooses, GLOO_SOCKET_IFNAME included.

        Raises:
            RuntimeError: one didn't come.
        """
        import torch.distributed as dist

        self._device, self._rank = device, rank
        timeout = timedelta(seconds=seconds)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(store, rank, world_size, options)
        elif gloo_address is not None:
            gloo_options = dist.ProcessGroupGloo._Options()
            gloo_options._timeout = timeout
            gloo_options._devices = [dist.ProcessGroupGloo.create_device(hostname=gloo_address)]
            self._group = dist.ProcessGroupGloo(store, rank, world_size, gloo_options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, world_size, timeout)

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], announced: Sequence[TensorInfo]) -> None:
        """Rank 0: send all tensors, which must be those that were announced."""
        each = iter(tensors)
        for bucket in cut_into_buckets(announced):
            buffer = self._empty(bucket.nbytes)
            fill(bucket, each, buffer)
            self._broadcast(buffer)

    def receive(self, announced: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """The others: the tensors as they come. Each bucket has memory of its own, so they may be kept."""
        for bucket in cut_into_buckets(announced):
            buffer = self._empty(bucket.nbytes)
            self._broadcast(buffer)
            for tensor, start in zip(bucket.tensors, bucket.starts, strict=True):
                yield tensor.name, view(buffer, tensor, start)

    def _empty(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _broadcast(self, buffer: torch.Tensor) -> None:
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([buffer], options).wait()
        if buffer.device.type == "cuda":  # `wait` only orders streams; the buffer is used again by others
            import torch

            torch.cuda.synchronize(buffer.device)


def open_store(world_size: int, seconds: float) -> Any:
    """Rank 0's meeting point, at a free port of this machine (`port`)."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=seconds)
    return TCPStore("localhost", 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)


def join_store(host: str, port: int, world_size: int, seconds: float) -> Any:
    """The others' way to it."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=seconds)
    return TCPStore(host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
