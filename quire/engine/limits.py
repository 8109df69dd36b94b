"""What the scheduler may do, and which requests that excludes for ever."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from quire.engine.admission import check_request, check_timeout
from quire.engine.wire import Add
from quire.errors import UsageError
from quire.kv.manager import KVManager
from quire.params import SamplingParams, check_tokens
from quire.runner.diffs import unfit


@dataclass(frozen=True)
class Limits:
    """What the scheduler may do, from options and plan. `recomputed_tokens`: so many tokens before
    a prefix hit are computed again."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    priority: bool = False
    max_queue: int = 256
    recomputed_tokens: int = 0

    def end_tokens(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a request with these parameters."""
        own = frozenset[int]() if params.ignore_eos else self._eos
        return own.union(params.stop_token_ids) if params.stop_token_ids else own

    @cached_property
    def _eos(self) -> frozenset[int]:
        """One for all requests: every step looks into it for each of them."""
        return frozenset(self.eos_token_ids)

    def max_tokens(self, add: Add) -> int:
        """The most tokens of output that a request can get."""
        room = self.max_model_len - len(add.prompt_token_ids)
        return room if add.params.max_tokens is None else min(add.params.max_tokens, room)


def check_add(add: Add, limits: Limits, kv: KVManager, step_tokens: int) -> None:
    """Raise UsageError for a request that can never run. `step_tokens`: the most tokens that one
    step writes of a request."""
    vocab_size = limits.vocab_size
    prompt, params = add.prompt_token_ids, add.params
    check_request(prompt, params, limits.max_model_len, vocab_size)
    for word in add.bad_words:
        check_tokens("bad_words", word, vocab_size)
    misfit = unfit(sorted(limits.end_tokens(params)), add.bad_words)
    if misfit is not None:
        raise UsageError("invalid_value", misfit)
    check_timeout(add.timeout)
    length = len(prompt)
    output = limits.max_tokens(add)
    # The last token's KV is never computed.
    if not kv.fits_ever(length + output - 1, step_tokens):
        _, total = kv.usage()
        raise UsageError(
            "prompt_too_large",
            f"a prompt of {length} tokens with {output} tokens of output can never fit the "
            f"KV cache of {total} blocks",
            fix="shorten the prompt, lower max_tokens, or start with a larger --kv-cache-memory",
            field="prompt",
        )
