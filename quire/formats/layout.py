"""Sizes of number formats: what headers and plans need, without torch."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one value, for formats whose values stand alone.
DENSE_BYTES = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8_e4m3": 1, "f8_e5m2": 1, "f8_e8m0": 1, "i64": 8,
    "i32": 4, "i16": 2, "i8": 1, "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1,
}  # fmt: skip
FLOAT_FORMATS = frozenset(name for name in DENSE_BYTES if name[0] in "fb" and name != "bool")


@dataclass(frozen=True)
class BlockFormat:
    """How many values one block holds and how many bytes it takes."""

    name: str
    values_per_block: int
    bytes_per_block: int


# Block layouts: ggml/src/ggml-common.h of llama.cpp.
BLOCK_FORMATS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        BlockFormat("f32", 1, 4),
        BlockFormat("f16", 1, 2),
        BlockFormat("bf16", 1, 2),
        BlockFormat("q4_0", 32, 18),
        BlockFormat("q4_1", 32, 20),
        BlockFormat("q5_0", 32, 22),
        BlockFormat("q5_1", 32, 24),
        BlockFormat("q8_0", 32, 34),
        BlockFormat("q4_k", 256, 144),
        BlockFormat("q5_k", 256, 176),
        BlockFormat("q6_k", 256, 210),
    )
}


def row_bytes(format: str, columns: int) -> int:
    """Bytes of one row of `columns` values. ValueError if blocks do not divide the row."""
    block = BLOCK_FORMATS[format]
    if columns % block.values_per_block:
        raise ValueError(
            f"a row of {columns} values is not a whole number of {format} blocks "
            f"of {block.values_per_block}"
        )
    return columns // block.values_per_block * block.bytes_per_block
