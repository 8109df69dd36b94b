"""What a GPU runner does not send again is on the device all the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Any
from unittest import mock

import pytest
import torch

from quire.params import SamplingParams
from quire.runner import device
from quire.runner.device import LEAST_RUNS, DeviceRunner
from quire.runner.packets import PacketRing
from quire.step import Batch, Decoding, Enter, Row, written_out
from runner.engines import SMALL, TINY, engine

WriteModel = Any
SLOTS = 6
PARAMS = SamplingParams(temperature=0.0)


def apply(arena: torch.Tensor, packet: torch.Tensor, count: int) -> None:
    """What the kernel of that name does."""
    for low, high, source, length in packet[: 4 * count].view(count, 4).tolist():
        begin = high << 32 | (low & 0xFFFF_FFFF)
        arena[begin : begin + length] = packet[source : source + length]


class Replayed:
    """Graphs of what runs on a processor: it runs again."""

    def __init__(self) -> None:
        self.captured: dict[Hashable, Callable[[], object]] = {}
        self.replayed = 0

    def capture(self, key: Hashable, compute: Callable[[], object]) -> None:
        compute()
        self.captured[key] = compute

    def replay(self, key: Hashable) -> bool:
        if key not in self.captured:
            return False
        self.captured[key]()
        self.replayed += 1
        return True


@pytest.fixture
def runners(write_model: WriteModel) -> list[DeviceRunner]:
    """Two whose models and kernels are not run."""
    model = write_model(**TINY)
    found = []
    for _ in range(2):
        made = engine(model, "cuda", warm=False, **SMALL | {"max_num_seqs": SLOTS}).core.runner
        assert isinstance(made, DeviceRunner)
        found.append(made)
    return found


def random_batches(rng: random.Random, slots: int, steps: int) -> list[Batch]:
    """Requests come and go, and grow by blocks; most rows of most steps decode plainly."""
    lengths: dict[int, int] = {}
    batches, leave = list[Batch](), list[int]()
    for step in range(1, steps + 1):
        enter, rows = [], []
        old = sorted(lengths)
        free = [slot for slot in range(slots) if slot not in lengths]
        if free and (not old or rng.random() < 0.2):
            slot = rng.choice(free)
            enter.append(Enter(slot, PARAMS, [5, 6, 7], 3, step, 0, [[1]], [], []))
            rows.append(Row(slot, 0, [5, 6, 7], [[]], True))
            lengths[slot] = 3
        if rng.random() < 0.1:
            rng.shuffle(old)
        grown = {i: [[rng.randrange(1, 99)]] for i, s in enumerate(old) if lengths[s] % 16 == 0}
        decoding = Decoding(old, [lengths[slot] for slot in old], grown)
        for slot in old:
            lengths[slot] += 1
        batches.append(Batch(step, leave, enter, rows, decoding if old else None))
        leave = [slot for slot in old if lengths[slot] == 60 or rng.random() < 0.02]
        for slot in leave:
            del lengths[slot]
    return batches


@pytest.mark.parametrize("seed", range(2))
def test_steps_in_columns_leave_on_the_device_what_written_out_rows_leave(
    runners: list[DeviceRunner], seed: int
) -> None:
    rng = random.Random(seed)
    launched: list[list[Any]] = [[], []]

    def run(self: DeviceRunner, key: Any, compute: Any) -> None:
        launched[runners.index(self)].append(key)

    with (
        mock.patch.object(device, "apply_runs", apply),
        mock.patch.object(device, "count_tokens", lambda *args: None),
        mock.patch.object(DeviceRunner, "_run", run),
        mock.patch.object(DeviceRunner, "_prepare", lambda *args: None),
    ):
        skipped = 0
        for batch in random_batches(rng, SLOTS, 200):
            if rng.random() < 0.05:
                for runner in runners:
                    runner.warm()
            if rng.random() < 0.02:
                for runner in runners:
                    runner.reset()
            skipped += runners[0]._steady is not None
            for runner, each in zip(runners, (batch, written_out(batch)), strict=True):
                runner.submit(each)
            # Rows behind those that are computed are read by nobody.
            rows = batch.num_rows
            for table in (0, runners[0]._sampled):
                first, second = (r.state.rows[table : table + rows] for r in runners)
                assert first.tolist() == second.tolist()
            first, second = (r.state.arena[: r.state.layout.rows_offset] for r in runners)
            assert torch.equal(first, second)
        assert launched[0] == launched[1] and skipped > 50


def test_packets_taken_by_graphs_leave_what_launched_kernels_leave(
    runners: list[DeviceRunner],
) -> None:
    graphs, rng = Replayed(), random.Random(0)
    for runner in runners:
        runner._packets = PacketRing(runner.device, capacity=2**14, depth=3, least=LEAST_RUNS)
    runners[0]._graphs = graphs  # type: ignore[assignment]
    with (
        mock.patch.object(device, "apply_runs", apply),
        mock.patch.object(device, "count_tokens", lambda *args: None),
        mock.patch.object(DeviceRunner, "_run", lambda *args: None),
    ):
        for batch in random_batches(rng, SLOTS, 100):
            if batch.step == 20:  # what the packets held then is not taken a second time
                runners[0]._capture_packets()
            runners[0].replaying = not 50 <= batch.step < 60
            for runner in runners:
                runner.submit(batch)
            assert torch.equal(runners[0].state.arena, runners[1].state.arena)
    assert len(graphs.captured) == 3 and 60 < graphs.replayed <= 91
