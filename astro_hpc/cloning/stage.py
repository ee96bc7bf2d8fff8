"""The clone stage: search trees become the SFT examples of both arms; see `examples` for what a tree gives.

Trees are read one after the other and never held beyond those under way. Everything finished goes into a journal, so
that a killed stage does nothing twice; the data set is put together from the journals of all shards at the end.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from astro_hpc.cloning.examples import TreeCloner, TreeExamples, solution_text
from astro_hpc.cloning.lm_verbalizer import LMVerbalizer
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.prompts import VerbalizePrompts
from astro_hpc.cloning.records import (
    Key,
    Unfinished,
    read_records,
    trace_record,
    tree_record,
    verdicts_record,
    write_data_set,
)
from astro_hpc.cloning.self_evaluation import SelfEvaluator
from astro_hpc.cloning.verbalize import Reflections, TemplateVerbalizer, Trace
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Engine
from astro_hpc.problems import signs
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, Lock
from astro_hpc.run.progress import Progress
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.shards import shard_of
from astro_hpc.search.tree import Node, Tree

_Item = tuple[Key, Tree]
_STOP_POLL_SECONDS = 0.2


def run(
    ctx: StageContext,
    *,
    trees: Iterable[Tree | Path],
    model_dir: Path | None = None,
    verbalizer_dir: Path | None = None,
) -> list[Path]:
    """Write `astro.jsonl`, `direct.jsonl` and `filters.json` into the stage's folder.

    Args:
        ctx: the stage's context.
        trees: trees, or journals of them.
        model_dir: the policy's Hugging Face folder: its tokenizer measures examples against `sft.seq_length`, and it
            gives the verdicts when `clone.self_evaluation_samples` > 0.
        verbalizer_dir: the verbalising model's folder, for `clone.verbalizer: lm`; the policy's when absent.

    Raises:
        ConfigError: no tree gives an example, or a model is needed and not given.
        CheckpointedExit: asked to stop; what is finished is in the journal.
    """
    return write_data_set(ctx, run_shard(ctx, trees=trees, model_dir=model_dir, verbalizer_dir=verbalizer_dir))


def run_shard(
    ctx: StageContext,
    *,
    trees: Iterable[Tree | Path],
    model_dir: Path | None = None,
    verbalizer_dir: Path | None = None,
    shard: int = 0,
    num_shards: int = 1,
) -> list[Path]:
    """Write the journal `records.jsonl` of the trees whose problems fall into the shard, as a search's shards do.

    Args and errors are those of `run`. A shard may be empty; `write_data_set` puts the shards' journals together.
    """
    path = ctx.dir / "records.jsonl"
    sources = list(trees)
    with Lock(ctx.dir / ".records.lock"), Journal(path) as journal:
        work = _Shard(ctx, sources, journal, lambda problem_id: shard_of(problem_id, num_shards) == shard)
        with (
            _Models(ctx, model_dir, verbalizer_dir) as models,
            ctx.progress(_count(sources), "trees", done=len(work.earlier.finished)) as bar,
        ):
            try:
                asyncio.run(work.carry_out(models, bar))
            except _StoppedError:
                raise CheckpointedExit(f"{len(work.earlier.finished)} trees are finished") from None
    report = read_records(ctx, [path]).report
    tokens = report["trees"].get("verdict_tokens", 0) + report["verbalizer"].get("generated_tokens", 0)
    ctx.count(**report, tokens=tokens)
    return [path]


class _StoppedError(Exception):
    """The stage was asked to stop; what is in flight is dropped."""


class _Shard:
    """Trees of one shard on their way from the search's journals into the stage's own."""

    def __init__(
        self, ctx: StageContext, sources: Sequence[Tree | Path], journal: Journal, mine: Callable[[str], bool]
    ) -> None:
        self.ctx, self.sources, self.journal, self.mine = ctx, sources, journal, mine
        self.earlier = Unfinished.read(journal.path)
        # Only ids, and packed: a search leaves many right terminals, and all trees are judged before the first is told.
        self.accepted = {key: array("I", ids) for key, ids in self.earlier.accepted.items()}

    async def carry_out(self, models: _Models, bar: Progress) -> None:
        """Judge all trees' solutions where that is asked for, then write all trees' examples."""
        cfg = self.ctx.cfg
        style = PromptStyle.load(cfg.model.prompt_style)
        template = make_template(cfg, style)
        if cfg.clone.verbalizer == "lm":
            check_prompts(cfg, template)
        cloner = TreeCloner(cfg, style, template, template, models.token_counter())
        in_flight = cfg.clone.traces_in_flight
        if cfg.clone.self_evaluation_samples:
            unjudged = (item for item in self._trees() if item[0] not in self.accepted)
            await self._each(unjudged, lambda items: self._judge(cloner, models, style, items), in_flight)
        if cfg.clone.verbalizer == "lm":
            await self._each(self._trees(bar), lambda items: self._tell_by_lm(cloner, models, items, bar), in_flight)
        else:
            await self._each(self._trees(bar), lambda items: self._tell(cloner, items, bar), 1)

    # --- the two phases -------------------------------------------------------------------------------------------

    async def _judge(self, cloner: TreeCloner, models: _Models, style: PromptStyle, items: Iterator[_Item]) -> None:
        """Self-evaluation: which of each tree's solutions the policy stands behind."""
        settings = self.ctx.cfg.clone
        for key, tree in items:
            evaluator = SelfEvaluator(
                models.policy(),
                style.render,
                settings.self_evaluation_samples,
                settings.self_evaluation_quorum,
                self.ctx.seed("clone"),
            )
            nodes = cloner.sound_solutions(tree)
            decisions = await evaluator.decide(tree.problem.text, [solution_text(tree, node) for node in nodes])
            accepted = [node.id for node, decision in zip(nodes, decisions, strict=True) if decision.accepted]
            counts = {
                "verdict_tokens": sum(decision.tokens for decision in decisions),
                "too_long_for_a_verdict": sum(not decision.fits for decision in decisions),
            }
            self.journal.append(verdicts_record(key, accepted, counts))
            self.accepted[key] = array("I", accepted)

    async def _tell_by_lm(self, cloner: TreeCloner, models: _Models, items: Iterator[_Item], bar: Progress) -> None:
        for item in items:  # the engine is made when the first tree comes, if one does
            await self._tell(replace(cloner, verbalizer=models.verbalizer(cloner)), iter([item]), bar)

    async def _tell(self, cloner: TreeCloner, items: Iterator[_Item], bar: Progress) -> None:
        """Write the examples of trees."""
        for key, tree in items:
            written = await self._examples_of(cloner, key, tree)
            self.journal.append(tree_record(key, tree.problem.id, written.to_json()))
            self.earlier.finish(key)
            self.accepted.pop(key, None)
            bar.update(1)

    async def _examples_of(self, cloner: TreeCloner, key: Key, tree: Tree) -> TreeExamples:
        sound = cloner.sound_solutions(tree)
        accepted = sound
        if self.ctx.cfg.clone.self_evaluation_samples:
            behind = set(self.accepted[key])
            accepted = [node for node in sound if node.id in behind]
        written = TreeExamples()
        if accepted:
            written = await cloner.examples(
                tree, accepted, self.earlier.traces.get(key, {}), lambda name, trace: self._keep(key, name, trace)
            )
        counts = written.counts["trees"]
        counts["read"] += 1
        counts["unsolved"] += not tree.solved
        counts["no_sound_solution"] += tree.solved and not sound
        counts["self_evaluation"] += bool(sound) and not accepted
        counts["used"] += bool(accepted)
        counts["right_terminals"] += len(sound)
        counts["right_terminals_rejected"] += len(sound) - len(accepted)
        counts["terminals_with_bad_steps"] += sum(node.outcome == "right" for node in tree.terminals()) - len(sound)
        return written

    def _keep(self, key: Key, name: str, trace: Trace) -> None:
        if trace.counts:  # the template's cost nothing to write again
            self.journal.append(trace_record(key, name, trace))

    # --- trees in, work out ---------------------------------------------------------------------------------------

    def _trees(self, bar: Progress | None = None) -> Iterator[_Item]:
        """The shard's trees that have no examples in the journal yet; of several of a problem the first."""
        seen: set[str] = set()
        for key, tree in _read(self.sources):
            problem_id = tree.problem.id
            if not self.mine(problem_id):
                if bar is not None:
                    bar.update(1)
                continue
            if problem_id not in seen:
                seen.add(problem_id)
                if key not in self.earlier.finished:
                    yield key, tree
            elif key not in self.earlier.finished:
                again = TreeExamples()
                again.counts["trees"] += Counter(read=1, same_problem=1)
                self.journal.append(tree_record(key, problem_id, again.to_json()))
                self.earlier.finish(key)

    async def _each(
        self, items: Iterator[_Item], work: Callable[[Iterator[_Item]], Awaitable[None]], in_flight: int
    ) -> None:
        """Let `in_flight` workers take items in order, so that the engine's queue doesn't drain while any are left."""

        def until_stopped() -> Iterator[_Item]:
            for item in items:
                if self.ctx.stop_requested:
                    raise _StoppedError
                yield item

        queue = until_stopped()

        async def worker() -> None:
            await work(queue)

        async def watch() -> None:
            while not self.ctx.stop_requested:
                await asyncio.sleep(_STOP_POLL_SECONDS)
            raise _StoppedError

        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch())
                workers = [group.create_task(worker()) for _ in range(in_flight)]
                await asyncio.wait(workers)
                watcher.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _Models:
    """The models that the stage needs, each loaded when it is first asked for, one at a time."""

    def __init__(self, ctx: StageContext, model_dir: Path | None, verbalizer_dir: Path | None) -> None:
        settings = ctx.cfg.clone
        if model_dir is None and settings.self_evaluation_samples:
            raise ConfigError("clone.self_evaluation_samples > 0 needs the policy's folder; give one, or set it to 0")
        if model_dir is None and verbalizer_dir is None and settings.verbalizer == "lm":
            raise ConfigError("clone.verbalizer=lm needs a model's folder; give one, or set it to template")
        self.ctx, self._policy_dir, self._verbalizer_dir = ctx, model_dir, verbalizer_dir or model_dir
        self._loaded: tuple[Path, Engine] | None = None
        self._verbalizer: LMVerbalizer | None = None

    def __enter__(self) -> _Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def policy(self) -> Engine:
        """The searching model's engine."""
        assert self._policy_dir is not None
        return self._engine(self._policy_dir)

    def verbalizer(self, cloner: TreeCloner) -> LMVerbalizer:
        """The language model that verbalises."""
        if self._verbalizer is None:
            assert self._verbalizer_dir is not None
            own = self._verbalizer_dir == self._policy_dir
            self._verbalizer = make_lm_verbalizer(self.ctx, cloner, self._engine(self._verbalizer_dir), own)
        return self._verbalizer

    def token_counter(self) -> Callable[[str, str], int] | None:
        """Tokens of prompt, completion and end of sequence, as training will see them."""
        return _token_counter(self._policy_dir)

    def _engine(self, folder: Path) -> Engine:
        if self._loaded is not None and self._loaded[0] != folder:
            self._close()
        if self._loaded is None:
            engine = make_engine(folder, self.ctx.cfg.inference, self.ctx.seed("clone", "engine"), self.ctx.log_dir)
            self._loaded = (folder, engine)
        return self._loaded[1]

    def _close(self) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None


