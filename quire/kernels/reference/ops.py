"""The kernels of `quire.kernels.native.ops` in plain torch: same names, shapes and signatures.

Slow and readable. They differ in rounding: weights are dense here, and nothing rounds activations.
"""

import math
from typing import Any

import numpy
import torch
from torch.nn import functional

from quire.kernels import capabilities
from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.activation import gated_activation as activation
from quire.kernels.reference.activation.gated_activation import limit_of
from quire.kernels.reference.attention.fp8_cache import (
    FP8_CACHE,
    codes_and_scales,
    decode_heads,
    encode_heads,
    head_size_of,
    packed_width,
)
from quire.kernels.reference.attention.latent_attention import latent_attention
from quire.kernels.reference.compressed.ops import CompressedKernels
from quire.kernels.reference.moe.route import route
from quire.kernels.reference.moe.route_groups import route_groups
from quire.kernels.reference.moe.route_tokens import route_tokens
from quire.kernels.reference.packed import (
    BLOCK,
    DENSE_TYPES,
    GgufWeight,
    PackedWeight,
    check_format,
    weight_source,
)
from quire.kernels.reference.rotary.latent_cache import latent_cache

__all__ = [
    "BLOCK", "PackedWeight", "add_rms_norm", "argmax", "attention", "cache_page", "compressed",
    "dense", "embedding", "exact_nbytes", "gated_activation", "gated_linear", "gumbel",
    "isa", "latent_attention", "latent_cache", "linear", "logsumexp",
    "num_threads", "pack", "pack_exact", "packed_nbytes", "rms_norm",
    "rotary_attention", "rotary_cache", "route", "route_groups", "route_tokens", "set_isa",
    "set_num_threads", "unpack_rows", "why_widened",
]  # fmt: skip

dense = False


def set_num_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError("threads: must be at least 1")
    torch.set_num_threads(threads)


def num_threads() -> int:
    return torch.get_num_threads()


def isa() -> str:
    return "torch"


def set_isa(name: str) -> None:
    if name != "torch":
        raise ValueError(f"isa: the references only have torch, not {name}")


def pack(weight: torch.Tensor | GgufWeight) -> PackedWeight:
    """A dense weight as it is; a quantised one as fp32."""
    format, data, n, k = weight_source(weight)
    if format in DENSE_TYPES:
        data = data.reshape(-1).view(DENSE_TYPES[format]).view(n, k)
    else:
        from quire.formats.gguf import dequantize

        data = dequantize(format, data, (n, k))
    return PackedWeight(data, format, n, k)


def packed_nbytes(format: str, n: int, k: int) -> int:
    check_format(format, n, k)
    return n * k * DENSE_TYPES.get(format, torch.float32).itemsize


def pack_exact(weight: torch.Tensor) -> PackedWeight:
    """A float32 weight whose products are wanted in float32, whatever the model's format."""
    return pack(weight)


def exact_nbytes(n: int, k: int) -> int:
    """Bytes that pack_exact will allocate for a weight [n, k]."""
    return packed_nbytes("f32", n, k)


def why_widened(name: str, columns: int, layer: str = "linear") -> str:
    return capabilities.why_widened("reference", layer, name, columns, "float32")


def unpack_rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    return embedding(ids, weight)


