"""The graph of jobs and the plan of a launch, as pure data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc import pipeline
from astro_hpc.config import RunConfig, load_config
from astro_hpc.config.base import ConfigError
from astro_hpc.launch import slurm
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.graph import (
    Engines,
    LiveJob,
    as_ranges,
    build_graph,
    choose,
    chunks,
    from_ranges,
    plan,
    refuse_shared_process,
)
from astro_hpc.launch.submit import _submit
from astro_hpc.run.files import Journal
from astro_hpc.run.stage import run_stage

CONFIGS = Path(__file__).parent.parent / "configs"


def run_config(**values: object) -> RunConfig:
    problems = {"train": [{"type": "signs", "count": 10}]}
    return RunConfig.model_validate({"name": "test", "problems": problems, **values})


def cluster_config(**stages: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"gpus_per_node": 0, "stages": stages})


configs = st.builds(
    run_config,
    arms=st.sampled_from([["astro"], ["direct"], ["astro", "direct"]]),
    warmup=st.sampled_from([{}, {"enabled": True, "problems": {"type": "signs", "count": 4}}]),
    eval=st.sampled_from([{}, {"benchmarks": {"b": {"type": "signs", "count": 3}}}]),
)
STAGES_IN_SHARDS = ("search", "clone", "select", "eval")
clusters = st.builds(
    lambda *shards: cluster_config(**{s: {"shards": n} for s, n in zip(STAGES_IN_SHARDS, shards, strict=True)}),
    *(st.integers(1, 20) for _ in STAGES_IN_SHARDS),
)


@given(configs, clusters)
def test_every_job_comes_after_what_it_reads_and_all_lead_to_the_report(cfg, cluster):
    jobs = build_graph(cfg, cluster)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert len({job.output_of(task) + job.marker for job in jobs for task in job.tasks}) == sum(
        len(job.tasks) for job in jobs
    )
    for number, job in enumerate(jobs):
        assert set(job.after) <= set(names[:number])
    needed, front = set(), ["report"]
    while front:
        name = front.pop()
        needed.add(name)
        front += [each for each in jobs[names.index(name)].after if each not in needed]
    assert needed == set(names)


def test_the_whole_graph_of_the_large_configuration():
    cfg = load_config(CONFIGS / "llama3.1-70b.yaml")
    cluster = ClusterConfig.model_validate(
        {
            "stages": {
                "search": {"shards": 64},
                "clone": {"shards": 8},
                "sft": {"nodes": 8},
                "select": {"shards": 3, "throttle": 2},
                "eval": {"shards": 2},
            }
        }
    )
    jobs = {job.name: job for job in build_graph(cfg, cluster)}
    assert {name: list(job.after) for name, job in jobs.items()} == {
        "search": [],
        "gather": ["search"],
        "clone": ["gather"],
        "clone-gather": ["clone"],
        "sft-astro": ["clone-gather"],
        "select-astro": ["sft-astro"],
        "select-gather-astro": ["select-astro"],
        "rl-astro": ["sft-astro", "select-gather-astro"],
        "sft-direct": ["clone-gather"],
        "select-direct": ["sft-direct"],
        "select-gather-direct": ["select-direct"],
        "rl-direct": ["sft-direct", "select-gather-direct"],
        "eval": ["rl-astro", "rl-direct"],
        "eval-gather": ["eval"],
        "report": ["eval-gather"],
    }
    assert jobs["search"].num_tasks == 64
    assert jobs["sft-astro"].resources.nodes * jobs["sft-astro"].resources.tasks_per_node == 64
    assert jobs["search"].output_of(3) == "search/shard-00003-of-00064"
    assert (jobs["select-direct"].num_tasks, jobs["select-direct"].throttle) == (3, 2)
    assert jobs["select-direct"].resources.gpus_per_node == 8
    assert jobs["select-gather-direct"].resources.gpus_per_node == 0


@pytest.mark.parametrize("shards", [1, 3])
def test_jobs_write_where_the_pipeline_s_stages_do(shards, tmp_path):
    warmup, benchmarks = (
        {"enabled": True, "problems": {"type": "signs", "count": 4}},
        {"b": {"type": "signs", "count": 3}},
    )
    cfg = run_config(arms=["astro", "direct"], warmup=warmup, eval={"benchmarks": benchmarks}, runs_dir=tmp_path)
    jobs = build_graph(cfg, cluster_config(**{stage: {"shards": shards} for stage in STAGES_IN_SHARDS}))
    for job in jobs:
        for task in job.tasks:
            (cfg.run_dir / job.output_of(task)).mkdir(parents=True, exist_ok=True)
    stages = {str(stage.dir) for _, stage in pipeline.pipeline(cfg)}
    outputs = {job.output_of(task) for job in jobs for task in job.tasks if job.marker == "manifest.json"}
    assert outputs == stages


def test_ranks_must_hold_the_model_and_tensor_parallel_stays_inside_a_node():
    cfg = run_config(parallel={"tensor_parallel_size": 4, "pipeline_parallel_size": 2})
    build_graph(cfg, cluster_config(sft={"nodes": 2, "tasks_per_node": 4}))
    build_graph(cfg, cluster_config(sft={"nodes": 1, "tasks_per_node": 1}))  # it starts its ranks itself
    with pytest.raises(ConfigError, match="3 nodes x 4 ranks .*a multiple of 8 ranks"):
        build_graph(cfg, cluster_config(sft={"nodes": 3, "tasks_per_node": 4}))
    with pytest.raises(ConfigError, match="would reach over nodes"):
        build_graph(cfg, cluster_config(sft={"nodes": 4, "tasks_per_node": 2}))


def test_rollouts_alone_need_one_process_and_leave_nothing_to_evaluate(tmp_path):
    cfg = run_config(
        runs_dir=tmp_path, rl={"rollouts_only": True}, eval={"benchmarks": {"b": {"type": "signs", "count": 3}}}
    )
    jobs = build_graph(cfg, cluster_config())
    assert [job.name for job in jobs][-2:] == ["rl-astro", "report"]
    assert "eval" not in [command for command, _ in pipeline.pipeline(cfg)]
    assert not pipeline.rl(cfg, "astro").on_ranks
    with pytest.raises(ConfigError, match=r"1 nodes x 4 ranks .*: rl.rollouts_only samples in one process"):
        build_graph(cfg, cluster_config(rl={"tasks_per_node": 4}))


def test_a_replay_is_told_apart_by_arm(tmp_path):
    both = {"arms": ["astro", "direct"], "runs_dir": tmp_path}
    with pytest.raises(ValueError, match=r"rl.replay=old: would feed the arms astro and direct alike; write {arm}"):
        run_config(**both, rl={"replay": "old"})
    cfg = run_config(**both, rl={"replay": "old/rl/{arm}/rollouts"})
    for arm in cfg.arms:
        assert pipeline.rl(cfg, arm).inputs["rollouts"] == Path(f"old/rl/{arm}/rollouts")
    assert run_config(rl={"replay": "old"}).rl.replay_of("astro") == Path("old")


def test_a_wrong_path_of_a_reward_is_refused_before_anything_is_loaded(tmp_path):
    for name in ("sft/astro/hf", "select/astro"):
        (tmp_path / "test" / name).mkdir(parents=True)
    (tmp_path / "test" / "select" / "astro" / "prompts.jsonl").write_text("")
    cfg = run_config(runs_dir=tmp_path, rl={"reward": {"function": "no_such_module:score"}})
    with pytest.raises(ConfigError, match=r"function=no_such_module:score: ModuleNotFoundError: No module named"):
        run_stage(cfg, pipeline.rl(cfg, "astro"))


def test_rl_has_nodes_that_train_and_nodes_that_serve():
    inference = {"engine": "vllm-server", "num_servers": 2, "tensor_parallel_size": 2}
    cfg = run_config(parallel={"tensor_parallel_size": 2}, inference=inference)
    jobs = build_graph(cfg, cluster_config(rl={"nodes": 4, "engine_nodes": 3, "tasks_per_node": 2}))
    [rl] = [job for job in jobs if job.stage == "rl"]
    assert (rl.train_nodes, rl.engines) == (1, Engines(nodes=3, servers=2))
    assert all(job.engines is None for job in jobs if job.stage != "rl")
    by_gpu = ClusterConfig.model_validate({"gpus_per_node": 4, "stages": {"rl": {"nodes": 2, "engine_nodes": 1}}})
    [rl] = [job for job in build_graph(cfg, by_gpu) if job.stage == "rl"]
    assert rl.resources.tasks_per_node == 4, "a rank a GPU"
    for sizes, rl, message in [
        ({}, {"nodes": 2, "engine_nodes": 1, "tasks_per_node": 3}, "1 nodes x 3 ranks .*a multiple of 2 ranks"),
        ({}, {"nodes": 3, "engine_nodes": 1, "tasks_per_node": 1}, "would reach over nodes"),
        ({"gpus_per_node": 3}, {"nodes": 2, "engine_nodes": 1}, "needs 4 GPUs a node, it has 3; lower one"),
        ({"gpus_per_node": 6}, {"nodes": 1, "tasks_per_node": 4}, "needs 4 of the first node's 6 GPUs; .*engine_nodes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_graph(cfg, ClusterConfig.model_validate({"gpus_per_node": 0, **sizes, "stages": {"rl": rl}}))
    with pytest.raises(ConfigError, match=r"engine_nodes=1 .* needs inference\.engine=vllm-server and .*num_servers"):
        build_graph(run_config(), cluster_config(rl={"nodes": 2, "engine_nodes": 1}))
    with pytest.raises(ValueError, match="2 of 2 nodes would serve and none train"):
        cluster_config(rl={"nodes": 2, "engine_nodes": 2})


def test_an_engine_in_the_process_of_one_of_several_ranks_is_refused():
    cfg = run_config(parallel={"tensor_parallel_size": 2})
    jobs = build_graph(cfg, cluster_config())
    refuse_shared_process(choose(jobs, ["sft"]), cfg)
    with pytest.raises(ConfigError, match="rl-astro: 2 ranks train, and inference.engine=vllm would sample in one"):
        refuse_shared_process(jobs, cfg)
    refuse_shared_process(jobs, run_config(parallel={"tensor_parallel_size": 2}, rl={"replay": "somewhere"}))
    refuse_shared_process(jobs, run_config())


def test_choosing_stages():
    jobs = build_graph(run_config(arms=["astro", "direct"]), cluster_config(clone={"shards": 2}))
    assert [job.name for job in choose(jobs, ["clone", "search"])] == ["search", "clone", "clone-gather"]
    assert [job.name for job in choose(jobs, first="rl")] == ["rl-astro", "rl-direct", "report"]
    assert [job.name for job in choose(jobs, ["sft", "gather"], first="sft")] == ["sft-astro", "sft-direct"]
    assert choose(jobs) == jobs
    for wrong in ("warmup", "serch"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is no stage of this run; it has search, gather"):
            choose(jobs, [wrong])


@given(st.sets(st.integers(0, 3000)), st.integers(1, 1001))
def test_chunks_hold_every_task_once_below_the_largest_array(tasks, size):
    found = chunks(tasks, size)
    assert sorted(task for _, group in found for task in group) == sorted(tasks)
    for offset, group in found:
        assert all(0 <= task - offset < size for task in group)


@given(st.sets(st.integers(0, 500), min_size=1))
def test_ranges_there_and_back(numbers):
    assert from_ranges(as_ranges(numbers)) == numbers
    assert from_ranges(f"[{as_ranges(numbers)}%7]") == numbers


def test_ranges_in_squeue_s_words():
    assert from_ranges("7") == {7}
    assert from_ranges("0-8:4,11") == {0, 4, 8, 11}


@st.composite
def situations(draw):
    """A graph, what of it is done, and what is queued or running."""
    jobs = build_graph(draw(configs), draw(clusters))
    done, live = {}, {}
    for number, job in enumerate(jobs):
        states = draw(
            st.lists(st.sampled_from(["done", "live", "missing"]), min_size=len(job.tasks), max_size=len(job.tasks))
        )
        done[job.name] = {task for task, state in zip(job.tasks, states, strict=True) if state == "done"}
        busy = [task for task, state in zip(job.tasks, states, strict=True) if state == "live"]
        halves = [half for half in (busy[::2], busy[1::2]) if half]
        live[job.name] = [
            LiveJob(str(100 * number + each), frozenset(half), draw(st.booleans())) for each, half in enumerate(halves)
        ]
    return jobs, done, live


def ancestors(jobs, name):
    """All jobs that a job's results come from."""
    by_name = {job.name: job for job in jobs}
    found, front = set(), list(by_name[name].after)
    while front:
        if (each := front.pop()) not in found:
            found.add(each)
            front += by_name[each].after
    return found


