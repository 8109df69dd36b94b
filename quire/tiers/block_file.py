"""A page as a file: a header that says whose bytes follow, and the bytes.

The checksum is SHA-256 over the tier's secret, the header before the checksum, and the page; so a
file of another root, another page's file under this name, and any changed bit are all seen.
"""

from __future__ import annotations

import hashlib
import struct

from quire.tiers.cold import Damaged

FORMAT_VERSION = 1
MAGIC = b"quirekv\0"
# Magic, version, header length, page length, cache fingerprint, identity; then the checksum.
_FIELDS = struct.Struct("<8sIIQ32s32s")
_CHECKSUM_BYTES = 32
HEADER_BYTES = _FIELDS.size + _CHECKSUM_BYTES


class PageHeader:
    """Makes and checks headers of one engine's pages. `fingerprint` and `secret`: 32 bytes."""

    def __init__(self, fingerprint: bytes, secret: bytes):
        self._fingerprint = fingerprint
        self._keyed = hashlib.sha256(secret)

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
        return _FIELDS.pack(
            MAGIC, FORMAT_VERSION, HEADER_BYTES, length, self._fingerprint, identity
        )

    def _checksum(self, fields: bytes, page: memoryview) -> bytes:
        digest = self._keyed.copy()
        digest.update(fields)
        digest.update(page)  # without the GIL
        return digest.digest()
