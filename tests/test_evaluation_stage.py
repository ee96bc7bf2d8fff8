"""The eval stage with a scripted engine: files, resume, grading, summary, table."""

import io
import itertools
import json
import random
import shutil

import pytest

import astro_hpc.inference
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import EvalLimits, RunConfig
from astro_hpc.evaluation import stage
from astro_hpc.evaluation.stage import attempt_ends
from astro_hpc.evaluation.table import print_table
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems import signs
from astro_hpc.problems.sources import load_source
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext


@pytest.fixture
def cfg(tmp_path):
    return RunConfig(
        name="t",
        runs_dir=tmp_path,
        problems={"train": [{"type": "signs", "count": 5}]},
        model={"prompt_style": "minimal-chat"},
        clone={"phrases": "short"},
        eval={
            "benchmarks": {"signs": {"type": "signs", "split": "heldout", "count": 20, "seed": 4}},
            "num_samples": 3,
            "max_tokens": 400,
        },
    )


class Players(ScriptedEngine):
    """Model 0 walks at random; later ones go back once when the first walk misses. Notes what it was asked."""

    def __init__(self, problems):
        super().__init__(self.play)
        self.problems = {problem.text: problem for problem in problems}
        self.requests = []
        self.folders = []

    def play(self, context, rng):
        problem = self.problems[context.split("\n")[1].removesuffix("<|im_end|>")]
        text = "\n".join(signs.random_walk(problem, rng))
        answer = text.rsplit("{", 1)[1][:-1]
        right = signs.check(problem.metadata["numbers"], problem.metadata["target"], answer)
        if self._version and not right:
            text += "\nBut wait, are we correct so far? Hmm... No. Let's restart.\n"
            text += "\n".join(signs.random_walk(problem, rng))
        return text

    def load_weights(self, source, version):
        self.folders.append(source)
        super().load_weights(source, version)

    def _sample(self, request):
        self.requests.append((self._version, request))
        return super()._sample(request)


@pytest.fixture
def engine(cfg, monkeypatch):
    players = Players(load_source(cfg.eval.benchmarks["signs"]))
    monkeypatch.setattr(astro_hpc.inference, "make_engine", lambda folder, *_: players)
    return players


def evaluate(cfg, models=("base", "sft")):
    folder = cfg.run_dir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    ctx = StageContext(cfg, folder, "eval")
    outputs = stage.run(ctx, models={name: cfg.run_dir / name for name in models})
    return ctx, outputs, json.loads((folder / "summary.json").read_text())


def test_files_are_in_nemo_skills_form_and_every_model_draws_the_same_seeds(cfg, engine):
    ctx, outputs, summary = evaluate(cfg)
    assert outputs == [cfg.run_dir / "eval" / name for name in ("base", "sft", "summary.json")]
    assert engine.folders == [cfg.run_dir / "sft"]
    problems = {problem.id: problem for problem in engine.problems.values()}
    for model in ("base", "sft"):
        for index in range(3):
            rows = list(read_jsonl(cfg.run_dir / "eval" / model / "signs" / f"output-rs{index}.jsonl"))
            assert [row["id"] for row in rows] == list(problems)
            for row in rows:
                meta = problems[row["id"]].metadata
                answer = row["generation"].rsplit("{", 1)[1][:-1]
                assert row["is_correct"] == signs.check(meta["numbers"], meta["target"], answer)
                assert row["symbolic_correct"] == row["is_correct"]
                assert row["num_generated_tokens"] == len(row["generation"]) + 1
                assert row["num_backtracks"] == row["generation"].count("restart")
    by_version = {v: [(r.prompt_token_ids, r.seed) for version, r in engine.requests if version == v] for v in (0, 1)}
    assert by_version[0] == by_version[1]
    assert len(set(by_version[0])) == 60
    assert ctx.counts["samples"] == 120
    assert ctx.counts["tokens"] == sum(row["tokens"] for row in summary["results"]) == engine.stats.generated_tokens


def test_summary_tells_first_attempts_from_final_answers(cfg, engine):
    _, _, summary = evaluate(cfg)
    base, sft = summary["results"]
    problems = list(engine.problems.values())
    assert base["chance"] == sft["chance"] == pytest.approx(sum(map(signs.chance, problems)) / 20)
    assert base["first_attempt"] == base["pass_at_1"]
    assert sft["first_attempt"] == base["pass_at_1"]  # the same seeds walk the same first time
    assert sft["pass_at_1"] > sft["first_attempt"]
    assert sft["responses_with_backtrack"] == pytest.approx(1 - sft["first_attempt"])
    assert sft["attempts_per_response"] == pytest.approx(2 - sft["first_attempt"])
    assert sft["right_attempts_kept"] == 1
    assert 0.5 < sft["wrong_attempts_left"] < 1  # the players give up after the second
    assert 0 < sft["repeated_attempts"] < 0.5
    assert base["wrong_attempts_left"] == 0
    (delta,) = summary["differences"]
    assert (delta["model"], delta["minus"]) == ("sft", "base")
    assert delta["value"] == pytest.approx(sft["pass_at_1"] - base["pass_at_1"])
    assert set(sft["per_problem"]) == {problem.id for problem in problems}


