"""Compressed entries in the cache: the reference's, and the same bits however a sequence is cut."""

from __future__ import annotations

import random as randomness
from dataclasses import replace
from functools import cache

import pytest
import torch

from quire.kernels.compressed import Paged
from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys, Plain
from quire.kernels.triton.compressed import compress as kernels
from quire.kernels.triton.compressed.compress import compress
from tests.kernels.triton.compressed_inputs import (
    REFERENCE,
    poisoned_cache,
    random,
    rotary_table,
    step_tokens,
    untouched_before,
)

pytestmark = pytest.mark.triton

F32 = torch.float32
SIZE, ROTARY, LENGTH = 24, 8, 40
EPS = 1e-6


class Layer:
    """A compressor with states of NaN for three requests, and a cache of NaN."""

    def __init__(
        self, ratio: int, overlap: bool, entries: Entries, device: torch.device, spare: int = 5,
        reference: bool = False,
    ):  # fmt: skip
        self.ratio, self.overlap, self.device = ratio, overlap, device
        self.width = 2 * entries.size if overlap else entries.size
        self.places, self.norm = random(1, ratio, self.width), random(2, entries.size)
        self.table = rotary_table(ROTARY)
        shape = ((2 if overlap else 1) * ratio + spare, 2, self.width)
        # Requests' states lie apart.
        wide = torch.full((3, 2 * shape[0], 2, self.width), torch.nan, device=device)
        self.state = wide[:, : shape[0]]
        self.spaced = wide
        self.slots = -(-LENGTH // ratio) * ratio
        self.cache = poisoned_cache(3 * self.slots // ratio, entries, F32, device)
        self.compress = REFERENCE.compress if reference else compress

    def step(
        self, parts: list[torch.Tensor], starts: list[int], requests: list[int], padding: int = 0
    ) -> None:
        """Rows [n, 2, W] of each request from a position on; those of padding are NaN."""
        counts = [len(part) for part in parts]
        states = [r if n else -1 for r, n in zip(requests, counts, strict=True)]
        tokens = step_tokens(starts, counts, states, padding, self.device)
        slots = [
            torch.arange(s, s + n) + request * self.slots
            for s, n, request in zip(starts, counts, requests, strict=True)
        ]
        slots_T = torch.cat([*slots, torch.full((padding,), -1)]).to(self.device)
        rows = torch.cat([*parts, torch.full((padding, 2, self.width), torch.nan)])
        # Between tokens NaN.
        wide = torch.full((len(rows), 3, 2, self.width), torch.nan, dtype=rows.dtype)
        wide[:, 1] = rows
        self.compress(
            wide.to(self.device)[:, 1], self.places.to(self.device), self.state,
            self.norm.to(self.device), EPS, self.table.to(self.device), tokens, slots_T,
            self.cache, self.ratio, self.overlap,
        )  # fmt: skip

    def entries_of(self, request: int) -> torch.Tensor:
        each = self.slots // self.ratio
        return self.cache.memory[request * each : (request + 1) * each]


def given(width: int, seed: int = 0) -> torch.Tensor:
    return random(seed, LENGTH, 2, width) * 2


def by_the_formula(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """Pooled entries before norm and rotation, window by window in float64."""
    ratio, size = layer.ratio, layer.norm.numel()
    rows = rows.double()
    rows[:, 1] += layer.places.double()[torch.arange(len(rows)) % ratio]
    entries = []
    for w in range(len(rows) // ratio):
        pooled = rows[ratio * w : ratio * (w + 1), :, -size:]
        if layer.overlap and w > 0:
            pooled = torch.cat([rows[ratio * (w - 1) : ratio * w, :, :size], pooled])
        entries.append((pooled[:, 0] * pooled[:, 1].softmax(0)).sum(0))
    return torch.stack(entries)


RATIOS = [(4, True), (16, False), (5, False), (7, True), (1, False), (1, True)]


@pytest.mark.parametrize(("ratio", "overlap"), RATIOS)
def test_entries_are_those_of_the_formula(ratio: int, overlap: bool, device: torch.device) -> None:
    layer = Layer(ratio, overlap, Plain(SIZE), device)
    rows = given(layer.width)
    layer.step([rows], [0], [1])
    pooled = by_the_formula(layer, rows)
    normed = pooled / (pooled.square().mean(1, keepdim=True) + EPS).sqrt() * layer.norm
    begun = torch.arange(len(pooled)) * ratio
    wanted = REFERENCE.rotate_pairs(normed.float()[:, None], layer.table, begun)[:, 0]
    found = layer.entries_of(1).cpu()
    torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-5, rtol=1e-4)
    assert found[len(wanted) :].isnan().all()
    assert layer.entries_of(0).isnan().all() and layer.entries_of(2).isnan().all()


@pytest.mark.parametrize(("ratio", "overlap"), RATIOS)
@pytest.mark.parametrize(
    ("parts", "padding"), [([[5, 0, 1], [30, 9, 0], [1, 1, 1]], 3), ([[0, 0, 0], [0, 1, 0]], 0)]
)
def test_steps_of_several_requests_equal_the_reference(
    parts: list[list[int]], padding: int, ratio: int, overlap: bool, device: torch.device
) -> None:
    layer = Layer(ratio, overlap, Plain(SIZE), device)
    its = Layer(ratio, overlap, Plain(SIZE), torch.device("cpu"), reference=True)
    rows, done = given(layer.width), [0, 0, 0]
    for counts in parts:
        step = [rows[d : d + n] for d, n in zip(done, counts, strict=True)]
        layer.step(step, done, [2, 0, 1], padding)
        its.step([part.clone() for part in step], done, [2, 0, 1], padding)
        done = [d + n for d, n in zip(done, counts, strict=True)]
    close = {"atol": 1e-5, "rtol": 1e-4, "equal_nan": True}
    torch.testing.assert_close(layer.cache.memory.cpu(), its.cache.memory, **close)
    # Sums of a row and its place's logits, which are one addition.
    torch.testing.assert_close(layer.spaced.cpu(), its.spaced, atol=0, rtol=0, equal_nan=True)


KINDS: list[Entries] = [Plain(SIZE), PackedKeys(SIZE, ROTARY), PackedIndex(SIZE)]


@cache
def whole(ratio: int, overlap: bool, kind: Entries, device: torch.device) -> Layer:
    """After one step with all tokens."""
    layer = Layer(ratio, overlap, kind, device)
    layer.step([given(layer.width)], [0], [0])
    return layer


@pytest.mark.parametrize(
    ("ratio", "overlap", "kind"),
    [(4, True, KINDS[0]), (4, True, KINDS[2]), (7, True, KINDS[1]), (16, False, KINDS[1]),
     (1, False, KINDS[0])],
)  # fmt: skip
@pytest.mark.parametrize("chunks", [[1] * 40, [3, 1, 19, 0, 17], [16, 16, 8], [39, 1]])
def test_bits_do_not_depend_on_how_a_sequence_is_cut(
    chunks: list[int], ratio: int, overlap: bool, kind: Entries, device: torch.device
) -> None:
    uncut, cut = whole(ratio, overlap, kind, device), Layer(ratio, overlap, kind, device)
    rows, start = given(cut.width), 0
    for count in chunks:
        cut.step([rows[start : start + count]], [start], [0])
        start += count
    assert start == LENGTH and torch.equal(bits(cut.cache), bits(uncut.cache))
    length = cut.state.shape[1]
    places = torch.arange(max(0, LENGTH - length), LENGTH) % length
    assert torch.equal(cut.state[0, places], uncut.state[0, places])


def bits(cache: Paged) -> torch.Tensor:
    return cache.memory.view(torch.uint8)


def test_bits_do_not_depend_on_other_requests_or_padding(device: torch.device) -> None:
    rng = randomness.Random(3)
    alone, together = (Layer(4, True, PackedIndex(SIZE), device, spare=16) for _ in range(2))
    rows = [given(alone.width, seed) for seed in range(3)]
    for request in range(3):
        alone.step([rows[request]], [0], [request])
    done = [0, 0, 0]
    while min(done) < LENGTH:
        counts = [min(rng.choice([0, 1, 2, 9, 20]), LENGTH - d) for d in done]
        parts = [r[d : d + n] for r, d, n in zip(rows, done, counts, strict=True)]
        together.step(parts, done, [0, 1, 2], rng.choice([0, 1, 5]))
        done = [d + n for d, n in zip(done, counts, strict=True)]
    assert torch.equal(bits(together.cache), bits(alone.cache))


@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_gives_the_bits_of_two(
    kind: Entries, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever a step takes; a state with many rows to spare takes one launch always."""
    launched: list[str] = []

    def launch(kernel: object, *args: object, **meta: object) -> None:
        launched.append(getattr(kernel, "__name__", str(kernel)))
        real(kernel, *args, **meta)  # type: ignore[arg-type]

    real = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    one, two = (Layer(4, True, kind, device, spare=spare) for spare in (24, 0))
    rows = given(one.width)
    for start in range(0, LENGTH, 14):
        for layer, count in ((one, 1), (two, 2)):
            launched.clear()
            layer.step([rows[start : start + 14]], [start], [0])
            assert len(launched) == count
    assert torch.equal(bits(one.cache), bits(two.cache))


@pytest.mark.parametrize(("ratio", "overlap"), [(16, False), (4, True)])
def test_refused_drafts_leave_no_trace(ratio: int, overlap: bool, device: torch.device) -> None:
    drafted, plain = (Layer(ratio, overlap, Plain(SIZE), device) for _ in range(2))
    rows, other = given(plain.width), given(plain.width, 5)
    for start in range(0, LENGTH - 6, 2):
        # One token is right and four are not: those are computed again, by other values.
        drafted.step([torch.cat([rows[start : start + 1], other[:4]])], [start], [0])
        drafted.step([rows[start + 1 : start + 2]], [start + 1], [0])
        plain.step([rows[start : start + 2]], [start], [0])
    entries = (LENGTH - 6) // ratio
    found, wanted = drafted.entries_of(0)[:entries], plain.entries_of(0)[:entries]
    assert torch.equal(found, wanted) and not wanted.isnan().any()


def test_programs_of_several_tokens_give_the_bits_of_programs_of_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, several = (Layer(5, True, PackedKeys(SIZE, ROTARY), device) for _ in range(2))
    rows = given(one.width)
    one.step([rows[:33], rows], [0, 0], [0, 1], 2)
    monkeypatch.setattr(kernels, "tokens_each", lambda tokens, ratio: ratio)
    several.step([rows[:33], rows], [0, 0], [0, 1], 2)
    assert torch.equal(bits(several.cache), bits(one.cache))


def test_programs_of_long_steps_look_at_as_many_tokens_as_have_one_entry() -> None:
    wanted = {
        (1, 128): 1,
        (256, 128): 1,
        (512, 128): 2,
        (8192, 128): 16,
        (8192, 4): 4,
        (9000, 1): 1,
    }
    assert {key: kernels.tokens_each(*key) for key in wanted} == wanted


def test_entries_of_flash_and_rows_in_bfloat16(device: torch.device) -> None:
    """HCA's 128 tokens of 512 values, half of them from an earlier step."""
    layer, its = (
        Layer(128, False, PackedKeys(512, ROTARY), where, reference=reference)
        for where, reference in ((device, False), (torch.device("cpu"), True))
    )
    layer.slots = its.slots = 128
    rows = random(4, 128, 2, 512).bfloat16()
    for start, end in ((0, 77), (77, 128)):
        layer.step([rows[start:end]], [start], [0], 1)
        its.step([rows[start:end].float()], [start], [0], 1)
    found, wanted = (x.cache.entries.unpack(x.cache.memory[:1].cpu()) for x in (layer, its))
    torch.testing.assert_close(found, wanted, rtol=0.13, atol=1e-3)
    assert (found != wanted).sum() < 8
    assert torch.equal(layer.state[0, :128].cpu(), its.state[0, :128])


def test_a_token_without_a_slot_writes_no_entry_but_is_kept(device: torch.device) -> None:
    layer = Layer(2, False, Plain(SIZE), device)
    rows = given(layer.width)
    layer.slots = -10
    layer.step([rows[:3]], [0], [1])
    assert layer.cache.memory.isnan().all() and untouched_before(layer.cache)
    assert not layer.state[1, :3].isnan().any() and layer.state[1, 3:].isnan().all()


def test_packed_index_keys_have_the_references_codes_and_scales(device: torch.device) -> None:
    packed, plain = (Layer(4, True, kind, device) for kind in (PackedIndex(SIZE), Plain(SIZE)))
    rows = given(packed.width)
    rows[9, 0], rows[20:, 0] = torch.nan, 0.0
    for layer in (packed, plain):
        layer.norm = layer.norm * 10.0 ** random(7, SIZE)
        layer.step([rows], [0], [0])
    wanted = packed.cache.entries.pack(plain.entries_of(0).cpu(), torch.uint8)
    assert torch.equal(packed.entries_of(0).cpu(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_nan_spoils_the_entries_that_pool_it_and_no_other(
    part: int, kind: Entries, device: torch.device
) -> None:
    layer = Layer(4, True, kind, device)
    rows = given(layer.width)
    rows[9, part] = torch.nan
    layer.step([rows[:24]], [0], [0])
    entries = kind.unpack(layer.entries_of(0)[:6].cpu())
    assert entries.isnan().any(1).tolist() == [False, False, True, True, False, False]


def test_a_step_fits_one_launch_while_new_rows_and_those_needed_have_places_of_their_own() -> None:
    for span, length in ((8, 40), (128, 160), (5, 5), (1, 1), (8, 11)):
        for tokens in range(1, 60):
            new = {(1000 + i) % length for i in range(tokens)}
            needed = {(1000 - i) % length for i in range(1, span)}
            apart = not new & needed and len(new) == tokens
            assert kernels.one_launch_does(tokens, span, length) == apart


def test_only_the_last_rows_of_a_request_are_kept(device: torch.device) -> None:
    """Those that another one behind them would take the place of are not written at all."""
    layer, count = Layer(4, True, Plain(SIZE), device), 30
    tokens, length = step_tokens([0], [count], [1], 0, device), layer.state.shape[1]
    tokens.context_len.add_(5)
    layer.compress(
        given(layer.width)[:count].to(device), layer.places.to(device), layer.state,
        layer.norm.to(device), EPS, layer.table.to(device), tokens,
        torch.full((count,), -1, device=device), layer.cache, 4, True,
    )  # fmt: skip
    kept = {position % length for position in range(count + 5 - length, count)}
    written = ~layer.state[1].isnan().any(-1).any(-1)
    assert set(written.nonzero().flatten().tolist()) == kept


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layer = Layer(4, True, Plain(SIZE), device)
    rows = given(layer.width)
    layer.state = layer.state[:, :7]
    with pytest.raises(ValueError, match="state"):
        layer.step([rows], [0], [0])
    layer = Layer(4, True, Plain(SIZE), device)
    layer.overlap = False
    with pytest.raises(ValueError, match="do not fit together"):
        layer.step([rows], [0], [0])
    layer = Layer(4, True, Plain(SIZE), device)
    layer.cache = replace(layer.cache, entries=Plain(SIZE + 1))
    with pytest.raises(ValueError, match="do not fit a cache"):
        layer.step([rows], [0], [0])
