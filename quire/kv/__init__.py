"""KV cache bookkeeping: pools of blocks, groups of layers, block identity, prefix index.

Nothing here touches tensors: the runner owns the memory, this room says which block is whose.
"""

BLOCK_SIZE = 16  # tokens per block, everywhere
NULL_BLOCK = 0  # a block nobody owns: padding and warm-up write here


def most_blocks(longest: int) -> int:
    """Entries of a request's block table, where it has at most so many tokens."""
    return -(-longest // BLOCK_SIZE) + 1
