"""How a command ends: exit codes, and errors told to people or programs."""

from __future__ import annotations

import json
import sys
import traceback

from quire.cli.flags import CommandLineError
from quire.errors import QuireError

# Documented in docs/cli.md.
EXIT_ERROR = 1
EXIT_COMMAND_LINE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE


def report(error: BaseException, as_json: bool, debug: bool) -> int:
    """Tell `error` on stderr; returns the exit code. A trace shows for our bugs, or on debug."""
    code = exit_code(error)
    if code == EXIT_PIPE:
        return code  # nobody reads
    known = isinstance(error, QuireError | KeyboardInterrupt)
    trace = "" if known and not debug else "".join(traceback.format_exception(error))
    if as_json:
        parts = _parts(error) | ({"trace": trace} if trace else {})
        print(json.dumps({"error": parts}), file=sys.stderr)
        return code
    if isinstance(error, QuireError):
        if trace:
            print(trace, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
    elif known:
        print(f"{trace}\ninterrupted", file=sys.stderr)
    else:
        print("error: quire failed in a way it should not: this is our bug", file=sys.stderr)
        print("  fix: report it, with the command and this trace\n", file=sys.stderr)
        print(trace, end="", file=sys.stderr)
    return code


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an exception."""
    if isinstance(error, CommandLineError):
        return EXIT_COMMAND_LINE
    if isinstance(error, QuireError):
        return EXIT_ERROR
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_PIPE if isinstance(error, BrokenPipeError) else EXIT_BUG


def _parts(error: BaseException) -> dict[str, str | None]:
    if isinstance(error, QuireError):
        return {
            "code": error.code,
            "what": error.what,
            "why": error.why,
            "fix": error.fix,
            "field": error.field,
        }
    if isinstance(error, KeyboardInterrupt):
        return {"code": "interrupted", "what": "interrupted"}
    what = f"{type(error).__name__}: {error}"
    return {"code": "internal_error", "what": what, "fix": "report it with this trace"}