def test_resume_samples_only_missing_files_and_ends_the_same(cfg, engine):
    evaluate(cfg)
    folder = cfg.run_dir / "eval"
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    (folder / "sft" / "signs" / "output-rs1.jsonl").unlink()
    shutil.rmtree(folder / "base")
    engine.requests.clear()
    engine._version = 0
    evaluate(cfg)
    assert [version for version, _ in engine.requests] == [0] * 60 + [1] * 20
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    engine.requests.clear()
    evaluate(cfg)
    assert engine.requests == []


def test_a_request_to_stop_keeps_every_graded_response(cfg, engine):
    folder = cfg.run_dir / "eval"
    folder.mkdir(parents=True)
    ctx = StageContext(cfg, folder, "eval")
    play = engine.play

    def stop_at_30(context, rng):
        if len(engine.requests) == 30:
            ctx.request_stop()
        return play(context, rng)

    engine.script = stop_at_30
    with pytest.raises(CheckpointedExit):
        stage.run(ctx, models={"base": cfg.run_dir / "base"})
    [journal] = folder.rglob("*.jsonl")
    kept = list(Journal.read(journal))
    assert 25 <= len(kept) < 30

    engine.script = play
    engine.requests.clear()
    stage.run(StageContext(cfg, folder, "eval"), models={"base": cfg.run_dir / "base"})
    assert len(engine.requests) == 60 - len(kept), "what was graded is not sampled again"
    assert sorted(path.name for path in folder.rglob("*.jsonl")) == [f"output-rs{i}.jsonl" for i in range(3)]


def test_limits_make_one_model_cheaper(cfg, engine):
    cfg.eval.limits = {"base": EvalLimits(num_samples=1, max_tokens=50)}
    _, _, summary = evaluate(cfg)
    assert [row["k"] for row in summary["results"]] == [1, 3]
    assert {request.max_tokens for version, request in engine.requests if version == 0} == {50}
    assert summary["results"][0]["truncated"] > 0
    cfg.eval.limits = {"bas": EvalLimits(num_samples=1)}
    with pytest.raises(ConfigError, match=r"eval\.limits names no model of this run: bas; models: base, sft"):
        evaluate(cfg)


def test_table_shows_every_column(cfg, engine):
    _, _, summary = evaluate(cfg)
    stream = io.StringIO()
    print_table(cfg, stream)
    title, header, *rows = stream.getvalue().splitlines()
    assert title.startswith("signs: % of 20 problems")
    for name in ("pass@1", "pass@3", "first attempt", "chance", "backtracks/response", "tokens/response", "minutes"):
        assert name in header
    assert [row.split()[0] for row in rows] == ["base", "sft"]
    assert f"{100 * summary['results'][1]['pass_at_1']:.1f} ± " in rows[1]
    assert len({len(row) for row in [header, *rows]}) == 1


@pytest.mark.parametrize(
    ("text", "attempts"),
    [
        ("no answer", []),
        (r"a \boxed{1} b", [r"a \boxed{1}"]),
        (r"a \boxed{1} b \boxed{2}", [r"a \boxed{1}", r" b \boxed{2}"]),
        (r"a \boxed{\frac{1}{2}} b \boxed{2", [r"a \boxed{\frac{1}{2}}"]),
        (r"a \boxed{1 and \boxed{2}", [r"a \boxed{1 and \boxed{2}"]),
    ],
)
def test_attempts_end_at_complete_answers(text, attempts):
    ends = attempt_ends(text, "\\boxed{")
    assert [text[a:b] for a, b in itertools.pairwise([0, *ends])] == attempts


def test_attempts_of_a_line_marker():
    assert attempt_ends("Answer: 3\nno\nAnswer: 4", "Answer:") == [9, 22]


def test_seeds_do_not_depend_on_the_run(cfg, engine):
    evaluate(cfg, ["base"])
    rng = random.Random(engine.requests[0][1].seed)
    cfg.seed = 99
    shutil.rmtree(cfg.run_dir / "eval")
    engine.requests.clear()
    evaluate(cfg, ["base"])
    assert random.Random(engine.requests[0][1].seed).random() == rng.random()
