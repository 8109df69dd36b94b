"""How vectors of a cache are stored: as numbers, or packed in FP8 as DeepSeek V4 was trained for.

Packed keys are e4m3 in groups of 64 with a power of two for each group, but for the values that
rotate, which stay bfloat16; packed index keys are e4m3 with one float32 for all. Scales are rounded
up, so that nothing is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quire.formats.float8 import E4M3_MAX, decode_ue8m0, encode_e4m3, encode_ue8m0

GROUP = 64
# Groups of smaller values have the scale of these.
LEAST_MAGNITUDE = 1e-4
ALIGNED = 8  # bytes of a packed vector are a multiple of this


class Entries(Protocol):
    """`width`: elements of the cache that hold one vector of `size` values."""

    @property
    def size(self) -> int: ...

    @property
    def width(self) -> int: ...

    def pack(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 [N, size] as [N, width] of a cache in `dtype`."""

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """[..., width] of a cache as float32 [..., size]."""


@dataclass(frozen=True)
class Plain:
    """Numbers in the cache's own format."""

    size: int

    @property
    def width(self) -> int:
        return self.size

    def pack(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.float()


@dataclass(frozen=True)
class PackedKeys:
    """Bytes: e4m3 of what does not rotate, bfloat16 of the last `rotary` values, a ue8m0 scale for
    each group, padding."""

    size: int
    rotary: int

    @property
    def fixed(self) -> int:
        return self.size - self.rotary

    @property
    def groups(self) -> int:
        return -(-self.fixed // GROUP)

    @property
    def width(self) -> int:
        return -(-(self.fixed + 2 * self.rotary + self.groups) // ALIGNED) * ALIGNED

    def pack(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        fixed, turned = values[:, : self.fixed], values[:, self.fixed :]
        padded = torch.nn.functional.pad(fixed, (0, self.groups * GROUP - self.fixed))
        grouped = padded.view(len(values), self.groups, GROUP)
        scales = encode_ue8m0(grouped.abs().amax(-1).clamp(min=LEAST_MAGNITUDE) / E4M3_MAX)
        codes = encode_e4m3(grouped / decode_ue8m0(scales)[:, :, None]).flatten(1)
        stored = values.new_zeros(len(values), self.width, dtype=torch.uint8)
        end = self.fixed + 2 * self.rotary
        stored[:, : self.fixed] = codes[:, : self.fixed].view(torch.uint8)
        stored[:, self.fixed : end] = turned.bfloat16().contiguous().view(torch.uint8)
        stored[:, end : end + self.groups] = scales
        return stored

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        end = self.fixed + 2 * self.rotary
        codes = stored[..., : self.fixed].contiguous().view(torch.float8_e4m3fn).float()
        turned = stored[..., self.fixed : end].contiguous().view(torch.bfloat16).float()
        scales = decode_ue8m0(stored[..., end : end + self.groups].contiguous())
        spread = scales.repeat_interleave(GROUP, dim=-1)[..., : self.fixed]
        return torch.cat([codes * spread, turned], dim=-1)


@dataclass(frozen=True)
class PackedIndex:
    """Bytes: e4m3, then a float32 scale, a power of two."""

    size: int

    @property
    def width(self) -> int:
        return self.size + 4

    def pack(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST_MAGNITUDE)
        scales = decode_ue8m0(encode_ue8m0(largest / E4M3_MAX))
        codes = encode_e4m3(values / scales).view(torch.uint8)
        return torch.cat([codes, scales.contiguous().view(torch.uint8)], dim=1)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        codes = stored[..., : self.size].contiguous().view(torch.float8_e4m3fn).float()
        return codes * stored[..., self.size :].contiguous().view(torch.float32)
