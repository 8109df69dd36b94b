"""Random quantised weights of every format, plain and packed, and packing undone."""

from __future__ import annotations

from dataclasses import replace

import torch

from quire.kernels.reference.quantized.weights import FOUR_BITS, QuantizedWeight
from quire.kernels.triton.quantized.pack import PackedQuantized


def quantized(
    format: str,
    n: int,
    k: int,
    device: torch.device,
    seed: int,
    group: int = 128,
    zeros: bool = True,
) -> QuantizedWeight:
    """A weight [n, k] with every code and many scales, of values around 1 / sqrt(k)."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8).to(device)

    def positive(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.1).to(device) / k**0.5

    if format in ("fp8", "fp8_block"):
        codes = integers(0, 127, n, k) | integers(0, 2, n, k) << 7  # all but NaN
        shape = (n,) if format == "fp8" else (-(-n // 128), -(-k // 128))
        return QuantizedWeight(format, codes.view(torch.float8_e4m3fn), positive(*shape) / 64)
    codes = integers(0, 256, n, k // 2 if format in FOUR_BITS else k)
    if format == "nvfp4":
        scales = integers(0, 100, n, k // 16).view(torch.float8_e4m3fn)
        return QuantizedWeight(format, codes, scales, positive(n) / 16)
    if format == "mxfp4":
        return QuantizedWeight(format, codes, integers(118, 125, n, k // 32))
    top = 17 if format == "int4" else 256
    return QuantizedWeight(
        format,
        codes,
        (positive(n, k // group) / (8 if format == "int4" else 128)).bfloat16(),
        None,
        integers(0, top, n, k // group) if zeros else None,
    )


def quantized_experts(
    format: str, e: int, n: int, k: int, device: torch.device, seed: int, group: int = 32
) -> QuantizedWeight:
    each = [quantized(format, n, k, device, seed + i, group) for i in range(e)]

    def stack(name: str) -> torch.Tensor | None:
        parts = [getattr(w, name) for w in each]
        return None if parts[0] is None else torch.stack([p.view(torch.uint8) for p in parts]).view(
            parts[0].dtype
        )  # fmt: skip

    codes, scales = stack("codes"), stack("scales")
    assert codes is not None and scales is not None
    return replace(
        each[0], codes=codes, scales=scales, row_scales=stack("row_scales"), zeros=stack("zeros")
    )


def unpacked_codes(packed: PackedQuantized) -> torch.Tensor:
    """A packed weight's codes [N, K] in order, uint8: what pack did, bit by bit the other way."""
    if packed.codes.dtype == torch.uint8:
        return packed.codes[:, : packed.k]
    words = packed.codes.view(packed.n, -1, 16)
    found = torch.zeros(packed.n, words.shape[1], 4, 16, 2, dtype=torch.uint8, device=words.device)
    # A place from 16 on is in the other half.
    places = [(15, 8, 7, 14), (9, 2, 1, 0), (13, 6, 5, 4), (19, 12, 11, 10)]
    for d, place in enumerate(places):
        if packed.format == "int4":
            place = (4 * d + 3, 4 * d + 2, 4 * d + 1, 4 * d)
        for half in (0, 1):
            for bit, at in zip((3, 2, 1, 0), place, strict=True):
                value = (words >> (at + 16 * half) % 32) & 1
                found[:, :, d, :, half] |= (value << bit).to(torch.uint8)
    return found.reshape(packed.n, -1)[:, : packed.k]
