"""benchmarks/gpu/steps.py: what a trace says, on made-up events; and all but tracing on the CPU."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu import steps as tool
from benchmarks.gpu.trace import Event, split, summarize, table
from quire.cli.bench_offline import Bench
from quire.engine.core import EngineCore
from quire.errors import UsageError

# A product, attention that begins 2 us before it ends, a gap of 3 us, the product again.
STEP = [Event("product", 0, 10), Event("attention", 8, 13), Event("product", 16, 26)]


def later(step: list[Event], by: float) -> list[Event]:
    return [Event(event.name, event.start + by, event.end + by) for event in step]


def test_steps_are_what_lies_between_markers_and_the_last_ones_count() -> None:
    lost = later(STEP[1:], 0)  # a trace can begin late
    marked = [Event("void spin_kernel(long)", at, at + 1) for at in (98, 198)]
    events = [*later(STEP, 200), *lost, *marked, *later(STEP, 100)]
    assert split(events, "spin_kernel", 2) == [later(STEP, 100), later(STEP, 200)]
    assert split(events, "spin_kernel", 1) == [later(STEP, 200)]


@pytest.mark.parametrize("events", [[], STEP, [Event("mark", -1, 0), *STEP, Event("mark", 30, 31)]])
def test_a_trace_without_all_steps_is_refused(events: list[Event]) -> None:
    with pytest.raises(UsageError, match="of 2 steps"):
        split(events, "mark", 2)


def test_overlaps_count_once_and_gaps_are_what_no_kernel_covers() -> None:
    found = summarize([STEP])
    assert found["device_us"] == 26
    assert found["kernels_us"] == 25
    assert found["busy_us"] == 23
    assert found["gaps_us"] == 3
    product, attention = found["kernels"]
    assert product == {
        "name": "product", "launches": 2, "mean_us": 10, "step_us": 20, "once_us": 20,
        "share": 20 / 26,
    }  # fmt: skip
    assert (attention["mean_us"], attention["once_us"]) == (5, 3)


def test_a_kernel_inside_another_adds_nothing() -> None:
    found = summarize([[Event("outer", 0, 10), Event("inner", 2, 4), Event("last", 9, 12)]])
    assert found["busy_us"] == found["device_us"] == 12
    assert [(row["name"], row["once_us"]) for row in found["kernels"]] == [
        ("outer", 10), ("last", 2), ("inner", 0),
    ]  # fmt: skip


def test_figures_are_of_one_step_and_time_between_steps_is_in_none() -> None:
    more = [*later(STEP, 1000), Event("copy", 1026, 1028)]
    found = summarize([STEP, more])
    assert found["device_us"] == (26 + 28) / 2
    assert found["gaps_us"] == 3
    copy = next(row for row in found["kernels"] if row["name"] == "copy")
    assert (copy["launches"], copy["mean_us"], copy["step_us"]) == (0.5, 2, 1)
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1 - 3 / 27)


def test_a_table_has_each_kernel_their_sum_and_the_gaps_in_columns() -> None:
    long = Event("void cutlass::Kernel2<" + "x" * 200, 26, 27)
    lines = table(summarize([[*STEP, long]]))
    assert len(lines) == 1 + 3 + 2
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["product", "2", "10.00", "20.0", "20.0", "74.1%"]
    assert lines[-2].split() == ["all", "kernels", "4", "26.0", "24.0", "88.9%"]
    assert lines[-1].split()[-2:] == ["3.0", "11.1%"]


def test_a_trace_has_what_the_device_did_in_each_step_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a profiler that writes down what is submitted, and a call of the driver beside it."""
    events: list[Any] = []

    def record(name: str, device: DeviceType = DeviceType.CUDA) -> None:
        at = SimpleNamespace(start=float(len(events)), end=len(events) + 0.5)
        events.append(SimpleNamespace(name=name, device_type=device, time_range=at))

    def submit(batch: Any) -> None:
        record(f"step {batch.num_tokens}")
        record("cudaGraphLaunch", DeviceType.CPU)

    batches = iter(SimpleNamespace(num_rows=1, num_tokens=number) for number in range(100))
    runner = SimpleNamespace(submit=submit)
    scheduler = SimpleNamespace(schedule=lambda: next(batches), commit=lambda result: [])
    core: Any = SimpleNamespace(scheduler=scheduler, runner=runner)
    profiler = nullcontext(SimpleNamespace(events=lambda: list(reversed(events))))
    monkeypatch.setattr(tool, "profile", lambda activities: profiler)
    monkeypatch.setattr(tool.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        tool.torch.cuda, "_sleep", lambda cycles: record("at::cuda::spin_kernel(long)")
    )
    found = tool.trace(core, lambda: core.runner.submit(core.scheduler.schedule()), 2)
    first = tool.LEAD
    assert [[e.name for e in step] for step in found] == [[f"step {first}"], [f"step {first + 1}"]]
    assert runner.submit is submit


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["nowhere", "--device", "cpu"]) == 1
    assert "steps are traced on a GPU" in capsys.readouterr().err


