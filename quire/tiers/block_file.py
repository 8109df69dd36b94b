"""A page as a file: its name, a header that says whose bytes follow, and the bytes.

The name is a hash of the identity, keyed by the tier's secret: whoever has the secret finds the
page, and nobody else can tell from the name what it is. The header has the identity under a mask
that only name and secret give, so that a page can be handed on to a tier with another secret. The
checksum is SHA-256 over the secret, the header before the checksum, and the page; so a file of
another root, another page's file under this name, and any changed bit are all seen.
"""

from __future__ import annotations

import hashlib
import struct

from quire.tiers.cold import Damaged

FORMAT_VERSION = 2  # 1 was named by identities; nothing finds those, and they are evicted
MAGIC = b"quirekv\0"
# Magic, version, header length, page length, cache fingerprint, masked identity; then the checksum.
_FIELDS = struct.Struct("<8sIIQ32s32s")
_CHECKSUM_BYTES = 32
HEADER_BYTES = _FIELDS.size + _CHECKSUM_BYTES


class PageHeader:
    """Makes and checks headers of one engine's pages. `fingerprint` and `secret`: 32 bytes."""

    def __init__(self, fingerprint: bytes, secret: bytes):
        self._fingerprint = fingerprint
        self._keyed = hashlib.sha256(secret)
        self._names = hashlib.blake2b(digest_size=32, key=secret, person=b"quire page name")
        self._masks = hashlib.blake2b(digest_size=32, key=secret, person=b"quire page mask")

    def name(self, identity: bytes) -> str:
        """What a page is called: 64 digits."""
        return _digest(self._names, identity).hex()

    def identity(self, header: bytes | bytearray, name: str) -> bytes | None:
        """The page whose file has this header and name; None where they are no such file's."""
        masked = _FIELDS.unpack_from(header)[-1]
        identity = _xor(masked, _digest(self._masks, name.encode()))
        return identity if self.name(identity) == name else None

    def make(self, identity: bytes, page: memoryview) -> bytes:
        """The header of a page."""
        fields = self._fields(identity, len(page))
        return fields + self._checksum(fields, page)

    def check(self, header: bytes | bytearray, identity: bytes, page: memoryview) -> None:
        """Raise Damaged where header and page are not those of this identity."""
        fields = self._fields(identity, len(page))
        if header[: len(MAGIC)] != MAGIC:
            raise Damaged("header", "no block file")
        if header[: _FIELDS.size] != fields:
            raise Damaged("identity", "the header is another block's")
        if header[_FIELDS.size :] != self._checksum(fields, page):
            raise Damaged("checksum", "the checksum differs")

    def _fields(self, identity: bytes, length: int) -> bytes:
        masked = _xor(identity, _digest(self._masks, self.name(identity).encode()))
        return _FIELDS.pack(MAGIC, FORMAT_VERSION, HEADER_BYTES, length, self._fingerprint, masked)

    def _checksum(self, fields: bytes, page: memoryview) -> bytes:
        digest = self._keyed.copy()
        digest.update(fields)
        digest.update(page)  # without the GIL
        return digest.digest()


def _digest(keyed: hashlib.blake2b, data: bytes) -> bytes:
    hashed = keyed.copy()
    hashed.update(data)
    return hashed.digest()


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))
