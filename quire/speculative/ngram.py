"""Prompt lookup: where the last tokens have come before, what followed them may come again.

Saxena, "Prompt Lookup Decoding" (2023). The index grows with the request, so that a proposal takes
time by the n-gram's length and not by the context's.
"""

from __future__ import annotations

# N-grams that one call indexes at most, about two milliseconds: a long prompt is indexed over its
# first steps, none of which is held up.
MOST_INDEXED = 4096


class NgramDrafter:
    """Of one request: where each n-gram of `least` to `most` tokens was last followed by a token.

    The longest n-gram that ends the tokens and is known decides, and its latest place. A place is
    kept under the n-gram's hash, and the tokens there are compared.
    """

    def __init__(self, least: int, most: int):
        assert 1 <= least <= most
        self._sizes = range(most, least - 1, -1)
        self._places: dict[int, dict[int, int]] = {size: {} for size in self._sizes}
        self._indexed = 0  # tokens whose n-grams are known

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` drafts; see Drafter."""
        self._index(tokens)
        for size in self._sizes:
            last = tokens[-size:]
            place = self._places[size].get(hash(tuple(last)))
            if place is not None and tokens[place - size : place] == last:
                return _continued(tokens, place, count)
        return []

    def _index(self, tokens: list[int]) -> None:
        """N-grams that end before the last token: something follows them."""
        end = min(len(tokens) - 1, self._indexed + MOST_INDEXED // len(self._sizes))
        for size in self._sizes:
            places = self._places[size]
            for place in range(max(size, self._indexed + 1), end + 1):
                places[hash(tuple(tokens[place - size : place]))] = place
        self._indexed = max(self._indexed, end)


def _continued(tokens: list[int], place: int, count: int) -> list[int]:
    """`count` tokens from `place` on. Behind the last one it goes on with what it has found: what
    repeats itself may do so once more."""
    period = len(tokens) - place
    found = tokens[place : place + count]
    while len(found) < count:
        found.append(found[len(found) - period])
    return found
