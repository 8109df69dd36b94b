"""Contexts that are in the KV cache without having been computed: for decode steps after prompts
that would take longer to compute than the steps that are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.errors import UsageError
from quire.params import SamplingParams
from quire.runner.pages import pool_tensors

if TYPE_CHECKING:
    from quire.cli.local import LocalEngine

# Of a prompt that is computed, whose pages are the content of all others.
PROMPT_TOKENS = 4096
BLOCKS_AT_ONCE = 1024  # copied in one operation, which takes as much memory again


class _Everything:
    """Holds every page."""

    def __contains__(self, identity: object) -> bool:
        return True


class FilledCaches:
    """The whole KV cache holds pages of a computed prompt, over and over: valid entries, whatever
    their format, and no request's own. `claim` then lets prompts find theirs among them. Raises
    UsageError where a model that drafts has a cache of its own."""

    def __init__(self, engine: LocalEngine):
        self._scheduler = engine.engine.core.scheduler
        kv, caches = self._scheduler.kv, engine.engine.build.caches
        if any(layer >= len(caches) for group in kv.groups for layer in group.layers):
            raise UsageError("invalid_flag", "scenarios fBxC do not go with a model that drafts")
        longest = engine.info.max_model_len
        prompt = [7 + i * i % 89 for i in range(min(PROMPT_TOKENS, longest - 1))]
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        for _ in engine.stream([engine.request(prompt, params)]):
            pass
        identities: list[list[bytes]] = []
        kv.missing(prompt, "", "", identities)
        for number, tensors in enumerate(pool_tensors(caches, kv.groups)):
            pool = kv.pools[number]
            chains = [identities[group.index] for group in kv.groups if group.pool == number]
            found = [pool.find(identity) for chain in chains for identity in chain]
            computed = [block for block in found if block is not None]
            assert computed, "the prompt left nothing in the cache"
            for tensor in tensors:
                _repeat(tensor, computed)
        kv.clear_cache()

    def claim(self, prompts: list[list[int]]) -> None:
        """Let each prompt's tokens be found in the cache, as far as there is room for all."""
        kv = self._scheduler.kv
        for prompt in prompts:
            _, _, pages = kv.beyond(prompt, "", "", [], _Everything())
            for page in pages:
                pool = kv.pools[kv.groups[page.group].pool]
                [block] = pool.allocate(1)
                pool.publish(block, page.identity)
                pool.release(block)


def _repeat(tensor: torch.Tensor, blocks: list[int]) -> None:
    """Give every block but the null block the content of one of `blocks`, in turn."""
    source = tensor[blocks].clone()
    for first in range(1, len(tensor), BLOCKS_AT_ONCE):
        some = torch.arange(first, min(first + BLOCKS_AT_ONCE, len(tensor)), device=tensor.device)
        tensor[some] = source[some % len(blocks)]
