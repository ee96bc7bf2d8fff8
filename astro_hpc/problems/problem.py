"""A math problem with a checkable answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: stable across runs and machines: `SOURCE/` and the first 16 hex digits of the text's sha256.
        text: what the model is asked.
        answer: the gold answer, or what the checker needs of one.
        checker: who decides: `math` (verifier), `signs` or `reasoning_gym` (the family's own).
        metadata: JSON-able extras (level, subject, the generator's entry).
    """

    id: str
    text: str
    answer: str
    checker: str = "math"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def make_id(source: str, text: str) -> str:
        """The id of a problem of `source` with this `text`."""
        return f"{source}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` undoes it."""
        return {
            "id": self.id,
            "text": self.text,
            "answer": self.answer,
            "checker": self.checker,
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Problem:
        """Undoes `to_json`."""
        return cls(row["id"], row["text"], row["answer"], row["checker"], dict(row["metadata"]))
