"""The page from a run folder made by the real clone and eval stages, whole and in parts."""

import html.parser
import json
import math
import random
import re
import shutil

import pytest
from test_cloning_stage import walk_trees
from test_evaluation_stage import Players

import astro_hpc.inference
from astro_hpc.cloning import stage as cloning
from astro_hpc.config.schema import RunConfig
from astro_hpc.evaluation import stage as evaluation
from astro_hpc.evaluation.economics import METHODS, summarize
from astro_hpc.problems.sources import load_source
from astro_hpc.report.charts import _running_mean
from astro_hpc.report.page import _lineage, build_page
from astro_hpc.report.tree_svg import tree_svg
from astro_hpc.rl.behaviour import write_samples
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.run.files import Journal, write_json_atomic
from astro_hpc.run.metrics import MetricsLog
from astro_hpc.run.stage import Stage, run_stage


def rollouts_of(step):
    """A right and a wrong response; the wrong one looks like markup and like a sample's heading."""
    texts = {"right": f"2 + 3 = {step}\n", "wrong": "<script>alert(6)</script>\n=== p: right, reward +1\n" + "x" * 9000}
    rollouts = [
        Rollout(f"p-{outcome}", (1,), (2, 3), (-0.5, -0.5), text, outcome, 1.0, False, ((0, 2),))
        for outcome, text in texts.items()
    ]
    return Group(step, tuple(rollouts))


def make_run(runs_dir, monkeypatch, trees=None):
    """A run folder whose search and training are made up, and whose traces and evaluation are the stages' own."""
    cfg = RunConfig(
        name="demo",
        runs_dir=runs_dir,
        description="A small model <b>learns</b> signs",
        arms=["astro", "direct"],
        problems={"train": [{"type": "signs", "count": 30}]},
        model={"prompt_style": "minimal-chat"},
        warmup={"enabled": True, "problems": {"type": "signs", "count": 10}},
        clone={"phrases": "short", "attempt_note": True, "self_evaluation_samples": 0},
        eval={
            "benchmarks": {"signs": {"type": "signs", "split": "heldout", "count": 40, "seed": 4}},
            "num_samples": 4,
            "max_tokens": 400,
        },
    )
    rng = random.Random(1)

    def search(ctx):
        with Journal(ctx.dir / "trees.jsonl") as journal:
            for tree in trees or walk_trees():
                journal.append(tree.to_json())
        ctx.count(tokens=63_000)
        return [ctx.dir / "trees.jsonl"]

    def train(ctx):
        steps = 4 if ctx.label.startswith("rl") else 200
        with MetricsLog(ctx.dir / "metrics.jsonl") as log:
            for step in range(1, steps + 1):
                if ctx.label.startswith("rl"):
                    log.log(step, reward=rng.uniform(-1, 1), pass_rate=rng.random(), groups_with_signal=rng.random(),
                            response_tokens_right=rng.uniform(150, 190), response_tokens_wrong=rng.uniform(200, 240),
                            backtracks=rng.random(), mismatch_mean_abs=0.02 + 0.01 * rng.random(),
                            entropy=rng.random(), mismatch_kl=0.01, generate_seconds=20.0, train_seconds=30.0 + step,
                            push_seconds=1.0, engine_idle_share=0.5, trainer_idle_share=0.4,
                            **({"validation_pass_rate": 0.25 * step / 2} if step % 2 == 0 else {}))  # fmt: skip
                    write_samples(ctx.dir / "samples", step, [rollouts_of(step)], [])
                else:
                    log.log(step, loss=2 * math.exp(-step / 40) + 0.3 * rng.random(), lr=1e-4)
        if ctx.label == "rl/astro":
            write_json_atomic(ctx.dir / "best.json", {"step": 4, "validation_pass_rate": 0.5})
        (ctx.dir / "hf").mkdir()
        (ctx.dir / "hf" / "weights").write_text(ctx.label)
        ctx.count(tokens=20_000)
        return [ctx.dir / "hf"]

    folder = cfg.run_dir / "search" / "shard-00000-of-00001"
    run_stage(cfg, Stage("warmup", cfg.run_dir / "warmup", {}, {}, train))
    run_stage(cfg, Stage(f"search/{folder.name}", folder, {"model": cfg.run_dir / "warmup" / "hf"}, {}, search))
    journal = folder / "trees.jsonl"
    traces = cfg.run_dir / "traces"
    run_stage(cfg, Stage("clone", traces, {"trees": journal}, {}, lambda ctx: cloning.run(ctx, trees=[journal])))
    models = {"base": runs_dir / "base", "warmup": cfg.run_dir / "warmup" / "hf"}
    models["base"].mkdir()
    for arm in cfg.arms:
        for name in ("sft", "rl"):
            models[f"{arm}-{name}"] = cfg.run_dir / name / arm / "hf"
            inputs = {"traces": traces / f"{arm}.jsonl"} if name == "sft" else {"model": models[f"{arm}-sft"]}
            run_stage(cfg, Stage(f"{name}/{arm}", cfg.run_dir / name / arm, inputs, {}, train))
    players = Players(load_source(cfg.eval.benchmarks["signs"]))
    monkeypatch.setattr(astro_hpc.inference, "make_engine", lambda folder, *_: players)
    run_stage(cfg, Stage("eval", cfg.run_dir / "eval", models, {}, lambda ctx: evaluation.run(ctx, models=models)))
    return cfg


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield make_run(tmp_path_factory.mktemp("runs"), patch)


