"""The only reader of environment variables.

`QUIRE_<OPTION>` sets an option of quire.config (checked there, with a suggestion for a misspelt
name); what is read here is everything else. Libraries read their own variables (HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE are huggingface_hub's).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "QUIRE_"


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    `options`: QUIRE_* variables by lower-case option name. `api_key`: QUIRE_API_KEY, kept apart
    so that it never shows in printed options. `no_color`: NO_COLOR is set.
    """

    options: dict[str, str]
    api_key: str | None
    no_color: bool
    offline: bool


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Read the environment once."""
    options = {
        name[len(PREFIX) :].lower(): value
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and name != "QUIRE_API_KEY"
    }
    return Settings(
        options=options,
        api_key=os.environ.get("QUIRE_API_KEY"),
        no_color=bool(os.environ.get("NO_COLOR")),
        offline=os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
    )


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a child process: ours and `extra`."""
    return {**os.environ, **extra}
