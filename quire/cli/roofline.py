"""What a scenario must at least take: the bytes it must read and the arithmetic it must do, at the
rates that this machine was measured to have.

A step is products, then attention in every layer: neither can hide the other's time, so each takes
the longer of its bytes and its arithmetic, and a step the sum. Activations, sampling and launches
count nothing. Keys and values count as read once by each decode step; those that a prompt's chunk
reads, and all that is written, are left out. Prompts and decode steps count apart. A step can hold
both, and then reads the weights once for them: where many prompts come beside long answers, an
engine could be a little faster than this estimate. Drafts are tokens of their step, whose rows are
read once for them; who makes them reads its own weights once for each draft of a row, and its
attention counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.cli.workload import DECODE, PREFILL, SINGLE, Scenario

if TYPE_CHECKING:
    from quire.layers.build import CacheLayer, Reads


@dataclass(frozen=True)
class Need:
    """Bytes to read and operations to do (a multiplication and an addition are two): in bfloat16,
    and in e4m3."""

    bytes: float = 0.0
    flops: float = 0.0
    e4m3_flops: float = 0.0

    def times(self, count: float) -> Need:
        return Need(self.bytes * count, self.flops * count, self.e4m3_flops * count)

    def plus(self, more: Need) -> Need:
        e4m3_flops = self.e4m3_flops + more.e4m3_flops
        return Need(self.bytes + more.bytes, self.flops + more.flops, e4m3_flops)


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second; `flops_s` 0 where it was not measured: then arithmetic
    counts nothing. `e4m3_flops_s` 0: e4m3 counts like bfloat16."""

    bytes_s: float
    flops_s: float = 0.0
    e4m3_flops_s: float = 0.0

    @classmethod
    def of(cls, measured: dict[str, float]) -> Ceilings:
        """From a record's ceilings (quire/cli/bench_record.py)."""
        rate = measured.get("memory_copy_gb_s") or measured["memory_read_gb_s"]
        flops = (measured.get(f"{kind}_tflop_s", 0.0) * 1e12 for kind in ("bf16", "e4m3"))
        return cls(rate * 1e9, *flops)

    def seconds(self, *needs: Need) -> float:
        """Of what cannot run at the same time."""
        each = 1 / self.flops_s if self.flops_s else 0.0
        fast = 1 / self.e4m3_flops_s if self.e4m3_flops_s else each
        return sum(
            max(need.bytes / self.bytes_s, need.flops * each + need.e4m3_flops * fast)
            for need in needs
        )


@dataclass(frozen=True)
class Matrices:
    """Weights that are read and used together; `e4m3_values` of the `values` are multiplied in
    e4m3, which few tokens are not: there it is bytes that count."""

    values: float = 0.0
    nbytes: float = 0.0
    e4m3_values: float = 0.0

    def share(self, count: int) -> Matrices:
        return Matrices(self.values / count, self.nbytes / count, self.e4m3_values / count)


@dataclass(frozen=True)
class Work:
    """What of a model counts. Its weights by how often they are read and used: `layers` once and
    for every token, `head` once and for every sampled token, of `experts` only the chosen ones,
    `expert` in each of `sparse` layers, `per_token` of them for every token. An embedding that is
    not the head is looked up, which counts nothing. `kv_bytes`: of a cached value."""

    layers: Matrices
    head: Matrices
    attention: tuple[Reads, ...]
    kv_bytes: int
    experts: int = 0
    per_token: int = 0
    expert: Matrices = Matrices()
    sparse: int = 0

    @classmethod
    def of(
        cls,
        config: Any,
        parts: Sequence[Mapping[str, Any]],
        caches: Sequence[CacheLayer] = (),
        kv_itemsize: int = 0,
    ) -> Work:
        """Of a model. `parts`: Plan.weight_parts as data, so that each part of a model counts
        the bytes that it has indeed, whatever their formats are."""
        found = {
            part["name"]: Matrices(part["values"], part["nbytes"], part["e4m3_values"])
            for part in parts
        }
        every, sparse = found["experts"], sum(part["layers"] for part in parts)
        experts = getattr(config, "experts", 0) if sparse else 0
        return cls(
            layers=found["layers"],
            head=found["head"],
            attention=tuple(reads for cache in caches for reads in cache.reading()),
            kv_bytes=kv_itemsize,
            experts=experts,
            per_token=config.experts_per_token if experts else 0,
            expert=every.share(experts * sparse) if experts else Matrices(),
            sparse=sparse,
        )

    def products(self, tokens: float, sampled: float, distinct: float | None = None) -> Need:
        """A step's matrix products. `distinct`: experts that a layer reads; without it what evenly
        random routing reads on average."""
        if distinct is None:
            distinct = self.spread(tokens)
        read = self.layers.nbytes + self.head.nbytes + self.sparse * distinct * self.expert.nbytes
        uses = (self.layers, tokens), (self.expert, self.sparse * self.per_token * tokens)
        flops = [0.0, 0.0]
        for matrices, count in (*uses, (self.head, sampled)):
            flops[0] += 2.0 * (matrices.values - matrices.e4m3_values) * count
            flops[1] += 2.0 * matrices.e4m3_values * count
        return Need(read, *flops)

    def spread(self, tokens: float) -> float:
        """Distinct experts that `tokens` tokens choose on average, each evenly at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - math.pow(1 - self.per_token / self.experts, tokens))

    def decoding(self, context: float) -> Need:
        """One token's attention over `context` tokens, all layers."""
        need = [0.0, 0.0]
        for reads in self.attention:
            seen = reads.seen(context)
            need[0] += reads.values * self.kv_bytes * seen
            need[1] += reads.operations * seen
        return Need(*need)

    def reading(self, start: int, end: int) -> Need:
        """The attention of a prompt's tokens from `start` to `end`, all layers."""
        parts = (a.operations * a.pairs(start, end) for a in self.attention)
        return Need(0.0, sum(parts))


