"""Prompts that have a language model write traces or judge solutions: data files, and how they become text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from astro_hpc.config.base import ConfigError, Section

_FIELD = re.compile(r"\{(problem|context|step|solution)\}")
_LABEL = re.compile(r"^([^{}\n:]+:)", re.MULTILINE)


class Shot(Section):
    """A worked example."""

    problem: str
    context: str
    step: str
    output: str
    """What follows the prefix."""


class Task(Section):
    """One kind of piece that the model is asked for."""

    instruction: str
    question: str
    """With the fields {problem}, {context} and {step}; the answer follows it."""
    prefix: str = ""
    """The answer begins with this; the model writes on from it."""
    examples: list[Shot] = Field(default_factory=list)


class VerbalizePrompts(Section):
    """The prompts of a language-model verbaliser; see prompts/verbalize.yaml."""

    layout: Literal["auto", "chat", "raw"] = "auto"
    nothing_yet: str
    max_growth: float = Field(gt=0)
    spare_chars: int = Field(ge=0)
    never: list[str] = Field(default_factory=list)
    step: Task
    backtrack: Task
    restart: Task

    @classmethod
    def load(cls, name_or_path: str) -> VerbalizePrompts:
        """Read a shipped set by name, or a YAML file by path (ending in .yaml).

        Raises:
            ConfigError: there is no such set, or its file is malformed.
        """
        if name_or_path.endswith((".yaml", ".yml")):
            path = Path(name_or_path)
            if not path.is_file():
                raise ConfigError(f"clone.verbalizer_prompts: there is no file {name_or_path}; check the path")
            text = path.read_text(encoding="utf-8")
        else:
            try:
                text = read_prompt_file(name_or_path)
            except FileNotFoundError:
                raise ConfigError(
                    f"clone.verbalizer_prompts: no set {name_or_path!r}; name verbalize, or a path ending in .yaml"
                ) from None
        try:
            raw = yaml.safe_load(text)
            return cls(**(raw if isinstance(raw, dict) else {}))
        except yaml.YAMLError as error:
            raise ConfigError(f"{name_or_path}: not YAML ({str(error).splitlines()[0]}); mend the file") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"prompts {name_or_path}: {key}: {first['msg']}; mend the file") from None

    def tasks(self) -> tuple[Task, Task, Task]:
        """All three."""
        return self.step, self.backtrack, self.restart

    def leaks(self) -> tuple[str, ...]:
        """What must not come back, in lower case: the labels of the questions and `never`."""
        labels = [label for task in self.tasks() for label in _LABEL.findall(task.question)]
        return tuple(dict.fromkeys(" ".join(text.lower().split()) for text in [*labels, *self.never]))

    def texts(self) -> list[str]:
        """The texts of which no run of words must come back."""
        texts = [task.instruction for task in self.tasks()]
        return texts + [text for task in self.tasks() for s in task.examples for text in (s.problem, s.context)]


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with its {fields} filled in, once: what is filled in is not looked at again."""
    return _FIELD.sub(lambda match: values.get(match.group(1), match.group()), template)


def encode_task(task: Task, values: Mapping[str, str], tokenizer: Any, layout: str = "auto") -> tuple[int, ...]:
    """The tokens of a prompt: instruction, worked examples, question, prefix.

    As turns of a chat where the tokenizer has a chat template (or `layout` is "chat"), else as running text.
    Special tokens that the filled-in texts spell out are broken up by a space.
    """
    values = {name: _harmless(text, tokenizer) for name, text in values.items()}
    turns = [(fill(task.question, vars(shot)), task.prefix + _glue(task, shot.output)) for shot in task.examples]
    question = fill(task.question, values)
    template = getattr(tokenizer, "chat_template", None)
    if layout == "chat" or (layout == "auto" and template):
        if not template:
            raise ConfigError(
                "the verbaliser's prompts ask for a chat, but its tokenizer has no chat template; use raw"
            )
        messages = []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        messages[0]["content"] = f"{task.instruction}\n\n{messages[0]['content']}"
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + task.prefix
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    parts = [task.instruction, *(f"{asked} {answered}" for asked, answered in turns)]
    text = "\n\n".join([*parts, f"{question} {task.prefix}".rstrip()])
    return tuple(tokenizer.encode(text, add_special_tokens=True))


def special_tokens(tokenizer: Any) -> list[str]:
    """All special tokens of a Hugging Face tokenizer, spelled out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = getattr(tokenizer, "all_special_tokens", ())
    tokens = dict.fromkeys([*named, *(token.content for token in added if token.special)])
    return [token for token in tokens if token.strip()]


def read_prompt_file(name: str) -> str:
    """The text of a shipped file, without its ending.

    Raises:
        FileNotFoundError: it isn't shipped.
    """
    return resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _glue(task: Task, output: str) -> str:
    """A space between prefix and output where words meet."""
    return f" {output}" if task.prefix and output[:1].isalnum() else output


def _harmless(text: str, tokenizer: Any) -> str:
    for token in special_tokens(tokenizer):
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
