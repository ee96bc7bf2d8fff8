"""The eval stage: every model answers the same held-out problems on one engine, and each answer is graded.

`MODEL/BENCHMARK/output-rsI.jsonl` holds sample I of every problem, in NeMo-Skills' form. Responses are journaled as
they are graded, and a resumed stage samples only what is missing. Metrics come from the files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.config.base import ConfigError
from astro_hpc.evaluation.metrics import (
    Attempt,
    Graded,
    Results,
    paired_difference,
    summarize,
    token_matched_best_of_n,
)
from astro_hpc.problems import signs
from astro_hpc.problems.final_answer import closing_brace
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import read_source
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, read_jsonl, write_json_atomic, write_jsonl_atomic
from astro_hpc.run.progress import Progress
from astro_hpc.run.seeds import derive_seed
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.shards import in_shard

if TYPE_CHECKING:
    from astro_hpc.inference.engine import Engine, Sample, SampleRequest
    from astro_hpc.verifier.pool import Verdict, VerifierPool

RESPONSES = "responses"
"""Folder in a shard's."""
_MAX_ATTEMPTS = 64
"""Attempts of one response that are judged one by one; a response that repeats itself can hold thousands."""


def run(ctx: StageContext, *, models: Mapping[str, Path]) -> list[Path]:
    """Sample, grade and summarise; returns the models' folders and `summary.json`.

    Args:
        ctx: the stage's context.
        models: name -> Hugging Face folder; all of one architecture, for the engine swaps weights only.

    Raises:
        ConfigError: no benchmark, an unknown model in `eval.limits`, or a model of another architecture.
        CheckpointedExit: asked to stop; finished files stay.
    """
    benchmarks = _load_benchmarks(ctx, models)
    plan = _plan(ctx, models, benchmarks, ctx.dir)
    _make_files(ctx, models, plan)
    return _summarize(ctx, models, benchmarks, plan)


def run_shard(ctx: StageContext, *, models: Mapping[str, Path], shard: int, num_shards: int) -> list[Path]:
    """Sample and grade one shard of every benchmark's problems; returns the folder of its files.

    `responses/MODEL/BENCHMARK/output-rsI.jsonl` are those of `run` with fewer rows, or none. Errors as `run`.
    """
    benchmarks = {
        name: in_shard(problems, shard, num_shards) for name, problems in _load_benchmarks(ctx, models).items()
    }
    plan = _plan(ctx, models, benchmarks, ctx.dir / RESPONSES)
    _make_files(ctx, models, plan)
    rows = [row for item in plan for index in range(item.num_samples) for row in _token_counts(item.file(index))]
    ctx.count(tokens=sum(rows), samples=len(rows))
    return [ctx.dir / RESPONSES]


def gather(ctx: StageContext, *, models: Mapping[str, Path], shards: Sequence[Path]) -> list[Path]:
    """Put the shards' responses together and summarise: the same files as `run` writes.

    Args:
        shards: their `responses` folders.

    Raises:
        ConfigError: as `run`, and when a response is missing.
    """
    benchmarks = _load_benchmarks(ctx, models)
    plan = _plan(ctx, models, benchmarks, ctx.dir)
    for item in plan:
        for index in item.missing:
            name = item.file(index).relative_to(ctx.dir)
            rows = {row["id"]: row for folder in shards for row in read_jsonl(folder / name)}
            if holes := [problem.id for problem in item.problems if problem.id not in rows]:
                raise ConfigError(
                    f"{ctx.label}: {name} lacks {len(holes)} problems, {holes[0]} first; sample them again"
                )
            write_jsonl_atomic(item.file(index), (rows[problem.id] for problem in item.problems))
    return _summarize(ctx, models, benchmarks, plan)


