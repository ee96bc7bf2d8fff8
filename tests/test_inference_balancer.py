"""Which replica takes a request, when a failed one is tried again, and what servers on one machine share."""

from __future__ import annotations

import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.config.base import ConfigError
from astro_hpc.inference.balancer import Balancer, PrefixMemory, RetryPolicy
from astro_hpc.inference.local_server import choose_port, share_out

NAMES = ("a", "b", "c")
PROMPTS = st.lists(st.integers(0, 3), max_size=24).map(tuple)


@given(st.data())
def test_only_usable_replicas_with_room_are_picked_and_loads_add_up(data: st.DataObject):
    balancer = Balancer(NAMES, capacity=data.draw(st.integers(1, 3)), block_size=4)
    running: list[tuple[str, int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if running and data.draw(st.booleans()):
            balancer.finish(*running.pop(data.draw(st.integers(0, len(running) - 1))))
            continue
        prompt, cost = data.draw(PROMPTS), data.draw(st.integers(1, 1000))
        usable, avoid = data.draw(st.sets(st.sampled_from(NAMES))), data.draw(st.sets(st.sampled_from(NAMES)))
        room = {name for name in usable if balancer.loads[name].requests < balancer.capacity}
        picked = balancer.pick(prompt, cost, usable, avoid)
        if not room:
            assert picked is None
            continue
        assert picked in (room - avoid or room)
        loads = [balancer.loads[name].tokens for name in (room - avoid or room)]
        limit = min(loads) + max(4 * cost, sum(loads) / len(loads) / 4)
        assert balancer.loads[picked].tokens <= limit
        balancer.start(picked, prompt, cost)
        running.append((picked, cost))
    for name in NAMES:
        assert balancer.loads[name].requests == sum(n == name for n, _ in running)
        assert balancer.loads[name].tokens == sum(c for n, c in running if n == name)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_without_common_prefixes_no_replica_is_left_behind(costs: list[int]):
    balancer = Balancer(NAMES, capacity=1000)
    for cost in costs:
        balancer.start(balancer.pick((), cost, NAMES), (), cost)
    tokens = [load.tokens for load in balancer.loads.values()]
    assert max(tokens) - min(tokens) <= max(costs)


def test_a_prompt_goes_where_its_prefix_is_cached_until_that_replica_is_overloaded():
    balancer = Balancer(NAMES, capacity=1000, block_size=4)
    first, second = tuple(range(100)), tuple(range(500, 600))
    balancer.start("b", first, 10)
    balancer.finish("b", 10)
    assert balancer.pick((*first, 7, 7), 110, NAMES) == "b"
    assert balancer.pick(second, 110, NAMES) == "a"
    for _ in range(50):
        balancer.start("b", first, 110)
    assert balancer.pick(first, 110, NAMES) != "b"
    balancer.forget("b")
    for _ in range(50):
        balancer.finish("b", 110)
    assert balancer.pick(first, 110, NAMES) == "a"  # all alike again: the first name


@given(st.lists(PROMPTS, max_size=20), PROMPTS, PROMPTS)
def test_prefixes_are_known_in_whole_blocks_and_the_memory_is_bounded(seen, prompt, rest):
    memory = PrefixMemory(block_size=4, max_blocks=8)
    for one in seen:
        memory.add(list(memory.hashes(one)))
        assert len(memory) <= 8
    hashes, longer = list(memory.hashes(prompt)), list(memory.hashes(prompt + rest))
    assert len(hashes) == len(prompt) // 4
    assert longer[: len(hashes)] == hashes
    assert memory.match(hashes) <= memory.match(longer) <= len(longer)
    memory.add(hashes)
    assert memory.match(hashes) == len(hashes)


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_back_off_doubles_up_to_a_limit_and_is_reproducible(failures: int, seed: int):
    policy = RetryPolicy(first_delay=0.5, longest_delay=20.0)
    delay = policy.delay(failures, random.Random(seed))
    longest = min(20.0, 0.5 * 2.0 ** (failures - 1)) if failures < 60 else 20.0
    assert longest / 2 <= delay <= longest
    assert delay == policy.delay(failures, random.Random(seed))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 16))
def test_servers_get_disjoint_gpus_or_the_user_hears_how_many_are_missing(num_servers, gpus_each, num_gpus):
    devices = [f"GPU-{number}" for number in range(num_gpus)]
    if num_servers * gpus_each > num_gpus:
        with pytest.raises(ConfigError, match=f"needs {num_servers * gpus_each} GPUs, {num_gpus} are there"):
            share_out(devices, num_servers, gpus_each)
        return
    shares = [share.split(",") for share in share_out(devices, num_servers, gpus_each)]
    assert [len(share) for share in shares] == [gpus_each] * num_servers
    assert len({device for share in shares for device in share}) == num_servers * gpus_each


def test_ports_come_from_the_slurm_job_and_are_free():
    ports = {choose_port(index, environ={"SLURM_JOB_ID": str(job)}) for job in (71, 72) for index in (0, 1)}
    assert len(ports) == 4
    assert choose_port(0, environ={"SLURM_JOB_ID": "71"}) in ports
    wanted = choose_port(0, environ={"SLURM_JOB_ID": "71"})
    with socket.create_server(("127.0.0.1", wanted)):
        assert choose_port(0, environ={"SLURM_JOB_ID": "71"}) != wanted
    assert choose_port(0, environ={}) > 0
