"""Numbers about many trees, gathered one tree at a time."""

from __future__ import annotations

from collections import Counter

from astro_hpc.search.mcts import STATS
from astro_hpc.search.puct import is_expanded
from astro_hpc.search.tree import Tree


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
        totals["depths"] += max(node.depth for node in tree.nodes)
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
            "mean_branching": round(totals["branches"] / expanded, 2),
            "prompts_too_long": totals["prompts_too_long"],
            "tokens": totals["generated_tokens"],
            "tokens_per_tree": round(totals["generated_tokens"] / trees, 1),
            **{name: totals[name] for name in STATS if name != "generated_tokens"},
        }
