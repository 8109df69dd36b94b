"""A block identity changes with everything that decides a block's content, and nothing else."""

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kv.identity import DIGEST_BYTES, BlockIdentity, canonical

TOKENS = list(range(16))

PROGRAM = """
from quire.kv.identity import BlockIdentity
identity = BlockIdentity(b"model")
parent = identity.root(1, "tenant", "salt", "adapter")
for start in (0, 16):
    parent = identity.block(parent, range(start, start + 16), b"media")
print(parent.hex())
"""


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_identities_are_equal_in_every_process(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == spelled_out()


def spelled_out() -> str:
    """The bytes of schema 1, independently. Where they change, SCHEMA_VERSION must rise."""

    def fields(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)

    def digest(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=32, key=b"quire block identity").digest()

    one = (1).to_bytes(4, "little")
    parent = digest(fields(one, b"model") + fields(one, b"tenant", b"salt", b"adapter"))
    for start in (0, 16):
        tokens = b"".join(t.to_bytes(8, "little") for t in range(start, start + 16))
        parent = digest(fields(parent, tokens, b"media"))
    return parent.hex()


def test_every_field_changes_the_identity() -> None:
    base = {"fingerprint": b"m", "group": 0, "tenant": "t", "salt": "s"}
    base |= {"adapter": "a", "tokens": tuple(TOKENS), "media": b"i"}
    changes = [
        {},
        {"fingerprint": b"n"},
        {"group": 1},
        {"tenant": "u"},
        {"salt": ""},
        {"adapter": "b"},
        {"tokens": tuple(reversed(TOKENS))},
        {"tokens": (*TOKENS[:-1], 2**31 - 1)},
        {"media": b"j"},
        # The same characters, split otherwise between the fields.
        {"tenant": "ts", "salt": ""},
        {"tenant": "", "salt": "ts"},
        {"tenant": "", "salt": "", "adapter": "tsa"},
    ]
    made = []
    for change in changes:
        fields = base | change
        identity = BlockIdentity(fields["fingerprint"])
        root = identity.root(fields["group"], fields["tenant"], fields["salt"], fields["adapter"])
        made.append(identity.block(root, fields["tokens"], fields["media"]))
    assert len(set(made)) == len(changes)
    assert all(len(identity) == DIGEST_BYTES for identity in made)


def test_the_same_tokens_after_other_tokens_are_another_block() -> None:
    identity = BlockIdentity(b"m")
    root = identity.root(0)
    first = identity.block(root, TOKENS)
    assert identity.block(first, TOKENS) != first
    assert identity.block(identity.block(root, TOKENS[::-1]), TOKENS) != identity.block(
        first, TOKENS
    )


def test_lists_tuples_and_ranges_of_equal_tokens_are_one_block() -> None:
    identity = BlockIdentity(b"m")
    root = identity.root(0)
    made = {identity.block(root, kind(TOKENS)) for kind in (list, tuple)}
    assert made == {identity.block(root, range(16))}


@given(st.lists(st.binary(max_size=9), max_size=5), st.lists(st.binary(max_size=9), max_size=5))
def test_canonical_bytes_are_injective(a: list[bytes], b: list[bytes]) -> None:
    assert (canonical(*a) == canonical(*b)) == (a == b)


def test_lone_surrogates_of_a_client_are_told_apart() -> None:
    identity = BlockIdentity(b"m")
    names = ["\ud800", "\ud801", "\udfff", "?", "\ufffd", ""]
    assert len({identity.root(0, name) for name in names}) == len(names)
    assert len({identity.root(0, "", name) for name in names}) == len(names)
