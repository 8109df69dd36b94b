"""Plain decoding: a step computes the one token that a request sampled last, and samples the next.

Most rows of most steps are these, so they go to the runner and back in columns, and their ledgers
are moved by loops that do nothing else: a step of 256 rows has a few hundred microseconds of the
engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quire.engine.request import Request
from quire.engine.wire import Delta
from quire.step import DEVICE_TOKEN, Decoding, Row

# Stands for every plain decoding row where a Row is asked for. The slot, and where the row starts,
# are the request's own business.
PLAIN = Row(-1, 0, [DEVICE_TOKEN], [], sample=True)


@dataclass(slots=True)
class Flight:
    """A step's requests in the order of their rows: those that decode plainly, and the others with
    their rows."""

    decoding: list[Request] = field(default_factory=list)
    parts: list[tuple[Request, Row]] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Request, Row]]:
        """Of both kinds."""
        for request in self.decoding:
            yield request, PLAIN
        yield from self.parts


def may_decode(request: Request) -> None:
    """The request's row samples: from now on the device knows the token that the next one starts
    with, so that can be a plain one, up to the request's end and that of its blocks. Only where all
    that is promised but this token is scheduled."""
    request.plain_until = min(request.longest - 1, request.covered)


def take_plain(
    running: list[Request], flight: Flight, grow: Callable[[Request], list[list[int]]]
) -> tuple[Decoding, list[Request]]:
    """Rows of the requests that decode plainly, and the others with a gap. `grow` gives blocks to
    a request that needs them for its row, and returns the new ones."""
    slots, starts = list[int](), list[int]()
    new_blocks: dict[int, list[list[int]]] = {}
    decoding, others = flight.decoding, list[Request]()
    for request in running:
        promised = request.promised
        if promised > request.plain_until:
            if not request.gap:
                continue
            if not request.plain_until:
                others.append(request)
                continue
            new_blocks[len(slots)] = grow(request)
            may_decode(request)
        slots.append(request.slot)
        starts.append(promised - 1)
        decoding.append(request)
        request.scheduled = promised
        request.promised = promised + 1
        request.inflight_steps += 1
    return Decoding(slots, starts, new_blocks), others


def commit_tokens(
    flight: Flight, tokens: list[int], commit: Callable[[Request, Row, int], Delta | None]
) -> list[Delta]:
    """Take the one token that each row gave, each of one token. `commit` takes it where there is
    more to do than to append it. Every delta has one token."""
    deltas = []
    requests, rows = flight.decoding, [PLAIN] * len(flight.decoding)
    if flight.parts:
        requests = requests + [request for request, _ in flight.parts]
        rows += [row for _, row in flight.parts]
    for request, row, token in zip(requests, rows, tokens, strict=True):
        request.inflight_steps -= 1
        computed = request.computed + 1
        if computed < request.quiet_until and token not in request.end_tokens:
            request.computed = computed
            request.tokens.append(token)
            deltas.append(Delta(request.request_id, [token]))
        elif delta := commit(request, row, token):
            deltas.append(delta)
    return deltas