def _load_benchmarks(ctx: StageContext, models: Mapping[str, Path]) -> dict[str, list[Problem]]:
    """The problems by benchmark; what became of the sources' rows is said, and counted for the manifest."""
    settings = ctx.cfg.eval
    if not settings.benchmarks:
        raise ConfigError("eval.benchmarks is empty; name at least one held-out source of problems")
    if unknown := set(settings.limits) - set(models):
        raise ConfigError(f"eval.limits names no model of this run: {sorted(unknown)[0]}; models: {', '.join(models)}")
    loaded = {name: read_source(source) for name, source in settings.benchmarks.items()}
    for name, (_, report) in loaded.items():
        ctx.say(f"benchmark {name}: {report}")
    ctx.count(benchmarks={name: report.to_json() for name, (_, report) in loaded.items()})
    return {name: problems for name, (problems, _) in loaded.items()}


def _make_files(ctx: StageContext, models: Mapping[str, Path], plan: Sequence[_Item]) -> None:
    """Sample and grade what is missing."""
    for item in plan:
        if not item.problems:  # a shard's share of a benchmark may be nothing: no engine is started for it
            for index in item.missing:
                write_jsonl_atomic(item.file(index), [])
    todo = [item for item in plan if item.missing]
    if todo:
        _sample_all(ctx, models, todo, total=sum(item.num_samples * len(item.problems) for item in plan))


def _token_counts(path: Path) -> list[int]:
    return [row["num_generated_tokens"] for row in read_jsonl(path)]


def _summarize(
    ctx: StageContext, models: Mapping[str, Path], benchmarks: Mapping[str, Sequence[Problem]], plan: Sequence[_Item]
) -> list[Path]:
    """All metrics, from the files alone."""
    results = {(item.benchmark, item.model): _read_results(item) for item in plan}
    majority = ctx.cfg.eval.majority
    rows = [_summary_row(item, results[item.benchmark, item.model], majority) for item in plan]
    for item, row in zip(plan, rows, strict=True):
        write_json_atomic(item.folder / "summary.json", row)
    summary = ctx.dir / "summary.json"
    write_json_atomic(summary, {"results": rows, **_comparisons(list(models), list(benchmarks), results)})
    ctx.count(
        tokens=sum(row["tokens"] for row in rows),
        samples=sum(row["k"] * row["num_problems"] for row in rows),
    )
    return [*(ctx.dir / name for name in models), summary]


@dataclass(frozen=True)
class _Item:
    """One model on one benchmark."""

    model: str
    benchmark: str
    folder: Path
    problems: list[Problem]
    num_samples: int
    max_tokens: int

    @property
    def journal(self) -> Path:
        """Graded responses of files that are not complete."""
        return self.folder / "graded.jsonl"

    def file(self, index: int) -> Path:
        return self.folder / f"output-rs{index}.jsonl"

    @property
    def missing(self) -> list[int]:
        """Sample indices whose file is still to be made."""
        return [index for index in range(self.num_samples) if not self.file(index).exists()]


def _plan(
    ctx: StageContext, models: Mapping[str, Path], benchmarks: Mapping[str, list[Problem]], folder: Path
) -> list[_Item]:
    settings, plan = ctx.cfg.eval, []
    for model in models:
        limits = settings.limits.get(model)
        num_samples = (limits and limits.num_samples) or settings.num_samples
        max_tokens = (limits and limits.max_tokens) or settings.max_tokens
        for name, problems in benchmarks.items():
            plan.append(_Item(model, name, folder / model / name, problems, num_samples, max_tokens))
    return plan


def _sample_all(ctx: StageContext, models: Mapping[str, Path], todo: Sequence[_Item], total: int) -> None:
    """Make all missing files, model by model on one engine."""
    from astro_hpc.inference import make_engine
    from astro_hpc.verifier.pool import VerifierPool

    left = sum(len(item.missing) * len(item.problems) for item in todo)
    order = list(dict.fromkeys(item.model for item in todo))
    engine = make_engine(models[order[0]], ctx.cfg.inference, ctx.seed("eval", "engine"), ctx.log_dir)
    try:
        with VerifierPool(ctx.cfg.verifier) as pool, ctx.progress(total, "responses", done=total - left) as progress:
            grader = _Grader(ctx, engine, pool, progress)
            for version, model in enumerate(order):
                if version:
                    engine.load_weights(models[model], version)
                for item in (item for item in todo if item.model == model):
                    grader.make_files(item)
    finally:
        engine.close()


