"""Attention to a window and compressed entries against the reference, and bit for bit against
itself in deterministic mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from quire.kernels.compressed import StepTokens
from quire.kernels.reference.compressed.entries import Entries, PackedKeys, Plain
from quire.kernels.triton.compressed.sparse_attention import sparse_attention, states_of
from tests.kernels.triton.compressed_inputs import REFERENCE
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.paged_inputs import TOLERANCE
from tests.kernels.triton.sparse_inputs import last_tokens, paged, paged_on_cpu

pytestmark = pytest.mark.triton

SCALE, RATIO = 0.3, 4


@dataclass(frozen=True)
class Shape:
    heads: int
    entries: Entries
    dtype: torch.dtype = torch.bfloat16
    size: int = 9
    window_block: int = 4
    entry_block: int = 8


SMALL = Shape(3, Plain(16))
SHAPES = [
    SMALL,
    Shape(2, PackedKeys(24, 8), size=33),
    Shape(5, Plain(12), dtype=torch.float32),
    pytest.param(Shape(20, PackedKeys(160, 32), torch.float32), marks=FULL),
    pytest.param(Shape(64, PackedKeys(512, 64), size=128), marks=FULL),
    pytest.param(Shape(17, Plain(512), torch.float16), marks=FULL),
]


class Requests:
    """Requests of `contexts` tokens with all their keys, queries and choices of entries."""

    def __init__(self, shape: Shape, contexts: Sequence[int], device: torch.device, seed: int = 0):
        self.shape, self.contexts, self.device = shape, contexts, device
        packed = isinstance(shape.entries, PackedKeys)
        kept = torch.uint8 if packed else shape.dtype
        self.window = paged(contexts, shape.entries, shape.window_block, kept, device, seed)
        lengths = [c // RATIO for c in contexts]
        self.entries = paged(lengths, shape.entries, shape.entry_block, kept, device, seed + 1)
        generator = torch.Generator().manual_seed(seed + 2)
        size = (shape.heads, shape.entries.size)
        self.queries = [torch.randn(c, *size, generator=generator) for c in contexts]
        self.sinks = torch.randn(shape.heads, generator=generator).to(device)
        self.picks = [torch.rand(c, c // RATIO, generator=generator) < 0.4 for c in contexts]
        self.table = torch.randn(max(contexts), 4, generator=generator).to(device)

    def chosen(self, tokens: StepTokens, width: int = 31) -> torch.Tensor:
        """Some of the entries that each token sees, with holes among them."""
        found = torch.full((len(tokens.positions), width), -1, dtype=torch.int32)
        for t, (row, position) in enumerate(
            zip(tokens.rows.tolist(), tokens.positions.tolist(), strict=True)
        ):
            if row >= 0:
                for e in range(min(width, (position + 1) // RATIO)):
                    if self.picks[row][position, e]:
                        found[t, e] = e
        return found.to(self.device)

    def step(
        self,
        counts: Sequence[int],
        contexts: Sequence[int] | None = None,
        *,
        kind: str = "chosen",
        deterministic: bool = False,
        padding: int = 0,
        room: float = 1,
        rotates: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(kernel's, reference's) results of the last counts[i] queries of request i when it has
        contexts[i] tokens; the kernel's of padding must be zero."""
        shape, device = self.shape, self.device
        contexts = self.contexts[: len(counts)] if contexts is None else contexts
        tokens = last_tokens(counts, contexts, padding, device)
        real = sum(counts)
        q = torch.full((real + padding, shape.heads + 1, shape.entries.size), torch.nan)
        for row, part in enumerate(q[:real].split(list(counts))):
            last = contexts[row]
            part[:, : shape.heads] = self.queries[row][last - len(part) : last]
        q = q.to(device, shape.dtype)[:, : shape.heads]
        given = (q, tokens, self.sinks, SCALE, self.window, shape.size)
        chosen = self.chosen(tokens) if kind == "chosen" else None
        if kind != "window":
            given += (self.entries, RATIO, chosen)
        numbers = states_of(shape.heads, shape.entries.size, device) * room
        out = torch.full_like(q, torch.nan).contiguous()
        same = sparse_attention(
            *given, deterministic=deterministic, out=out,
            scratch=torch.full((int(numbers),), torch.nan, device=device),
            cos_sin=self.table if rotates else None,
        )  # fmt: skip
        assert same is out
        assert (out[real:] == 0).all()
        real_tokens = last_tokens(counts, contexts, 0, torch.device("cpu"))
        others = given[6:8] and (paged_on_cpu(self.entries), RATIO)
        expected = REFERENCE.sparse_attention(
            q[:real].cpu().float(), real_tokens, self.sinks.cpu(), SCALE,
            self.table.cpu() if rotates else None, paged_on_cpu(self.window), shape.size, *others,
            None if chosen is None else chosen[:real].cpu().long(),
        )  # fmt: skip
        return out[:real].cpu(), expected.to(shape.dtype)

    def check(self, *args: object, **options: object) -> None:
        found, expected = self.step(*args, **options)  # type: ignore[arg-type]
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["window", "chosen", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_and_mixed_steps_equal_the_reference(
    shape: Shape, kind: str, deterministic: bool, device: torch.device
) -> None:
    requests = Requests(shape, [1, 140, 17], device)
    requests.check([1, 1, 1], kind=kind, deterministic=deterministic)
    requests.check([1, 2, 0], kind=kind, deterministic=deterministic, padding=1)


def test_keys_are_divided_among_programs_as_far_as_scratch_reaches(device: torch.device) -> None:
    requests = Requests(SMALL, [330, 3], device)
    for room in (1, 0.5, 0):
        requests.check([1, 1], kind="all", room=room)
        requests.check([1, 0], kind="all", room=room, padding=1)


def test_results_are_rotated_back(device: torch.device) -> None:
    requests = Requests(SMALL, [50, 33], device)
    for deterministic in (False, True):
        requests.check([1, 2], deterministic=deterministic, rotates=True, padding=1)


def test_deterministic_bits_do_not_depend_on_how_tokens_are_computed(device: torch.device) -> None:
    """A request's tokens in one step, in chunks, one by one, alone and among others."""
    requests = Requests(Shape(2, PackedKeys(24, 8)), [60, 37], device)

    def bits(counts: Sequence[int], contexts: Sequence[int], **options: object) -> torch.Tensor:
        found, _ = requests.step(counts, contexts, deterministic=True, **options)  # type: ignore[arg-type]
        return found[: counts[0]]

    whole = bits([14], [60])
    parts = [bits([n], [end]) for n, end in ((1, 47), (8, 55), (4, 59), (1, 60))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(bits([14, 2], [60, 37], padding=2), whole)
    assert torch.equal(bits([1, 1], [60, 37]), whole[-1:])


def test_nothing_to_do_is_no_launch(device: torch.device) -> None:
    requests = Requests(SMALL, [5], device)
    found, _ = requests.step([0], [5])
    assert found.shape == (0, 3, 16)
    requests.check([1], [2], kind="all")  # no entry yet


def test_what_does_not_fit_is_an_error(device: torch.device) -> None:
    requests = Requests(SMALL, [20, 30], device)
    packed = Requests(Shape(3, PackedKeys(16, 8)), [20, 30], device)
    tokens = last_tokens([1, 1], [20, 30], 0, device)
    q = torch.zeros(2, 3, 16, dtype=torch.bfloat16, device=device)
    given = {
        "q_THD": q, "tokens": tokens, "sinks_H": requests.sinks, "scale": SCALE,
        "window": requests.window, "size": 9, "compressed": requests.entries, "ratio": RATIO,
        "chosen_TE": requests.chosen(tokens), "deterministic": False,
        "scratch": torch.empty(0, device=device),
    }  # fmt: skip
    sparse_attention(**given)  # type: ignore[arg-type]
    for change, message in (
        ({"q_THD": q.half()}, "window"),
        ({"q_THD": q[:, :, :8]}, "q"),
        ({"q_THD": q.mT.contiguous().mT}, "q"),
        ({"sinks_H": requests.sinks[:2]}, "sinks"),
        ({"sinks_H": requests.sinks.half()}, "sinks"),
        ({"ratio": 0}, "compressed"),
        ({"compressed": None}, "compressed"),
        ({"compressed": packed.entries}, "compressed"),
        ({"chosen_TE": requests.chosen(tokens)[:1]}, "chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(**{**given, **change})  # type: ignore[arg-type]
