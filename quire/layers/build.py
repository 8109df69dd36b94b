"""What layers are built with, and the registry of what they need: weights and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from quire.comm.group import Group
from quire.kernels.reference.compressed.ops import CompressedKernels
from quire.kv import BLOCK_SIZE
from quire.weights.source import TensorInfo, WeightSource


class Kernels(Protocol):
    """The operations layers call: quire.kernels.reference.ops or a faster equal of it.

    Signatures and shapes: quire/kernels/reference/ops.py, those of `compressed`:
    quire/kernels/reference/compressed/ops.py. `dense`: weights are held dense in the model's number
    format or as codes, the experts of a layer in one (see DenseKernels). `why_widened`: why `pack`
    does not take a QuantTensor of a format as it is, empty where it does.
    """

    dense: bool
    compressed: CompressedKernels
    pack: Callable[..., Any]
    pack_exact: Callable[..., Any]
    exact_nbytes: Callable[..., int]
    packed_nbytes: Callable[..., int]
    why_widened: Callable[..., str]
    linear: Callable[..., torch.Tensor]
    embedding: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., torch.Tensor]
    rotary_cache: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    rotary_attention: Callable[..., torch.Tensor]
    latent_cache: Callable[..., torch.Tensor]
    latent_attention: Callable[..., torch.Tensor]
    cache_page: Callable[..., tuple[tuple[int, ...], ...]]
    gated_activation: Callable[..., torch.Tensor]
    gated_linear: Callable[..., torch.Tensor]
    route: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    route_groups: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    route_tokens: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class CpuKernels(Kernels, Protocol):
    """What the CPU runner needs besides, to sample row by row."""

    argmax: Callable[..., torch.Tensor]
    logsumexp: Callable[..., torch.Tensor]
    gumbel: Callable[..., torch.Tensor]


class DenseKernels(Protocol):
    """What dense kernels have besides: what `pack` gives in one stack, all experts of a layer at
    once, products of each head or group of columns with a weight of its own, products
    that begin with the addition and norm before them, and gated ones whose results are stored as
    the next product takes them."""

    stack: Callable[..., Any]
    pack_experts: Callable[..., Any]
    experts: Callable[..., torch.Tensor]
    head_linear: Callable[..., torch.Tensor]
    grouped_linear: Callable[..., torch.Tensor]
    norm_for_experts: Callable[..., tuple[torch.Tensor, Any] | None]
    gated_linear: Callable[..., Any]
    add_norm_linear: Callable[..., tuple[Any, torch.Tensor]]


class Weight(Protocol):
    """A part of a model that holds weights.

    `tensors` lists what it needs by checkpoint name, with whole (unsharded) shapes; `load` reads
    this rank's share; `nbytes` is the memory it will hold on this rank, given each tensor's
    format.
    """

    def tensors(self) -> list[TensorInfo]: ...
    def load(self, source: WeightSource) -> None: ...
    def nbytes(self, formats: Callable[[str], str]) -> int: ...


@dataclass(frozen=True)
class Reads:
    """What each query reads of a layer's cache: entries of `ratio` tokens each, `most` of those
    before it (None: all), each of so many `values`, with which it does so many `operations`."""

    values: int
    operations: int
    most: int | None = None
    ratio: int = 1

    def seen(self, context: float) -> float:
        """Entries that the last of so many tokens reads."""
        entries = context / self.ratio
        return entries if self.most is None else min(entries, self.most)

    def pairs(self, start: int, end: int) -> int:
        """(query, entry) pairs of queries at positions start to end - 1."""
        return self._pairs(end) - self._pairs(start)

    def _pairs(self, tokens: int) -> int:
        """Of the first `tokens` queries."""
        ratio, most = self.ratio, self.most
        full = tokens if most is None else min(tokens, ratio * most)  # then each reads `most`
        whole, rest = divmod(full, ratio)
        pairs = ratio * whole * (whole - 1) // 2 + whole * (rest + 1)
        return pairs + (tokens - full) * (most or 0)


@dataclass
class CacheLayer:
    """What one attention layer keeps of every token, in blocks of `block_size` tokens.

    `page`: the shape of one block in each of the layer's tensors; the runner makes `tensors`
    [blocks, *shape] of it once planned. `heads` query heads read keys of `key_size` and values of
    `value_size` from `kv_heads` heads. `by_kernels`: Kernels.attention reads it, and not code of
    the model's own. `reads`: what a query reads, if not all before it in the window. `group` is the
    index of the KV group the layer belongs to.
    """

    layer: int
    page: tuple[tuple[int, ...], ...]
    window: int | None
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    block_size: int = BLOCK_SIZE
    by_kernels: bool = True
    reads: tuple[Reads, ...] = ()
    group: int = -1
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def latent(self) -> bool:
        """Whether values are the first part of keys, in one tensor."""
        return len(self.page) == 1 and self.by_kernels

    def reading(self) -> tuple[Reads, ...]:
        """What each query reads."""
        operations = 2 * self.heads * (self.key_size + self.value_size)
        whole = Reads(self.page_values // self.block_size, operations, self.window)
        return self.reads or (whole,)

    @property
    def page_values(self) -> int:
        """Values of one block."""
        return sum(prod(shape) for shape in self.page)


@dataclass
class StateLayer:
    """What one layer keeps of each running request besides its cache: float32 [slots, *shape],
    which the runner makes once planned. It is not kept with cached prefixes: after a hit the last
    `recomputed` tokens before it are computed again, which makes it whole.
    """

    shape: tuple[int, ...]
    recomputed: int
    tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Build:
    """Context of building one model: kernels, dense dtype (None keeps the checkpoint's, and makes
    quantised weights that the kernels do not have `widened`), device, ranks, the longest context
    in tokens (the size of rotary tables), whether experts are chosen by the "model" or evenly
    at random ("uniform", for benchmarks), and the format of the caches, of which "fp8" is packed by
    layers of most families (`packs_fp8`, once they are built), in bytes. `kv_scales`: those of the
    checkpoint for that, by tensor name. Caches are numbered from
    `first_layer` on, behind those of a model whose blocks are shared.

    Building allocates nothing: weights come with `load`, caches with the runner, so that a plan
    can be made of a model that does not fit. What a plan needs gathers here: `weights`, `caches`,
    `states`, `width` (most float32 values per token that a layer works with, besides its input and
    output), `output` (values per token that `forward` gives, 0 where it is the hidden size),
    `scratch` (bytes that a layer works with besides, whatever the number of tokens) and
    `rotary_bytes` (of each rotary table, per position). `spare`: beginnings of the names of tensors
    that checkpoints of the model may have and that it does not read. `on_experts` is called with
    the experts [T, K] that a layer chose, by who wants to count them.
    """

    kernels: Kernels
    dtype: torch.dtype | None = None
    group: Group = field(default_factory=Group)
    max_len: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    moe_routing: str = "model"
    kv_dtype: str = "auto"
    kv_scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    widened: torch.dtype = torch.bfloat16
    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    rotary_bytes: dict[str, int] = field(default_factory=dict)
    width: int = 0
    output: int = 0
    scratch: int = 0
    packs_fp8: bool = False
    on_experts: Callable[[torch.Tensor], None] | None = None
    first_layer: int = 0
    weights: list[Weight] = field(default_factory=list)
    caches: list[CacheLayer] = field(default_factory=list)
    states: list[StateLayer] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)

    def add_weight(self, weight: Weight) -> None:
        self.weights.append(weight)

    def add_width(self, values: int) -> None:
        self.width = max(self.width, values)

    def add_scratch(self, nbytes: int) -> None:
        self.scratch = max(self.scratch, nbytes)

    def add_cache(
        self,
        page: tuple[tuple[int, ...], ...],
        window: int | None,
        *,
        heads: int,
        kv_heads: int,
        key_size: int,
        value_size: int,
        block_size: int = BLOCK_SIZE,
        by_kernels: bool = True,
        reads: tuple[Reads, ...] = (),
    ) -> CacheLayer:
        """The next layer's cache; arguments as CacheLayer has them."""
        number, sizes = self.first_layer + len(self.caches), (heads, kv_heads, key_size, value_size)
        cache = CacheLayer(number, page, window, *sizes, block_size, by_kernels, reads)
        self.caches.append(cache)
        return cache

    def add_state(self, shape: tuple[int, ...], recomputed: int) -> StateLayer:
        """State of the next layer that has any; arguments as StateLayer has them."""
        state = StateLayer(shape, recomputed)
        self.states.append(state)
        return state
