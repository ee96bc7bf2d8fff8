"""One problem's tree search, a coroutine on an engine and a verifier (paper, section 2.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from astro_hpc.config.schema import SearchConfig
from astro_hpc.inference.engine import Engine, Sample, SampleRequest
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.seeds import derive_seed
from astro_hpc.search.puct import backup, select_leaf, set_priors, step_mass
from astro_hpc.search.steps import Step, StepCutter
from astro_hpc.search.tree import STATS, Node, Tree
from astro_hpc.verifier.pool import Verdict

T = TypeVar("T")

_NO_ANSWER = Verdict("wrong", None, 0.0)
_EMPTY_STEP = Step("", (), 0.0, False)


class Verifier(Protocol):
    """What a search asks of `VerifierPool`."""

    async def averify(self, problem: Problem, text: str) -> Verdict:
        """The verdict on a whole solution."""
        ...


@dataclass(frozen=True)
class SearchTools:
    """What all trees of a search share.

    Attributes:
        seed: the run's; every request's seed is derived from it, the problem, the node and the sample's number.
    """

    engine: Engine
    verifier: Verifier
    style: PromptStyle
    cutter: StepCutter
    cfg: SearchConfig
    seed: int


async def search_tree(problem: Problem, tools: SearchTools) -> Tree:
    """Build the problem's tree: `num_iterations` times select, expand, roll out and back up.

    The tree depends on the problem, the configuration and the samples alone: not on the order in which samples
    or verdicts come in, nor on other trees.

    Ends of a path. A step with a complete final answer is a terminal with the verifier's verdict. A step without
    one that is empty, was cut at `max_step_tokens`, was ended by the model or leaves the model's context no room
    is a terminal with outcome "wrong" and no answer. A state at `max_depth` is no terminal: it has its rollouts
    and is never expanded. Selecting either again only backs up.

    Kept rollouts (`keep_rollouts`) become nodes of origin "rollout" below the child they started from. Their R
    (and so Q) is the mean verdict of the rollouts that run through them, their N is 0, and each sample of a step
    adds to its prior mass as an expansion's does. A state with such children alone counts as not expanded, so
    the counts hold as `puct` states them. When an expansion samples a kept step again, the node becomes one of
    the expansion and only the rollouts it lacks are drawn.

    A prompt that fills the model's context gives a tree of the root alone, with `prompt_too_long` in its stats.
    """
    return await _TreeSearch(problem, tools).run()


@dataclass(frozen=True)
class _Rollout:
    """A continuation to its end: its steps up to the one that completes the answer, or all where none does."""

    steps: list[Step]
    verdict: Verdict


@dataclass
class _Notes:
    """What a search remembers of a node and the finished tree doesn't need.

    Attributes:
        length: tokens from the start of the prompt to the end of the node's step.
        mass: of all samples that made it: their exp(mean token log-probability), or 1 each for the uniform prior.
        returns: 1 for right, else 0, of each rollout that started here or runs through here.
    """

    length: int
    mass: float = 0.0
    returns: list[float] = field(default_factory=list)


class _TreeSearch:
    def __init__(self, problem: Problem, tools: SearchTools) -> None:
        self.problem, self.tools, self.cfg = problem, tools, tools.cfg
        prompt = tools.style.render(problem.text)
        self.prompt_ids = tuple(tools.engine.tokenizer.encode(prompt, add_special_tokens=False))
        self.tree = Tree(problem, [Node(id=0, parent=None, depth=0, origin="root")])
        self.notes = [_Notes(len(self.prompt_ids))]
        """By node id."""
        self.stats = dict.fromkeys(STATS, 0)

    async def run(self) -> Tree:
        if len(self.prompt_ids) >= self.tools.engine.max_model_len:
            self.tree.stats = {**self.stats, "prompt_too_long": 1}
            return self.tree
        for _ in range(self.cfg.num_iterations):
            leaf = select_leaf(self.tree, self.cfg.c_puct)
            if not leaf.terminal and leaf.depth < self.cfg.max_depth:
                await self._expand(leaf)
            backup(self.tree, leaf)
        self.tree.stats = dict(self.stats)
        return self.tree

    async def _expand(self, leaf: Node) -> None:
        """Sample k next steps and evaluate those that are new."""
        stop = (self.tools.style.step_delimiter, *self.tools.style.stop)
        numbers = range(self.cfg.num_expansions)
        # Built once and handed down: k + k * M requests start from here.
        context, solution = self._context(leaf), self._solution(leaf)
        samples = await all_of(self._sample(leaf, context, "step", i, self.cfg.max_step_tokens, stop) for i in numbers)
        children: dict[int, Node] = {}
        for sample in samples:
            step = next(iter(self.tools.cutter.cut(sample)), _EMPTY_STEP)
            child = self._child(leaf, step, "expansion", solution)
            children[child.id] = child
        fresh = list(children.values())
        rollouts_of = await all_of(self._evaluate(node, context, solution) for node in fresh)
        # In the order of nodes and numbers, whatever came in first.
        for node, rollouts in zip(fresh, rollouts_of, strict=True):
            for rollout in rollouts:
                self._add_return(node, rollout.verdict)
        if self.cfg.keep_rollouts:
            for node, rollouts in zip(fresh, rollouts_of, strict=True):
                for rollout in rollouts:
                    self._grow(node, rollout, solution + node.step)
        self._renew_priors(leaf)

    async def _evaluate(self, node: Node, parent_context: tuple[int, ...], parent_solution: str) -> list[_Rollout]:
        """Settle a terminal by its verdict; else draw the rollouts that its M lacks."""
        solution = parent_solution + node.step
        if node.terminal:
            if node.outcome is None:
                self._settle(node, await self._verify(solution))
            return []
        context = parent_context + node.token_ids
        missing = range(len(self.notes[node.id].returns), self.cfg.num_rollouts)
        return await all_of(self._roll_out(node, context, solution, number) for number in missing)

    async def _roll_out(self, node: Node, context: tuple[int, ...], solution: str, number: int) -> _Rollout:
        """Let the model go on from `node` to the end, and judge where that leads."""
        sample = await self._sample(
            node, context, "rollout", number, self.cfg.max_rollout_tokens, self.tools.style.stop
        )
        self.stats["rollouts"] += 1
        self.stats["rollout_tokens"] += len(sample.token_ids)
        steps = self.tools.cutter.cut(sample)
        answered = until_answered(steps, self.tools.style, solution)
        if answered is None:
            return _Rollout(steps, _NO_ANSWER)
        return _Rollout(steps[: answered[0]], await self._verify(answered[1]))

    async def _sample(
        self, node: Node, context: tuple[int, ...], kind: str, number: int, max_tokens: int, stop: tuple[str, ...]
    ) -> Sample:
        room = self.tools.engine.max_model_len - len(context)
        seed = derive_seed(self.tools.seed, "search", self.problem.id, node.id, kind, number)
        sample = await self.tools.engine.generate(
            SampleRequest(context, min(max_tokens, room), self.cfg.temperature, self.cfg.top_p, seed, stop)
        )
        self.stats["requests"] += 1
        self.stats["generated_tokens"] += len(sample.token_ids)
        return sample

    async def _verify(self, solution: str) -> Verdict:
        verdict = await self.tools.verifier.averify(self.problem, solution)
        self.stats["unknown_verdicts"] += verdict.outcome == "unknown"
        return verdict

    # --- what changes the tree; no waiting in here ------------------------------------------------------------

    def _child(self, parent: Node, step: Step, origin: str, solution: str) -> Node:
        """The child of `parent` by `step`: a new one, or the one of equal text with the step's mass added.

        Args:
            solution: the text down to `parent`.
        """
        node = None
        if self.cfg.merge_identical_steps:
            node = next((n for n in self.tree.children(parent) if n.step == step.text), None)
        if node is None:
            node = Node(len(self.tree.nodes), parent.id, parent.depth + 1, step.text, step.token_ids, step.logprob)
            node.origin = origin
            self.tree.nodes.append(node)
            self.notes.append(_Notes(self.notes[parent.id].length + len(step.token_ids)))
            parent.children.append(node.id)
            self._classify(node, solution + step.text, step.delimited)
        else:
            self.stats["merged_steps"] += origin == "expansion" and node.origin == "expansion"
            if origin == "expansion":
                node.origin = origin
        uniform = self.cfg.prior == "uniform"
        self.notes[node.id].mass += 1.0 if uniform else step_mass(step.logprob, len(step.token_ids))
        return node

    def _classify(self, node: Node, solution: str, delimited: bool) -> None:
        """Mark a new node that ends its path; an answered one awaits its verdict."""
        if _is_answered(solution, self.tools.style):
            node.terminal = True
        elif not delimited or not node.step.strip() or self.notes[node.id].length >= self.tools.engine.max_model_len:
            self._settle(node, _NO_ANSWER)

    def _settle(self, node: Node, verdict: Verdict) -> None:
        node.terminal, node.outcome, node.answer = True, verdict.outcome, verdict.answer
        node.reward = node.q = float(verdict.outcome == "right")

    def _add_return(self, node: Node, verdict: Verdict) -> None:
        """Count one more rollout from or through a node that has not been visited yet."""
        returns = self.notes[node.id].returns
        returns.append(float(verdict.outcome == "right"))
        node.reward = node.q = sum(returns) / len(returns)

    def _grow(self, start: Node, rollout: _Rollout, solution: str) -> None:
        """Add a rollout's steps below `start` as a path, as far as the depth limit or the path's first end.

        Args:
            solution: the text down to `start`.
        """
        node = start
        for step in rollout.steps:
            if node.depth >= self.cfg.max_depth:
                return
            parent, node = node, self._child(node, step, "rollout", solution)
            solution += step.text
            self._renew_priors(parent)
            if node.terminal:
                if node.outcome is None:
                    self._settle(node, rollout.verdict)
                return
            self._add_return(node, rollout.verdict)

    def _renew_priors(self, parent: Node) -> None:
        set_priors(self.tree.children(parent), [self.notes[child].mass for child in parent.children])

    def _context(self, node: Node) -> tuple[int, ...]:
        return self.prompt_ids + tuple(token for step in self.tree.path(node) for token in step.token_ids)

    def _solution(self, node: Node) -> str:
        return "".join(step.step for step in self.tree.path(node))


def until_answered(steps: Sequence[Step], style: PromptStyle, solution: str = "") -> tuple[int, str] | None:
    """How many steps it takes to the first complete final answer, and the text with them; None without an answer.

    Args:
        steps: they continue `solution`.
    """
    for count, step in enumerate(steps, 1):
        solution += step.text
        if _is_answered(solution, style):
            return count, solution
    return None


def _is_answered(solution: str, style: PromptStyle) -> bool:
    return style.answer_marker in solution and style.is_terminal(solution)


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first error cancels the rest, so nothing goes on behind a failed tree's back."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]