def on_their_way(jobs, chosen, done, live):
    """Jobs of which something is queued, running or to be submitted, told without looking at a plan."""
    moving = {name for name, each in live.items() if each}
    while True:
        more = set()
        for job in jobs:
            busy = {task for one in live[job.name] for task in one.tasks}
            lacks = set(job.tasks) - busy - (set() if moving & set(job.after) else done[job.name])
            if lacks and job in chosen:
                more.add(job.name)
        if more <= moving:
            return moving
        moving |= more


@given(situations(), st.integers(1, 50))
def test_a_launch_submits_what_is_not_done_or_is_made_from_what_is_made_again_and_nothing_twice(situation, size):
    jobs, done, live = situation
    result = plan(jobs, jobs, done, live, size)
    submitted = [(step.job.name, task) for step in result.submissions for task in step.tasks]
    busy = {(name, task) for name, each in live.items() for one in each for task in one.tasks}
    moving = on_their_way(jobs, jobs, done, live)
    ready = {(job.name, task) for job in jobs if not moving & set(job.after) for task in done[job.name]}
    everything = {(job.name, task) for job in jobs for task in job.tasks}
    assert len(submitted) == len(set(submitted))
    assert set(submitted) == everything - busy - ready
    for step in result.submissions:
        assert all(0 <= task - step.offset < size for task in step.tasks)