def make_template(cfg: RunConfig, style: PromptStyle) -> TemplateVerbalizer:
    """The template verbaliser, which also says what the language model isn't asked for."""
    settings = cfg.clone
    return TemplateVerbalizer(
        Phrases.load(settings.phrases),
        separator=style.step_delimiter if style.step_delimiter.isspace() else "\n\n",
        reflections=Reflections(settings.reflect_min_q, settings.reflect_rate, settings.fixed_phrase),
        attempt_note=_attempt_note if settings.attempt_note else None,
        seed=cfg.seed,
    )


def check_prompts(cfg: RunConfig, template: TemplateVerbalizer) -> None:
    """Find mistakes in prompts and phrases before a model is loaded."""
    LMVerbalizer.check(VerbalizePrompts.load(cfg.clone.verbalizer_prompts), template.phrases)


def make_lm_verbalizer(ctx: StageContext, cloner: TreeCloner, engine: Engine, is_policy: bool) -> LMVerbalizer:
    """The verbaliser of `clone.verbalizer: lm` on an engine; `is_policy`: it is the searching model itself."""
    settings, style = ctx.cfg.clone, cloner.style
    return LMVerbalizer(
        engine,
        cloner.template,
        VerbalizePrompts.load(settings.verbalizer_prompts),
        delimiter=style.step_delimiter,
        answer_markers=tuple(dict.fromkeys([*ctx.cfg.verifier.answer_markers, style.answer_marker])),
        answer_of=cloner.answer_of,
        stop=style.stop if is_policy else (),
        temperature=settings.verbalizer_temperature,
        max_tokens=settings.verbalizer_max_tokens,
        retries=settings.verbalizer_retries,
        seed=ctx.cfg.seed,
        slots=asyncio.Semaphore(settings.traces_in_flight),
    )


def _attempt_note(tree: Tree, node: Node) -> str | None:
    """What the attempt that ends at `node` gave, where the problem's family can tell."""
    if tree.problem.checker != signs.CHECKER or node.answer is None:
        return None
    return signs.attempt_note(tree.problem, node.answer)


def _read(sources: Sequence[Tree | Path]) -> Iterator[_Item]:
    for number, source in enumerate(sources):
        if isinstance(source, Path):
            for line, row in enumerate(Journal.read(source)):
                yield (number, line), Tree.from_json(row)
        else:
            yield (number, 0), source


def _count(sources: Sequence[Tree | Path]) -> int:
    """Trees in all sources, without reading them as such."""
    count = 0
    for source in sources:
        if isinstance(source, Path):
            with open(source, "rb") as handle:
                count += sum(1 for _ in handle)
        else:
            count += 1
    return count


def _token_counter(model_dir: Path | None) -> Callable[[str, str], int] | None:
    if model_dir is None:
        return None
    from astro_hpc.training.data import load_tokenizer

    tokenizer = load_tokenizer(model_dir)

    def count(prompt: str, completion: str) -> int:
        return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, completion)) + 1

    return count