class Clock:
    host_seconds = 0.0

    def read(self) -> tuple[float, float]:
        return 0.002, 0.001


class BenchWithClock(Bench):
    def __init__(self, engine: Any):
        super().__init__(engine)
        self.core.runner.clock = Clock()  # type: ignore[attr-defined]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU that is the CPU, and traces that are STEP; the rows of the steps that were traced."""
    rows: list[int] = []

    def trace(core: EngineCore, advance: Callable[[], object], steps: int) -> list[list[Event]]:
        with tool.watched(core) as watch:
            for _ in range(steps):
                advance()
        rows.extend(each for each, _ in watch.batches)
        return [STEP] * steps

    monkeypatch.setattr(tool, "find_gpu", lambda: (SimpleNamespace(), ""))
    monkeypatch.setattr(tool, "Bench", BenchWithClock)
    monkeypatch.setattr(tool, "trace", trace)
    return rows


def test_a_record_has_every_size_and_the_parts_of_the_host(
    tiny_llama: str, pretended: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "steps.json"
    command = f"{tiny_llama} --load-format dummy --skip-tokenizer-init --rows 1,3 --context 40"
    command += f" --steps 4 --prompts 100 --output {output}"
    assert tool.main(command.split()) == 0
    record = json.loads(output.read_text())
    assert record["command"].startswith("python -m benchmarks.gpu.steps ")
    assert {"date", "machine", "versions", "plan", "ceilings"} <= record.keys()
    assert pretended == [1] * 4 + [3] * 4 + [1] * tool.PROMPT_STEPS
    one, three, prompt = record["results"].values()
    assert [found["tokens"] for found in (one, three, prompt)] == [1, 3, 100]
    assert one["device_us"] == pytest.approx(2000 / (tool.LEAD + 4), abs=1e-3)
    for found in (one, three, prompt):
        parts = found["host_us"]
        assert sum(parts.values()) - parts["all"] == pytest.approx(parts["all"], abs=1e-2)
        assert all(each > 0 for each in parts.values())
        assert found["share"] == pytest.approx(found["floor_us"] / found["wall_us"], abs=1e-3)
        assert found["traced"]["gaps_us"] == 3
    text = capsys.readouterr().out
    assert "decode3: means of 4 steps of 3 tokens" in text
    assert "engine thread" in text


def test_what_does_not_fit_together_is_refused(
    tiny_llama: str, pretended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"{tiny_llama} --load-format dummy --skip-tokenizer-init --max-num-seqs 2"
    assert tool.main(f"{model} --rows 3".split()) == 1
    assert "--max-num-seqs" in capsys.readouterr().err
    short = f"{model} --rows 1 --context 40 --prompts 100 --max-num-batched-tokens 64"
    assert tool.main(short.split()) == 1
    assert "a prompt took several" in capsys.readouterr().err
