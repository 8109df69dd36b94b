"""What `--kv-tiers` names: where KV blocks go when the device is full."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.sizes import parse_size

KINDS = "dram:SIZE, fs:DIRECTORY:SIZE, mooncake:CONFIG.json"


@dataclass(frozen=True)
class TierSpec:
    """One tier as it was asked for. `size` in bytes (0: the tier's own configuration says),
    `path`: a directory (fs) or a file of JSON (mooncake)."""

    kind: str
    path: str = ""
    size: int = 0


def parse_tiers(text: str) -> tuple[TierSpec, ...]:
    """Tiers from "dram:32GiB,fs:/var/cache/quire:200GiB", the fastest first.

    Raises ValueError whose text says what is allowed.
    """
    tiers = tuple(_parse(part.strip()) for part in text.split(",") if part.strip())
    kinds = [tier.kind for tier in tiers]
    if kinds.count("dram") > 1 or "dram" in kinds[1:]:
        raise ValueError("a list with dram once, as its first")
    if kinds.count("mooncake") > 1:
        raise ValueError("a list with mooncake once")
    paths = [tier.path for tier in tiers if tier.path]
    if len(set(paths)) < len(paths):
        raise ValueError("a list that names each path once")
    return tiers


def _parse(part: str) -> TierSpec:
    kind, _, rest = part.partition(":")
    if kind == "dram" and rest:
        return TierSpec("dram", size=_size(rest))
    if kind == "fs":
        path, _, size = rest.rpartition(":")
        if path and size:
            return TierSpec("fs", path, _size(size))
    if kind == "mooncake" and rest:
        return TierSpec("mooncake", rest)
    raise ValueError(f"a list of {KINDS}")


def _size(text: str) -> int:
    size = parse_size(text)
    if size <= 0:
        raise ValueError("a list whose sizes are above 0")
    return size
