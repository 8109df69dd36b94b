"""Every option of Quire, once: name, type, default, meaning, and whether it can change live.

From these dataclasses come the CLI flags (`--max-model-len`), the environment names
(`QUIRE_MAX_MODEL_LEN`), the keys of a config file (`max-model-len` in TOML) and docs/options.md.
Option names are unique over the whole tree. Where vLLM has a flag of the same meaning, the name
is vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from quire.config.speculation import (
    QUANTIZATIONS,
    Speculation,
    parse_speculation,
    speculation_text,
)
from quire.config.tiers import parse_tiers


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    live: bool = False,
    secret: bool = False,
    size: bool = False,
    check: Callable[[str], Any] | None = None,
    parse: Callable[[Any], str] | None = None,
) -> Any:
    """A dataclass field with what flags and docs need.

    `live`: can change while the engine runs. `size`: bytes, also written like "4GiB".
    `low`, `high`: inclusive range of a number. `check` raises ValueError, whose text says what is
    allowed; a list of texts is given to it with commas between. `parse`: checks a value of
    structure and gives the text that stands for it, or raises UsageError.
    """
    meta = {
        "help": help,
        "choices": choices,
        "low": low,
        "high": high,
        "live": live,
        "secret": secret,
        "size": size,
        "check": check,
        "parse": parse,
    }
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how its weights are held."""

    model: str = option("smollm2", "directory, .gguf file, Hugging Face id, or alias (smollm2)")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face model")
    load_format: str = option(
        "auto", "where weights come from", choices=("auto", "safetensors", "gguf", "dummy")
    )
    quantization: str | None = option(
        None,
        "quantise an unquantised checkpoint while loading: all linear layers, or experts only; see "
        "docs/quantization.md",
        choices=QUANTIZATIONS,
    )
    dtype: str = option(
        "auto",
        "number format of unquantised weights, and of quantised ones where they are widened; auto "
        "keeps the checkpoint's",
        choices=("auto", "float32", "bfloat16"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "number format of the KV cache; fp8 is e4m3 with scales (not e5m2); auto is fp8 for "
        "checkpoints that were made for it, else the model's on a GPU; on a CPU float32 with "
        "--dtype float32, else bfloat16",
        choices=("auto", "float32", "bfloat16", "fp8"),
    )
    max_model_len: int | None = option(
        None, "longest context in tokens; by default the model's, or what memory allows", low=1
    )
    seed: int = option(0, "seeds dummy weights", low=0)
    skip_tokenizer_init: bool = option(False, "load no tokenizer: prompts are token ids")
    offline: bool = option(False, "never use the network, only files already on this machine")


@dataclass(frozen=True)
class EngineOptions:
    """Where and how the engine runs."""

    device: str = option(
        "auto",
        "where to compute; auto takes a GPU that the kernels support, else the CPU",
        choices=("auto", "cpu", "cuda"),
    )
    runner: str = option(
        "auto",
        "how steps are executed; auto takes CUDA graphs on a GPU",
        choices=("auto", "graph", "eager"),
    )
    kernels: str = option(
        "auto",
        "CPU kernels: native code, or torch (the reference); auto takes native where it is built",
        choices=("auto", "native", "reference"),
    )
    threads: int | None = option(None, "CPU threads; by default the physical cores", low=1)
    deterministic: bool | None = option(
        None,
        "the same request gives the same bits whatever else runs; by default on a CPU, where it "
        "costs nothing; see docs/determinism.md",
    )
    strict: bool = option(False, "make any downgrade in the plan an error")
    max_num_seqs: int | None = option(
        None,
        "requests computed at the same time; by default 64; on a GPU 512, 256 for DeepSeek V4",
        low=1,
        high=4096,
    )
    max_num_batched_tokens: int | None = option(
        None,
        "token budget of one step, shared by prompts and decoding; by default 512, 8192 on a GPU",
        low=1,
        high=2**20,
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory that the engine may use", low=0.05, high=0.99
    )
    kv_cache_memory: int | None = option(
        None, "bytes for the KV cache (like 2GiB); by default what the plan finds", low=1, size=True
    )
    enable_prefix_caching: bool = option(True, "reuse KV of equal prompt beginnings")
    checkpoint_tokens: int | None = option(
        None,
        "tokens between the places of a prompt where DeepSeek V4's windows are kept for prefix "
        "hits, besides its end; by default 4096",
        low=1,
        high=2**20,
    )
    kv_tiers: str | None = option(
        None,
        "where KV blocks go when the device is full, the fastest first: dram:SIZE, "
        "fs:DIRECTORY:SIZE, mooncake:CONFIG.json, with commas between; see docs/kv-tiers.md",
        check=parse_tiers,
    )
    kv_tier_policy: str = option(
        "lru",
        "which block leaves the DRAM tier: lru the one used longest ago; arc keeps what is used "
        "often through a flood of new blocks",
        choices=("lru", "arc"),
    )
    kv_tier_fsync: bool = option(
        False,
        "wait for the disk before a block file gets its name; without it a crash of the "
        "machine can cost blocks, never give wrong ones",
    )
    scheduling_policy: str = option(
        "fcfs", "order of waiting requests", choices=("fcfs", "priority")
    )
    async_scheduling: bool | None = option(
        None,
        "schedule the next step before the last one's tokens are known; by default on a GPU",
    )
    speculative_config: str | None = option(
        None,
        "draft tokens that the model then verifies many at a time, as JSON with vLLM's keys; see "
        "docs/speculative.md",
        parse=speculation_text,
    )
    moe_routing: str = option(
        "model",
        "which experts tokens go to: the model's choice, or evenly at random (for benchmarks with "
        "dummy weights)",
        choices=("model", "uniform"),
    )
    max_queue: int = option(
        256, "waiting requests beyond which new ones are refused (503)", low=0, live=True
    )

    @property
    def speculation(self) -> Speculation | None:
        """What `speculative_config` says."""
        asked = self.speculative_config
        return None if asked is None else parse_speculation(asked)

    @property
    def mtp(self) -> bool:
        """Whether the model's own module for multi-token prediction drafts."""
        asked = self.speculation
        return asked is not None and asked.method == "mtp"


@dataclass(frozen=True)
class ServerOptions:
    """How the HTTP server listens and what it allows."""

    host: str = option("127.0.0.1", "address to bind")
    port: int = option(8000, "port to bind; 0 takes a free one", low=0, high=65535)
    served_model_name: str | None = option(None, "model id that clients use; default: the model")
    api_key: str | None = option(None, "key that clients must send", secret=True)
    api_key_file: str | None = option(None, "file with one `name:key` or `key` per line")
    admin_keys: str = option(
        "default",
        "names of keys, with commas between, that may look at the KV cache and clear it "
        "(`/v1/cache`); --api-key's name is default",
    )
    allow_unauthenticated: bool = option(False, "allow binding off loopback without any key")
    allow_unknown_fields: bool = option(False, "accept unknown request fields instead of a 400")
    max_body_bytes: int = option(8 * 2**20, "largest request body", low=1024, size=True, live=True)
    max_header_bytes: int = option(32 * 2**10, "largest request head", low=1024, size=True)
    max_connections: int = option(1024, "open connections beyond which new ones get 503", low=1)
    header_timeout: float = option(10.0, "seconds for a client to send its request head", low=0.1)
    body_timeout: float = option(30.0, "seconds for a client to send its body", low=0.1)
    idle_timeout: float = option(60.0, "seconds an idle connection is kept", low=0.1)
    request_timeout: float = option(
        600.0, "seconds after which a request is ended", low=0.1, live=True
    )
    drain_timeout: float = option(30.0, "seconds that SIGTERM waits for running requests", low=0)
    template_timeout: float = option(
        2.0, "seconds that rendering a chat template may take", low=0.1
    )
    tool_call_parser: str = option(
        "auto",
        "how tool calls are read out of answers; auto takes what the model's family and chat "
        "template tell; see docs/chat.md",
        choices=("auto", "none", "hermes", "deepseek_v4"),
    )
    reasoning_parser: str = option(
        "auto",
        "how a model's thoughts are told from its answer; auto as above",
        choices=("auto", "none", "qwen3", "deepseek_r1", "deepseek_v4"),
    )
    log_level: str = option("info", "what to log", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class Options:
    """All options. Build with `quire.config.parse`, or directly in Python."""

    model: ModelOptions = field(default_factory=ModelOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelOptions,
    "engine": EngineOptions,
    "server": ServerOptions,
}


def all_options(*sections: str) -> dict[str, tuple[str, Any]]:
    """Option name -> (section, dataclass field), for the named sections or all of them."""
    chosen = sections or tuple(SECTIONS)
    return {f.name: (s, f) for s in chosen for f in fields(SECTIONS[s])}
