"""Which modules a pattern of a quantisation config means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from quire.quant.expressions import Expression

# Parts that tools leave as they are without saying so: tables of tokens, what chooses experts, and
# the ends of DeepSeek-V3's layers that predict further tokens.
USUALLY_DENSE = (
    "lm_head",
    "embed_tokens",
    "gate",
    "router",
    "shared_expert_gate",
    "eh_proj",
    "head",
)
EXPERTS = "experts"  # the part of a name under which a layer's experts stand
MAX_NAME = 512  # names of files, too, can be made to take long
_NUMBER = re.compile("[0-9]+")
# What a pattern needs for the numbers in a name to matter: digits, or what stands for some.
_OF_NUMBERS = re.compile(r"[0-9?\[]|re:")


class Patterns:
    """Patterns of module names, of which the first that means a module counts.

    "re:..." is a regular expression from the name's beginning (compressed-tensors); with "*" a
    wildcard (ModelOpt, gpt-oss); else whole parts of the dotted name, wherever they stand, so that
    "gate" means "mlp.gate" and not "mlp.gate_proj". A pattern also means what lies in a module.
    Raises ModelError for an expression that Expression does not take.
    """

    def __init__(self, patterns: Sequence[str]):
        self._plain: dict[str, int] = {}
        self._expressions: list[tuple[int, Expression]] = []
        self._wildcards: list[tuple[int, re.Pattern[str]]] = []
        for place, pattern in enumerate(patterns):
            if pattern.startswith("re:"):
                self._expressions.append((place, Expression(pattern.removeprefix("re:"))))
            elif "*" in pattern:
                # A wildcard may begin at any part of the name and end before any.
                ends = fnmatch.translate(pattern), fnmatch.translate(pattern + ".*")
                self._wildcards.append((place, re.compile(rf"(?:.*\.)?(?:{'|'.join(ends)})")))
            else:
                self._plain.setdefault(pattern, place)
        self._lengths = sorted({pattern.count(".") + 1 for pattern in self._plain})
        self._numbers_matter = any(map(_OF_NUMBERS.search, patterns))
        self._known: dict[str, int | None] = {}

    def first(self, module: str) -> int | None:
        """The place of the first pattern that means a module; None, too, for a name of more than
        512 characters."""
        if len(module) > MAX_NAME:
            return None
        if self._numbers_matter:
            return self._first(module)
        # One look for all the experts of all layers.
        kind = _NUMBER.sub("0", module)
        if kind not in self._known:
            self._known[kind] = self._first(kind)
        return self._known[kind]

    def _first(self, module: str) -> int | None:
        found = [place for place, pattern in self._wildcards if pattern.match(module)]
        found += [place for place, pattern in self._expressions if pattern.matches(module)]
        parts = module.split(".")
        for length in self._lengths:
            for start in range(len(parts) - length + 1):
                place = self._plain.get(".".join(parts[start : start + length]))
                if place is not None:
                    found.append(place)
        return min(found, default=None)


def usually_dense(module: str) -> bool:
    return module.rpartition(".")[2] in USUALLY_DENSE


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] == "embed_tokens"
