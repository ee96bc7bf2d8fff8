"""Every random draw has a name: seeds are derived from the run's seed and what is drawn."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the draw called `names`, independent of every other name's.

    Strings and integers are told apart, so ("1",) and (1,) differ.
    """
    text = "\0".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
