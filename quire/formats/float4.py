"""Four-bit floats (e2m1 of OCP MX) in plain torch, two in a byte.

Codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 is the sign. There is neither infinity nor
NaN. Column 2 j of a row is in the low half of byte j, column 2 j + 1 in the high half.
"""

from __future__ import annotations

from functools import cache

import torch

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] to uint8 codes [..., K], the low half of a byte first."""
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of `unpack_nibbles`: uint8 codes below 16 [..., K], K even, to [..., K / 2]."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] to float32 [..., K]."""
    # Both values of a byte at once, as the eight bytes of a float64, which are only moved.
    pairs = _pairs(packed.device)
    values = torch.index_select(pairs, 0, packed.reshape(-1).int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of each byte: float32 [256, 2] seen as float64 [256]."""
    single = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    pairs = torch.tensor([[single[byte & 15], single[byte >> 4]] for byte in range(256)])
    return pairs.view(torch.float64)[:, 0].to(device)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Floats [..., K], K even, to uint8 [..., K / 2]: rounded to nearest, ties to the even code,
    saturated at 6. ValueError for a NaN, which has no code."""
    if values.isnan().any():
        raise ValueError("NaN has no code in e2m1")
    size = values.float().abs()
    # Halfway between two values a tie goes to the even code: up where the upper one is even.
    codes = (size > 0.25).to(torch.uint8)
    for halfway, up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True)):
        codes += size >= halfway if up else size > halfway
    codes += size > 5.0
    return pack_nibbles(codes | (torch.signbit(values).to(torch.uint8) << 3))
