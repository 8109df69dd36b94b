"""Quantised weights as checkpoints have them, once their scheme's names and conventions are gone.

A weight has N outputs (rows) and K inputs; experts have a dimension E before both.

| format    | codes                           | scales                         | also            |
|-----------|---------------------------------|--------------------------------|-----------------|
| fp8       | float8_e4m3fn [N, K]            | float32 [N]                    |                 |
| fp8_block | float8_e4m3fn [N, K]            | float32 [N / 128, K / 128]     |                 |
| nvfp4     | uint8 [N, K / 2], e2m1          | float8_e4m3fn [N, K / 16]      | row_scales      |
| mxfp4     | uint8 [N, K / 2], e2m1          | uint8 ue8m0 [N, K / 32]        |                 |
| int4      | uint8 [N, K / 2], 0 to 15       | half or float32 [N, K / g]     | zeros           |
| int8      | uint8 [N, K]                    | as int4                        | zeros           |

`row_scales` float32 [N]; `zeros` uint8 [N, K / g], or none. An even column is in a byte's low
half. Divisions round up. A value is (code - zero) * scale * row_scale; without `zeros`, zero is 8
for int4 and 128 for int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = ("fp8", "fp8_block", "nvfp4", "mxfp4", "int4", "int8")
FOUR_BITS = ("nvfp4", "mxfp4", "int4")
# Values of e2m1 without the sign (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALF_OR_FLOAT = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 128  # rows and columns of an fp8_block


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight [N, K], or [E, N, K] of experts, in one of FORMATS; see the table above."""

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    row_scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return int(self.codes.shape[-2])

    @property
    def k(self) -> int:
        return int(self.codes.shape[-1]) * (2 if self.format in FOUR_BITS else 1)

    @property
    def experts(self) -> int | None:
        return int(self.codes.shape[0]) if self.codes.dim() == 3 else None

    @property
    def group(self) -> int:
        """Columns that share a scale, where scales are by group of columns."""
        fixed = {"nvfp4": 16, "mxfp4": 32, "fp8_block": BLOCK, "fp8": self.k}
        if self.format in fixed:
            return fixed[self.format]
        return self.k // max(1, int(self.scales.shape[-1]))

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """One expert's weight."""
        return QuantizedWeight(
            self.format,
            self.codes[expert],
            self.scales[expert],
            None if self.row_scales is None else self.row_scales[expert],
            None if self.zeros is None else self.zeros[expert],
        )

    def check(self) -> None:
        """Raises ValueError for dtypes or shapes that the table does not have."""
        if self.format not in FORMATS:
            raise ValueError(f"format: {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.codes.dim() not in (2, 3):
            raise ValueError(f"codes: expected [N, K] or [E, N, K], not {list(self.codes.shape)}")
        eight = torch.float8_e4m3fn if self.format.startswith("fp8") else torch.uint8
        lead, n, k = tuple(self.codes.shape[:-2]), self.n, self.k
        dtypes, shape = {
            "fp8": ((torch.float32,), (n,)),
            "fp8_block": ((torch.float32,), (-(-n // BLOCK), -(-k // BLOCK))),
            "nvfp4": ((torch.float8_e4m3fn,), (n, k // 16)),
            "mxfp4": ((torch.uint8,), (n, k // 32)),
        }.get(self.format, (HALF_OR_FLOAT, (n, k // max(1, self.group))))
        wanted = {
            "codes": (self.codes, (eight,), lead + tuple(self.codes.shape[-2:])),
            "scales": (self.scales, dtypes, lead + shape),
        }
        if self.format == "nvfp4":
            wanted["row_scales"] = (_given(self.row_scales), (torch.float32,), (*lead, n))
        if self.zeros is not None:
            wanted["zeros"] = (self.zeros, (torch.uint8,), tuple(self.scales.shape))
        for name, (tensor, types, size) in wanted.items():
            if tensor.dtype not in types or tuple(tensor.shape) != size:
                raise ValueError(
                    f"{name} of {self.format}: expected {types[0]} {list(size)}, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )
        if self.format not in ("fp8", "fp8_block") and (self.group == 0 or k % self.group):
            raise ValueError(f"scales of {self.format}: {k} columns are not whole groups")


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0) if tensor is None else tensor


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes of a byte, low half first, uint8 [..., 2 * bytes]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """The weight's values, float32 of its own shape. Exact except for int formats' products."""
    codes = unpack_codes(weight.codes) if weight.format in FOUR_BITS else weight.codes
    k = weight.k
    if weight.format in ("nvfp4", "mxfp4"):
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
        values = table[codes.int()]
    else:
        values = codes.float()
    if weight.format == "fp8":
        return values * weight.scales[..., None]
    if weight.format == "fp8_block":
        rows = weight.scales.repeat_interleave(BLOCK, dim=-2)[..., : weight.n, :]
        return values * rows.repeat_interleave(BLOCK, dim=-1)[..., :k]
    scales = weight.scales
    if weight.format == "mxfp4":
        scales = torch.exp2(scales.float() - 127)
    by_column = scales.float().repeat_interleave(weight.group, dim=-1)
    if weight.format == "nvfp4":
        assert weight.row_scales is not None
        return values * by_column * weight.row_scales[..., None]
    if weight.format in ("int4", "int8"):
        zero = 8.0 if weight.format == "int4" else 128.0
        zeros = zero if weight.zeros is None else weight.zeros.float()
        if isinstance(zeros, torch.Tensor):
            zeros = zeros.repeat_interleave(weight.group, dim=-1)
        values = values - zeros
    return values * by_column
