"""What the runner is told of a request in a step, and how that moves the request's ledger."""

from __future__ import annotations

from quire.engine.decoding import may_decode
from quire.engine.drafting import NO_DRAFTS
from quire.engine.request import Request
from quire.kv import BLOCK_SIZE
from quire.kv.manager import KVManager
from quire.step import DEVICE_TOKEN, Enter, Row

# The token of a row that decodes ahead of what the host knows: most rows, so they share it.
ON_DEVICE = [DEVICE_TOKEN]


def make_row(
    request: Request,
    count: int,
    new_blocks: list[list[int]],
    drafts: list[int] = NO_DRAFTS,
    propose: int = 0,
) -> Row:
    """A row of the next `count` tokens, with `drafts` behind them: these are in flight now, and
    where they are all that is promised, one more is."""
    start = request.scheduled
    end = request.scheduled = start + count
    request.inflight_steps += 1
    sample = end == request.promised
    known = len(request.tokens)
    if count == 1:
        tokens = ON_DEVICE if start >= known else [request.tokens[start]]
    else:
        tokens = request.tokens[start:end]
        tokens += ON_DEVICE * (count - len(tokens))
    if sample:
        request.promised += 1
        if request.gate is None:
            may_decode(request)
    prompt_logprobs = request.prompt_logprobs_sent < request.prompt_logprobs_due
    gated = sample and request.gate is not None
    if drafts:
        tokens = tokens + drafts
    count = len(drafts)
    slot = request.slot
    return Row(slot, start, tokens, new_blocks, sample, prompt_logprobs, gated, count, propose)


def new_blocks(kv: KVManager, request: Request, end: int) -> list[list[int]]:
    """What the runner does not know yet of block tables that were grown to `end` tokens."""
    tables, sent = kv.table(request.request_id), request.blocks_sent
    new = [table[sent[g] :] for g, table in enumerate(tables)]
    request.blocks_sent = [len(table) for table in tables]
    request.covered = covered(end)
    return new


def covered(end: int) -> int:
    """Tokens that there is room for in blocks that were grown to `end` tokens."""
    return -(-end // BLOCK_SIZE) * BLOCK_SIZE


def make_enter(kv: KVManager, request: Request, hit: int, end: int) -> Enter:
    """A request that has just got its slot, and blocks for `end` tokens."""
    request.blocks_sent = [0] * len(kv.groups)
    return Enter(
        slot=request.slot,
        params=request.add.params,
        tokens=list(request.tokens),
        num_prompt=request.num_prompt,
        seed=request.add.seed,
        choice=request.add.choice,
        blocks=new_blocks(kv, request, end),
        end_tokens=sorted(request.end_tokens),
        bad_words=request.add.bad_words,
        cached=hit,
    )
