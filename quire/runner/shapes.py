"""The shapes of steps: which sizes get a graph, what a step is padded to, and what to prepare."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """Tokens and rows of a forward pass with its padding. They are equal where every row has one
    token, and only there: that is how the attention kernels know (TritonKernels.attention).
    `short`: all contexts are, for which attention has a faster kernel."""

    tokens: int
    rows: int
    short: bool = False


@dataclass(frozen=True)
class Reading:
    """Tokens and rows of the pass in which a model that drafts reads a step, with its padding; more
    tokens than rows."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class Guessing:
    """Rows of its passes after that, with padding, and the sampler's variant."""

    rows: int
    variant: str


class Sampling(NamedTuple):
    """Rows of a sampling pass with its padding, the kernel's variant, and whether any row wants
    log-probabilities."""

    rows: int
    variant: str
    logprobs: bool


Key = Shape | Sampling | Reading | Guessing


@dataclass(frozen=True)
class Shapes:
    """Of steps of up to `tokens` tokens for up to `rows` requests, of which up to `sampled` rows
    sample. `decode` and `mixed`: ascending sizes that get a graph, of steps with one token for
    each row and of others. `drafting`: a model drafts beside this one. Steps with one token for
    each of up to `short_rows` rows have a shape of their own where no context is longer than
    `short_context` tokens."""

    tokens: int
    rows: int
    sampled: int
    decode: Sequence[int]
    mixed: Sequence[int]
    drafting: bool
    short_rows: int = 0
    short_context: int = 0

    def of(self, tokens: int, rows: int, longest: int | None = None) -> Shape:
        """A step's, padded. `longest`: tokens of the longest context; not needed above short_rows
        rows."""
        if tokens == rows:
            size = self.padded(rows)
            few = size <= self.short_rows
            return Shape(size, size, few and longest is not None and longest <= self.short_context)
        if not self.mixed or max(tokens, rows + 1) > self.mixed[-1]:
            return Shape(tokens, rows)
        size = _size(max(tokens, rows + 1), self.mixed)
        return Shape(size, self._mixed_rows(size))

    def padded(self, rows: int) -> int:
        """The size of a table of `rows` that decode, sample or draft."""
        return _size(rows, self.decode)

    def gets_graph(self, key: Key) -> bool:
        if isinstance(key, Shape | Reading):
            return key.tokens in (self.decode if key.tokens == key.rows else self.mixed)
        return True

    def planned(self) -> list[Key]:
        """What to prepare, the largest first, so that the others find memory in the pool."""
        size, keys = self.tokens, list[Key]()
        # What gets no graph is computed at every doubling: between them kernels are the same
        # (gemm_tiles.size_class).
        while size > max((*self.mixed, 1)):
            keys.append(self.of(size, min(self.rows, max(1, size - 1))))
            size = -(-size // 2)
        keys += [Shape(tokens, self._mixed_rows(tokens)) for tokens in reversed(self.mixed)]
        most = min(self.sampled, self.tokens)
        # Without graphs, a size of each class of rows that kernels tell apart.
        sizes = self.decode or sorted({most, *(min(2**i, most) for i in range(7))})
        for rows in reversed(sizes):
            keys += [Shape(rows, rows), Sampling(rows, "greedy", False)]
            keys += [Shape(rows, rows, short=True)] * (rows <= self.short_rows)
        keys += [Sampling(rows, "plain", False) for rows in reversed(sizes)]
        # The rest is captured where a request asks for it; its kernels are compiled before.
        rest = (("full", False), ("greedy", True), ("full", True))
        keys += [Sampling(sizes[-1], name, logprobs) for name, logprobs in rest]
        return keys + self._planned_drafts(keys, sizes) if self.drafting else keys

    def _planned_drafts(self, keys: list[Key], sizes: Sequence[int]) -> list[Key]:
        """Of the model that drafts: it reads steps of all sizes, and guesses for all requests."""
        mixed = [key for key in keys if isinstance(key, Shape) and key.tokens > key.rows]
        found: list[Key] = [Reading(self.tokens + self.rows, self.rows)]
        found += [Reading(key.tokens, key.rows) for key in mixed]
        guessing = [rows for rows in reversed(sizes) if rows <= self.padded(self.rows)]
        for rows in guessing:
            found += [Guessing(rows, name) for name in ("greedy", "plain")]
        return [*found, Guessing(guessing[0], "full")]

    def _mixed_rows(self, tokens: int) -> int:
        return min(self.rows, tokens - 1)


def ends(keys: Iterable[Key]) -> list[Key]:
    """The first and the last of each kind, in which most kernels of all appear; of a model that
    drafts none."""
    kinds: dict[Hashable, list[Key]] = {}
    for key in keys:
        if isinstance(key, Shape):
            kinds.setdefault((key.tokens == key.rows, key.short), []).append(key)
        elif isinstance(key, Sampling):
            kinds.setdefault(key[1:], []).append(key)
    return [key for alike in kinds.values() for key in dict.fromkeys((alike[0], alike[-1]))]


def _size(count: int, sizes: Sequence[int]) -> int:
    """The first of ascending `sizes` that holds `count`; `count` itself where none does."""
    return next((size for size in sizes if size >= count), count)
