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


# Codes with scales (quire/formats/quantized.py): columns that share a scale, 0 where the group size
# is the checkpoint's choice or a row has one scale.
QUANT_FORMATS = {"fp8": 0, "fp8_block": 128, "nvfp4": 16, "mxfp4": 32, "int4": 0, "int8": 0}
INTEGER_FORMATS = ("int4", "int8")
# Integers whose columns belong to groups in an order of their own (GPTQ's desc_act): QuantTensor
# has no place for the order, so that they are read as values.
ORDERED_FORMATS = ("int4_ordered", "int8_ordered")
FP8_BLOCK = QUANT_FORMATS["fp8_block"]  # a block has as many rows as columns


def grouped(format: str, group: int) -> str:
    """A format's name in headers and plans: int4 and int8 with their columns per scale, 0 for the
    whole row, since kernels have some and not others: "int4_g128", "int8_row"."""
    if format not in INTEGER_FORMATS:
        return format
    return f"{format}_g{group}" if group else f"{format}_row"


def ungrouped(name: str) -> str:
    """The format of a name that `grouped` gave; other names are their own."""
    return name[:4] if name.startswith(INTEGER_FORMATS) and name not in ORDERED_FORMATS else name


def group_of(name: str, columns: int) -> int:
    """Columns that share a scale in rows of `columns` values; without a size in the name, 128."""
    if name == "fp8" or name.endswith("_row"):
        return columns
    return int(name.partition("_g")[2] or QUANT_FORMATS[ungrouped(name)] or 128)


def is_quantized(name: str) -> bool:
    return ungrouped(name) in QUANT_FORMATS or name in ORDERED_FORMATS


def quantized_nbytes(name: str, rows: int, columns: int) -> int:
    """Bytes of codes and scales of a QuantTensor; int4 and int8 with half scales and zero points.
    ValueError where groups do not divide the columns."""
    format, width = ungrouped(name), max(1, group_of(name, columns))
    if format not in ("fp8", "fp8_block") and columns % width:
        raise ValueError(f"groups of {width} do not divide {columns} columns of {format}")
    codes = rows * columns
    if format == "fp8":
        return codes + 4 * rows
    if format == "fp8_block":
        return codes + 4 * -(-rows // width) * -(-columns // width)
    if format == "nvfp4":
        return codes // 2 + codes // width + 4 * rows
    if format == "mxfp4":
        return codes // 2 + codes // width
    return (codes // 2 if format == "int4" else codes) + 3 * codes // width
