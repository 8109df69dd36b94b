"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "4GiB", "500MB" or "1024". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,20})(\.\d{1,20})?\s*([a-zA-Z]*)\s*", text, re.ASCII)
    if not match or match[3].lower() not in _UNITS:
        raise ValueError("a size like 4GiB, 500MB or a number of bytes")
    unit = _UNITS[match[3].lower()]
    if match[2] and unit == 1:
        raise ValueError("a whole number of bytes")
    return int(match[1]) * unit + int(float(match[2] or 0) * unit)
