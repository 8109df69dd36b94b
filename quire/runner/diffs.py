"""What the host sends of a Batch to a GPU runner's state, as runs of int32."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.kernels.device_state import (
    MAX_ENDS,
    MAX_WORD_TOKENS,
    MAX_WORDS,
    NUM_SCALARS,
    Flag,
    Layout,
    RowFlag,
    Scalar,
)
from quire.params import SamplingParams
from quire.runner.packets import Run
from quire.step import Decoding, Enter, Row, draft_tokens, mask_bytes

# As vLLM: dividing by much less would overflow.
LEAST_TEMPERATURE = 1e-5
# A factor of 0 would make 0 * -inf of a forbidden token.
LEAST_REPETITION = float(np.finfo(np.float32).smallest_subnormal)

# As plain integers, which are much faster to combine: for each row of each step.
_GREEDY = int(Flag.GREEDY)
_ALLOWED = int(Flag.ALLOWED)
_SAMPLE = int(RowFlag.SAMPLE)
_DRAFTS = int(RowFlag.DRAFTS)
_BEHIND = int(RowFlag.BEHIND)
_PROPOSE = int(RowFlag.PROPOSE)
_SPECIAL = sum(flag for flag in Flag if flag not in (Flag.GREEDY, Flag.LOGPROBS))


def flags_of(params: SamplingParams, enter: Enter, vocab_size: int) -> int:
    """The flags of a request that enters with these parameters."""
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    num_output = len(enter.tokens) - enter.num_prompt
    found = {
        Flag.GREEDY: params.greedy,
        Flag.PENALTIES: penalties != (0.0, 0.0, 1.0),
        Flag.BIAS: bool(params.logit_bias),
        Flag.ALLOWED: params.allowed_token_ids is not None,
        Flag.BAD_WORDS: bool(enter.bad_words),
        Flag.ENDS: bool(enter.end_tokens) and num_output < params.min_tokens,
        Flag.LOGPROBS: params.logprobs is not None,
        Flag.TOP_K: not params.greedy and 0 < params.top_k < vocab_size,
        Flag.TOP_P: not params.greedy and params.top_p < 1.0,
        Flag.MIN_P: not params.greedy and params.min_p > 0.0,
    }
    return sum(int(flag) for flag, is_set in found.items() if is_set)


def variant(flags: Iterable[int]) -> str:
    """The least of the sampler's variants that serves slots with these flags. A row's token is
    the same, bit for bit, in every variant that serves it."""
    some, all_of = 0, _GREEDY
    for each in flags:
        some |= each
        all_of &= each
    if some & _SPECIAL:
        return "full"
    return "greedy" if all_of else "plain"


def unfit(end_tokens: Sequence[int], bad_words: Sequence[Sequence[int]]) -> str | None:
    """Why a request with these cannot have a slot, in words, or None where it can. What
    quire.params bounds always fits."""
    tokens = sum(len(word) for word in bad_words)
    if len(end_tokens) > MAX_ENDS:
        return f"{len(end_tokens)} end tokens, and at most {MAX_ENDS} are possible"
    if len(bad_words) > MAX_WORDS or tokens > MAX_WORD_TOKENS:
        return (
            f"bad_words of {len(bad_words)} token sequences and {tokens} tokens; at most "
            f"{MAX_WORDS} sequences of {MAX_WORD_TOKENS} tokens together are possible"
        )
    return None


class Columns(NamedTuple):
    """The rows of a step, column by column, and of those that sample their index, their slot and
    the place of their last token among the step's. `num_tokens` of all rows. `gated`: indices of
    gated rows. `drafts`: by index, of the rows that have any; such a row samples once more for each
    of them, and `behind` says of each sample how many of them come before. `propose`: by index,
    how many drafts are wanted behind the rows that want any. `split`: a draft may be computed as a
    row by itself; not where layers keep state of a request, which its rows would hand on."""

    slots: list[int]
    starts: list[int]
    lengths: list[int]
    samples: list[bool]
    num_tokens: int
    sampling: list[int]
    sampling_slots: list[int]
    places: list[int]
    gated: list[int]
    behind: list[int]
    drafts: dict[int, list[int]]
    propose: dict[int, int]
    split: bool = True

    @classmethod
    def plain(cls, decoding: Decoding) -> Columns:
        """Of a step of nothing else."""
        slots, count = decoding.slots, len(decoding.slots)
        places, ones, samples = list(range(count)), [1] * count, [True] * count
        return cls(
            slots, decoding.starts, ones, samples, count, places, slots, places, gated=[],
            behind=[0] * count, drafts={}, propose={},
        )  # fmt: skip

    @classmethod
    def of(cls, rows: Sequence[Row], drafting: bool = False, split: bool = True) -> Columns:
        """`drafting`: whether any row may want drafts behind it."""
        slots = [row.slot for row in rows]
        starts = [row.start for row in rows]
        lengths = [len(row.tokens) for row in rows]
        samples = [row.sample for row in rows]
        gates = [row.gated for row in rows]
        propose = {i: row.propose for i, row in enumerate(rows) if row.propose} if drafting else {}
        gated = [i for i, gate in enumerate(gates) if gate] if True in gates else []
        if sum(lengths) == samples.count(True) == len(rows):  # all decode: most steps
            places = list(range(len(rows)))
            columns = (slots, starts, lengths, samples, len(rows), places, slots, places, gated)
            return cls(*columns, [0] * len(rows), {}, propose, split)
        ends = list(accumulate(lengths))
        drafts = {i: draft_tokens(row) for i, row in enumerate(rows) if row.drafts}
        counts = [1 + len(drafts.get(i, ())) if sample else 0 for i, sample in enumerate(samples)]
        sampling = [i for i, count in enumerate(counts) for _ in range(count)]
        behind = [k for count in counts for k in range(count)]
        places = [ends[i] - counts[i] + k for i, k in zip(sampling, behind, strict=True)]
        mine = [slots[i] for i in sampling]
        columns = (slots, starts, lengths, samples, ends[-1], sampling, mine, places, gated)
        return cls(*columns, behind, drafts, propose, split)

    @property
    def decode(self) -> bool:
        """Each token is sampled behind: rows have one, and drafts behind it."""
        return self.num_tokens == len(self.sampling)

    @property
    def num_rows(self) -> int:
        """Rows that are computed: where all decode, a draft is one by itself if it may be, as
        attention reads the keys of a row with one query by many programs."""
        return len(self.sampling) if self.decode and self.split else len(self.slots)

    def without(self, rows: Collection[int]) -> Columns:
        """The same step, where `rows` do not sample."""
        kept = [k for k, i in enumerate(self.sampling) if i not in rows]
        return self._replace(
            sampling=[self.sampling[k] for k in kept],
            sampling_slots=[self.sampling_slots[k] for k in kept],
            places=[self.places[k] for k in kept],
            behind=[self.behind[k] for k in kept],
        )


class Diffs:
    """The host's side: what to send of a Batch. Remembers how far block tables are filled, and
    `flags`, those of the request in each slot."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.flags = [0] * layout.slots
        self._filled = [[0] * layout.slots for _ in range(layout.groups)]
        self._allowed: dict[int, npt.NDArray[np.uint8]] = {}  # by allowed_token_ids of the slot
        self._tables = [layout.offset(slot, "tables") for slot in range(layout.slots)]

    def enter(self, enter: Enter) -> list[Run]:
        """The runs of a request that takes a slot. Raises ValueError where it does not fit one."""
        reason = unfit(enter.end_tokens, enter.bad_words)
        if reason is None and len(enter.tokens) > self.layout.max_len:
            reason = f"{len(enter.tokens)} tokens, and at most {self.layout.max_len} are possible"
        if reason is not None:
            raise ValueError(f"slot {enter.slot}: {reason}")
        params, slot, offset = enter.params, enter.slot, self.layout.offset
        flags = self.flags[slot] = flags_of(params, enter, self.layout.vocab_size)
        runs = [
            (offset(slot, "scalars"), _scalars(enter, flags)),
            (offset(slot, "history"), array("i", enter.tokens)),
        ]
        if flags & Flag.ENDS:
            runs.append((offset(slot, "ends"), array("i", enter.end_tokens)))
        if params.logit_bias:
            values = array("f", params.logit_bias.values())
            runs.append((offset(slot, "bias_ids"), array("i", params.logit_bias)))
            runs.append((offset(slot, "bias_values"), array("i", values.tobytes())))
        if enter.bad_words:
            starts = accumulate((len(word) for word in enter.bad_words), initial=0)
            tokens = array("i", chain.from_iterable(enter.bad_words))
            runs.append((offset(slot, "word_starts"), array("i", starts)))
            runs.append((offset(slot, "word_tokens"), tokens))
        self._allowed.pop(slot, None)
        if params.allowed_token_ids is not None:
            allowed = np.zeros(8 * mask_bytes(self.layout.vocab_size), dtype=np.uint8)
            allowed[params.allowed_token_ids] = 1
            self._allowed[slot] = np.packbits(allowed, bitorder="little")
            runs.append((offset(slot, "allowed"), array("i", self._allowed[slot].tobytes())))
        for group, blocks in enumerate(enter.blocks):
            self._filled[group][slot] = 0
            self._extend(runs, group, slot, blocks)
        return [run for run in runs if len(run[1])]

    def mask(self, slot: int, mask: bytes) -> list[Run]:
        """The runs that let a slot choose among the tokens of a mask (quire/step.py), and where it
        has allowed_token_ids, of these only."""
        own = self._allowed.get(slot)
        if own is not None:
            mask = np.bitwise_and(own, np.frombuffer(mask, dtype=np.uint8)).tobytes()
        runs = [(self.layout.offset(slot, "allowed"), array("i", mask))]
        if not self.flags[slot] & _ALLOWED:
            self.flags[slot] |= _ALLOWED
            where = self.layout.offset(slot, "scalars", Scalar.FLAGS)
            runs.append((where, array("i", (self.flags[slot],))))
        return runs

    def blocks(self, rows: Sequence[Row], decoding: Decoding | None = None) -> list[Run]:
        """The runs of the blocks that are new in a step, beside those of requests that enter."""
        runs: list[Run] = []
        if decoding is not None:
            for i, new_blocks in decoding.new_blocks.items():
                self._grow(runs, decoding.slots[i], new_blocks)
        for row in rows:
            if row.new_blocks:
                self._grow(runs, row.slot, row.new_blocks)
        return runs

    def drafts(self, rows: Columns) -> list[Run]:
        """The runs that put drafts behind what their slots know."""
        return [
            (
                self.layout.offset(
                    rows.slots[i], "history", rows.starts[i] + rows.lengths[i] - len(drafts)
                ),
                array("i", drafts),
            )
            for i, drafts in rows.drafts.items()
        ]

    def rows(self, rows: Columns, size: int) -> Run:
        """The run that sets the first `size` of DeviceState.rows, the last of them padding."""
        if not (rows.decode and rows.drafts and rows.split):
            return self.whole_rows(rows, size, 0)
        values = array("i", (-1, 0, 0, 0)) * size
        for k, (i, behind) in enumerate(zip(rows.sampling, rows.behind, strict=True)):
            flags = _SAMPLE + _DRAFTS * behind
            values[4 * k : 4 * k + 4] = array(
                "i", (rows.slots[i], rows.starts[i] + behind, 1, flags)
            )
        return self.layout.rows_offset, values

    def next_rows(self, run: Run, rows: Columns) -> Run:
        """What `rows` gave of a plain step, for the one after it of the same slots."""
        run[1][1 : 4 * len(rows.slots) : 4] = array("i", rows.starts)
        return run

    def whole_rows(self, rows: Columns, size: int, first: int) -> Run:
        """The run that sets `size` of DeviceState.rows from the `first` on: a row of the step in
        each, the last of them padding."""
        end = 4 * len(rows.slots)
        values = array("i", (-1, 0, 0, 0)) * size
        values[0:end:4] = array("i", rows.slots)
        values[1:end:4] = array("i", rows.starts)
        values[2:end:4] = array("i", rows.lengths)
        values[3:end:4] = array("i", rows.samples)  # True is RowFlag.SAMPLE
        for i, drafts in rows.drafts.items():
            values[4 * i + 3] += _DRAFTS * len(drafts)
        for i, count in rows.propose.items():
            values[4 * i + 3] += _PROPOSE * count
        return self.layout.rows_offset + 4 * first, values

    def sampling_rows(self, rows: Columns, size: int, first: int) -> Run:
        """The run that sets `size` of DeviceState.rows from the `first` on: rows that sample, and
        the place of their hidden state among the step's tokens."""
        end = 4 * len(rows.sampling)
        values = array("i", (-1, 0, 0, 0)) * size
        values[0:end:4] = array("i", rows.sampling_slots)
        values[1:end:4] = array("i", rows.places)
        values[3:end:4] = array("i", (_SAMPLE,)) * len(rows.sampling)
        if rows.drafts:
            for k, (i, behind) in enumerate(zip(rows.sampling, rows.behind, strict=True)):
                values[4 * k + 3] += _DRAFTS * len(rows.drafts.get(i, ())) + _BEHIND * behind
        return self.layout.rows_offset + 4 * first, values

    def _grow(self, runs: list[Run], slot: int, new_blocks: list[list[int]]) -> None:
        for group, blocks in enumerate(new_blocks):
            if blocks:
                self._extend(runs, group, slot, blocks)

    def _extend(self, runs: list[Run], group: int, slot: int, blocks: list[int]) -> None:
        filled = self._filled[group][slot]
        offset = self._tables[slot] + group * self.layout.max_blocks + filled
        runs.append((offset, array("i", blocks)))
        self._filled[group][slot] = filled + len(blocks)


