"""KV groups: layers that keep KV for the same span of tokens, and so share block tables."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kv import BLOCK_SIZE


@dataclass(frozen=True)
class KVGroup:
    """A set of layers with one block table per request.

    `window` None: every token is kept (full attention, or compressed entries of all tokens).
    Otherwise a query at position p reads keys p-window+1..p and older blocks are given back.
    `page_bytes`: one block in all layers of the group; `block_size`: its tokens. `pool`: index of
    the pool its blocks come from; groups of one pool have equal page_bytes. `checkpoint`: of a
    window, blocks are kept for prefix hits only before multiples of so many tokens and before the
    end of each prompt; None: all are.
    """

    index: int
    window: int | None
    layers: tuple[int, ...]
    page_bytes: int
    pool: int = 0
    block_size: int = BLOCK_SIZE
    checkpoint: int | None = None

    def first_needed(self, position: int) -> int:
        """Index of the first block that a query at `position` reads."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_size

    def blocks_of(self, tokens: int) -> int:
        """Blocks that `tokens` tokens from a sequence's start fill or begin."""
        return -(-tokens // self.block_size)

    def peak_blocks(self, tokens: int, step_tokens: int) -> int:
        """Most blocks a request of `tokens` holds when it computes `step_tokens` in one step."""
        whole = self.blocks_of(tokens)
        if self.window is None:
            return whole
        return min(whole, self.blocks_of(self.window + step_tokens) + 1)

    def keeps(self, block: int, prompt_boundary: int) -> bool:
        """Whether a computed block is kept for prefix hits; `prompt_boundary`: the last token count
        before the end of the prompt at which a hit can end."""
        if self.checkpoint is None:
            return True
        end = (block + 1) * self.block_size
        following = -(-end // self.checkpoint) * self.checkpoint
        return any(
            end <= boundary and self.first_needed(boundary) <= block
            for boundary in (following, prompt_boundary)
        )
