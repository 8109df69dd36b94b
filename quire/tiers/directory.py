"""The directory of a filesystem tier: private, with a secret, shared by several processes.

    secret          32 random bytes that key names and checksums
    blocks/         one file a page
    writers/        a locked file for each process that writes, and its temporary files

A process that dies leaves its lock free; whoever starts next deletes what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from quire.errors import UsageError

SECRET_BYTES = 32
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class TierDirectory:
    """Open handles on a tier's directory: files are named relative to these, never by path, and
    symbolic links are not followed, so nothing outside can be reached.

    Raises UsageError where the directory cannot be used, or others could write to it.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._check_owner(root)
                self.secret = read_secret("secret", root)
                self.blocks = _subdirectory(root, "blocks")
                self.writers = _subdirectory(root, "writers")
            finally:
                os.close(root)
            self._writer = secrets.token_hex(8)
            self._lock = os.open(f"{self._writer}.lock", _CREATE, 0o600, dir_fd=self.writers)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _unusable(self.path, str(error)) from None

    def _check_owner(self, root: int) -> None:
        found = os.fstat(root)
        if found.st_uid != os.geteuid():
            raise _unusable(self.path, "it belongs to another user")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _unusable(self.path, "other users may write to it", "chmod 700 it")

    def temporary(self, number: int) -> tuple[int, str]:
        """A new file that only this user can read, open for writing, and its name in writers/."""
        name = f"{self._writer}.{number}.tmp"
        return os.open(name, _CREATE, 0o600, dir_fd=self.writers), name

    def publish(self, temporary: str, name: str) -> None:
        """Give a temporary file its name in blocks/, at once for all who look."""
        os.rename(temporary, name, src_dir_fd=self.writers, dst_dir_fd=self.blocks)

    def discard(self, temporary: str) -> None:
        """Delete a temporary file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self.writers)

    def open_block(self, name: str) -> int:
        """Open a file in blocks/ for reading; anything but a plain file is not opened for long."""
        return os.open(name, _OPEN, dir_fd=self.blocks)

    def block_stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.blocks, follow_symlinks=False)

    def delete_block(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.blocks)

    def scan_blocks(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file in blocks/ that is still there when it is looked at."""
        with os.scandir(self.blocks) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)

    def sweep(self) -> int:
        """Delete what processes that have ended left in writers/. Returns how many files."""
        swept = 0
        names = os.listdir(self.writers)
        for lock in [name for name in names if name.endswith(".lock")]:
            writer = lock.removesuffix(".lock")
            if writer == self._writer or not self._has_ended(lock):
                continue
            left = [name for name in names if name.startswith(f"{writer}.")]
            for name in left:
                self.discard(name)
            swept += len(left) - 1
        return swept

    def _has_ended(self, lock: str) -> bool:
        try:
            handle = os.open(lock, _OPEN, dir_fd=self.writers)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    def close(self) -> None:
        """Idempotent."""
        handles, self._lock, self.blocks, self.writers = (
            (self._lock, self.blocks, self.writers), -1, -1, -1,
        )  # fmt: skip
        if handles[0] >= 0:
            self.writers = handles[2]
            self.discard(f"{self._writer}.lock")
            self.writers = -1
            for handle in handles:
                os.close(handle)


def _unusable(path: Path, why: str, fix: str = "") -> UsageError:
    return UsageError(
        "kv_tier",
        f"--kv-tiers: {path} cannot hold KV blocks",
        why=why,
        fix=fix or "name a directory that this user can write to",
        field="kv_tiers",
    )


def _subdirectory(root: int, name: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=root)
    return os.open(name, _DIRECTORY, dir_fd=root)


def read_secret(name: str, directory: int) -> bytes:
    """The secret in a file, which is made where there is none: the first of several processes that
    start at once wins. Raises OSError."""
    try:
        return _read_secret(name, directory)
    except FileNotFoundError:
        temporary = f"{name}.{secrets.token_hex(8)}"
        handle = os.open(temporary, _CREATE, 0o600, dir_fd=directory)
        try:
            os.write(handle, secrets.token_bytes(SECRET_BYTES))
            os.fsync(handle)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(handle)
            os.unlink(temporary, dir_fd=directory)
        return _read_secret(name, directory)


def _read_secret(name: str, directory: int) -> bytes:
    handle = os.open(name, _OPEN, dir_fd=directory)
    try:
        found = os.fstat(handle)
        secret = os.read(handle, SECRET_BYTES + 1)
    finally:
        os.close(handle)
    if not stat.S_ISREG(found.st_mode) or len(secret) != SECRET_BYTES:
        raise OSError(f"the file {name!r} is not a secret of {SECRET_BYTES} bytes")
    if found.st_mode & 0o077 or found.st_uid != os.geteuid():
        raise OSError(f"the file {name!r} can be read by others")
    return secret
