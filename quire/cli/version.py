"""`quire version`: of Quire, Python and torch, without importing torch."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import quire
from quire.cli.flags import Invocation, Parser


def add_flags(parser: Parser) -> None:
    """Nothing besides the general flags."""


def versions() -> dict[str, str]:
    """Versions by name; "not installed" where a package is missing."""
    found = {"quire": quire.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "tokenizers", "safetensors"):
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(invocation: Invocation) -> int:
    """Print the versions."""
    found = versions()
    if invocation.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name} {version}" for name, version in found.items()))
    return 0
