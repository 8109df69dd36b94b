"""4-bit codes in the words that kernels read (pack.py): one pass, while weights are loaded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, wait_for_inputs

WORDS = 1024  # of a program


@triton.jit
def pack_words_kernel(
    codes, zero, words, count, width, stored, groups, WORDS: tl.constexpr, FLOATS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`count` words in rows of `width`, of codes in rows of `stored` bytes. `zero` or none: uint8,
    not 0 for those of `groups` of 16 columns in each row whose codes become 0."""
    # What is written is a weight, which later kernels read without waiting: they may not start yet.
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = at < count
    row, word = at // width, (at % width).to(tl.int32)
    result = tl.zeros([WORDS], tl.uint32)
    for d in tl.static_range(4):
        # The codes of columns 32 d + 2 j and the next are one byte.
        place = word // 16 * 64 + 16 * d + word % 16
        byte = tl.load(codes + row * stored + place, mask=inside & (place < stored), other=0)
        if zero is not None:
            group = place // 8
            none = tl.load(zero + row * groups + group, mask=inside & (group < groups), other=0)
            byte = tl.where(none != 0, 0, byte)
        pair = byte.to(tl.uint32)
        pair = (pair & 0xF) | ((pair & 0xF0) << 12)  # one in each half
        if not FLOATS:
            result |= pair << (4 * d)
        elif d == 0:
            result |= ((pair & 0x80008) << 12) | ((pair & 0x60006) << 6) | ((pair & 0x10001) << 14)
        elif d == 1:
            result |= ((pair & 0x80008) << 6) | (pair & 0x70007)
        elif d == 2:
            result |= ((pair & 0x80008) << 10) | ((pair & 0x70007) << 4)
        else:  # signs are in the other half
            result |= ((pair & 0x70007) << 10) | ((pair & 8) << 16) | ((pair >> 16) & 8)
    tl.store(words + at, result.to(tl.int32, bitcast=True), mask=inside)


def pack_words(codes: torch.Tensor, zero: torch.Tensor | None, floats: bool) -> torch.Tensor:
    """int32 [N, blocks * 16] of codes [N, K / 2], two in a byte, the first below; K is padded with
    zeros to blocks of 128 columns.

    `floats`: codes of e2m1, whose sign, exponent and mantissa get as far apart as a bfloat16 has
    them, else integers. `zero` bool [N, K / 16]: groups whose codes become 0.
    """
    rows, stored = codes.shape
    width = -(-stored // 64) * 16
    words = torch.empty((rows, width), dtype=torch.int32, device=codes.device)
    zero = None if zero is None else zero.contiguous().view(torch.uint8)
    launch(
        pack_words_kernel,
        (triton.cdiv(rows * width, WORDS),),
        codes.device,
        codes.contiguous(),
        zero,
        words,
        rows * width,
        width,
        stored,
        0 if zero is None else zero.shape[1],
        WORDS=WORDS,
        FLOATS=floats,
        num_warps=4,
    )
    return words
