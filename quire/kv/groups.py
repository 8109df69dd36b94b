"""KV groups: layers that keep KV for the same span of tokens, and so share block tables."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kv import BLOCK_SIZE


@dataclass(frozen=True)
class KVGroup:
    """A set of layers with one block table per request.

    `window` None: every token is kept (full attention). Otherwise a query at position p reads
    keys p-window+1..p and older blocks are given back. `page_bytes`: one block in all layers of
    the group. `pool`: index of the pool its blocks come from; groups of one pool have equal
    page_bytes.
    """

    index: int
    window: int | None
    layers: tuple[int, ...]
    page_bytes: int
    pool: int = 0

    def first_needed(self, position: int) -> int:
        """Index of the first block that a query at `position` reads."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // BLOCK_SIZE

    def peak_blocks(self, tokens: int, step_tokens: int) -> int:
        """Most blocks a request of `tokens` holds when it computes `step_tokens` in one step."""
        whole = -(-tokens // BLOCK_SIZE)
        if self.window is None:
            return whole
        return min(whole, -(-(self.window + step_tokens) // BLOCK_SIZE) + 1)
