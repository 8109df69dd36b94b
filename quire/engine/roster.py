"""All requests of the engine: who waits, in which order, and who runs in which slot."""

from __future__ import annotations

import heapq
from bisect import insort

from quire.engine.request import Request, State
from quire.engine.sharing import Sharing
from quire.kv.manager import KVManager

# Finished requests leave the heap of waiting ones when it holds this many and as many as waiting.
LEAST_FINISHED = 64


def order_of(request: Request) -> tuple[int, int]:
    return request.order


class Roster:
    """The scheduler, and what builds its batches, change it.

    `requests` by their ids; of these `running` have a slot and blocks, by Request.order.
    `suspects`: one of them may have made a step raise. `leaving`: slots that the runner does not
    know to be free yet. `preemptions` so far.
    """

    def __init__(self, kv: KVManager, max_num_seqs: int):
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.suspects: set[Request] = set()
        self.leaving: list[int] = []
        self.preemptions = 0
        self.sharing = Sharing(kv)
        self._kv, self._max_num_seqs = kv, max_num_seqs
        # A heap. Requests that finished while they waited stay in it for a while.
        self.waiting: list[tuple[tuple[int, int], Request]] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def add(self, request: Request) -> None:
        """A new request waits."""
        self.requests[request.request_id] = request
        self.put_back([request])

    def next_waiting(self) -> Request | None:
        """Take the first of those that wait; `start` it, or `put_back`."""
        while self.waiting:
            request = heapq.heappop(self.waiting)[1]
            if request.state is not State.FINISHED:
                return request
        return None

    def put_back(self, requests: list[Request]) -> None:
        """They wait, each in its place."""
        for request in requests:
            heapq.heappush(self.waiting, (request.order, request))

    def start(self, request: Request, hit: int, start: int) -> None:
        """A request that was taken out runs: KV of its first `hit` tokens is there, and it computes
        from `start` on."""
        request.state = State.RUNNING
        request.slot = self._free_slots.pop()
        request.computed = request.scheduled = start
        request.settle_at = request.covered = request.plain_until = 0
        insort(self.running, request, key=order_of)
        self.sharing.announce(request, hit)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and slot; it will be recomputed, its tokens stay."""
        self.preemptions += 1
        self._kv.free(request.request_id)
        self.release(request)
        request.state = State.WAITING
        request.computed = request.scheduled = 0
        request.visit = None
        self.put_back([request])

    def release(self, request: Request) -> None:
        """Take the slot of a running request, which has given back its blocks."""
        self.sharing.withdraw(request)
        request.quiet_until = 0
        self.running.remove(request)
        self.leaving.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def remove(self, request: Request) -> None:
        """A request without a slot has ended."""
        request.state = State.FINISHED
        request.computed = request.scheduled = 0
        self.suspects.discard(request)
        del self.requests[request.request_id]
        if len(self.waiting) > 2 * self.num_waiting + LEAST_FINISHED:
            self.waiting = [each for each in self.waiting if each[1].state is State.WAITING]
            heapq.heapify(self.waiting)

    def take_leaving(self) -> list[int]:
        """Slots that the runner is to be told of now."""
        leaving, self.leaving = self.leaving, []
        return leaving

    def check_slots(self) -> None:
        """A part of `check_integrity` that takes no time."""
        assert len(self.running) + len(self._free_slots) == self._max_num_seqs

    def check_integrity(self) -> None:
        """Raise AssertionError where requests and slots contradict each other."""
        slots = [r.slot for r in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs))
        assert self.running == sorted(self.running, key=order_of)
        assert all(self.requests.get(r.request_id) is r for r in self.suspects)
        assert all(r.state is not State.RUNNING for _, r in self.waiting)
        waiting = [r for _, r in self.waiting if r.state is State.WAITING]
        assert all(r.state is State.RUNNING for r in self.running)
        assert {r.request_id for r in waiting + self.running} == set(self.requests)
        assert len(waiting) + len(self.running) == len(self.requests)
        computing = self.sharing.computing.values()
        assert all(r.announced and r.state is State.RUNNING for r in computing)
