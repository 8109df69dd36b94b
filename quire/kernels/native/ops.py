"""Typed entrances to the native kernels.

Shapes: T tokens, H hidden, K and N a weight's inputs and outputs, D head size, Hq and Hkv heads,
B sequences, V vocabulary. Tensors are on the CPU; activations are fp32. Every output row depends
only on its own input row and the weights, to the bit: not on T, on other rows or on threads.
A wrong shape or type raises ValueError.
"""

from typing import Any

import torch

from quire.kernels import capabilities
from quire.kernels.native import _native
from quire.kernels.native.program import call, record
from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.activation.gated_activation import SWIGLU_ALPHA, limit_of
from quire.kernels.reference.attention.fp8_cache import FP8_CACHE, head_size_of, packed_width
from quire.kernels.reference.compressed.ops import CompressedKernels
from quire.kernels.reference.moe.route import route
from quire.kernels.reference.moe.route_groups import route_groups
from quire.kernels.reference.moe.route_tokens import route_tokens
from quire.kernels.reference.packed import (
    BLOCK,
    GgufWeight,
    PackedWeight,
    check_format,
    weight_source,
)

__all__ = [
    "BLOCK", "PackedWeight", "add_rms_norm", "argmax", "attention", "cache_page", "compressed",
    "dense", "embedding", "exact_nbytes", "gated_activation", "gated_linear", "gumbel",
    "isa", "latent_attention", "latent_cache", "linear", "logsumexp",
    "num_threads", "pack", "pack_exact", "packed_nbytes", "record", "rms_norm",
    "rotary_attention", "rotary_cache", "route", "route_groups", "route_tokens", "set_isa",
    "set_num_threads", "unpack_rows", "why_widened",
]  # fmt: skip

dense = False

set_num_threads = _native.set_num_threads
num_threads = _native.num_threads
isa = _native.isa
set_isa = _native.set_isa

_FORMATS = _native.FORMATS
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAX_LATENT = 1024  # as in latent.h
_CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, FP8_CACHE: 2}  # as in kernels.h
_LATENT_TYPES = (torch.float32, torch.bfloat16)


def _reject(name: str, tensor: torch.Tensor, expected: str) -> ValueError:
    found = (
        f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
    )
    return ValueError(f"{name}: expected a contiguous CPU tensor, {expected}, not {found}")


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous CPU tensor of exactly this type and shape."""
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise _reject(name, tensor, f"{dtype} {list(shape)}")
    return tensor.data_ptr()


def _optional(name: str, tensor: torch.Tensor | None, size: int) -> int:
    return 0 if tensor is None else _address(name, tensor, torch.float32, size)


def _rows(name: str, tensor: torch.Tensor, width: int) -> tuple[int, int]:
    """Address and row stride of fp32 rows of `width`, which may be columns of a wider matrix."""
    if (
        tensor.dtype is not torch.float32
        or tensor.dim() != 2
        or tensor.shape[1] != width
        or not tensor.is_cpu
    ):
        raise _reject(name, tensor, f"fp32 [T, {width}]")
    stride, step = tensor.stride()
    if step != 1 and width > 1:
        raise _reject(name, tensor, f"fp32 [T, {width}] with adjacent columns")
    return tensor.data_ptr(), stride


def pack(weight: torch.Tensor | GgufWeight) -> PackedWeight:
    """Packs a dense [N, K] tensor, or (format, bytes as uint8, n, k) straight from a GGUF file."""
    format, data, n, k = weight_source(weight)
    packed = torch.empty(packed_nbytes(format, n, k), dtype=torch.uint8)
    row_bytes = data.nbytes // n if n else 0
    _native.pack(_FORMATS[format], data.data_ptr(), row_bytes, n, k, packed.data_ptr())
    return PackedWeight(packed, format, n, k)


def packed_nbytes(format: str, n: int, k: int) -> int:
    """Bytes that pack will allocate for a weight [n, k]."""
    check_format(format, n, k)
    return _native.packed_nbytes(_FORMATS[format], n, k)


def pack_exact(weight: torch.Tensor) -> PackedWeight:
    """A float32 weight whose products are wanted in float32, whatever the model's format."""
    return pack(weight)


def exact_nbytes(n: int, k: int) -> int:
    """Bytes that pack_exact will allocate for a weight [n, k]."""
    return packed_nbytes("f32", n, k)


def why_widened(name: str, columns: int, layer: str = "linear") -> str:
    """Why `pack` does not take a weight of this format as it is (capabilities.why_widened)."""
    return capabilities.why_widened("native", layer, name, columns, "float32")


