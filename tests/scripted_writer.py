"""Scripts for an engine that plays a verbalising model: a faithful one, and one that tries everything else too."""

from __future__ import annotations

import random

NASTY = (
    "",
    "\\boxed{7}",
    "The final answer is 7.",
    "Let's go back to the start.",
    "But wait, are we solving the problem correctly so far? Hmm...",
    "Notes on the next step: 7",
    "12345678",
    "x" * 3000,
    "{" * 500,
    "\\boxed{" * 200,
    "\x1b[31m\x00",
    "Our solution seems to be correct so far.",
    "<|im_end|>",
)


def faithful(context: str, rng: random.Random) -> str:
    """A rewritten step, or the end of a backtrack's sentence."""
    if context.endswith("where we"):
        return " " + rng.choice(["wrote this down.", "had come so far."])
    if context.endswith("from the beginning"):
        return rng.choice([".", " and read the problem again."])
    notes = context.rpartition("Notes on the next step: ")[2].removesuffix("\nThe next step in full:")
    return f" {rng.choice(['So we take', 'Next comes', 'We see that'])} {notes}.\n"


def hostile(context: str, rng: random.Random) -> str:
    """Faithful at times; else it adds to, cuts or replaces what it should say."""
    good = faithful(context, rng).rstrip("\n")
    nasty = rng.choice(NASTY)
    return rng.choice([good, f"{good} {nasty}", nasty, f"{nasty} {good}", good[: len(good) // 2]]) + "\n"
