"""Block identity: canonical bytes hashed with BLAKE2b-256, equal in every process.

Two blocks with one identity hold the same KV: the hash covers everything that decides their
content (model, numerics, layout, group, all tokens before, tenant). Every field is written with
its length, so that no two different inputs have the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import cache

SCHEMA_VERSION = 1
DIGEST_BYTES = 32
_LENGTH = struct.Struct("<Q")
_EMPTY = _LENGTH.pack(0)
# No identity leaves the process: tiers name pages by hashes of them with secrets of their own.
KEY = b"quire block identity"


@cache
def _packing(tokens: int) -> tuple[Callable[..., bytes], bytes]:
    """What packs so many tokens into int64, and the bytes' length as `canonical` writes it."""
    packed = struct.Struct(f"<{tokens}q")
    return packed.pack, _LENGTH.pack(packed.size)


def canonical(*fields: bytes) -> bytes:
    """Length-prefixed concatenation: injective over tuples of byte strings."""
    return b"".join([part for f in fields for part in (_LENGTH.pack(len(f)), f)])


class BlockIdentity:
    """Makes identities for one engine.

    `fingerprint`: bytes that change when the model, its numerics or the cache layout change
    (Plan.cache_fingerprint).
    """

    def __init__(self, fingerprint: bytes):
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES, key=KEY)
        self._prefix = canonical(struct.pack("<I", SCHEMA_VERSION), fingerprint)

    def root(self, group: int, tenant: str = "", salt: str = "", adapter: str = "") -> bytes:
        """The parent of a sequence's first block."""
        # A client's JSON may hold lone surrogates; they have bytes of their own.
        names = (name.encode("utf-8", "surrogatepass") for name in (tenant, salt, adapter))
        return self._digest(self._prefix + canonical(struct.pack("<I", group), *names))

    def block(self, parent: bytes, tokens: Sequence[int], media: bytes = b"") -> bytes:
        """The identity of a full block of `tokens` that follows `parent`."""
        # canonical(parent, raw, media), without its loop: this runs for every block.
        pack, size = _packing(len(tokens))
        ends = canonical(media) if media else _EMPTY
        return self._digest(
            b"".join((_LENGTH.pack(len(parent)), parent, size, pack(*tokens), ends))
        )

    def _digest(self, data: bytes) -> bytes:
        hashed = self._hash.copy()  # has taken in the key already
        hashed.update(data)
        return hashed.digest()