class _Grader:
    """Samples an item's missing files and grades answers while the engine goes on."""

    def __init__(self, ctx: StageContext, engine: Engine, pool: VerifierPool, progress: Progress) -> None:
        self.ctx, self.engine, self.pool, self.progress = ctx, engine, pool, progress
        self.style = PromptStyle.load(ctx.cfg.model.prompt_style)
        self.phrases = Phrases.load(ctx.cfg.clone.phrases)
        self.tokens = 0

    def make_files(self, item: _Item) -> None:
        """Ask for everything at once, so that the engine's queue never drains; journal each response as it is graded.

        The files are written from the journal, which a killed stage goes on from, and which ends with them.
        """
        missing = item.missing
        rows = {(row["sample"], row["id"]): row for row in Journal.read(item.journal) if row["sample"] in missing}
        self.progress.update(len(rows))
        jobs = [(i, problem) for i in missing for problem in item.problems if (i, problem.id) not in rows]
        waiting: dict[int, _Response] = {}

        with Journal(item.journal) as journal:

            def keep(number: int) -> None:
                index, problem = jobs[number]
                row = self._row(problem, waiting.pop(number), index)
                journal.append(row)
                rows[index, problem.id] = row

            def on_sample(number: int, sample: Sample) -> None:
                if self.ctx.stop_requested:
                    raise CheckpointedExit(f"{self.ctx.label}: stopped at {item.model} on {item.benchmark}")
                waiting[number] = self._submit(jobs[number][1], sample)
                self.tokens += len(sample.token_ids)
                self.progress.update(model=item.model, tokens=f"{self.tokens:,}")
                for graded in [n for n, response in waiting.items() if response.is_graded]:
                    keep(graded)

            self.engine.generate_many([self._request(item, index, problem) for index, problem in jobs], on_sample)
            for number in list(waiting):
                keep(number)
        for index in missing:
            write_jsonl_atomic(item.file(index), (rows[index, problem.id] for problem in item.problems))
        item.journal.unlink()

    def _request(self, item: _Item, index: int, problem: Problem) -> SampleRequest:
        from astro_hpc.inference.engine import SampleRequest

        settings = self.ctx.cfg.eval
        ids = self.engine.tokenizer.encode(self.style.render(problem.text), add_special_tokens=False)
        return SampleRequest(
            tuple(ids),
            # a long prompt leaves less room; one that leaves none is refused by the engine, with the numbers
            max_tokens=max(1, min(item.max_tokens, self.engine.max_model_len - len(ids))),
            temperature=settings.temperature,
            top_p=settings.top_p,
            # without the model's name: every model draws the same random numbers
            seed=derive_seed(settings.seed, "eval", item.benchmark, problem.id, index),
            stop=self.style.stop,
        )

    def _submit(self, problem: Problem, sample: Sample) -> _Response:
        ends = attempt_ends(sample.text, self.style.answer_marker)[:_MAX_ATTEMPTS]
        attempts = [self.pool.submit(problem, sample.text[:end]) for end in ends]
        return _Response(sample, self.pool.submit(problem, sample.text), ends, attempts)

    def _row(self, problem: Problem, response: _Response, index: int) -> dict[str, Any]:
        """A row in NeMo-Skills' form, under both of the names it has had for the verdict, and our own fields."""
        sample, verdict = response.sample, response.verdict.result()
        attempts = []
        untils = [*response.ends, len(sample.text)][1:]
        for end, until, future in zip(response.ends, untils, response.attempts, strict=True):
            judged, after = future.result(), sample.text[end:until]
            went_back = self.phrases.count_backtracks(after) > 0
            attempts.append({"answer": judged.answer, "outcome": judged.outcome, "went_back": went_back})
        return {
            "id": problem.id,
            "problem": problem.text,
            "expected_answer": problem.answer,
            "generation": sample.text,
            "predicted_answer": verdict.answer,
            "is_correct": verdict.outcome == "right",
            "symbolic_correct": verdict.outcome == "right",
            "num_generated_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "sample": index,
            "outcome": verdict.outcome,
            "attempts": attempts,
            "num_backtracks": self.phrases.count_backtracks(sample.text),
        }


