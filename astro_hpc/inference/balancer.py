"""Which replica takes a request, and when a failed one is tried again: pure, without clocks or sockets."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

_AFFINITY_REQUESTS = 4
_AFFINITY_SHARE = 0.25


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter.

    Attributes:
        max_attempts: a request that has failed this often is given up.
        first_delay: seconds, the longest wait after the first failure; doubles with each further one.
        longest_delay: seconds.
    """

    max_attempts: int = 10
    first_delay: float = 0.25
    longest_delay: float = 30.0

    def delay(self, failures: int, draw: random.Random) -> float:
        """Seconds to wait after the `failures`-th failure in a row: between half and all of the doubled delay."""
        longest = min(self.longest_delay, self.first_delay * 2.0 ** min(failures - 1, 60))
        return longest * (0.5 + 0.5 * draw.random())


@dataclass
class Load:
    """What one replica is at.

    Attributes:
        requests: in flight.
        tokens: their prompts' and longest outputs' together.
    """

    requests: int = 0
    tokens: int = 0
    prefixes: PrefixMemory = field(default_factory=lambda: PrefixMemory())


class PrefixMemory:
    """Which prompt prefixes a replica has seen lately, in whole blocks, as its prefix cache does."""

    def __init__(self, block_size: int = 32, max_blocks: int = 100_000) -> None:
        self._block_size, self._max_blocks = block_size, max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def hashes(self, tokens: Sequence[int]) -> Iterator[int]:
        """One number for each whole block, made of it and all before it."""
        size, chained = self._block_size, 0
        for first in range(0, len(tokens) - size + 1, size):
            chained = hash((chained, tuple(tokens[first : first + size])))
            yield chained

    def match(self, hashes: Sequence[int]) -> int:
        """How many leading blocks are known."""
        for count, block in enumerate(hashes):
            if block not in self._blocks:
                return count
        return len(hashes)

    def add(self, hashes: Sequence[int]) -> None:
        """Remember the blocks, and forget the least recently used ones beyond the limit."""
        for block in hashes:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """The replica has lost its cache."""
        self._blocks.clear()


class Balancer:
    """Least load first, but a prompt goes where its prefix is cached as long as that replica is not overloaded.

    A tree's requests share long prefixes: spread blindly over R replicas, each prefix would be computed R times.
    """

    def __init__(self, replicas: Sequence[str], capacity: int, block_size: int = 32) -> None:
        """Start with idle replicas.

        Args:
            capacity: requests that one replica is given at once; the others wait here, where they can still go to
                whichever is free first.
        """
        self.loads = {name: Load(prefixes=PrefixMemory(block_size)) for name in replicas}
        self.capacity = capacity

    def pick(
        self, prompt: Sequence[int], cost: int, usable: Collection[str], avoid: Collection[str] = ()
    ) -> str | None:
        """The replica for a request, or None while no usable one has room.

        Args:
            cost: tokens that the request may take: its prompt and longest output.
            avoid: taken only where nothing else is usable: those that the request failed on.
        """
        room = [name for name in usable if self.loads[name].requests < self.capacity]
        candidates = [name for name in room if name not in avoid] or room
        if not candidates:
            return None
        tokens = {name: self.loads[name].tokens for name in candidates}
        least, mean = min(tokens.values()), sum(tokens.values()) / len(tokens)
        limit = least + max(_AFFINITY_REQUESTS * cost, _AFFINITY_SHARE * mean)
        hashes = list(self.loads[candidates[0]].prefixes.hashes(prompt))
        return min(
            (name for name in candidates if tokens[name] <= limit),
            key=lambda name: (-self.loads[name].prefixes.match(hashes), tokens[name], self.loads[name].requests, name),
        )

    def start(self, replica: str, prompt: Sequence[int], cost: int) -> None:
        """A request has been given to `replica`."""
        load = self.loads[replica]
        load.requests += 1
        load.tokens += cost
        load.prefixes.add(list(load.prefixes.hashes(prompt)))

    def finish(self, replica: str, cost: int) -> None:
        """A request that was given to `replica` has ended, one way or another."""
        load = self.loads[replica]
        load.requests -= 1
        load.tokens -= cost

    def forget(self, replica: str) -> None:
        """The replica has been restarted, or its prefix cache cleared."""
        self.loads[replica].prefixes.clear()
