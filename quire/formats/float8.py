"""Eight-bit floats in plain torch: e4m3 and e5m2 (OCP 8-bit floating point), ue8m0 (OCP MX scales).

e4m3 is the variant without infinities: code 0x7F and 0xFF are NaN, the largest value is 448. e5m2
has infinities, its largest value is 57344. ue8m0 code c stands for 2 ** (c - 127), 255 for NaN.
Decoding is exact. Encoding rounds to nearest, ties to even, and saturates: what is larger than the
largest value, infinities too, becomes the largest value; NaN stays NaN.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
UE8M0_NAN = 255


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn, or its bits as uint8, to float32 of the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Floats to float8_e4m3fn."""
    return values.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e5m2(codes: torch.Tensor) -> torch.Tensor:
    """float8_e5m2, or its bits as uint8, to float32 of the same shape."""
    return codes.view(torch.float8_e5m2).float()


def encode_e5m2(values: torch.Tensor) -> torch.Tensor:
    """Floats to float8_e5m2."""
    return values.float().clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """uint8 (or float8_e8m0fnu) to float32. The smallest, 2 ** -127, is subnormal in float32."""
    bits = codes.view(torch.uint8).int()
    # A code is the exponent of a float32 as it stands, but for the two ends.
    exponents = (bits << 23).masked_fill(bits == 0, 1 << 22)
    return exponents.masked_fill(bits == UE8M0_NAN, 0x7FC00000).view(torch.float32)


def encode_ue8m0(values: torch.Tensor) -> torch.Tensor:
    """Positive floats to uint8, rounded up to a power of two, so that what is divided by the scale
    never grows. Below 2 ** -127, zero too, code 0; above 2 ** 127, code 254; NaN and what is
    negative, code 255."""
    values = values.float()
    fraction, exponent = torch.frexp(values)  # fraction in [0.5, 1)
    codes = (exponent + 127 - (fraction == 0.5).int()).clamp(0, 254)
    codes = codes.masked_fill(values <= 2.0**-127, 0).masked_fill(values.isinf(), 254)
    return codes.masked_fill(values.isnan() | (values < 0), UE8M0_NAN).to(torch.uint8)
