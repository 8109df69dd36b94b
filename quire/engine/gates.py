"""Requests whose next token depends on what the host makes of those before it: a grammar, say.

A row of such a request is gated: its forward pass is launched like any other, and its sampling
waits for a mask of the tokens that may come next, which takes the token before it to be known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from quire.engine.request import Request, State
from quire.errors import QuireError
from quire.step import Row, mask_bytes


class Gate(Protocol):
    """Says which tokens may come next."""

    def allowed(self, output: list[int]) -> bytes:
        """A mask (quire/step.py) of the tokens that may follow the request's `output`, which is
        not to be changed. What it raises fails the request, and no other. It is asked for every
        token once, and again after a step that was lost; all choices of a request may share it."""


class Gates:
    """The gated rows of steps in flight whose masks have not been asked for."""

    def __init__(self, vocab_size: int):
        self._mask_bytes = mask_bytes(vocab_size)
        self._held: dict[int, list[tuple[int, Request, Row]]] = {}

    def hold(self, step: int, parts: Iterable[tuple[Request, Row]]) -> None:
        """A step is scheduled."""
        gated = [(i, request, row) for i, (request, row) in enumerate(parts) if row.gated]
        if gated:
            self._held[step] = gated

    def holds(self, step: int) -> bool:
        """Whether a step has gated rows whose masks are still to come."""
        return step in self._held

    def drop(self, step: int) -> None:
        """A step will not sample, or has done so."""
        self._held.pop(step, None)

    def open(self, step: int) -> tuple[dict[int, bytes], list[tuple[Request, QuireError]]] | None:
        """Masks of a step's gated rows by their index, and the requests whose gate failed; both
        leave out what has finished. None while a token before one of them is not known."""
        live = [part for part in self._held.get(step, ()) if part[1].state is not State.FINISHED]
        if any(len(request.tokens) < row.start + len(row.tokens) for _, request, row in live):
            return None
        self.drop(step)
        masks: dict[int, bytes] = {}
        failed: list[tuple[Request, QuireError]] = []
        for i, request, _ in live:
            try:
                masks[i] = self._mask(request)
            except Exception as error:  # of one request: it must not end the others
                why = f"{type(error).__name__}: {error}"
                what = "what limits the tokens of this request failed"
                failed.append((request, QuireError("gate_failed", what, why=why)))
        return masks, failed

    def _mask(self, request: Request) -> bytes:
        assert request.gate is not None
        mask = request.gate.allowed(request.tokens[request.num_prompt :])
        if len(mask) != self._mask_bytes:
            raise ValueError(f"a mask of {len(mask)} bytes, where {self._mask_bytes} are needed")
        return mask
