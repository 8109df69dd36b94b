"""What the scheduler tells the runner about one step, and what comes back: plain data.

A Batch carries everything a step needs and the runner never reads the scheduler's objects, so the
same bytes can be sent to other ranks. Requests live in numbered slots; a Batch holds only what
changed: requests that enter or leave slots, and new blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from quire.params import SamplingParams

DEVICE_TOKEN = -1  # in Row.tokens: the token the slot sampled in the step before, still on device


class Enter(msgspec.Struct, array_like=True):
    """A request takes a slot.

    `tokens` holds prompt and already committed output tokens; the first `num_prompt` are the
    prompt (penalties tell them apart). `seed` and `choice` key the sampling noise. `blocks[g]` is
    the block table of KV group g so far; a block that the window has left behind is 0, the null
    block. `bad_words` are token sequences. `end_tokens` are suppressed below min_tokens. The first
    `cached` tokens have their KV already: those computed again only make whole what layers keep of
    the request besides.
    """

    slot: int
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    seed: int
    choice: int
    blocks: list[list[int]]
    end_tokens: list[int]
    bad_words: list[list[int]]
    cached: int = 0


class Row(msgspec.Struct, array_like=True, gc=False):
    """One request's share of a step.

    `tokens` are computed at positions start, start+1, ...; DEVICE_TOKEN stands for the token
    sampled by the slot's previous step. `new_blocks[g]` extends the block table of group g.
    `sample`: the last token's logits choose the next token. `position` of the sampled token is
    start + len(tokens). `prompt_logprobs`: report log-probabilities of the prompt tokens that
    follow the tokens of this chunk. `gated`: its token is chosen among those of
    a mask that is given to the submitted step (Pending.open in quire/engine/core.py); of a slot's
    rows that sample either all are gated or none.

    `drafts`: so many of the last tokens are guesses. The token before them chooses the next one as
    ever; where that is the first draft, the draft's logits choose one more, and so on. What a
    refused draft has written is written again by the slot's next row, which begins with the last
    token chosen. Not with `gated`.

    `propose`: so many drafts of what follows are wanted of the runner's drafter, if it has one.
    There are blocks for as many tokens behind the row.
    """

    slot: int
    start: int
    tokens: list[int]
    new_blocks: list[list[int]]
    sample: bool
    prompt_logprobs: bool = False
    gated: bool = False
    drafts: int = 0
    propose: int = 0


def sure_tokens(row: Row) -> list[int]:
    """A row's tokens without its drafts."""
    return row.tokens[: len(row.tokens) - row.drafts] if row.drafts else row.tokens


def draft_tokens(row: Row) -> list[int]:
    """A row's drafts."""
    return row.tokens[len(row.tokens) - row.drafts :]


def mask_bytes(vocab_size: int) -> int:
    """Size of a mask: one bit per token, in whole words of 32."""
    return -(-vocab_size // 32) * 4


def mask_of(tokens: Iterable[int], vocab_size: int) -> bytes:
    """The mask of these tokens: token t is bit t % 8 of byte t // 8."""
    mask = bytearray(mask_bytes(vocab_size))
    for token in tokens:
        mask[token >> 3] |= 1 << (token & 7)
    return bytes(mask)


class Decoding(msgspec.Struct, array_like=True):
    """Plain decoding rows, column by column: each computes the token that its slot sampled last,
    and samples the next. `new_blocks`: those of the few rows that get any, by their index."""

    slots: list[int]
    starts: list[int]
    new_blocks: dict[int, list[list[int]]]


class Batch(msgspec.Struct, array_like=True):
    """One step. Order of effects: `leave`, then `enter`, then the rows: those of `decoding`, then
    `rows`."""

    step: int
    leave: list[int]
    enter: list[Enter]
    rows: list[Row]
    decoding: Decoding | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows) + (len(self.decoding.slots) if self.decoding else 0)

    @property
    def num_tokens(self) -> int:
        decoding = len(self.decoding.slots) if self.decoding else 0
        return decoding + sum(len(row.tokens) for row in self.rows)


def written_out(batch: Batch) -> Batch:
    """The same step with all its rows in `rows`."""
    decoding = batch.decoding
    if decoding is None:
        return batch
    rows = [
        Row(slot, start, [DEVICE_TOKEN], decoding.new_blocks.get(i, []), sample=True)
        for i, (slot, start) in enumerate(zip(decoding.slots, decoding.starts, strict=True))
    ]
    return Batch(batch.step, batch.leave, batch.enter, rows + batch.rows)


class Copies(msgspec.Struct, array_like=True):
    """Pages to copy between blocks of a pool and slots of host memory (quire/tiers/slab.py), before
    any step that is submitted later writes to these blocks, and after all submitted before have
    computed. `store`: from the device to host memory. `number` names the order when it is done."""

    number: int
    store: bool
    pool: int
    blocks: list[int]
    slots: list[int]


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities at one position: the chosen token first, then the most likely ones."""

    tokens: list[int]
    logprobs: list[float]
    ranks: list[int]


# RowResult.error: the code of what the scheduler tells the request.
# Logits hold NaN or the largest is infinite, or the hidden state of any token of the row is not
# finite, whether it samples or not: KV of a row without this error may be used by others.
NAN_ERROR = "numerical_error"
FORBIDDEN_ERROR = "invalid_value"  # its parameters exclude every token


class RowResult(msgspec.Struct, array_like=True, gc=False):
    """What one row gave: sampled tokens (none where Row.sample is false; with accepted drafts
    more than one, and as many `logprobs`), or an error's code. `drafts`: what Row.propose asked
    for, or fewer."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    drafts: list[int] = []


class Result(msgspec.Struct, array_like=True):
    """Results of a Batch, in the order of its rows. `tokens`: where each row computed one token
    and gave one and nothing else, these, and no `rows`."""

    step: int
    rows: list[RowResult]
    tokens: list[int] = []

    def written_out(self) -> list[RowResult]:
        """A result for every row."""
        return self.rows or [RowResult([token]) for token in self.tokens]
