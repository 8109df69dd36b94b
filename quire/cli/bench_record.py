"""A benchmark's record: results with the machine, the versions, the command and the ceiling."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.roofline import Ceilings, Drafted, Work, roofline, to_record
from quire.cli.version import versions
from quire.errors import UsageError

if TYPE_CHECKING:
    from quire.cli.workload import Scenario

BANDWIDTH_BYTES = 256 * 2**20
_KEPT = """device device_name threads kernels isa runner dtype kv_dtype weight_formats weight_bytes
weight_parts draft_parts max_num_seqs max_num_batched_tokens context_tokens deterministic
speculation fingerprint"""


class Record:
    """Everything one run of a benchmark measured. `facts`: numbers of the whole run; `phases`: of
    its start, in seconds."""

    def __init__(
        self,
        command: str,
        model: str,
        plan: dict[str, Any],
        facts: dict[str, float],
        phases: dict[str, float],
    ):
        self.command = command
        self.model = model
        self.plan = plan_facts(plan)
        self.facts = dict(facts)
        self.phases = dict(phases)
        self.ceilings: dict[str, float] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def add(
        self,
        scenario: Scenario,
        cut: bool,
        runs: list[dict[str, float]],
        work: Work,
        experts: dict[str, float] | None = None,
        drafter: Work | None = None,
    ) -> None:
        """The repetitions of a scenario. `cut`: it is smaller than its name says. `work`: what of
        the model counts for its floor, `drafter`: of what drafts for it; `experts`: what was
        counted (None: it has none)."""
        names = dict.fromkeys(name for run in runs for name in run)
        median = {n: statistics.median(run.get(n, 0.0) for run in runs) for n in names}
        ceilings = Ceilings.of(self.ceilings)
        drafted = Drafted(median.get("drafts_per_row", 0), median.get("accepted", 0), drafter)
        found = roofline(work, scenario, self.plan, ceilings, experts, drafted)
        floor = to_record(found, scenario, median)
        self.results[scenario.name] = {
            "requests": scenario.requests,
            "prompt_tokens": scenario.prompt,
            "output_tokens": scenario.output,
            "full_size": not cut,
            **({"prompts": "not computed: pages of another"} if scenario.filled else {}),
            "median": _rounded(median),
            "roofline": _rounded(floor),
            **({} if experts is None else {"experts": _rounded(experts)}),
            "runs": [_rounded(run) for run in runs],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.model,
            "machine": machine(),
            "versions": versions(),
            "plan": self.plan,
            "ceilings": {name: round(value, 2) for name, value in self.ceilings.items()},
            **_rounded(self.facts),
            "start_phases_s": _rounded(self.phases),
            "results": self.results,
        }

    def lines(self) -> list[str]:
        """A table: one line for each scenario and metric."""
        plan = self.plan
        lines = [
            f"{self.model} on {plan['device_name']}, {plan['threads']} threads, "
            f"{plan['kernels']} kernels ({plan['isa']}), {plan['weight_formats']}",
            "",
            f"{'scenario':12}{'requests':>9}{'in':>7}{'out':>6}{'floor':>16}{'share':>7}"
            "  results (median)",
        ]
        for name, result in self.results.items():
            values = ", ".join(f"{k} {v:.4g}" for k, v in result["median"].items())
            counts = (
                f"{result['requests']:>9}{result['prompt_tokens']:>7}{result['output_tokens']:>6}"
            )
            counts += _floor(result["roofline"])
            if experts := result.get("experts"):
                values += f"; experts read by a layer's step: {_experts(experts)}"
            note = "" if result["full_size"] else "  (smaller than the scenario: not comparable)"
            lines.append(f"{name:12}{counts}  {values}{note}")
        ceilings = ", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items())
        phases = ", ".join(f"{name} {took:.1f}" for name, took in self.phases.items())
        answer = f"first answer {self.facts['first_answer_s']:.1f}"
        start = f"start {self.facts['start_s']:.1f} s ({phases}), {answer}"
        return [*lines, "", f"measured ceilings: {ceilings}", start]

    def finish(self, as_json: bool, output: str | None) -> None:
        """Print, and write the file if asked. Raises UsageError where it cannot be written."""
        self.facts["peak_memory_mib"] = peak_memory() / 2**20
        print(json.dumps(self.to_dict()) if as_json else "\n".join(self.lines()))
        if output:
            write_json(output, self.to_dict())


def plan_facts(plan: dict[str, Any]) -> dict[str, Any]:
    """What of a plan a record keeps."""
    return {name: plan[name] for name in _KEPT.split()}


def _rounded(values: Mapping[str, float | str]) -> dict[str, float | str]:
    return {n: v if isinstance(v, str) else round(v, 4) for n, v in values.items()}


def _floor(found: dict[str, Any]) -> str:
    """Two columns: the scenario's figure at the floor, and the share of it that was reached."""
    if "floor" not in found:
        return f"{'-':>16}{'-':>7}"
    unit = "ms" if found["figure"].endswith("_ms") else "tok/s"
    return f"{found['floor']:>10.4g} {unit:5}{found['share']:>7.1%}"


def _experts(found: dict[str, float]) -> str:
    parts = []
    if "decode" in found:
        rows, tokens = found["decode_rows"], found["decode_tokens"]
        drafts = f" and {tokens - rows:.4g} drafts" if tokens > rows else ""
        parts.append(f"{found['decode']:.4g} of {found['of']:g} with {rows:g} rows{drafts}")
    if "draft" in found:
        parts.append(f"{found['draft']:.4g} by the module that drafts")
    if "prompt" in found:
        parts.append(f"{found['prompt']:.4g} with prompts")
    return ", ".join(parts)


def write_json(path: str, data: dict[str, Any]) -> None:
    """Write a record. Raises UsageError where it cannot be written."""
    try:
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError("cannot_write", f"cannot write {path}", why=str(error)) from None


def machine() -> dict[str, Any]:
    """The machine of this run."""
    from quire.hardware.machine import detect

    found = detect()
    return {
        "processor": found.name,
        "architecture": found.architecture,
        "cores": found.cores,
        "memory_bytes": found.memory_bytes,
        "system": platform.platform(),
    }


def peak_memory() -> int:
    """The most bytes this process has had in memory."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def ceilings(device: str) -> dict[str, float]:
    """What the device can do at most, measured: reading memory on a CPU; on a GPU a copy (bytes
    read and written) and products of random matrices in bfloat16 and, where there are, in e4m3."""
    if device == "cpu":
        return {"memory_read_gb_s": read_bandwidth()}
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = _device_seconds(lambda: torch.mm(a, b))
    copy = _device_seconds(lambda: target.copy_(source))
    rates = {"memory_copy_gb_s": 2 * source.nbytes / copy / 1e9}
    rates |= {"bf16_tflop_s": 2 * 8192**3 / product / 1e12}
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9):
        codes, others = (x.to(torch.float8_e4m3fn) for x in (a, b))
        one = torch.ones((), device="cuda")
        product = _device_seconds(
            lambda: torch._scaled_mm(
                codes, others.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        )  # fmt: skip
        rates |= {"e4m3_tflop_s": 2 * 8192**3 / product / 1e12}
    return rates


def _device_seconds(work: Callable[[], object]) -> float:
    """Median time of `work` on the GPU."""
    import torch

    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[2:]))


def read_bandwidth() -> float:
    """GB/s at which torch reads memory: the fastest of five sums over 256 MiB."""
    import torch

    data = torch.ones(BANDWIDTH_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return BANDWIDTH_BYTES / best / 1e9