@given(situations(), st.data())
def test_what_is_submitted_waits_for_all_that_is_on_its_way_to_it_or_is_refused(situation, data):
    """Whichever jobs are chosen, and whatever lies between them."""
    jobs, done, live = situation
    chosen = [job for job in jobs if data.draw(st.booleans())]
    moving = on_their_way(jobs, chosen, done, live)
    try:
        result = plan(jobs, chosen, done, live, 1001)
    except ConfigError:
        assert len(chosen) < len(jobs), "with all chosen nothing can be lacking"
        return
    steps = {step.job.name: step for step in result.submissions}
    for name, step in steps.items():
        ok, ids = set(step.after_ok), set(step.after_any)
        for each in step.after_ok:
            assert list(steps).index(each) < list(steps).index(name)
        while more := {up for each in ok for up in steps[each].after_ok} - ok:
            ok |= more
        ids |= {slurm_id for each in ok for slurm_id in steps[each].after_any}
        above = ancestors(jobs, name)
        assert ok == above & set(steps)
        assert ids >= {each.slurm_id for up in above for each in live[up]}
        for up in step.job.after:  # it reads nothing that is absent, or that nobody renews
            busy = {task for each in live[up] for task in each.tasks}
            by_name = {job.name: job for job in jobs}
            behind = ancestors(jobs, up) & moving
            assert up in steps or (busy | done[up] >= set(by_name[up].tasks) and (busy or not behind))
    for told in result.rewire:
        assert told.after_ok


