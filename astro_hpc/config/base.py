"""What every section of a configuration shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: unknown keys fail, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ConfigError(ValueError):
    """The user's input is unusable. The message is one line: what is wrong, where, how to mend it.

    The command line prints it without a traceback and exits with 2.
    """
