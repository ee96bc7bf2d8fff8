"""Groups sampled in the background: same seeds same responses, bounded lag, nothing lost, every wait bounded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RewardConfig, RLConfig, SignsSource, VerifierConfig
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems.sources import load_source
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.reward import Reward
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.rl.source import JOURNAL, LiveSource, ReplaySource, StepGroups, step_file
from astro_hpc.rl.worker import RolloutWorker
from astro_hpc.run.files import Journal
from astro_hpc.run.seeds import derive_seed
from astro_hpc.verifier.pool import Verdict, VerifierPool

PROBLEMS = load_source(SignsSource(count=6, split="train"))
STYLE = PromptStyle(prompt="{problem}\n", step_delimiter="\n")


def _settings(**values: object) -> RLConfig:
    return RLConfig.model_validate({"prompts_per_step": 3, "group_size": 2, "max_response_tokens": 200, **values})


def _source(
    tmp_path: Path, engine: ScriptedEngine, settings: RLConfig, step: int = 0, state: dict | None = None, **more: Any
):
    pool = VerifierPool(VerifierConfig())
    worker = RolloutWorker(
        engine, pool, STYLE, Reward(settings.reward), settings, lambda p, s, piece: derive_seed(1, "rl", p, s, piece)
    )
    source = LiveSource(worker, PROBLEMS, settings, folder=tmp_path, order_seed=5, step=step, state=state, **more)
    return source, worker, pool


def _run(tmp_path: Path, engine: ScriptedEngine, settings: RLConfig, steps: range, state: dict | None = None):
    """Take the steps, bumping the engine's version as a trainer would; returns the groups and the last state."""
    source, worker, pool = _source(tmp_path, engine, settings, steps[0] - 1, state)
    try:
        taken = []
        for step in steps:
            taken.append(source.take(step))
            worker.hold(10)
            engine.load_weights(Path(), step)
            worker.go_on()
        return taken, source.state()
    finally:
        worker.close()
        pool.close()


def _texts(groups: StepGroups) -> list[tuple[int, list[str]]]:
    return [(group.position, [rollout.text for rollout in group.rollouts]) for group in groups.used]


def test_sync_steps_are_decided_by_positions_and_survive_a_cut(tmp_path):
    engine = ScriptedEngine(latency=0.01)
    whole, _ = _run(tmp_path / "a", engine, _settings(), range(1, 4))
    assert [group.position for step in whole for group in step.used] == list(range(9))
    assert {(v, r.oldest_version) for v, s in enumerate(whole) for g in s.used for r in g.rollouts} == {
        (0, 0),
        (1, 1),
        (2, 2),
    }
    # cut after step 1; step 2 had been sampled when the run was killed
    _, state = _run(tmp_path / "b", ScriptedEngine(latency=0.01), _settings(), range(1, 2))
    saved = step_file(tmp_path / "b", 2)
    saved.write_bytes(step_file(tmp_path / "a", 2).read_bytes())
    engine = ScriptedEngine(latency=0.01)
    engine.load_weights(Path(), 1)
    rest, _ = _run(tmp_path / "b", engine, _settings(), range(2, 4), state)
    assert [_texts(step) for step in rest] == [_texts(step) for step in whole[1:]]
    assert engine.stats.requests == 6, "step 2 was not sampled again"


def _answer(context: str, random: Any) -> str:
    return "\\boxed{" + "1+1"[: random.randrange(1, 4)] + "}"


@pytest.mark.parametrize("ended", ["told to stop", "killed"])
@pytest.mark.parametrize(
    "settings", [{}, {"dynamic_sampling": True, "reward": {"function": "user_rewards:by_length"}}], ids=str
)
def test_what_was_finished_of_a_step_is_not_sampled_again(tmp_path, settings, ended):
    settings = _settings(**settings)
    whole_engine = ScriptedEngine(_answer, latency=0.01)
    (whole,), _ = _run(tmp_path / "whole", whole_engine, settings, range(1, 2))
    positions = len(whole.positions)
    assert whole_engine.stats.requests == 2 * positions
    for finished in range(1, positions):
        folder = tmp_path / f"cut-{finished}"

        def journaled(folder: Path = folder) -> int:
            return len(list(Journal.read(folder / JOURNAL)))

        source, worker, pool = _source(
            folder, ScriptedEngine(_answer, latency=0.01), settings, stop=lambda f=finished, n=journaled: n() >= f
        )
        assert source.take(1) is None
        state = source.state() if ended == "told to stop" else None
        worker.close()
        pool.close()
        source.close()
        kept = journaled()
        assert kept >= finished
        engine = ScriptedEngine(_answer)
        (again,), after = _run(folder, engine, settings, range(1, 2), state)
        assert _texts(again) == _texts(whole)
        assert again.no_signal == whole.no_signal
        assert engine.stats.requests == 2 * (positions - kept)
        assert after == {"cursor": positions, "pending": []}
        assert journaled() == 0, "the step's file holds them"