@given(situations())
def test_launching_again_after_all_was_submitted_does_nothing(situation):
    jobs, done, live = situation
    result = plan(jobs, jobs, done, live, 10)
    for number, step in enumerate(result.submissions):
        live[step.job.name] = [*live[step.job.name], LiveJob(f"new{number}", frozenset(step.tasks), True)]
    again = plan(jobs, jobs, done, live, 10)
    assert again.submissions == []
    assert again.rewire == []


def test_a_waiting_job_is_told_of_inputs_that_are_made_again():
    jobs = build_graph(run_config(), cluster_config(search={"shards": 3}))
    live = {"search": [LiveJob("5", frozenset({2}))], "gather": [LiveJob("6", frozenset({0}), pending=True)]}
    result = plan(jobs, choose(jobs, ["search", "gather"]), {"search": {0}}, live, 1001)
    assert [(step.job.name, step.tasks) for step in result.submissions] == [("search", (1,))]
    [told] = result.rewire
    assert (told.slurm_ids, told.after_ok, told.after_any) == (("6",), ("search",), ("5",))


def test_a_result_that_is_made_again_takes_along_what_was_made_from_it():
    jobs = build_graph(run_config(), cluster_config(search={"shards": 3}))
    done = {job.name: set(job.tasks) for job in jobs}
    assert plan(jobs, jobs, done, {}, 1001).submissions == []
    done["search"] = {0, 2}
    steps = plan(jobs, jobs, done, {}, 1001).submissions
    assert [(step.job.name, step.tasks, step.after_ok) for step in steps][:3] == [
        ("search", (1,), ()),
        ("gather", (0,), ("search",)),
        ("clone", (0,), ("gather",)),
    ]
    assert [step.job.name for step in steps][-1] == "report"
    with pytest.raises(
        ConfigError, match=r"clone: needs gather, which others .* will outdate; add it: --stages gather,clone, or"
    ):
        plan(jobs, choose(jobs, ["search", "clone"]), {**done, "clone": set()}, {}, 1001)
    assert [step.job.name for step in plan(jobs, choose(jobs, ["search"]), done, {}, 1001).submissions] == ["search"]
    running = {"search": [LiveJob("7", frozenset({1}))]}
    [gather, clone] = plan(jobs, choose(jobs, ["gather", "clone"]), done, running, 1001).submissions
    assert (gather.after_ok, gather.after_any) == ((), ("7",))
    assert (clone.after_ok, clone.after_any) == (("gather",), ())


