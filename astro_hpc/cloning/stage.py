"""The clone stage: search trees become the SFT examples of both arms.

The astro arm holds `num_direct` plain solutions (k = 0) and `num_search` solutions that first fail k >= 1 times; the
direct arm holds plain solutions of the same trees, as many a tree as the astro arm (`equal_arms`), without any
reflection. Trees are read twice and never held, so memory does not grow with their number.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from astro_hpc.cloning.linearize import correct_terminals, incorrect_terminals, linearize, sample_incorrect
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.self_evaluation import SelfEvaluator
from astro_hpc.cloning.verbalize import TemplateVerbalizer, Trace
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.problems import signs
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, write_json_atomic, write_jsonl_atomic
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.tree import Node, Tree

_Sequence = tuple[int, list[Node]]
"""k and the nodes."""
_DRAWS_PER_EXAMPLE = 8
"""Tries to find a sequence that the tree hasn't given yet."""
_TREES_PER_BATCH = 64
"""Trees whose solutions are self-evaluated together."""


def run(ctx: StageContext, *, trees: Iterable[Tree | Path], model_dir: Path | None = None) -> list[Path]:
    """Write `astro.jsonl`, `direct.jsonl` and `filters.json` into the stage's folder.

    A row is `{"id", "problem_id", "prompt", "completion", "messages", "answer", "arm", "k", "repeat", "num_tokens",
    "graph"}`; `repeat` is 0 unless the direct arm ran out of different solutions; `num_tokens` (prompt, completion
    and end of sequence) is 0 without a tokenizer.

    Args:
        ctx: the stage's context.
        trees: trees, or journals of them.
        model_dir: the policy's Hugging Face folder: its tokenizer measures examples against `sft.seq_length`, and it
            gives the verdicts when `clone.self_evaluation_samples` > 0.

    Raises:
        ConfigError: no tree gives an example, or self-evaluation is on without a model.
        CheckpointedExit: asked to stop during self-evaluation; the verdicts so far are journaled.
    """
    sources = list(trees)
    evaluator = _evaluator(ctx, model_dir)
    try:
        cloner = _Cloner(ctx, _token_counter(model_dir), evaluator)
        astro, direct = ctx.dir / "astro.jsonl", ctx.dir / "direct.jsonl"
        written = write_jsonl_atomic(astro, cloner.astro_rows(sources))
    finally:
        if evaluator is not None:
            evaluator.engine.close()
    if written:
        write_jsonl_atomic(direct, cloner.direct_rows(sources))
    report = {name: dict(counts) for name, counts in cloner.filters.items()}
    filters = ctx.dir / "filters.json"
    write_json_atomic(filters, {**report, "num_tokens": {arm: _spread(cloner.lengths[arm]) for arm in cloner.lengths}})
    if not written:
        raise ConfigError(
            f"clone: none of {report['trees']['read']} trees gives an example (see {filters}); "
            "search with more iterations or rollouts, or easier problems"
        )
    ctx.count(trace_tokens=sum(map(sum, cloner.lengths.values())), **report)
    return [astro, direct, filters]