def unpack_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64 [T]) as fp32 [T, K], equal to the dequantised weight to the bit."""
    return embedding(ids, weight)


def embedding(ids: torch.Tensor, weight: PackedWeight, scale: float = 1.0) -> torch.Tensor:
    """Rows `ids` (int64 [T]) of the weight times `scale`: fp32 [T, K]."""
    rows = ids.numel()
    out = torch.empty(rows, weight.k)
    call(
        _native.unpack_rows,
        _FORMATS[weight.format], weight.data.data_ptr(), weight.n, weight.k,
        _address("ids", ids, torch.int64, rows), rows, scale, out.data_ptr(),
    )  # fmt: skip
    return out


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] times the weight's transpose plus bias [N]: fp32 [T, N].

    x and out may be column slices of wider matrices. With a block format, x is rounded to int16 in
    blocks of 32 (scale = largest / 32767) and products within a block are exact; a row with an
    infinity or a NaN gives NaNs.
    """
    n, k, rows = weight.n, weight.k, x.shape[0]
    x_address, x_stride = _rows("x", x, k)
    if out is None:
        out = torch.empty(rows, n)
        out_address, out_stride = out.data_ptr(), n
    else:
        out_address, out_stride = _rows("out", out, n)
        if out.shape[0] != rows:
            raise _reject("out", out, f"fp32 [{rows}, {n}]")
    call(
        _native.linear,
        x_address, x_stride, weight.data.data_ptr(), _FORMATS[weight.format], n, k,
        _optional("bias", bias, n), out_address, out_stride, rows,
    )  # fmt: skip
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [T, H]; x may be columns."""
    rows, width = x.shape
    if out is None:
        out = torch.empty(rows, width)
    call(
        _native.norm,
        *_rows("x", x, width), 0,
        _address("weight", weight, torch.float32, width), eps,
        _address("out", out, torch.float32, rows, width), rows, width,
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x in place; returns rms_norm(residual, weight): [T, H]."""
    rows, width = x.shape
    out = torch.empty(rows, width)
    call(
        _native.norm,
        *_rows("x", x, width),
        _address("residual", residual, torch.float32, rows, width),
        _address("weight", weight, torch.float32, width), eps, out.data_ptr(), rows, width,
    )  # fmt: skip
    return out


