"""The GPU runner beside the scheduler through random lives: what it finds on the device before a
step are the slots, starts, blocks and options of that step, although it is sent only what changed.

The model is not computed. What the device must hold is known from MockRunner, which takes every
Batch written out.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from mock_runner import Held, MockRunner, StepFailed
from runner.engines import FAMILIES, TINY, engine
from test_scheduler import LAYOUTS, MODEL_LEN, Driver, least_blocks, random_operation

from quire.kernels.device_state import Flag, Scalar
from quire.runner import device
from quire.runner.device import DeviceRunner
from quire.runner.diffs import flags_of, variant
from quire.runner.pending import DevicePending
from quire.runner.shapes import Sampling, Shape
from quire.step import Batch, Result, Row, written_out

SLOTS, BUDGET = 6, 64
DECODE_SIZES, MIXED_SIZES = (1, 2, 4, SLOTS), (16, 48)
SHORT = 40  # tokens of a context that is
LAYOUT = {"llama": "full", "gemma3": "one pool"}  # as many groups as the family's
WriteModel = Any


def apply(arena: torch.Tensor, packet: torch.Tensor, count: int) -> None:
    """What the kernel of that name does."""
    for low, high, source, length in packet[: 4 * count].view(count, 4).tolist():
        begin = high << 32 | (low & 0xFFFF_FFFF)
        arena[begin : begin + length] = packet[source : source + length]


def no_logprobs(runner: DeviceRunner, rows: list[Row]) -> dict[int, Any]:
    return {}


class Beside:
    """Takes the place of a Driver's runner, and has the GPU runner take the same steps."""

    def __init__(self, runner: MockRunner, beside: DeviceRunner, rng: random.Random):
        self._mock, self._device, self._rng = runner, beside, rng
        self._launched: list[Shape | Sampling] = []
        self._masked: set[int] = set()  # slots that were given a mask
        self.resent = self.steady = self.short = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mock, name)

    def reset(self) -> None:
        self._mock.reset()
        self._device.reset()

    def launch(self, runner: DeviceRunner, key: Shape | Sampling, compute: Any) -> None:
        self._launched.append(key)

    def submit(self, batch: Batch) -> Result | Held:
        if self._rng.random() < 0.05:
            self._device.warm()
        self._launched.clear()
        kept = self._device._steady is not None
        try:
            result = self._mock.submit(batch)
        except StepFailed:
            if self._rng.random() < 0.5:  # it raises after it was launched
                self._device.submit(batch)
            raise
        pending = self._device.submit(batch)
        rows = written_out(batch).rows
        self._masked -= {enter.slot for enter in batch.enter}
        plain = batch.decoding is not None and not batch.rows
        self.steady += kept and plain
        self.resent += plain and not kept
        self._check_rows(rows)
        if isinstance(result, Result):
            self._check_sampling(rows, range(len(rows)))
            return result
        held = result

        def open(masks: dict[int, bytes]) -> Result:
            self._open(pending, masks, rows)
            return held.open(masks)

        return Held(open)

    def _open(self, pending: DevicePending, masks: dict[int, bytes], rows: list[Row]) -> None:
        pending.open(masks)
        self._masked |= {rows[i].slot for i in masks}
        self._check_sampling(rows, [i for i, row in enumerate(rows) if not row.gated or i in masks])

    def _check_rows(self, rows: list[Row]) -> None:
        state, shape = self._device.state, self._launched[0]
        assert isinstance(shape, Shape)
        lengths = [row.start + len(row.tokens) for row in rows]
        decode, longest = all(len(row.tokens) == 1 for row in rows), max(lengths, default=0)
        assert shape.short == (decode and shape.rows <= 2 and longest <= SHORT)
        self.short += shape.short
        table = state.rows[: shape.rows].tolist()
        expected = [[row.slot, row.start, len(row.tokens), int(row.sample)] for row in rows]
        assert table[: len(rows)] == expected
        assert all(slot == -1 for slot, *_ in table[len(rows) :]), "padding of an earlier step"
        for row in rows:
            slot = self._mock.slots[row.slot]
            for group, blocks in enumerate(slot.tables):
                assert state.tables[row.slot, group, : len(blocks)].tolist() == blocks
            scalars = state.scalars[row.slot]
            assert scalars[Scalar.SEED_LOW] == slot.enter.seed
            assert scalars[Scalar.NUM_PROMPT] == slot.enter.num_prompt
            assert scalars[Scalar.FLAGS] == self._flags(row.slot)

    def _check_sampling(self, rows: list[Row], chosen: Any) -> None:
        places, end = [], 0
        for row in rows:
            end += len(row.tokens)
            places.append(end - 1)
        sampling = [i for i in chosen if rows[i].sample]
        launched = [key for key in self._launched if isinstance(key, Sampling)]
        assert len(launched) == bool(sampling)
        if not sampling:
            return
        flags = [self._flags(rows[i].slot) for i in sampling]
        key, first = launched[0], self._device._sampled
        table = self._device.state.rows[first : first + key.rows].tolist()
        assert key.variant == variant(flags)
        assert key.logprobs is any(each & Flag.LOGPROBS for each in flags)
        assert [row[:2] for row in table[: len(sampling)]] == [
            [rows[i].slot, places[i]] for i in sampling
        ]
        assert all(slot == -1 for slot, *_ in table[len(sampling) :]), "padding of an earlier step"

    def _flags(self, slot: int) -> int:
        enter = self._mock.slots[slot].enter
        flags = flags_of(enter.params, enter, self._device.state.layout.vocab_size)
        return flags | (Flag.ALLOWED if slot in self._masked else 0)