class _Cloner:
    """Makes the rows of both arms and counts what each filter takes."""

    def __init__(
        self, ctx: StageContext, count_tokens: Callable[[str, str], int] | None, evaluator: SelfEvaluator | None
    ) -> None:
        self.ctx = ctx
        self.settings = ctx.cfg.clone
        self.max_tokens = ctx.cfg.sft.seq_length
        self.style = PromptStyle.load(ctx.cfg.model.prompt_style)
        self.verbalizer = make_verbalizer(ctx.cfg, self.style)
        self.count_tokens = count_tokens
        self.evaluator = evaluator
        self.filters: dict[str, Counter[str]] = {
            "trees": Counter(read=0, unsolved=0, self_evaluation=0, used=0),
            "astro": Counter(wanted=0, no_incorrect_terminal=0, duplicate=0, too_long=0, written=0),
            "direct": Counter(wanted=0, too_long=0, written=0, repeats=0),
        }
        self.lengths: dict[str, list[int]] = {"astro": [], "direct": []}
        self._journal = ctx.dir / "self_evaluation.jsonl"
        self._verdicts = {(p, i): verdict for batch in Journal.read(self._journal) for p, i, verdict in batch}
        self._accepted: dict[str, list[int]] = {}
        self._astro_count: Counter[str] = Counter()

    def astro_rows(self, sources: Sequence[Tree | Path]) -> Iterator[dict[str, Any]]:
        """The astro arm; also notes each tree's accepted solutions and number of rows for the direct arm."""
        counts = self.filters["astro"]
        for tree, accepted in self._used_trees(sources):
            problem = tree.problem
            rng = random.Random(self.ctx.seed("clone", "astro", problem.id))
            counts["wanted"] += self.settings.num_direct + self.settings.num_search
            sequences = [*self._direct_sequences(tree, accepted, rng), *self._search_sequences(tree, accepted, rng)]
            for index, (k, sequence) in enumerate(sequences):
                trace = self.verbalizer(tree, sequence, rng)
                row = self._row(tree, sequence[-1], trace, "astro", index, k)
                if row is not None:
                    self._astro_count[problem.id] += 1
                    yield row

    def direct_rows(self, sources: Sequence[Tree | Path]) -> Iterator[dict[str, Any]]:
        """The direct arm, of the trees that `astro_rows` went through before."""
        counts = self.filters["direct"]
        for tree in _read_trees(sources):
            problem = tree.problem
            accepted = self._accepted.pop(problem.id, None)
            if accepted is None:
                continue
            wanted = self._astro_count[problem.id] if self.settings.equal_arms else self.settings.num_direct
            counts["wanted"] += wanted
            rng = random.Random(self.ctx.seed("clone", "direct", problem.id))
            nodes = _different_solutions(tree, [tree.nodes[i] for i in accepted], rng)
            traces = [(node, self.verbalizer(tree, tree.path(node), rng, reflect=False)) for node in nodes]
            fitting = [(node, trace) for node, trace in traces if self._fits(problem, trace)]
            if not fitting:
                counts["too_long"] += wanted
                continue
            num_rows = wanted if self.settings.equal_arms else min(wanted, len(fitting))
            for index, (node, trace) in enumerate(itertools.islice(itertools.cycle(fitting), num_rows)):
                row = self._row(tree, node, trace, "direct", index, 0, repeat=index // len(fitting))
                assert row is not None
                counts["repeats"] += row["repeat"] > 0
                yield row

    def _used_trees(self, sources: Sequence[Tree | Path]) -> Iterator[tuple[Tree, list[Node]]]:
        """Trees with at least one accepted correct terminal, and these (Psi')."""
        counts = self.filters["trees"]
        for batch in _batched(_read_trees(sources), _TREES_PER_BATCH):
            correct = [self._sound(tree, correct_terminals(tree)) for tree in batch]
            accepted = self._self_evaluate(batch, correct) if self.evaluator is not None else correct
            for tree, before, after in zip(batch, correct, accepted, strict=True):
                counts["read"] += 1
                counts["unsolved"] += not tree.solved
                counts["no_sound_solution"] += tree.solved and not before
                counts["self_evaluation"] += bool(before) and not after
                counts["right_terminals"] += len(before)
                counts["right_terminals_rejected"] += len(before) - len(after)
                if after and tree.problem.id not in self._accepted:
                    counts["used"] += 1
                    self._accepted[tree.problem.id] = [node.id for node in after]
                    yield tree, after
                elif after:
                    counts["same_problem"] += 1

    def _sound(self, tree: Tree, terminals: list[Node]) -> list[Node]:
        """The terminals whose steps agree with their answer, where that is asked for and can be told."""
        if not self.settings.check_steps or tree.problem.checker != signs.CHECKER:
            return terminals
        sound = [t for t in terminals if signs.steps_agree([n.step for n in tree.path(t)[1:-1]], t.answer or "")]
        self.filters["trees"]["terminals_with_bad_steps"] += len(terminals) - len(sound)
        return sound

    def _self_evaluate(self, trees: Sequence[Tree], correct: Sequence[list[Node]]) -> list[list[Node]]:
        """Psi' of each tree; what an earlier attempt has journaled is not asked again."""
        assert self.evaluator is not None
        if self.ctx.stop_requested:
            raise CheckpointedExit(f"{self.ctx.label}: stopped after {len(self._verdicts)} solutions")
        keys = [(tree.problem.id, node.id) for tree, nodes in zip(trees, correct, strict=True) for node in nodes]
        by_id = {tree.problem.id: tree for tree in trees}
        asked = [key for key in keys if key not in self._verdicts]
        solutions = [(by_id[p].problem.text, _solution_text(by_id[p], by_id[p].nodes[i])) for p, i in asked]
        verdicts = self.evaluator.accepts(solutions) if solutions else []
        if asked:
            with Journal(self._journal) as journal:
                journal.append([[*key, verdict] for key, verdict in zip(asked, verdicts, strict=True)])
            self._verdicts.update(zip(asked, verdicts, strict=True))
        return [
            [node for node in nodes if self._verdicts[tree.problem.id, node.id]]
            for tree, nodes in zip(trees, correct, strict=True)
        ]

    def _direct_sequences(self, tree: Tree, accepted: list[Node], rng: random.Random) -> Iterator[_Sequence]:
        nodes = _different_solutions(tree, accepted, rng)
        self.filters["astro"]["duplicate"] += max(0, self.settings.num_direct - len(nodes))
        for node in nodes[: self.settings.num_direct]:
            yield 0, tree.path(node)

    def _search_sequences(self, tree: Tree, accepted: list[Node], rng: random.Random) -> Iterator[_Sequence]:
        wanted, counts = self.settings.num_search, self.filters["astro"]
        incorrect = self._sound(tree, incorrect_terminals(tree))
        max_k = min(self.settings.max_incorrect, len({node.answer for node in incorrect}))
        if max_k == 0:
            counts["no_incorrect_terminal"] += wanted
            return
        seen: set[tuple[int, ...]] = set()
        for _ in range(wanted * _DRAWS_PER_EXAMPLE):
            if len(seen) == wanted:
                break
            chosen = sample_incorrect(incorrect, rng.randint(1, max_k), rng)
            sequence = linearize(tree, chosen, rng.choice(accepted), rng)
            key = tuple(node.id for node in sequence)
            if key not in seen:
                seen.add(key)
                yield len(chosen), sequence
        counts["duplicate"] += wanted - len(seen)

    def _row(
        self, tree: Tree, last: Node, trace: Trace, arm: str, index: int, k: int, repeat: int = 0
    ) -> dict[str, Any] | None:
        """The example, or None (counted) when it is longer than SFT takes."""
        problem, counts = tree.problem, self.filters[arm]
        num_tokens = self._num_tokens(problem, trace)
        if num_tokens > self.max_tokens:
            counts["too_long"] += 1
            return None
        counts["written"] += 1
        counts[f"k={k}"] += 1
        self.lengths[arm].append(num_tokens)
        return {
            "id": f"{problem.id}/{arm}/{index}",
            "problem_id": problem.id,
            "prompt": self.style.render(problem.text),
            "completion": trace.text,
            "messages": [
                {"role": "user", "content": problem.text},
                {"role": "assistant", "content": trace.text},
            ],
            "answer": last.answer or "",
            "arm": arm,
            "k": k,
            "repeat": repeat,
            "num_tokens": num_tokens,
            "graph": trace.graph(tree),
        }

    def _num_tokens(self, problem: Problem, trace: Trace) -> int:
        return self.count_tokens(self.style.render(problem.text), trace.text) if self.count_tokens else 0

    def _fits(self, problem: Problem, trace: Trace) -> bool:
        return self._num_tokens(problem, trace) <= self.max_tokens


def make_verbalizer(cfg: RunConfig, style: PromptStyle) -> TemplateVerbalizer:
    """The verbaliser that `cfg.clone` asks for."""
    return TemplateVerbalizer(
        Phrases.load(cfg.clone.phrases),
        separator=style.step_delimiter if style.step_delimiter.isspace() else "\n\n",
        reflect_min_q=cfg.clone.reflect_min_q,
        reflect_rate=cfg.clone.reflect_rate,
        attempt_note=_attempt_note if cfg.clone.attempt_note else None,
    )


def _attempt_note(tree: Tree, node: Node) -> str | None:
    """What the attempt that ends at `node` gave, where the problem's family can tell."""
    if tree.problem.checker != signs.CHECKER or node.answer is None:
        return None
    return signs.attempt_note(tree.problem, node.answer)


def _read_trees(sources: Sequence[Tree | Path]) -> Iterator[Tree]:
    for source in sources:
        if isinstance(source, Path):
            yield from map(Tree.from_json, Journal.read(source))
        else:
            yield source


def _solution_text(tree: Tree, node: Node) -> str:
    return "".join(step.step for step in tree.path(node))


def _different_solutions(tree: Tree, nodes: Sequence[Node], rng: random.Random) -> list[Node]:
    """`nodes` shuffled, without those whose solution reads the same as another's."""
    by_text = {_solution_text(tree, node).strip(): node for node in reversed(nodes)}
    different = sorted(by_text.values(), key=lambda node: node.id)
    rng.shuffle(different)
    return different


def _batched(trees: Iterable[Tree], size: int) -> Iterator[list[Tree]]:
    iterator = iter(trees)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _token_counter(model_dir: Path | None) -> Callable[[str, str], int] | None:
    """Tokens of prompt, completion and end of sequence, as training will see them."""
    if model_dir is None:
        return None
    from astro_hpc.training.data import load_tokenizer

    tokenizer = load_tokenizer(model_dir)

    def count(prompt: str, completion: str) -> int:
        return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, completion)) + 1

    return count


def _evaluator(ctx: StageContext, model_dir: Path | None) -> SelfEvaluator | None:
    settings = ctx.cfg.clone
    if settings.self_evaluation_samples == 0:
        return None
    if model_dir is None:
        raise ConfigError("clone.self_evaluation_samples > 0 needs the policy's folder; give one, or set it to 0")
    from astro_hpc.inference import make_engine

    return SelfEvaluator(
        make_engine(model_dir, ctx.cfg.inference, ctx.seed("clone", "engine"), ctx.log_dir),
        PromptStyle.load(ctx.cfg.model.prompt_style).render,
        settings.self_evaluation_samples,
        settings.self_evaluation_quorum,
        ctx.seed("clone"),
    )


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not any(lengths):
        return {}
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else [float(lengths[0])] * 19
    return {"mean": round(mean(lengths), 1), "p50": cuts[9], "p95": cuts[18], "max": max(lengths), "sum": sum(lengths)}
