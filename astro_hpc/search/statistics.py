"""Numbers about many trees and what they took, gathered one tree and one attempt at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from astro_hpc.search.puct import is_expanded
from astro_hpc.search.tree import STATS, Tree


class SearchStatistics:
    """Running totals over finished trees; holds none of them."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()

    def add(self, tree: Tree) -> None:
        """Count one tree."""
        totals = self._totals
        totals["trees"] += 1
        totals["solved"] += tree.solved
        totals["nodes"] += len(tree.nodes)
        totals["prompts_too_long"] += int(tree.stats.get("prompt_too_long", 0))
        deepest = max(node.depth for node in tree.nodes)
        totals["depths"] += deepest
        totals["max_depth"] = max(totals["max_depth"], deepest)
        for node in tree.nodes:
            if node.terminal:
                totals[f"terminals_{node.outcome}"] += 1
            elif is_expanded(tree, node):
                totals["expanded"] += 1
                totals["branches"] += len(node.children)
        for name in STATS:
            totals[name] += int(tree.stats.get(name, 0))

    @property
    def trees(self) -> int:
        """Trees counted so far."""
        return self._totals["trees"]

    @property
    def solved(self) -> int:
        """Those with a right terminal: the paper's valid trees."""
        return self._totals["solved"]

    def to_json(self) -> dict[str, int | float]:
        """For the manifest; `tokens` are generated ones, `mean_depth` is over the trees' deepest nodes."""
        totals = self._totals
        trees, expanded = max(totals["trees"], 1), max(totals["expanded"], 1)
        return {
            "trees": totals["trees"],
            "valid_trees": totals["solved"],
            "valid_share": round(totals["solved"] / trees, 4),
            "nodes": totals["nodes"],
            "terminals_right": totals["terminals_right"],
            "terminals_wrong": totals["terminals_wrong"],
            "terminals_unknown": totals["terminals_unknown"],
            "mean_depth": round(totals["depths"] / trees, 2),
            "max_depth": totals["max_depth"],
            "mean_branching": round(totals["branches"] / expanded, 2),
            "prompts_too_long": totals["prompts_too_long"],
            "tokens": totals["generated_tokens"],
            "tokens_per_tree": round(totals["generated_tokens"] / trees, 1),
            **{name: totals[name] for name in STATS if name != "generated_tokens"},
        }


class SearchCost:
    """What the attempts at a search took: seconds, tokens, the prefix cache's share. Holds none of them.

    An attempt that was killed has left no account, and its trees don't count here either.
    """

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()

    def add(self, attempt: Mapping[str, float]) -> None:
        """Count one attempt: `trees`, `search_seconds` (wall clock), `engine_seconds` (engine computing),
        `cpu_seconds`, `gpu_seconds` (GPUs held x wall clock), `generated_tokens` (of dropped trees too),
        `prompt_tokens`, `cached_prompt_tokens`.
        """
        self._totals.update(attempt)

    def to_json(self) -> dict[str, float]:
        """For the manifest."""
        totals = self._totals
        seconds = {f"{kind}_seconds": totals[f"{kind}_seconds"] for kind in ("search", "engine", "cpu", "gpu")}
        per_tree = {f"{name}_per_tree": value / max(totals["trees"], 1) for name, value in seconds.items()}
        return {
            **{name: round(value, 3) for name, value in {**seconds, **per_tree}.items()},
            "tokens_per_second": round(totals["generated_tokens"] / max(totals["search_seconds"], 1e-9), 1),
            "prompt_tokens": totals["prompt_tokens"],
            "cache_hit_rate": round(totals["cached_prompt_tokens"] / max(totals["prompt_tokens"], 1), 4),
        }