def _scalars(enter: Enter, flags: int) -> array[int]:
    params = enter.params
    ints = np.zeros(NUM_SCALARS, dtype=np.int32)
    words, floats, doubles = ints.view(np.uint32), ints.view(np.float32), ints.view(np.float64)
    ints[Scalar.LENGTH] = len(enter.tokens)
    ints[Scalar.NUM_PROMPT] = enter.num_prompt
    ints[Scalar.FLAGS] = flags
    words[Scalar.SEED_LOW] = enter.seed & 0xFFFF_FFFF
    words[Scalar.SEED_HIGH] = enter.seed >> 32 & 0xFFFF_FFFF
    words[Scalar.CHOICE] = enter.choice
    ints[Scalar.MIN_TOKENS] = params.min_tokens
    ints[Scalar.TOP_K] = params.top_k
    ints[Scalar.NUM_ENDS] = len(enter.end_tokens)
    ints[Scalar.NUM_BIAS] = len(params.logit_bias or ())
    ints[Scalar.NUM_WORDS] = len(enter.bad_words)
    ints[Scalar.LONGEST_WORD] = max((len(word) for word in enter.bad_words), default=0)
    ints[Scalar.NUM_LOGPROBS] = params.logprobs or 0
    ints[Scalar.CACHED] = enter.cached
    floats[Scalar.TEMPERATURE] = max(params.temperature, LEAST_TEMPERATURE)
    floats[Scalar.LOG_MIN_P] = math.log(params.min_p) if params.min_p > 0 else -math.inf
    floats[Scalar.PRESENCE] = params.presence_penalty
    floats[Scalar.FREQUENCY] = params.frequency_penalty
    floats[Scalar.REPETITION] = max(params.repetition_penalty, LEAST_REPETITION)
    doubles[Scalar.TOP_P // 2] = params.top_p
    return array("i", ints.tobytes())
