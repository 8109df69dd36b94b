"""What both kernel sets share: the packed weight, the input forms of pack, and format facts."""

from dataclasses import dataclass

import torch

from quire.formats.layout import BLOCK_FORMATS

BLOCK = 16  # tokens in one block of the KV cache

# Weights in one block of a format, and bytes of that block in a GGUF file.
GGUF_BLOCKS = {
    name: (block.values_per_block, block.bytes_per_block) for name, block in BLOCK_FORMATS.items()
}
DENSE_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
DENSE_TYPES = {name: dtype for dtype, name in DENSE_FORMATS.items()}

GgufWeight = tuple[str, torch.Tensor, int, int]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [n, k] as a kernel set wants it; only the set that packed it may read `data`."""

    data: torch.Tensor
    format: str
    n: int
    k: int


def check_format(format: str, n: int, k: int) -> None:
    """Raises ValueError unless a weight [n, k] can have this format."""
    if format not in GGUF_BLOCKS:
        raise ValueError(
            f"weight format {format!r} is not supported; supported: {', '.join(GGUF_BLOCKS)}"
        )
    block = GGUF_BLOCKS[format][0]
    if n < 0 or k <= 0 or k % block:
        raise ValueError(
            f"a {format} weight needs n >= 0 and k a positive multiple of {block}, not [{n}, {k}]"
        )


def weight_source(weight: torch.Tensor | GgufWeight) -> GgufWeight:
    """The (format, data, n, k) of either form that pack accepts; data is contiguous on the CPU.

    A dense weight keeps its type and shape; a GGUF weight is uint8 of n rows, in any shape.
    """
    if isinstance(weight, torch.Tensor):
        if weight.dim() != 2 or weight.dtype not in DENSE_FORMATS:
            found = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"weight: expected [n, k] of f32, f16 or bf16, not {found}")
        format, data, (n, k) = DENSE_FORMATS[weight.dtype], weight, weight.shape
        check_format(format, n, k)
    else:
        format, data, n, k = weight
        check_format(format, n, k)
        elements, size = GGUF_BLOCKS[format]
        expected = n * k // elements * size
        if data.dtype != torch.uint8 or data.numel() != expected:
            found = f"{data.numel()} of {data.dtype}"
            raise ValueError(
                f"weight: {format} [{n}, {k}] is {expected} bytes of uint8, not {found}"
            )
    if data.device.type != "cpu":
        raise ValueError(f"weight: expected a CPU tensor, not {data.device}")
    return format, data.contiguous(), n, k