def test_groups_of_other_weights_are_not_taken_for_this_steps(tmp_path):
    source, worker, pool = _source(tmp_path, ScriptedEngine(), _settings())
    source.stop = lambda: (tmp_path / JOURNAL).stat().st_size > 0
    assert source.take(1) is None
    worker.close()
    pool.close()
    source.close()
    engine = ScriptedEngine()
    engine.load_weights(Path(), 4)
    source, worker, pool = _source(tmp_path, engine, _settings(), step=4, state={"cursor": 0, "pending": []})
    assert {r.oldest_version for group in source.take(5).used for r in group.rollouts} == {4}
    assert engine.stats.requests == 6
    worker.close()
    pool.close()
    (tmp_path / JOURNAL).write_bytes(b"")
    with Journal(tmp_path / JOURNAL) as journal:
        journal.append({"position": 9})
    with pytest.raises(ConfigError, match=r"finished.journal: not a group of rollouts: KeyError\('rollouts'\)"):
        _source(tmp_path, engine, _settings(), step=5)
    worker.close()
    pool.close()


@pytest.mark.parametrize(
    "settings", [{"mode": "async", "max_lag": 1}, {"oversample": 1.5}, {"mode": "async", "max_lag": 2}]
)
def test_lag_is_bounded_and_no_position_is_lost_or_used_twice(tmp_path, settings):
    taken, state = _run(tmp_path, ScriptedEngine(latency=0.01), _settings(**settings), range(1, 8))
    positions = [position for step in taken for position in step.positions]
    assert len(positions) == len(set(positions))
    assert sorted([*positions, *state["pending"]]) == list(range(state["cursor"]))
    for step, groups in enumerate(taken, 1):
        assert len(groups.used) == 3
        assert all(step - 1 - group.oldest_version <= _settings(**settings).max_lag for group in groups.used)
    # a resumed run goes on with what was in flight
    handed_out, kept = len(positions), len(list(Journal.read(tmp_path / JOURNAL)))
    engine = ScriptedEngine()
    engine.load_weights(Path(), 7)
    more, after = _run(tmp_path, engine, _settings(**settings), range(8, 12), state)
    positions += [position for step in more for position in step.positions]
    assert len(positions) == len(set(positions))
    assert sorted([*positions, *after["pending"]]) == list(range(after["cursor"]))
    unused = after["cursor"] - handed_out - kept
    assert engine.stats.requests <= 2 * unused, "what was finished and not used is not sampled again"


def test_pieces_join_to_one_response_and_record_their_versions(tmp_path):
    plain = _run(tmp_path / "a", ScriptedEngine(lambda *_: "x" * 50), _settings(), range(1, 2))[0][0]
    assert all(rollout.weight_versions == ((0, 51),) for group in plain.used for rollout in group.rollouts)

    class Switching(ScriptedEngine):
        async def generate(self, request: SampleRequest):  # new weights after every third sample
            if self.stats.requests % 3 == 2:
                self._version += 1
            return await super().generate(request)

    script = Switching(lambda context, _: "x" * (50 - context.count("x")))
    pieces = _run(tmp_path / "b", script, _settings(segment_tokens=20, max_lag=99), range(1, 2))[0][0]
    for group in pieces.used:
        for rollout in group.rollouts:
            assert rollout.text == "x" * 50
            assert len(rollout.token_ids) == len(rollout.logprobs) == 51
            assert sum(count for _, count in rollout.weight_versions) == 51
            assert not rollout.truncated
    assert any(len(r.weight_versions) > 1 for g in pieces.used for r in g.rollouts)


def test_pieces_are_refused_where_a_stop_could_fall_between_them(tmp_path):
    style = STYLE.model_copy(update={"stop": ("\n\n",)})
    with pytest.raises(ConfigError, match="rl.segment_tokens"):
        RolloutWorker(ScriptedEngine(), None, style, None, _settings(segment_tokens=5), lambda *_: 0)


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path):
    settings = _settings(dynamic_sampling=True, reward={"function": "user_rewards:by_length"})
    taken, state = _run(tmp_path, ScriptedEngine(_answer), settings, range(1, 4))
    assert all(group.has_signal for step in taken for group in step.used)
    assert any(step.no_signal for step in taken)
    assert [len(step.used) for step in taken] == [3, 3, 3]
    positions = [position for step in taken for position in step.positions]
    assert sorted(positions) == list(range(state["cursor"]))
    again, _ = _run(tmp_path / "again", ScriptedEngine(_answer, latency=0.01), settings, range(1, 4))
    assert [_texts(step) for step in again] == [_texts(step) for step in taken]


def test_dynamic_sampling_ends_where_no_prompt_has_signal(tmp_path):
    settings = _settings(dynamic_sampling=True, max_sampling_rounds=2)
    (step,), _ = _run(tmp_path, ScriptedEngine(lambda *_: "no answer"), settings, range(1, 2))
    assert (len(step.used), len(step.no_signal)) == (3, 3)


