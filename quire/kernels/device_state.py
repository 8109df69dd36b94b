"""What a GPU runner remembers of the request in each slot: one int32 arena, sent as runs of int32.

A slot's record holds its scalars, block tables, lists of tokens and history one after the other,
so that what a request brings along when it enters is a handful of runs. The host says what has
changed, and a kernel copies the runs into the arena (quire/runner/diffs.py). The device appends
sampled tokens itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property

import torch

BLOCK = 16  # tokens of a KV block
MAX_ENDS = 320  # 256 stop_token_ids and the model's own
MAX_BIAS = 1024
MAX_WORDS = 512  # 256 bad words, each alone and after a space
MAX_WORD_TOKENS = 4096
MAX_LOGPROBS = 100
RUN_WORDS = 4  # of a run in a packet's table: arena offset (int64 in two), packet offset, length
_ALIGNMENT = 32  # int32: fields begin at 128 bytes, a line of the GPU's caches


class Scalar(IntEnum):
    """Where a value lies among its slot's scalars."""

    LENGTH = 0  # tokens known on the device, also the position of the next one sampled
    NUM_PROMPT = 1
    FLAGS = 2
    SEED_LOW = 3
    SEED_HIGH = 4
    CHOICE = 5
    MIN_TOKENS = 6
    TOP_K = 7
    NUM_ENDS = 8
    NUM_BIAS = 9
    NUM_WORDS = 10
    LONGEST_WORD = 11  # tokens
    NUM_LOGPROBS = 12
    CACHED = 13  # as many first tokens have their KV already: see Enter.cached
    TEMPERATURE = 16  # float32, as the next four; at least LEAST_TEMPERATURE
    LOG_MIN_P = 17  # -inf for a min_p of 0
    PRESENCE = 18
    FREQUENCY = 19
    REPETITION = 20
    TOP_P = 22  # float64 in two


NUM_SCALARS = 32


class Flag(IntFlag):
    """What a slot's request asks of sampling. A flag that is not set saves looking."""

    GREEDY = 1
    PENALTIES = 2
    BIAS = 4
    ALLOWED = 8
    BAD_WORDS = 16
    ENDS = 32  # end tokens are forbidden below min_tokens
    LOGPROBS = 64
    TOP_K = 128  # this and the two below: never with GREEDY, which they cannot change
    TOP_P = 256
    MIN_P = 512


class RowFlag(IntFlag):
    """The fourth number of a row of a step: a flag, and three numbers above it, in units of these.

    A row that is computed has so many DRAFTS as its last tokens, which lie behind the slot's known
    ones in its history. A row that samples is that of the token behind the first BEHIND of the
    slot's drafts, of which there are DRAFTS; those of one slot follow each other. PROPOSE: how many
    drafts are wanted behind a row that is computed.
    """

    SAMPLE = 1
    DRAFTS = 1 << 8
    BEHIND = 1 << 16
    PROPOSE = 1 << 24


