"""Prompts under way: who would compute the same blocks waits, and then finds them cached."""

from __future__ import annotations

from quire.engine.request import Request
from quire.kv import BLOCK_SIZE
from quire.kv.manager import KVManager

# A request waits for blocks that another is computing only where they are worth a step.
LEAST_SHARED_TOKENS = 3 * BLOCK_SIZE


class Sharing:
    """`computing`: prompt blocks that running requests are computing, by identity, in the group of
    the largest blocks."""

    def __init__(self, kv: KVManager):
        self.computing: dict[bytes, Request] = {}
        self._kv = kv

    def waits(self, request: Request) -> bool:
        """Whether a running request is just computing what this one would compute first."""
        if not self.computing or request.add.params.prompt_logprobs is not None:
            return False
        add = request.add
        missing = self._kv.missing(request.tokens, add.tenant, add.cache_salt, request.identities)
        least = self._kv.groups[self._kv.coarsest].blocks_of(LEAST_SHARED_TOKENS)
        shared = missing[:least]
        return len(shared) == least and all(i in self.computing for i in shared)

    def announce(self, request: Request, hit: int) -> None:
        """Others with the same beginning wait for the blocks of this prompt behind `hit` tokens."""
        if not self._kv.enable_caching:
            return
        coarsest = self._kv.coarsest
        size = self._kv.groups[coarsest].block_size
        for identity in request.identities[coarsest][hit // size : request.num_prompt // size]:
            self.computing.setdefault(identity, request)
        request.announced = True

    def withdraw(self, request: Request) -> None:
        """The prompt is computed, or will not be: nobody waits for its blocks any more."""
        if request.announced:
            for identity in request.identities[self._kv.coarsest]:
                if self.computing.get(identity) is request:
                    del self.computing[identity]
            request.announced = False