def test_a_stuck_engine_is_named_within_the_deadline(tmp_path):
    class Stuck(ScriptedEngine):
        async def generate(self, request: SampleRequest):
            await asyncio.sleep(3600)

    settings = _settings(rollout_timeout_minutes=0.005)
    source, worker, pool = _source(tmp_path, Stuck(), settings)
    with pytest.raises(TimeoutError, match=r"3 groups in flight, waiting for 6 samples of the engine"):
        source.take(1)
    with pytest.raises(TimeoutError, match="6 samples were still under way"):
        worker.hold(0.05)
    began = time.monotonic()
    worker.close()
    pool.close()
    assert time.monotonic() - began < 10


def test_an_engine_that_fails_ends_the_step_with_its_error(tmp_path):
    def broken(*_: object) -> str:
        raise ZeroDivisionError("the engine")

    source, worker, pool = _source(tmp_path, ScriptedEngine(broken), _settings())
    with pytest.raises(ZeroDivisionError, match="the engine"):
        source.take(1)
    worker.close()
    pool.close()


def test_a_users_reward_that_fails_or_hangs_ends_the_step_by_name(tmp_path):
    for function, seconds, raised, message in (
        (
            "fails",
            60,
            ConfigError,
            r"user_rewards:fails, called for a response to \S+: ZeroDivisionError: .*user_rewards.py:\d+",
        ),
        (
            "hangs",
            0.2,
            TimeoutError,
            r"user_rewards:hangs: gave no reward for a response to \S+ within 0.2 s; .*reward.timeout_seconds",
        ),
    ):
        reward = {"function": f"user_rewards:{function}", "timeout_seconds": seconds}
        source, worker, pool = _source(tmp_path / function, ScriptedEngine(), _settings(reward=reward))
        with pytest.raises(raised, match=message):
            source.take(1)
        worker.close()
        pool.close()


def test_a_process_ends_though_a_users_reward_hangs():
    program = """if True:
        import asyncio
        from astro_hpc.config.schema import RewardConfig, SignsSource
        from astro_hpc.problems.sources import load_source
        from astro_hpc.rl.reward import Reward
        from astro_hpc.verifier.pool import Verdict
        reward = Reward(RewardConfig(function="user_rewards:hangs", timeout_seconds=0.1))
        try:
            asyncio.run(reward.score(load_source(SignsSource(count=1))[0], "", Verdict("right", "1", 0)))
        except TimeoutError as error:
            print(error)
        """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "gave no reward" in done.stdout


def test_replay_gives_what_was_trained_on_and_names_what_is_missing(tmp_path):
    taken, _ = _run(tmp_path, ScriptedEngine(), _settings(), range(1, 3))
    replay = ReplaySource(tmp_path, _settings(num_steps=2))
    assert replay.take(2).used == taken[1].used
    with pytest.raises(ConfigError, match="has no step_00000003.jsonl; set rl.num_steps=2"):
        ReplaySource(tmp_path, _settings(num_steps=3))
    with pytest.raises(ConfigError, match="holds 3 groups of .2. responses"):
        ReplaySource(tmp_path, _settings(num_steps=2, group_size=4)).take(1)
    step_file(tmp_path, 1).write_text('{"fate": "used", "position": 0}\n')
    with pytest.raises(ConfigError, match=r"step_00000001.jsonl:1: not a rollout"):
        replay.take(1)


def test_groups_survive_their_file(tmp_path):
    rollout = Rollout("p", (1, 2), (3, 4), (-0.5, -0.123457), "text\n", "right", 1.0, False, ((0, 1), (2, 1)))
    groups = StepGroups([Group(3, (rollout, rollout))], [Group(1, (rollout,))], [Group(9, (rollout,))])
    groups.save(tmp_path / "g.jsonl")
    assert StepGroups.load(tmp_path / "g.jsonl") == groups
    assert rollout.oldest_version == 0


def test_reward_of_the_verifier_and_of_a_users_function():
    right, wrong, none = Verdict("right", "1", 0), Verdict("wrong", "2", 0), Verdict("wrong", None, 0)
    problem = PROBLEMS[0]
    plain = Reward(RewardConfig())
    assert [plain(problem, "", v) for v in (right, wrong, none, Verdict("unknown", "x", 0))] == [1, -1, -1, -1]
    assert Reward(RewardConfig(no_answer=-0.5))(problem, "", none) == -1.5
    assert Reward(RewardConfig(function="user_rewards:by_length"))(problem, "abc", wrong) == 3.0
    for path, message in (
        ("no_such_module:f", "No module named"),
        ("user_rewards:missing", "missing"),
        ("user_rewards:NUMBER", "is not a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            Reward(RewardConfig(function=path))
    with pytest.raises(ConfigError, match="gave nan"):
        Reward(RewardConfig(function="user_rewards:not_a_number"))(problem, "", right)
    with pytest.raises(ValueError, match="expected package.module:name"):
        RewardConfig(function="os.system")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replay": "x", "rollouts_only": True}, "exclude each other"),
        ({"replay": "x", "validation": {"problems": {"type": "signs", "count": 1}}}, "needs an engine and a trainer"),
        ({"oversample": 2, "max_lag": 0}, "needs max_lag"),
        ({"objective": {"overlong_buffer_tokens": 500}}, "must be below"),
        ({"objective": {"importance_correction": "token_mask", "importance_floor": 3}}, "is not below"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        _settings(**values)
