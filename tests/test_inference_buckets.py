"""Weights in buckets: nothing is lost, moved or read as another type, on a real gloo group too."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.inference.buckets import Group, TensorInfo, cut_into_buckets, fill, join_store, open_store, view

DTYPES = ["bfloat16", "float32", "uint8", "int64"]
infos = st.lists(
    st.builds(
        lambda number, dtype, shape: TensorInfo(f"t{number}", dtype, tuple(shape)),
        st.integers(0, 9),
        st.sampled_from(DTYPES),
        st.lists(st.integers(1, 5), max_size=3),
    ),
    max_size=12,
)


def values(info: TensorInfo, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, info.shape, generator=draw).to(getattr(torch, info.dtype))


@given(infos, st.integers(1, 400))
def test_every_tensor_is_in_one_bucket_in_order_and_within_the_limit(tensors, limit):
    buckets = list(cut_into_buckets(tensors, limit))
    assert [tensor for bucket in buckets for tensor in bucket.tensors] == tensors
    for bucket in buckets:
        assert bucket.nbytes <= limit or len(bucket.tensors) == 1
        ends = [start + tensor.nbytes for start, tensor in zip(bucket.starts, bucket.tensors, strict=True)]
        assert all(end <= start for end, start in zip(ends, bucket.starts[1:], strict=False))
        assert ends[-1] == bucket.nbytes
        assert all(start % 16 == 0 for start in bucket.starts)


@given(infos, st.integers(1, 400))
def test_what_is_filled_in_is_read_out_bit_for_bit(tensors, limit):
    sent = [(info.name, values(info, seed)) for seed, info in enumerate(tensors)]
    each, got = iter(sent), []
    for bucket in cut_into_buckets(tensors, limit):
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        fill(bucket, each, buffer)
        got += [
            (info.name, view(buffer, info, start)) for info, start in zip(bucket.tensors, bucket.starts, strict=True)
        ]
    assert [name for name, _ in got] == [name for name, _ in sent]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(got, sent, strict=True))
    assert [TensorInfo.from_json(info.to_json()) for info in tensors] == tensors


def test_other_weights_than_announced_are_not_sent():
    [bucket] = cut_into_buckets([TensorInfo("a", "float32", (2,)), TensorInfo("b", "float32", (2,))])
    buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
    for wrong in ([("b", torch.zeros(2))], [("a", torch.zeros(2))], [("a", torch.zeros(2)), ("b", torch.zeros(3))]):
        with pytest.raises(RuntimeError, match="have changed"):
            fill(bucket, iter(wrong), buffer)


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_two_workers_receive_what_is_sent(address, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    announced = [TensorInfo("a", "float32", (3, 5)), TensorInfo("b", "bfloat16", (7,)), TensorInfo("c", "int64", ())]
    sent = [(info.name, values(info)) for info in announced]
    store, got = open_store(3, 60), {}
    cpu = torch.device("cpu")

    def worker(rank: int) -> None:
        group = Group(join_store("127.0.0.1", store.port, 3, 60), rank, 3, cpu, 60)
        got[rank] = list(group.receive(announced))

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    Group(store, 0, 3, cpu, 60, address).send(sent, announced)
    for thread in threads:
        thread.join(60)
    for rank in (1, 2):
        assert [name for name, _ in got[rank]] == ["a", "b", "c"]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got[rank], sent, strict=True))
