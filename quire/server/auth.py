"""Who may ask: API keys from flag, environment and file, and the rule for binding off loopback."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from quire.config.options import ServerOptions
from quire.errors import UsageError
from quire.server.errors import HttpError

# Every other path needs a key, where keys are set: a new route is guarded without being listed.
PUBLIC_PATHS = frozenset({"/health", "/ready"})
MAX_KEY_CHARACTERS = 512


class KeyRing:
    """API keys as SHA-256 digests, each with its tenant's name. Immutable."""

    def __init__(self, keys: Iterable[tuple[str, str]]):
        """`keys`: (tenant, key) pairs. Raises UsageError for an unusable or repeated key."""
        self._tenants: dict[bytes, str] = {}
        for tenant, key in keys:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise _bad_key(f"the key of {tenant!r} must be printable ASCII without spaces")
            if not 0 < len(key) <= MAX_KEY_CHARACTERS:
                raise _bad_key(f"a key must have 1 to {MAX_KEY_CHARACTERS} characters")
            digest = hashlib.sha256(key.encode()).digest()
            if self._tenants.setdefault(digest, tenant) != tenant:
                raise _bad_key(f"{tenant!r} and {self._tenants[digest]!r} have the same key")

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """The tenant of `key`, or None. Time does not depend on which key matches or how far."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def authorize(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The tenant asking for `path` ("" where no keys are set). Raises HttpError 401.

        `path` and `headers` are those of the ASGI scope; nothing is derived from Host.
        """
        if path in PUBLIC_PATHS or not self._tenants:
            return ""
        values = [value for name, value in headers if name == b"authorization"]
        if len(values) == 1:
            scheme, _, key = values[0].decode("latin-1").partition(" ")
            tenant = self.tenant(key.strip()) if scheme.lower() == "bearer" else None
            if tenant is not None:
                return tenant
        raise HttpError(
            401,
            "invalid_api_key",
            "a valid API key is needed",
            fix="send Authorization: Bearer <key>",
            headers={"WWW-Authenticate": "Bearer"},
        )


def load_keys(options: ServerOptions, environment_key: str | None) -> KeyRing:
    """Keys of --api-key (else QUIRE_API_KEY) and --api-key-file. Raises UsageError.

    The tenant of the single key is "default"; of a line `name:key` it is the name; of a line
    `key` it is a name made from the key's digest.
    """
    keys = []
    single = options.api_key or environment_key
    if single:
        keys.append(("default", single))
    if options.api_key_file:
        keys += _read_key_file(options.api_key_file)
    return KeyRing(keys)


def _read_key_file(path: str) -> list[tuple[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "api_key_file", f"cannot read the key file {path}", why=str(error)
        ) from None
    keys = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        if not colon:
            name, key = "key-" + hashlib.sha256(line.encode()).hexdigest()[:12], line
        keys.append((name.strip(), key.strip()))
    if not keys:
        raise UsageError("api_key_file", f"the key file {path} has no keys")
    return keys


def _bad_key(what: str) -> UsageError:
    return UsageError("api_key", what, fix="change --api-key, QUIRE_API_KEY or --api-key-file")


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only. Unknown names count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(options: ServerOptions, keys: KeyRing) -> None:
    """Raise UsageError where anyone on the network could use the server without a key."""
    if keys or options.allow_unauthenticated or is_loopback(options.host):
        return
    raise UsageError(
        "unauthenticated",
        f"refusing to listen on {options.host} without an API key",
        why="anyone who reaches this address could use the server",
        fix="set --api-key or --api-key-file, bind 127.0.0.1, or pass --allow-unauthenticated",
        field="host",
    )