def test_a_job_whose_inputs_nobody_makes_is_refused():
    jobs = build_graph(run_config(), cluster_config())
    with pytest.raises(ConfigError, match=r"clone: needs gather, which is neither done nor queued; .*--from search"):
        plan(jobs, choose(jobs, ["clone"]), {}, {}, 1001)
    assert plan(jobs, choose(jobs, ["clone"]), {"gather": {0}}, {}, 1001).submissions[0].after_ok == ()


def test_a_launch_that_is_cut_off_has_told_those_that_wait_and_says_what_it_submitted(tmp_path, monkeypatch):
    jobs = build_graph(run_config(), cluster_config(search={"shards": 5}))
    live = {"search": [LiveJob("5", frozenset({2}))], "gather": [LiveJob("6", frozenset({0}), pending=True)]}
    steps = plan(jobs, jobs, {}, live, 2)
    (tmp_path / "jobs").mkdir()
    asked: list[list[str]] = []

    def full_queue(command: list[str]) -> str:
        asked.append(command)
        if len([each for each in asked if each[0] == "sbatch"]) == 3:
            raise ConfigError("sbatch: Job violates accounting policy")
        return f"{10 + len(asked)}\n"

    monkeypatch.setattr(slurm, "run", full_queue)
    message = r"accounting policy; submitted: search 11, search 13; launch again submits the rest"
    with pytest.raises(ConfigError, match=message):
        _submit(tmp_path, steps, dry_run=False)
    told = [command[-1] for command in asked if command[0] == "scontrol"]
    assert told == ["dependency=afterok:11,afterany:5", "dependency=afterok:11:13,afterany:5"]
    assert [command[0] for command in asked] == ["sbatch", "scontrol", "sbatch", "scontrol", "sbatch"]
    assert [row["id"] for row in Journal.read(tmp_path / "jobs" / "submitted.jsonl")] == ["11", "13"]
    asked[:] = [["sbatch"], ["sbatch"]]
    with pytest.raises(ConfigError, match=r"accounting policy$"):
        _submit(tmp_path, steps, dry_run=False)