def _cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Addresses of the two caches, then blocks, KV heads and head size."""
    blocks, kv_heads, width, _ = k_cache.shape
    head_size = head_size_of(width, k_cache.dtype)
    if k_cache.dtype not in _CACHE_TYPES or head_size % 8 or not 8 <= head_size <= 256:
        raise _reject(
            "k_cache",
            k_cache,
            f"fp32 or bf16 [blocks, Hkv, D, {BLOCK}] with D a multiple of 8 up to 256, or uint8 "
            f"[blocks, Hkv, D + 4, {BLOCK}]",
        )
    k_address = _address("k_cache", k_cache, k_cache.dtype, blocks, kv_heads, width, BLOCK)
    v_address = _address("v_cache", v_cache, k_cache.dtype, blocks, kv_heads, BLOCK, width)
    return k_address, v_address, blocks, kv_heads, head_size


def rotary_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    fixed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Queries made ready for attention, keys and values written to the cache: returns q [T, Hq*D].

    qkv [T, (Hq + 2 Hkv) * D] is read only. Query and key heads pass through an RMS norm if its
    weight [D] is given, then the rotary embedding of their position (int64 [T]): rotate-half pairs
    within the first R elements, cos_sin [P, R] being R/2 cosines then R/2 sines, or None for no
    rotation. Token t goes to slot slots[t] (int64; block * 16 + offset); a negative one nowhere.
    uint8 caches hold e4m3 and scales (quire/kernels/reference/attention/fp8_cache.py), the heads'
    own or `fixed` ones, float32 [2, Hkv], of keys and of values.
    """
    k_address, v_address, blocks, kv_heads, head_size = _cache(k_cache, v_cache)
    rows, width = qkv.shape
    query_heads = width // head_size - 2 * kv_heads
    if query_heads <= 0 or width % head_size:
        raise _reject("qkv", qkv, f"fp32 [T, (Hq + 2 * {kv_heads}) * {head_size}]")
    limit, rotary_size = (0, 0) if cos_sin is None else cos_sin.shape
    if rotary_size % 2 or rotary_size > head_size:
        raise ValueError(
            f"cos_sin: its width {rotary_size} must be even and at most the head size {head_size}"
        )
    if out is None:
        out = torch.empty(rows, query_heads * head_size)
    if fixed is not None and k_cache.dtype is not FP8_CACHE:
        raise ValueError(f"fixed: a cache of {k_cache.dtype} has no scales")
    call(
        _native.rotary_cache,
        _address("qkv", qkv, torch.float32, rows, width),
        _address("out", out, torch.float32, rows, query_heads * head_size),
        _address("positions", positions, torch.int64, rows),
        0 if cos_sin is None else _address("cos_sin", cos_sin, torch.float32, limit, rotary_size),
        rotary_size, _optional("q_norm", q_norm, head_size),
        _optional("k_norm", k_norm, head_size), eps, k_address, v_address,
        _CACHE_TYPES[k_cache.dtype], _address("slots", slots, torch.int64, rows),
        0 if fixed is None else _address("fixed", fixed, torch.float32, 2, kv_heads),
        rows, query_heads, kv_heads, head_size, limit, blocks * BLOCK,
    )  # fmt: skip
    return out


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of B sequences over what is cached of them: [T, Hq*D].

    q [T, Hq*D]: rows query_start[b]..query_start[b+1] (int32 [B+1]) are the last of sequence b,
    which has context_len[b] tokens (int32 [B]) in blocks block_tables[b] (int32 [B, blocks]).
    `window`: a query at p sees keys p-window+1..p only, and older table entries are not read.
    `softcap`: scores become cap * tanh(score / cap). `sinks` [Hq]: a logit per head that joins the
    denominator. Nothing beyond a sequence's length is used, whatever the memory holds.
    """
    k_address, v_address, blocks, kv_heads, head_size = _cache(k_cache, v_cache)
    rows, width = q.shape
    query_heads = width // head_size
    if width % (head_size * kv_heads) or not width:
        raise _reject("q", q, f"fp32 [T, Hq * {head_size}] with Hq a multiple of {kv_heads}")
    sequences, table_width = block_tables.shape
    if window is not None and window < 1:
        raise ValueError(f"window: must be at least 1, not {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: must be positive, not {softcap}")
    if out is None:
        out = torch.empty(rows, width)
    call(
        _native.attention,
        _address("q", q, torch.float32, rows, width),
        k_address, v_address, _CACHE_TYPES[k_cache.dtype],
        _address("block_tables", block_tables, torch.int32, sequences, table_width), table_width,
        _address("query_start", query_start, torch.int32, sequences + 1),
        _address("context_len", context_len, torch.int32, sequences),
        sequences, query_heads, kv_heads, head_size, scale, window or 0, softcap or 0.0,
        _optional("sinks", sinks, query_heads),
        _address("out", out, torch.float32, rows, width), rows, blocks,
    )  # fmt: skip
    return out


def rotary_attention(
    new: NewTokens, k_cache: torch.Tensor, v_cache: torch.Tensor, *others: Any
) -> torch.Tensor:
    """attention of the queries of `new` tokens, whose keys and values rotary_cache writes first;
    `others`: attention's arguments from the block tables on."""
    return attention(new.written(rotary_cache, k_cache, v_cache), k_cache, v_cache, *others)


def _latents(cache: torch.Tensor, rank: int) -> tuple[int, int, int]:
    """Address of a cache of latents, its blocks, values of a latent."""
    blocks, _, _, width = cache.shape
    if cache.dtype not in _LATENT_TYPES or not 0 < rank < width <= MAX_LATENT:
        expected = f"fp32 or bf16 [blocks, 1, {BLOCK}, W] with {rank} < W <= {MAX_LATENT}"
        raise _reject("cache", cache, expected)
    return _address("cache", cache, cache.dtype, blocks, 1, BLOCK, width), blocks, width