class Balance(html.parser.HTMLParser):
    """Fails on tags that don't match; collects tags, ids and visible text."""

    VOID = frozenset({"meta", "br", "circle", "path", "link", "img", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parse(path):
    text = path.read_text()
    page = Balance()
    page.feed(text)
    assert page.open == []
    return text, page


def test_page_is_whole_offline_and_small(whole_run):
    path = build_page(whole_run)
    assert path == whole_run.run_dir / "report" / "index.html"
    assert path.stat().st_size < 6e6
    text, page = parse(path)
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not attributes.get("src")
        assert attributes.get("href", "#").startswith("#")
    assert "url(http" not in text
    assert {"results", "stages", "training", "trace", "responses", "lineage"} <= set(page.ids)
    visible = "".join(page.text)
    assert "yet" not in visible  # nothing is missing
    for name in ("base", "warmup", "astro-sft", "astro-rl", "direct-rl", "first attempt", "chance"):
        assert name in visible


def test_charts_have_titles_units_and_a_place(whole_run):
    _, page = parse(build_page(whole_run))
    text = build_page(whole_run).read_text()
    figures = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.S).group(1))
    places = [attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes]
    assert sorted(places) == sorted(figures)
    assert {"result-signs", "loss-warmup", "loss-sft-astro"} <= set(figures)
    names = ("reward", "mean-reward", "validation", "length", "mismatch", "entropy", "kl", "idle")
    assert {f"rl-{name}" for name in (*names, "times-astro", "times-direct")} <= set(figures)
    times = figures["rl-times-astro"]["data"]
    assert [(trace["name"], trace["stackgroup"]) for trace in times] == [
        (part, "seconds") for part in ("generate", "train", "push")
    ]
    assert times[1]["y"] == [31.0, 32.0, 33.0, 34.0]
    validation = next(trace for trace in figures["rl-validation"]["data"] if trace["name"] == "astro")
    assert (validation["x"], validation["y"]) == ([2, 4], [0.25, 0.5])
    for figure in figures.values():
        assert figure["data"]
        assert figure["layout"]["xaxis"]["title"]["text"]


def test_rollouts_of_the_first_and_last_step_are_readable_and_bounded(whole_run):
    text, page = parse(build_page(whole_run))
    visible = "".join(page.text)
    for arm in ("astro", "direct"):
        assert [f"Rollouts of {arm}, step {step}" in visible for step in range(1, 5)] == [True, False, False, True]
    assert "p-right: right, reward +1, 2 tokens" in visible
    assert "2 + 3 = 4" in visible
    assert "2 + 3 = 2" not in visible
    assert "alert(6)" in visible
    assert "<script>alert(6)" not in text
    assert "x" * 7000 not in text
    assert "Best of astro on held-out problems: 50.0 % after step 4, kept in rl/astro/hf_best" in visible


def test_metrics_that_are_not_numbers_leave_the_charts_readable(whole_run, tmp_path):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    with open(tmp_path / "demo" / "sft" / "astro" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 201, "loss": NaN, "lr": null}\n{"step": 202, "loss": Infinity}\n{"st')
    text, _ = parse(build_page(whole_run.model_copy(update={"runs_dir": tmp_path})))
    charts = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.S).group(1)
    json.loads(charts, parse_constant=lambda name: pytest.fail(f"{name} is not JSON for a browser"))


