"""Finding markers in text that comes in pieces: a marker's beginning at the end is held back."""

from __future__ import annotations


def held_back(text: str, *markers: str) -> int:
    """Length of the longest end of `text` with which one of `markers` may yet begin."""
    longest = 0
    for marker in markers:
        start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
        while start >= 0 and not marker.startswith(text[start:]):
            start = text.find(marker[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest


def split_off(text: str, count: int) -> tuple[str, str]:
    """`text` without its last `count` characters, and those."""
    return text[: len(text) - count], text[len(text) - count :]
