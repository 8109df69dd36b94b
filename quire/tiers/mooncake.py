"""The Mooncake tier: pages in a distributed store of other machines' memory and disks.

A value is a block file's header and the page, so that what comes back is checked as a file is. The
client library reconnects by itself; a code that is no answer about the page is a fault.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from quire.config.sizes import parse_size
from quire.errors import UsageError
from quire.tiers.block_file import HEADER_BYTES, PageHeader
from quire.tiers.cold import Damaged, Evicted, Missing
from quire.tiers.directory import read_secret

# Return codes of Mooncake (mooncake-store/include/types.h).
OBJECT_NOT_FOUND = -704
BUFFER_TOO_SMALL = -600
CONNECT_SECONDS = 2.0


class MooncakeError(Exception):
    """A call gave an error code. `kind`: for a counter."""

    def __init__(self, call: str, code: int):
        super().__init__(f"Mooncake's {call} gave {code}")
        self.kind = f"mooncake{code}"


class MooncakeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON file that `--kv-tiers mooncake:FILE` names; names are those of Mooncake's own
    configuration, but for `secret_file`: 32 bytes that key names and checksums, equal on all
    machines that share blocks. `global_segment_size`: memory of this machine for the store (0:
    only other processes hold pages), which goes when the engine ends."""

    master_server_address: str
    metadata_server: str
    secret_file: str
    local_hostname: str = "127.0.0.1"
    protocol: Literal["tcp", "rdma"] = "tcp"
    device_name: str = ""
    global_segment_size: int | str = 0
    local_buffer_size: int | str = 64 * 2**20


def read_config(path: str) -> MooncakeConfig:
    """Raises UsageError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=MooncakeConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise _unusable(path, str(error)) from None


def _unusable(
    path: str, why: str, fix: str = "mend the file; docs/kv-tiers.md has one"
) -> UsageError:
    return UsageError(
        "kv_tier",
        f"--kv-tiers: the configuration {path} cannot be used",
        why=why,
        fix=fix,
        field="kv_tiers",
    )


class MooncakeTier:
    """One client of a store. Pages are moved through registered buffers of its own, one for each
    of at most `workers` calls at a time. `largest`: bytes of the largest page.

    Raises UsageError where the configuration or the package cannot be used. The store itself may
    be unreachable, now or later: that is a fault like any other.
    """

    name = "mooncake"
    capacity, used, count, evictions = 0, 0, 0, 0  # the store's own business
    hands_on = False
    evicted: Evicted | None = None

    def __init__(self, path: str, fingerprint: bytes, largest: int, workers: int = 8):
        self._config = read_config(path)
        if not self._config.master_server_address.rpartition(":")[2].isdecimal():
            raise _unusable(path, "master_server_address must be like 10.0.0.1:50051")
        secret = _read_secret(path, self._config.secret_file)
        self._sizes = [
            _bytes(path, size)
            for size in (self._config.global_segment_size, self._config.local_buffer_size)
        ]
        self._client_type = _client_type(path)
        self._header = PageHeader(fingerprint, secret)
        self._prefix = f"quire-{fingerprint[:8].hex()}-"
        self._memory = [mmap.mmap(-1, HEADER_BYTES + largest) for _ in range(workers)]
        self._connecting = threading.Lock()
        self._client: Any = None
        self._buffers: queue.SimpleQueue[tuple[int, memoryview]] = queue.SimpleQueue()

    def start(self) -> None:
        self._connected()

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                client, config = self._client_type(), self._config
                # Asked first, as the library goes on trying for a minute and a half.
                host, _, port = config.master_server_address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
                code = client.setup(
                    config.local_hostname, config.metadata_server, *self._sizes, config.protocol,
                    config.device_name, config.master_server_address,
                )  # fmt: skip
                if code != 0:
                    raise MooncakeError("setup", code)
                for memory in self._memory:
                    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
                    code = client.register_buffer(address, len(memory))
                    if code != 0:
                        raise MooncakeError("register_buffer", code)
                    self._buffers.put((address, memoryview(memory)))
                self._client = client
        return self._client

    @contextmanager
    def _buffer(self) -> Iterator[tuple[int, memoryview]]:
        buffer = self._buffers.get()
        try:
            yield buffer
        finally:
            self._buffers.put(buffer)

    def _key(self, identity: bytes) -> str:
        return self._prefix + self._header.name(identity)

    def present(self, identities: Sequence[bytes]) -> set[bytes]:
        codes = self._connected().batch_is_exist([self._key(each) for each in identities])
        if len(codes) != len(identities) or any(code < 0 for code in codes):
            raise MooncakeError("batch_is_exist", min(codes, default=0))
        return {each for each, code in zip(identities, codes, strict=True) if code == 1}

    def load(self, identity: bytes, into: memoryview) -> None:
        client, size = self._connected(), HEADER_BYTES + len(into)
        with self._buffer() as (address, buffer):
            code = client.get_into(self._key(identity), address, len(buffer))
            if code == OBJECT_NOT_FOUND:
                raise Missing
            try:
                if code == BUFFER_TOO_SMALL or (code >= 0 and code != size):
                    raise Damaged("length", f"{code} bytes")
                if code < 0:
                    raise MooncakeError("get_into", code)
                into[:] = buffer[HEADER_BYTES:size]
                self._header.check(bytes(buffer[:HEADER_BYTES]), identity, into)
            except Damaged:
                client.remove(self._key(identity), True)
                raise

    def store(self, identity: bytes, page: memoryview) -> bool:
        if self.present([identity]):
            return False
        size = HEADER_BYTES + len(page)
        with self._buffer() as (address, buffer):
            buffer[HEADER_BYTES:size] = page
            buffer[:HEADER_BYTES] = self._header.make(identity, buffer[HEADER_BYTES:size])
            code = self._connected().put_from(self._key(identity), address, size)
        if code != 0:
            raise MooncakeError("put_from", code)
        return True

    def forget(self, identity: bytes) -> None:
        code = self._connected().remove(self._key(identity), True)
        if code not in (0, OBJECT_NOT_FOUND):
            raise MooncakeError("remove", code)

    def clear(self) -> int:
        code = int(self._connected().remove_by_regex(f"^{self._prefix}.*", True))
        if code < 0:
            raise MooncakeError("remove_by_regex", code)
        return code

    def close(self) -> None:
        with self._connecting:
            if self._client is not None:
                self._client.close()
                self._client = None


def _client_type(path: str) -> Any:
    """The client class of Mooncake's package, which is an extra."""
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        fix = "pip install 'quire[mooncake]', and the system's libibverbs1 librdmacm1 libnuma1"
        raise _unusable(path, f"Mooncake's package does not load: {error}", fix) from None
    return MooncakeDistributedStore


def _read_secret(path: str, secret: str) -> bytes:
    try:
        directory = os.open(Path(secret).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return read_secret(Path(secret).name, directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise _unusable(path, f"secret_file: {error}") from None


def _bytes(path: str, size: int | str) -> int:
    with suppress(ValueError):
        value = parse_size(size) if isinstance(size, str) else size
        if value >= 0:
            return value
    raise _unusable(path, f"{size!r} is no size like 4GiB or a number of bytes")
