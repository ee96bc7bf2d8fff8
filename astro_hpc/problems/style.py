"""Prompt styles: how a problem becomes the text that a model continues. A style is a YAML file, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from astro_hpc.config.base import ConfigError, Section
from astro_hpc.problems.final_answer import last_marked

_FOLDER = Path(__file__).parent / "styles"
_PROBLEM, _SOLUTION, _EXAMPLES = "{problem}", "{solution}", "{examples}"


class Example(Section):
    """A worked example of a few-shot style."""

    problem: str
    solution: str


class PromptStyle(Section):
    r"""How prompts look and how a completion is cut into steps.

    The texts hold special tokens spelled out: tokenise with `add_special_tokens=False`. A problem's own text can't
    smuggle in special tokens: they are broken up by a space.
    """

    description: str = ""
    prompt: str
    """The whole prompt, with `{problem}` where the problem goes and `{examples}` where the examples go, if any."""
    step_delimiter: Annotated[str, Field(min_length=1)]
    """Ends each step; belongs to the step it ends."""
    answer_marker: Annotated[str, Field(min_length=1)] = "\\boxed{"
    r"""Precedes the final answer. Ending in `{` it encloses the answer up to the matching brace, else the line does."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides the end-of-sequence token."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that a problem's text must not contain as such."""
    examples: list[Example] = Field(default_factory=list)
    example: str = ""
    """One example of `{examples}`, with `{problem}` and `{solution}`."""

    _before: str = PrivateAttr("")
    _after: str = PrivateAttr("")

    @model_validator(mode="after")
    def _split_prompt(self) -> Self:
        if self.prompt.count(_PROBLEM) != 1:
            raise ValueError("prompt must hold {problem} exactly once")
        if bool(self.examples) != (_EXAMPLES in self.prompt):
            raise ValueError("prompt must hold {examples} if and only if examples are given")
        if self.examples and not (_PROBLEM in self.example and _SOLUTION in self.example):
            raise ValueError("example must hold {problem} and {solution}")
        before, after = self.prompt.split(_PROBLEM)
        shown = "".join(
            self.example.replace(_PROBLEM, e.problem, 1).replace(_SOLUTION, e.solution, 1) for e in self.examples
        )
        self._before, self._after = before.replace(_EXAMPLES, shown, 1), after.replace(_EXAMPLES, shown, 1)
        return self

    @classmethod
    def load(cls, name_or_path: str) -> PromptStyle:
        """The style of that name (a file in astro_hpc/problems/styles) or at that path (ending in .yaml).

        Raises:
            ConfigError: there is none, or the file is no style.
        """
        path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else _FOLDER / f"{name_or_path}.yaml"
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError:
            known = ", ".join(cls.names())
            raise ConfigError(
                f"model.prompt_style: no style {name_or_path!r}; name one of {known}, or a path ending in .yaml"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); mend the file") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping with prompt, step_delimiter, ...")
        try:
            return cls(**data)
        except (ValidationError, TypeError) as error:
            raise ConfigError(f"{path}: {_first_problem(error)}; mend the style") from None

    @staticmethod
    def names() -> list[str]:
        """The styles that come with the package."""
        return sorted(path.stem for path in _FOLDER.glob("*.yaml"))

    def render(self, problem_text: str) -> str:
        """The whole prompt for a problem."""
        for token in self.special_tokens:
            problem_text = problem_text.replace(token, f"{token[:1]} {token[1:]}")
        return f"{self._before}{problem_text}{self._after}"

    def is_terminal(self, step_text: str) -> bool:
        """Whether a step holds a complete final answer."""
        return bool(last_marked(step_text, (self.answer_marker,)))


def _first_problem(error: ValidationError | TypeError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'style'}: {first['msg'].removeprefix('Value error, ')}"
    return str(error)
