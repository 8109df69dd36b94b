"""The frozen result of planning."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from quire.config.speculation import Speculation
from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup


@dataclass(frozen=True)
class Choice:
    """What serves an operation or decides a setting, and why. `downgrade`: less than was asked
    or could be had on such a machine; --strict refuses it."""

    what: str
    chosen: str
    reason: str
    downgrade: bool = False


@dataclass(frozen=True)
class WeightPart:
    """`name`: "layers", which every token needs; "experts", of which it needs the chosen ones;
    "head", for sampled tokens (an embedding that is also the head counts here); "embedding", of
    which rows are looked up. `nbytes` as this rank holds them; `values` of all ranks, of which
    `e4m3_values` are multiplied in e4m3 where there are many tokens. Experts are in `layers`."""

    name: str
    nbytes: int
    values: int
    e4m3_values: int
    layers: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything decided before loading. All sizes are bytes, of the device's memory but for
    `tier_bytes`.

    `activation_bytes` is the largest working memory of a step and the rotary tables,
    `graph_bytes` what recorded steps or CUDA graphs keep, `state_bytes` the requests' state and
    the kernels' scratch on a GPU, `reserve_bytes` what the process needs besides (interpreter,
    libraries, tokenizer, the GPU's context). `context_tokens` is how many tokens all requests
    together can hold in the KV cache. `decode_graphs`: numbers of rows for which a decode step is
    captured (with drafts, of tokens: each is a row of its own then), `mixed_graphs` numbers of
    tokens of other steps.
    `max_sampled`: rows of logits that a step samples from at most. `draft_bytes`: weights of a
    model or module that drafts, of which `draft_parts` are the parts; its layers' caches are in
    `groups`, numbered behind the model's.
    `tier_slots`: pages of each pool in host memory, where there are tiers; they take `tier_bytes`.
    `tier_rates`: bytes a second that each of --kv-tiers gives, measured or assumed; 0: not known.
    `model_fingerprint` is of the weights and of the config's values; `ranks` share the model.
    `recomputed_tokens`: so many before a prefix hit are computed again. `weight_parts`: what
    `weight_bytes` consists of, by how often steps read it.
    """

    model: str
    model_fingerprint: str
    architecture: str
    device: str
    device_name: str
    threads: int
    dtype: str
    kv_dtype: str
    weight_formats: str
    kernels: str
    isa: str
    runner: str
    deterministic: bool
    async_scheduling: bool
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    graph_bytes: int
    state_bytes: int
    reserve_bytes: int
    max_model_len: int
    context_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    decode_graphs: tuple[int, ...]
    mixed_graphs: tuple[int, ...]
    groups: tuple[KVGroup, ...]
    pool_blocks: tuple[int, ...]
    choices: tuple[Choice, ...]
    numerics_version: int
    max_sampled: int
    weight_parts: tuple[WeightPart, ...] = ()
    speculation: Speculation | None = None
    draft_bytes: int = 0
    draft_parts: tuple[WeightPart, ...] = ()
    draft_fingerprint: str = ""
    ranks: int = 1
    moe_routing: str = "model"
    recomputed_tokens: int = 0
    tier_slots: tuple[int, ...] = ()
    tier_bytes: int = 0
    tier_rates: tuple[float, ...] = ()

    @property
    def total_bytes(self) -> int:
        parts = (self.weight_bytes, self.kv_bytes, self.activation_bytes)
        rest = (self.graph_bytes, self.state_bytes, self.reserve_bytes, self.draft_bytes)
        return sum(parts) + sum(rest) + (self.tier_bytes if self.device == "cpu" else 0)

    @property
    def cache_fingerprint(self) -> bytes:
        """Changes with anything that can change the KV of a token sequence."""
        fields = [
            self.model_fingerprint,
            self.architecture,
            self.dtype,
            self.kv_dtype,
            self.weight_formats,
            self.kernels,
            self.isa,
            self.device,
            self.deterministic,
            self.numerics_version,
            self.ranks,
            self.moe_routing,
            BLOCK_SIZE,
            [(g.window, g.layers, g.page_bytes, g.block_size) for g in self.groups],
        ]
        if self.draft_fingerprint:
            fields.append(self.draft_fingerprint)
        return hashlib.blake2b(msgspec.json.encode(fields), digest_size=32).digest()

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of the API: equal for engines whose answers should be equal."""
        return "fp_" + self.cache_fingerprint.hex()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for the wire."""
        return {
            **asdict(self),
            "total_bytes": self.total_bytes,
            "fingerprint": self.fingerprint,
        }

    def summary(self) -> dict[str, str]:
        """The five numbers of the ready block."""
        return {
            "weights": format_bytes(self.weight_bytes),
            "kv cache": f"{format_bytes(self.kv_bytes)} ({self.context_tokens} tokens)",
            "activations": format_bytes(self.activation_bytes),
            "reserve": format_bytes(self.reserve_bytes + self.graph_bytes + self.state_bytes),
            "context": f"{self.max_model_len} tokens",
        }


def format_bytes(size: int) -> str:
    """A size for people: 98.4 MiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