@dataclass(frozen=True)
class Layout:
    """Sizes, and where what lies in the arena, in int32: a record per slot, then the rows.
    `block_sizes`: the tokens in a block of each group."""

    slots: int
    max_len: int
    vocab_size: int
    block_sizes: tuple[int, ...]
    max_blocks: int
    max_rows: int

    @property
    def groups(self) -> int:
        return len(self.block_sizes)

    def blocks(self, group: int) -> int:
        """The most blocks of one request in a group."""
        longest = self.max_blocks * BLOCK
        return -(-longest // self.block_sizes[group])

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Offset in a record and size of each of its fields."""
        sizes = {
            "scalars": NUM_SCALARS,
            "tables": self.groups * self.max_blocks,
            "ends": MAX_ENDS,
            "bias_ids": MAX_BIAS,
            "bias_values": MAX_BIAS,
            "word_starts": MAX_WORDS + 1,
            "word_tokens": MAX_WORD_TOKENS,
            "allowed": -(-self.vocab_size // 32),
            "history": self.max_len + 1,
        }
        found, offset = {}, 0
        for name, size in sizes.items():
            found[name] = (offset, size)
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        found["end"] = (offset, 0)
        return found

    @property
    def record(self) -> int:
        """Size of a slot's record."""
        return self.fields["end"][0]

    @property
    def rows_offset(self) -> int:
        return self.slots * self.record

    @property
    def size(self) -> int:
        """Size of the arena."""
        return self.rows_offset + 4 * self.max_rows

    def offset(self, slot: int, name: str, index: int = 0) -> int:
        """Where element `index` of a slot's field lies in the arena."""
        return slot * self.record + self.fields[name][0] + index


def layout(
    slots: int,
    max_len: int,
    vocab_size: int,
    groups: int | Sequence[int],
    max_blocks: int | None = None,
    max_rows: int | None = None,
) -> Layout:
    """A Layout. `groups`: the tokens in a block of each, or how many there are, of BLOCK tokens. By
    default a request may have all blocks of `max_len` tokens and one more, and a step as many rows
    as there are slots, rounded up to a multiple of 256 for padding."""
    sizes = (BLOCK,) * groups if isinstance(groups, int) else tuple(groups)
    if max_blocks is None:
        max_blocks = -(-max_len // BLOCK) + 1
    if max_rows is None:
        max_rows = -(-slots // 256) * 256
    return Layout(slots, max_len, vocab_size, sizes, max_blocks, max_rows)


class DeviceState:
    """The arena int32 [size] and named views of it; S slots.

    `history` int32 [S, max_len + 1]: prompt, then output. `tables` int32 [S, groups, max_blocks].
    `scalars` int32 [S, 32] (see Scalar), and of these `length`, `num_prompt`, `flags` int32 [S].
    `ends`, `bias_ids`, `word_starts`, `word_tokens`, `allowed` (one bit per token) int32 and
    `bias_values` float32: what their flags and counts make valid. `rows` int32 [max_rows, 4]: the
    rows of the next step (slot or -1, start, count, RowFlag).

    `counts` int16 [S, V], outside the arena and only of slots with penalties: how often a token
    is in the output (15 bits, saturating), and in the sign bit whether it is in the prompt.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.device = device
        self.arena = torch.zeros(layout.size, dtype=torch.int32, device=device)
        self.counts = torch.zeros(layout.slots, layout.vocab_size, dtype=torch.int16, device=device)
        records = self.arena[: layout.rows_offset].view(layout.slots, layout.record)

        def field(name: str) -> torch.Tensor:
            offset, size = layout.fields[name]
            return records[:, offset : offset + size]

        self.scalars = field("scalars")
        self.tables = field("tables").view(layout.slots, layout.groups, layout.max_blocks)
        self.ends = field("ends")
        self.bias_ids = field("bias_ids")
        self.bias_values = field("bias_values").view(torch.float32)
        self.word_starts = field("word_starts")
        self.word_tokens = field("word_tokens")
        self.allowed = field("allowed")
        self.history = field("history")
        self.length = self.scalars[:, Scalar.LENGTH]
        self.num_prompt = self.scalars[:, Scalar.NUM_PROMPT]
        self.flags = self.scalars[:, Scalar.FLAGS]
        self.rows = self.arena[layout.rows_offset :].view(layout.max_rows, 4)
        # None where all are BLOCK, which kernels need not look up.
        self.block_sizes: torch.Tensor | None = None
        if any(size != BLOCK for size in layout.block_sizes):
            self.block_sizes = torch.tensor(layout.block_sizes, dtype=torch.int32, device=device)

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_len: int,
        vocab_size: int,
        groups: int | Sequence[int],
        max_blocks: int | None = None,
        device: torch.device | str = "cpu",
        max_rows: int | None = None,
    ) -> DeviceState:
        """State of empty slots; sizes as in `layout`."""
        sizes = layout(slots, max_len, vocab_size, groups, max_blocks, max_rows)
        return cls(sizes, torch.device(device))

    @staticmethod
    def nbytes(
        slots: int,
        max_len: int,
        vocab_size: int,
        groups: int | Sequence[int],
        max_blocks: int | None = None,
        max_rows: int | None = None,
    ) -> int:
        """What `allocate` takes."""
        sizes = layout(slots, max_len, vocab_size, groups, max_blocks, max_rows)
        return 4 * sizes.size + 2 * slots * vocab_size


@dataclass
class StepBuffers:
    """What a step's layers read, written by `prepare_step`: B rows, T tokens, G KV groups.

    `query_start` int32 [B + 1], `context_len` int32 [B], `tokens` and `positions` int64 [T],
    `block_tables` int32 [G, B, max_blocks], `slots` int64 [G, T]: block * tokens of a block +
    offset to write to, -1 for padding and for what is cached already. `state_slots` int64 [B]: the
    slot of each row's request, -1 for padding. `rows` int64 [T]: the row that each token is of, -1
    for padding.
    """

    query_start: torch.Tensor
    context_len: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    state_slots: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, tokens: int, groups: int, max_blocks: int, device: torch.device | str
    ) -> StepBuffers:
        """Zeroed buffers: block 0, the null block, everywhere."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(torch.int32, rows + 1),
            zeros(torch.int32, rows),
            zeros(torch.int64, tokens),
            zeros(torch.int64, tokens),
            zeros(torch.int32, groups, rows, max_blocks),
            zeros(torch.int64, groups, tokens),
            zeros(torch.int64, rows),
            zeros(torch.int64, tokens),
        )

    @staticmethod
    def nbytes(rows: int, tokens: int, groups: int, max_blocks: int) -> int:
        """What `allocate` takes: of long contexts' block tables hundreds of megabytes."""
        of_groups = groups * (4 * rows * max_blocks + 8 * tokens)
        return 4 * (2 * rows + 1) + 8 * rows + 24 * tokens + of_groups

    def view(self, rows: int, tokens: int, blocks: int | None = None) -> StepBuffers:
        """The same memory, for a step of that many rows and tokens. `blocks`: as many as a request
        has at most, if less than max_blocks."""
        return StepBuffers(
            self.query_start[: rows + 1],
            self.context_len[:rows],
            self.tokens[:tokens],
            self.positions[:tokens],
            self.block_tables[:, :rows, :blocks],
            self.slots[:, :tokens],
            self.state_slots[:rows],
            self.rows[:tokens],
        )
