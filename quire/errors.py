"""Errors for people: what happened, why, and what to do about it."""

from __future__ import annotations


class QuireError(Exception):
    """An error with a stable code, for a person or a client program to act on.

    `code` is a stable snake_case word (documented in docs/errors.md), `what` one sentence,
    `why` the cause where it is known, `fix` what to do. `field` names the request field or
    option at fault, `status` is the HTTP status the server answers with.
    """

    status = 500

    def __init__(
        self, code: str, what: str, why: str = "", fix: str = "", field: str | None = None
    ):
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix
        self.field = field

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.what, self.why, self.fix, self.field))


class UsageError(QuireError, ValueError):
    """What a user or client asked for cannot be done as asked."""

    status = 400


class ModelError(QuireError):
    """A model's files are missing, corrupt, contradictory or of an unknown kind."""


class PlanError(QuireError):
    """The model cannot run on this machine with these options; known before loading."""


class Overloaded(QuireError):
    """The queue is full: ask again later."""

    status = 503


class EngineDead(QuireError):
    """The engine process has ended; the cause it reported travels in `why`."""

    status = 503


def suggest(word: str, known: list[str]) -> str:
    """A ` Did you mean ...?` sentence for a misspelt word, or nothing."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
