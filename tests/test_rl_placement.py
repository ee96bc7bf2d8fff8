"""Who gets which GPU of a machine where ranks train beside servers that sample."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig, ParallelConfig
from astro_hpc.inference import server_engine
from astro_hpc.inference.job_servers import job_servers, started_here
from astro_hpc.inference.local_server import share_out
from astro_hpc.inference.server_engine import address_for, gloo_address
from astro_hpc.model.sizes import local_world_size
from astro_hpc.run.ranks import ranks_here

few = st.integers(1, 4)


@given(st.integers(1, 16), few, few, few, few, st.none() | few)
def test_ranks_and_servers_share_a_machine_without_a_gpu_in_common(gpus, servers, each, tp, pp, copies):
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=copies)
    least = tp * pp * (copies or 1) + servers * each
    devices = [str(number) for number in range(gpus)]
    if least > gpus:
        with pytest.raises(ConfigError, match=f"has {gpus}, {servers * each} of them for inference.num_servers"):
            local_world_size(parallel, gpus, servers * each)
        return
    ranks = local_world_size(parallel, gpus, servers * each)
    assert ranks % (tp * pp) == 0
    shares = [share.split(",") for share in share_out(devices, servers, each, taken=ranks)]
    used = devices[:ranks] + [device for share in shares for device in share]
    assert len(used) == len(set(used)) <= gpus
    assert set(used) <= set(devices)
    assert [len(share) for share in shares] == [each] * servers
    if copies is None:
        assert gpus - len(used) < tp * pp, "another copy of the model would fit"


def test_too_few_gpus_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"needs 8 GPUs beside the 2 of the ranks that train, 8 are there; .* fewer"):
        share_out([str(number) for number in range(8)], 2, 4, taken=2)
    with pytest.raises(ConfigError, match="needs 6 GPUs, 4 are there; lower one of them$"):
        share_out(["0", "1", "2", "3"], 3, 2)


def test_how_many_ranks_are_on_this_machine():
    step = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}
    assert ranks_here({}) == 1
    assert ranks_here({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == 4
    assert ranks_here({**step, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == 8
    assert ranks_here({**step, "SLURM_STEP_TASKS_PER_NODE": "12,4"}) == 12


def test_servers_of_the_job_stand_in_for_those_that_would_be_started():
    cfg = InferenceConfig(engine="vllm-server", num_servers=2)
    told = {"ASTRO_HPC_SERVERS": "http://n3:20000,http://n4:20001"}
    assert job_servers(cfg, told) == ["http://n3:20000", "http://n4:20001"]
    assert (started_here(cfg, told), started_here(cfg, {})) == (0, 2)
    named = InferenceConfig(engine="vllm-server", servers=["http://mine:8000"])
    assert job_servers(named, told) == []
    assert started_here(InferenceConfig(), told) == 0


def test_servers_elsewhere_are_told_an_address_that_they_can_reach(monkeypatch):
    assert server_engine._address_towards("127.0.0.1") == "127.0.0.1"
    monkeypatch.setattr(server_engine, "_address_towards", lambda host: f"mine towards {host}")
    here, there = "http://127.0.0.1:8000", "http://192.0.2.7:8000"
    alone = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # ranks that all run on this machine
    assert address_for([here, "http://[::1]:1", "http://localhost:2"], {"MASTER_ADDR": "n1"}) == "127.0.0.1"
    assert address_for([here, there], {"MASTER_ADDR": "n1"}) == "n1"
    for environ in (alone, {}, {"MASTER_ADDR": "localhost"}):
        assert address_for([here, there], environ) == "mine towards 192.0.2.7"
    assert gloo_address("192.0.2.1", alone) == "192.0.2.1"
    assert gloo_address("127.0.0.1", alone) is None
    assert gloo_address("192.0.2.1", {"GLOO_SOCKET_IFNAME": "eth0"}) is None