def test_everything_from_the_run_is_escaped(whole_run, tmp_path):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    cfg = whole_run.model_copy(update={"runs_dir": tmp_path, "description": "<script>alert(1)</script>"})
    for path in (cfg.run_dir / "eval").rglob("output-rs0.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["generation"] = "</div><script>alert(2)</script> \\boxed{1}"
            row["problem"] = "<img src=x onerror=alert(3)>"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = parse(build_page(cfg))
    assert "alert(1)" in text
    assert "alert(2)" in text
    for attack in ("<script>alert", "<img"):
        assert attack not in text


@pytest.mark.parametrize("missing", ["eval", "rl", "sft", "traces", "search", "warmup"])
def test_partial_runs_say_what_is_missing(whole_run, tmp_path, missing):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    order = ["warmup", "search", "traces", "sft", "rl", "eval"]
    for name in order[order.index(missing) :]:
        shutil.rmtree(tmp_path / "demo" / name)
    _, page = parse(build_page(whole_run.model_copy(update={"runs_dir": tmp_path})))
    visible = "".join(page.text)
    assert "Not evaluated yet" in visible
    assert "unfinished" in visible
    assert ("No traces yet" in visible) == (missing in ("traces", "search", "warmup"))
    assert ("No training stage" in visible) == (missing == "warmup")


def test_a_begun_stage_and_many_shards(whole_run, tmp_path):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    search = tmp_path / "demo" / "search"
    first = search / "shard-00000-of-00001"
    for shard in range(8):
        shutil.copytree(first, search / f"shard-{shard:05d}-of-00008")
    shutil.rmtree(first)
    (search / "shard-00003-of-00008" / "manifest.json").unlink()
    _, page = parse(build_page(whole_run.model_copy(update={"runs_dir": tmp_path})))
    visible = "".join(page.text)
    assert "search, 8 shards" in visible
    assert "7 of 8 done" in visible


def test_search_economics_are_shown_where_they_were_asked_for(whole_run, tmp_path):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    cfg = whole_run.model_copy(update={"runs_dir": tmp_path})
    result = {"solved": True, "seen": True, "majority": False, "right_solutions": 2, "tokens": 1234, "samples": 3}
    rows = [dict.fromkeys(METHODS, result), dict.fromkeys(METHODS, result)]
    write_json_atomic(cfg.run_dir / "search" / "economics" / "economics.json", summarize(rows))
    _, page = parse(build_page(cfg))
    visible = "".join(page.text)
    assert "What the search buys: 2 problems" in visible
    assert "1,234" in visible
    assert "solved, search minus best-of-N at the same tokens: +0.0 percentage points" in visible


def test_lineage_ticks_only_what_matches(whole_run):
    _, page = parse(build_page(whole_run))
    visible = "".join(page.text)
    assert "✓ warmup" in visible
    assert "✓ clone" in visible
    assert "✓ sft/astro" in visible


def test_lineage_of_a_stage_that_changed_nothing(whole_run, tmp_path):
    shutil.copytree(whole_run.run_dir, tmp_path / "demo")
    cfg = whole_run.model_copy(update={"runs_dir": tmp_path})
    manifests = {name: tmp_path / "demo" / name / "astro" / "manifest.json" for name in ("sft", "rl")}
    made = json.loads(manifests["sft"].read_text())["outputs"]["sft/astro/hf"]
    later = json.loads(manifests["rl"].read_text())
    manifests["rl"].write_text(json.dumps({**later, "outputs": {"rl/astro/hf": made}}))
    rows = {row["stage"]: row for row in _lineage(cfg)}
    assert rows["rl/astro"]["inputs"] == [("model", made[:10], "sft/astro")]


def test_tree_drawing_shows_the_walk_and_bounds_its_size():
    tree = max(walk_trees(), key=lambda tree: len(tree.nodes)).to_json()
    right = next(node for node in tree["nodes"] if node["outcome"] == "right")
    wrong = next(node for node in tree["nodes"] if node["outcome"] == "wrong")

    def path_to(node):
        return ([] if node["parent"] is None else path_to(tree["nodes"][node["parent"]])) + [node["id"]]

    path = [*path_to(wrong), 0, *path_to(right)[1:]]
    svg = tree_svg(tree["nodes"], path)
    assert svg.count('class="back"') == 1
    assert svg.count('class="node') == len(tree["nodes"])
    nodes = [{**tree["nodes"][0], "children": list(range(1, 5001))}]
    leaf = {"parent": 0, "depth": 1, "step": "<x>" * 40, "q": 0.5, "origin": "expansion", "outcome": "wrong"}
    nodes += [{**leaf, "children": [], "id": i, "visits": i} for i in range(1, 5001)]
    big = tree_svg(nodes, [0, 7])
    assert len(big) < 60_000
    assert 'data-node="7"' in big
    assert 'data-node="5000"' in big
    assert "+4941" in big
    assert "<x>" not in big


def test_running_mean():
    values = [float(i) for i in range(50)]
    assert _running_mean(values)[:3] == [0.0, 0.5, 1.0]
    assert _running_mean(values)[49] == pytest.approx(sum(values[30:50]) / 20)