@dataclass(frozen=True)
class _Response:
    """A sample with its verdicts, which may still be under way."""

    sample: Sample
    verdict: Future[Verdict]
    ends: list[int]
    attempts: list[Future[Verdict]]

    @property
    def is_graded(self) -> bool:
        """All verdicts have come in."""
        return self.verdict.done() and all(attempt.done() for attempt in self.attempts)


def attempt_ends(text: str, marker: str) -> list[int]:
    """Where each complete final answer of a response ends (index behind it)."""
    ends: list[int] = []
    at = text.find(marker)
    while at >= 0:
        begin = at + len(marker)
        if marker.endswith("{"):
            brace = closing_brace(text, begin)
            end = None if brace is None else brace + 1
        else:
            newline = text.find("\n", begin)
            end = len(text) if newline < 0 else newline
        if end is not None:
            ends.append(end)
        at = text.find(marker, begin if end is None else end)
    return ends


def graded(row: Mapping[str, Any]) -> Graded:
    """What the metrics need of a row of an output file."""
    attempts, seen = [], set()
    for attempt in row["attempts"]:
        repeated = attempt["answer"] in seen
        seen.add(attempt["answer"])
        attempts.append(Attempt(attempt["outcome"] == "right", attempt["went_back"], repeated))
    return Graded(
        correct=bool(row["is_correct"]),
        answer=row["predicted_answer"],
        num_tokens=row["num_generated_tokens"],
        num_backtracks=row["num_backtracks"],
        truncated=row["finish_reason"] == "length",
        attempts=tuple(attempts),
    )


def _read_results(item: _Item) -> Results:
    results: dict[str, list[Graded]] = {problem.id: [] for problem in item.problems}
    for index in range(item.num_samples):
        for row in read_jsonl(item.file(index)):
            results[row["id"]].append(graded(row))
    return results


def _summary_row(item: _Item, results: Results, majority: int) -> dict[str, Any]:
    chances = [signs.chance(problem) for problem in item.problems if problem.checker == signs.CHECKER]
    return {
        "model": item.model,
        "benchmark": item.benchmark,
        "chance": mean(chances) if len(chances) == len(item.problems) else None,
        **summarize(results, majority),
        "per_problem": {key: mean(sample.correct for sample in samples) for key, samples in results.items()},
    }


def _comparisons(
    models: Sequence[str], benchmarks: Sequence[str], results: Mapping[tuple[str, str], Results]
) -> dict[str, list[dict[str, Any]]]:
    """Each pair of models: the paired difference, and best-of-n of the terser one on the other's token budget."""
    differences, best_of_n = [], []
    for benchmark in benchmarks:
        for i, first in enumerate(models):
            for second in models[i + 1 :]:
                earlier, later = results[benchmark, first], results[benchmark, second]
                delta = paired_difference(later, earlier)
                pair = {"benchmark": benchmark, "model": second, "minus": first}
                differences.append({**pair, "value": delta.value, "interval": [delta.low, delta.high]})
                for long, short in ((first, second), (second, first)):
                    matched = token_matched_best_of_n(results[benchmark, long], results[benchmark, short])
                    if matched["affordable_n"] > 1:
                        names = {"benchmark": benchmark, "model": short, "budget_of": long}
                        best_of_n.append({**names, **matched})
    return {"differences": differences, "token_matched_best_of_n": best_of_n}