def latent_cache(
    q: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cache: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    interleaved: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents normed, rotated and written to the cache; of queries the rotated parts, in the result
    [T, heads * (rank + rotary)], of which the rest is not written.

    Shapes as in quire/kernels/reference/rotary/latent_cache.py; rows of latents may be apart.
    """
    (rows, query), (limit, rotary), (rank,) = q.shape, cos_sin.shape, norm.shape
    address, blocks, width = _latents(cache, rank)
    nope, rest = query // heads - rotary, query % heads
    if rotary % 2 or rank + rotary != width or nope < 0 or rest:
        raise ValueError(
            f"q {list(q.shape)} of {heads} heads, cos_sin {list(cos_sin.shape)}, norm of {rank} "
            f"and latents of {width} do not fit together"
        )
    latents_address, stride = _rows("latents", latents, width)
    if out is None:
        out = torch.empty(rows, heads * width)
    call(
        _native.latent_cache,
        _address("q", q, torch.float32, rows, query), latents_address, stride,
        _address("out", out, torch.float32, rows, heads * width),
        _address("positions", positions, torch.int64, rows),
        _address("cos_sin", cos_sin, torch.float32, limit, rotary),
        _address("norm", norm, torch.float32, rank), eps, address, _CACHE_TYPES[cache.dtype],
        _address("slots", slots, torch.int64, rows),
        rows, heads, nope, rank, rotary, int(interleaved), limit, blocks * BLOCK,
    )  # fmt: skip
    return out


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    rank: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q [T, heads * W] over latents [blocks, 1, 16, W], of which the first
    `rank` values are mixed: [T, heads * rank]. Sequences as in `attention`.
    """
    address, blocks, width = _latents(cache, rank)
    (rows, query), (sequences, table_width) = q.shape, block_tables.shape
    heads, rest = divmod(query, width)
    if rest or not heads:
        raise _reject("q", q, f"fp32 [T, heads * {width}]")
    if out is None:
        out = torch.empty(rows, heads * rank)
    call(
        _native.latent_attention,
        _address("q", q, torch.float32, rows, query), address, _CACHE_TYPES[cache.dtype],
        _address("block_tables", block_tables, torch.int32, sequences, table_width), table_width,
        _address("query_start", query_start, torch.int32, sequences + 1),
        _address("context_len", context_len, torch.int32, sequences),
        sequences, heads, width, rank, scale,
        _address("out", out, torch.float32, rows, heads * rank), rows, blocks,
    )  # fmt: skip
    return out


def gated_activation(
    x: torch.Tensor, kind: str, out: torch.Tensor | None = None, limit: float = 0.0
) -> torch.Tensor:
    """activation(x[:, :I]) * x[:, I:] for x [T, 2I]; kind is "silu" or "gelu_tanh", or
    "swiglu_oai", where both halves are clamped and 1 is added to the second. With a `limit` above 0
    the first half is clamped from above and the second from both sides, whatever the kind."""
    limit = limit_of(kind, limit)
    if limit > 0:
        x = _clamp(x, limit)
    if kind == "swiglu_oai":
        _as_silu(x)
        kind = "silu"
    if kind not in _ACTIVATIONS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(_ACTIVATIONS)}")
    rows, both = x.shape
    if both % 2:
        raise _reject("x", x, "fp32 [T, 2I]")
    if out is None:
        out = torch.empty(rows, both // 2)
    call(
        _native.gated_activation,
        _address("x", x, torch.float32, rows, both), _ACTIVATIONS[kind],
        _address("out", out, torch.float32, rows, both // 2), rows, both // 2,
    )  # fmt: skip
    return out


def _clamp(x: torch.Tensor, limit: float) -> torch.Tensor:
    clamped = x.clone()
    gate, up = clamped.chunk(2, dim=1)
    gate.clamp_(max=limit)
    up.clamp_(-limit, limit)
    return clamped


def _as_silu(x: torch.Tensor) -> None:
    """What silu makes gpt-oss's SwiGLU of: g sigmoid(a g) (u + 1) = silu(a g) (u + 1) / a.

    Only operations that round each element by itself, so that a row's bits are its own.
    """
    gate, up = x.chunk(2, dim=1)
    gate *= SWIGLU_ALPHA
    up += 1
    up /= SWIGLU_ALPHA


def gated_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    kind: str,
    limit: float = 0.0,
) -> torch.Tensor:
    """gated_activation of a linear layer whose first N / 2 outputs are the gate."""
    return gated_activation(linear(x, weight, bias), kind, limit=limit)


def cache_page(kv_heads: int, head_size: int, fp8: bool = False) -> tuple[tuple[int, ...], ...]:
    """Shapes of one block of keys and of values; `fp8`: in bytes, with scales."""
    width = packed_width(head_size) if fp8 else head_size
    return (kv_heads, width, BLOCK), (kv_heads, BLOCK, width)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest logit, the first on a tie, -1 if the row has a NaN: int64 [B]."""
    rows, width = logits.shape
    if not width:
        raise _reject("logits", logits, "fp32 [B, V] with V > 0")
    address, stride = _rows("logits", logits, width)
    out = torch.empty(rows, dtype=torch.int64)
    _native.argmax(address, stride, out.data_ptr(), rows, width)
    return out


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(row))) of each row, summed in float64: fp32 [B]."""
    rows, width = logits.shape
    address, stride = _rows("logits", logits, width)
    out = torch.empty(rows)
    _native.logsumexp(address, stride, out.data_ptr(), rows, width)
    return out


def gumbel(seed: int, choice: int, position: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise fp32 [size], a function of (seed, choice, position, index) alone.

    Philox-4x32-10 with key = seed (64 bits) and counter = (index // 4, position, choice, 0).
    """
    out = torch.empty(size)
    _native.gumbel(seed & 0xFFFF_FFFF_FFFF_FFFF, choice, position, size, out.data_ptr())
    return out


compressed = CompressedKernels(linear, rms_norm)