def embedding(ids: torch.Tensor, weight: PackedWeight, scale: float = 1.0) -> torch.Tensor:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < weight.n:
        raise ValueError("ids: outside the table")
    return weight.data[ids].float() * scale


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x: expected [T, {weight.k}], not {list(x.shape)}")
    return _into(out, functional.linear(x, weight.data.float(), bias))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    return _into(out, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    residual += x
    return rms_norm(residual, weight, eps)


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
    blocks, kv_heads, width, _ = k_cache.shape
    head_size = head_size_of(width, k_cache.dtype)
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // head_size, head_size)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    if cos_sin is not None:
        cosine, sine = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
    if slots.numel() and int(slots.max()) >= blocks * BLOCK:
        raise ValueError("slots: beyond the cache")
    written = slots >= 0
    block, offset = slots[written] // BLOCK, slots[written] % BLOCK
    k, v = k[written], v[written]
    if k_cache.dtype == FP8_CACHE:
        for part, (cache, values) in enumerate(((k_cache, k), (v_cache, v))):
            codes, scales = codes_and_scales(cache, tokens_last=cache is k_cache)
            memory = codes.transpose(2, 3) if cache is k_cache else codes
            given = None if fixed is None else fixed[part]
            memory[block, :, offset], scales[block, :, offset] = encode_heads(values, given)
    else:
        k_cache[block, :, :, offset] = k.to(k_cache.dtype)
        v_cache[block, :, offset, :] = v.to(v_cache.dtype)
    return _into(out, q.flatten(1))


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = cosine.shape[-1]
    a, b, rest = torch.split(heads, [half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], dim=-1)


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
    _, kv_heads, width, _ = k_cache.shape
    head_size = head_size_of(width, k_cache.dtype)
    result = torch.empty_like(q)
    for b in range(block_tables.shape[0]):
        first, last, context = int(query_start[b]), int(query_start[b + 1]), int(context_len[b])
        if first == last:
            continue
        oldest = max(0, context - (last - first) + 1 - window) if window else 0
        start = oldest // BLOCK * BLOCK
        table = block_tables[b, oldest // BLOCK : -(-context // BLOCK)].long()
        k, v = (  # [Hkv, keys, D]
            blocks.transpose(0, 1).flatten(1, 2)[:, : context - start]
            for blocks in (_read(k_cache[table], True), _read(v_cache[table], False))
        )
        heads = (
            q[first:last].view(last - first, kv_heads, -1, head_size).permute(1, 2, 0, 3)
        )  # [Hkv, G, T, D]
        scores = torch.einsum("hgtd,hsd->hgts", heads, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(context - (last - first), context).unsqueeze(1)
        key = torch.arange(start, context)
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            extra = sinks.view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        # The window's first block may hold keys that no query sees; they must not count as 0 * NaN.
        v = v.masked_fill(hidden.all(0).view(1, -1, 1), 0.0)
        mixed = torch.einsum("hgts,hsd->thgd", weights, v)
        result[first:last] = mixed.reshape(last - first, -1)
    return _into(out, result)


def rotary_attention(
    new: NewTokens, k_cache: torch.Tensor, v_cache: torch.Tensor, *others: Any
) -> torch.Tensor:
    """attention of the queries of `new` tokens, whose keys and values rotary_cache writes first;
    `others`: attention's arguments from the block tables on."""
    return attention(new.written(rotary_cache, k_cache, v_cache), k_cache, v_cache, *others)


def _read(blocks: torch.Tensor, tokens_last: bool) -> torch.Tensor:
    """Blocks of a cache as float32 [blocks, Hkv, 16, D]; `tokens_last`: they are stored with the
    last two dimensions the other way."""
    if blocks.dtype == FP8_CACHE:
        codes, scales = codes_and_scales(blocks, tokens_last)
        return decode_heads(codes.transpose(2, 3) if tokens_last else codes, scales)
    return (blocks.transpose(2, 3) if tokens_last else blocks).float()


def gated_activation(
    x: torch.Tensor, kind: str, out: torch.Tensor | None = None, limit: float = 0.0
) -> torch.Tensor:
    return activation.gated_activation(x, kind, out, limit_of(kind, limit))


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
    if not logits.shape[1]:
        raise ValueError("logits: the vocabulary is empty")
    index = torch.full(logits.shape[:1], -1, dtype=torch.int64)
    for row, values in enumerate(logits):
        if not values.isnan().any():
            index[row] = (values == values.max()).nonzero()[0, 0]
    return index


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.double(), dim=-1).float()


def gumbel(seed: int, choice: int, position: int, size: int) -> torch.Tensor:
    words = _philox(seed, choice, position, -(-size // 4))[:size]
    uniform = ((words >> numpy.uint64(8)).astype(numpy.float64) + 0.5) * 2.0**-24
    return torch.from_numpy((-numpy.log(-numpy.log(uniform))).astype(numpy.float32))


def _philox(seed: int, choice: int, position: int, groups: int) -> numpy.ndarray:
    """Philox-4x32-10 (Salmon et al., SC 2011) of counters (0..groups-1, position, choice, 0)."""
    low, shift = numpy.uint64(0xFFFF_FFFF), numpy.uint64(32)
    counter = numpy.zeros((4, groups), dtype=numpy.uint64)
    counter[0] = numpy.arange(groups)
    counter[1], counter[2] = position & 0xFFFF_FFFF, choice & 0xFFFF_FFFF
    key = [seed & 0xFFFF_FFFF, seed >> 32 & 0xFFFF_FFFF]
    for _ in range(10):
        a, b = counter[0] * numpy.uint64(0xD2511F53), counter[2] * numpy.uint64(0xCD9E8D57)
        first = (b >> shift) ^ counter[1] ^ numpy.uint64(key[0])
        third = (a >> shift) ^ counter[3] ^ numpy.uint64(key[1])
        counter = numpy.stack([first, b & low, third, a & low])
        key = [(key[0] + 0x9E3779B9) & 0xFFFF_FFFF, (key[1] + 0xBB67AE85) & 0xFFFF_FFFF]
    return counter.T.reshape(-1)


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)


compressed = CompressedKernels(linear, rms_norm)
