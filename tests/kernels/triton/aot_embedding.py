"""Embeddings of Qwen3-8B and of rows that no vector load fits."""

from __future__ import annotations

from quire.kernels.triton.embedding.embedding import BLOCK_H, embedding_kernel
from tests.kernels.triton.aot import Case


def embedding(dtype: str, h: int) -> Case:
    types = {"ids_ptr": "*i64", "table_ptr": dtype, "out_ptr": dtype}
    types |= {"vocab": "i32", "scale": "fp32"}
    constants = {"TABLE_STRIDE": h, "H": h, "BLOCK_H": BLOCK_H}
    return Case(f"embedding {dtype} H {h}", embedding_kernel, types, constants)


CASES = [embedding("*bf16", 4096), embedding("*fp32", 33)]