@pytest.fixture(scope="module")
def models(write_model: WriteModel) -> dict[str, str]:
    return {name: write_model(**TINY | FAMILIES[name]) for name in LAYOUT}


def live(model: str, family: str, seed: int, operations: int) -> Beside:
    """A random life of a scheduler over two runners."""
    sizes = {"max_num_seqs": SLOTS, "max_num_batched_tokens": BUDGET, "max_model_len": MODEL_LEN}
    runner = engine(model, "cuda", warm=False, runner="eager", **sizes).core.runner
    assert isinstance(runner, DeviceRunner)
    runner._shapes = replace(runner._shapes, decode=DECODE_SIZES, mixed=MIXED_SIZES)
    runner._shapes = replace(runner._shapes, short_rows=2, short_context=SHORT)
    rng = random.Random(seed)
    groups, budget = LAYOUTS[LAYOUT[family]], rng.choice([16, 33, BUDGET])
    blocks = [n + rng.choice([0, 3, 60]) for n in least_blocks(groups, MODEL_LEN, budget)]
    slots = rng.choice([2, SLOTS])
    driver = Driver(groups, blocks, rng.choice([1, 2, 3]), budget, slots, rng=rng)
    beside = Beside(driver.runner, runner, rng)
    driver.runner = beside  # type: ignore[assignment]
    with (
        mock.patch.object(device, "apply_runs", apply),
        mock.patch.object(device, "count_tokens", lambda *args: None),
        mock.patch.object(DeviceRunner, "_prompt_logprobs", no_logprobs),
        mock.patch.object(DeviceRunner, "_prepare", lambda *args: None),
        mock.patch.object(DeviceRunner, "_run", lambda *args: beside.launch(*args)),
    ):
        for _ in range(operations):
            random_operation(driver, rng)
            for _ in range(rng.choice([0, 0, 8])):  # steps of the same rows follow each other
                driver.iterate()
        driver.drain()
    return beside


@pytest.mark.parametrize("family", LAYOUT)
def test_what_is_on_the_device_is_what_the_step_needs(models: dict[str, str], family: str) -> None:
    lives = [live(models[family], family, seed, operations=60) for seed in range(2)]
    assert sum(each.steady for each in lives) > 50 and sum(each.resent for each in lives) > 20
    assert sum(each.short for each in lives) > 10


@pytest.mark.full
@pytest.mark.parametrize("family", LAYOUT)
@pytest.mark.parametrize("seed", range(2, 40))
def test_what_is_on_the_device_is_what_the_step_needs_full(
    models: dict[str, str], family: str, seed: int
) -> None:
    live(models[family], family, seed, operations=120)
