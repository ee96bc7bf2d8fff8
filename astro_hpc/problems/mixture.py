"""Drawing problems: a few of one source, or proportions of several. A draw has a name and repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

from astro_hpc.problems.problem import Problem
from astro_hpc.run.seeds import derive_seed


def draw(problems: Sequence[Problem], count: int, seed: int, *names: str | int) -> list[Problem]:
    """`count` of the problems, in their order.

    A problem's rank depends on the seed, the draw's name and its own id alone: a larger draw holds the smaller one,
    and problems that come or go move no other's rank.
    """
    if count >= len(problems):
        return list(problems)
    ranked = sorted(range(len(problems)), key=lambda index: derive_seed(seed, *names, problems[index].id))
    return [problems[index] for index in sorted(ranked[:count])]


def shares(sizes: Sequence[int], weights: Sequence[float], size: int | None = None) -> list[int]:
    """How many problems each source gives to a mixture.

    Args:
        sizes: problems that each source has.
        weights: the proportions wanted, each above 0.
        size: problems in all; None: as many as keep the proportions, so that no source is short.

    Returns:
        Counts that add up to `size`, or to all there are when that is less. A source with fewer problems than its
        share gives all, and what is missing goes to the others in proportion to their weights.
    """
    if size is None:
        size = int(min(n / weight for n, weight in zip(sizes, weights, strict=True)) * sum(weights) + 1e-9)
    counts = [0] * len(sizes)
    open_sources = list(range(len(sizes)))
    left = min(size, sum(sizes))
    while open_sources:
        wanted = apportion(left, [weights[index] for index in open_sources])
        short = [index for index, share in zip(open_sources, wanted, strict=True) if sizes[index] < share]
        if not short:
            for index, share in zip(open_sources, wanted, strict=True):
                counts[index] = share
            break
        for index in short:
            counts[index] = sizes[index]
            left -= sizes[index]
            open_sources.remove(index)
    return counts


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion; the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