@dataclass(frozen=True)
class Drafted:
    """What was drafted, by each row of a decode step in the mean: so many `drafts`, of which a
    share was `accepted`. `drafter`: the model or module that made them, if one did."""

    drafts: float = 0.0
    accepted: float = 0.0
    drafter: Work | None = None


@dataclass(frozen=True)
class Roofline:
    """A scenario's two phases: seconds at the ceilings, and what they need. `step_s` is one decode
    step of `rows` requests with their drafts, `tokens` together, which gives each request `given`
    tokens; without a `prompt` ceiling that phase is 0."""

    rows: int
    tokens: float
    given: float
    step: tuple[Need, Need]
    step_s: float
    decode_s: float
    prompt: tuple[Need, Need]
    prompt_s: float


def roofline(
    work: Work,
    scenario: Scenario,
    plan: dict[str, Any],
    ceilings: Ceilings,
    experts: dict[str, float] | None = None,
    drafted: Drafted = Drafted(),
) -> Roofline:
    """The floor of a scenario. `experts`: what ExpertCount found; else even routing is assumed."""
    counted = experts or {}
    length = (scenario.prompt + (scenario.shortest or scenario.prompt)) / 2
    # Tokens known in the mean decode step: its token is one of 2 to `output`.
    context = length + scenario.output / 2
    seats = min(plan["max_num_seqs"], int(plan["context_tokens"] // context) or 1)
    rows = min(scenario.requests, seats)
    in_step = rows * (1 + drafted.drafts)
    given = 1 + drafted.drafts * drafted.accepted
    products = work.products(in_step, in_step, counted.get("decode"))
    if drafted.drafter is not None:  # it reads what the step gave, and then goes on
        a_pass = drafted.drafter.products(rows, rows, counted.get("draft"))
        products = products.plus(a_pass.times(max(1.0, drafted.drafts)))
    one = work.decoding(context)
    step = products, Need(one.bytes * rows, one.flops * in_step)
    step_s = ceilings.seconds(*step)
    new = round(length) - scenario.shared
    tokens = scenario.requests * new
    steps = -(-tokens // plan["max_num_batched_tokens"])
    each = work.products(-(-tokens // steps), 0, counted.get("prompt"))
    sampled = work.products(0, scenario.requests, 0.0)
    arithmetic = Need(0.0, sampled.flops, sampled.e4m3_flops)  # its bytes are in each step's
    prompts = each.times(steps).plus(arithmetic)
    prompt = (prompts, work.reading(scenario.shared, round(length)).times(scenario.requests))
    return Roofline(
        rows=rows,
        tokens=in_step,
        given=given,
        step=step,
        step_s=step_s,
        decode_s=step_s * (scenario.output - 1) * scenario.requests / (rows * given),
        prompt=prompt,
        prompt_s=ceilings.seconds(*prompt) if ceilings.flops_s else 0.0,
    )


def ideal(found: Roofline, scenario: Scenario) -> tuple[str, float] | None:
    """Which figure of a scenario has a floor, and what it is there; None where arithmetic counts
    and its rate was not measured."""
    if scenario.kind == DECODE:
        return "itl_ms", found.decode_s / (scenario.output - 1) * 1e3
    if scenario.kind == SINGLE:
        return "decode_tok_s", found.given / found.step_s
    if not found.prompt_s:
        return None
    if scenario.kind == PREFILL:
        return "prefill_tok_s", scenario.requests * scenario.prompt / found.prompt_s
    tokens = scenario.requests * scenario.output
    return "output_tok_s", tokens / (found.prompt_s + found.decode_s)


def to_record(
    found: Roofline, scenario: Scenario, median: dict[str, float]
) -> dict[str, float | str]:
    """What a record keeps: needs and floors of a decode step and of all prompts, and, where the
    scenario's figure has a floor, that and the `share` of it which was reached."""
    kept: dict[str, float | str] = {"rows": found.rows}
    if found.tokens > found.rows:
        kept |= {"step_tokens": found.tokens, "tokens_per_row": found.given}
    phases = {"step": (found.step, found.step_s), "prompt": (found.prompt, found.prompt_s)}
    for name, ((products, attention), seconds) in phases.items():
        if not seconds or (name == "step" and scenario.output == 1):
            continue
        kept[f"{name}_gb"] = (products.bytes + attention.bytes) / 1e9
        kept[f"{name}_tflop"] = (products.flops + attention.flops) / 1e12
        if products.e4m3_flops:
            kept[f"{name}_e4m3_tflop"] = products.e4m3_flops / 1e12
        kept[f"{name}_ms"] = seconds * 1e3
    best = ideal(found, scenario)
    if best is not None:
        figure, value = best
        reached = median[figure]
        share = value / reached if figure.endswith("_ms") else reached / value
        kept |= {"figure": figure, "floor": value, "share": share}
    return kept
