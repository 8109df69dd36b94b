"""The relative error of attention over an FP8 cache, and of norms whose result is quantised to
e4m3, against float64; part of `python -m benchmarks.op_errors`.

Attention: float64 goes on from the codes and scales that the kernels wrote, and from the queries as
they are in the kernels' dtype, so that what is measured is rounding of scores, weights and sums.
Norms: float64 goes on from the inputs as they are. *codes and scales* is the whole error, most of
which e4m3's 4 bits are; *beyond e4m3* is the error against the float64 norm that was rounded to the
kernels' dtype and quantised in float64: values near a border may get the neighbouring code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from quire.engine.startup import kernel_facts
from quire.formats.float8 import E4M3_MAX
from quire.kernels.reference.attention.fp8_cache import SCALE_BYTES, codes_and_scales
from quire.kernels.reference.quantized import quantize as reference

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 8, 2, 128, 16
HIDDEN, NORM_TOKENS, EPS = 1024, 64, 1e-6
# Of each request: tokens in the cache, and those at its end that ask.
DECODE = ((100, 1), (512, 1), (2000, 1))
PROMPT = ((300, 300), (700, 60), (16, 16))
Requests = tuple[tuple[int, int], ...]


class Error(NamedTuple):
    """Of one op: root mean square and worst, both over the result's root mean square."""

    rms: float
    worst: float


def error(found: torch.Tensor, wanted: torch.Tensor) -> Error:
    off, size = found.double() - wanted, wanted.square().mean().sqrt()
    return Error(float(off.square().mean().sqrt() / size), float(off.abs().max() / size))


class KernelSet(NamedTuple):
    """`quantize_norm`: of x, residual, weight, eps and a group; None where a set has no such op."""

    name: str
    kernels: Any
    dtype: torch.dtype
    quantize_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None


def triton_sets(device: torch.device) -> Iterator[tuple[str, Any]]:
    """A GPU's kernels in bfloat16, in both modes, by name."""
    from quire.kernels.triton.ops import TritonKernels

    for mode in (False, True):
        name = "triton deterministic" if mode else "triton"
        yield name, TritonKernels(torch.bfloat16, device, mode)


def kernel_sets(device: torch.device, triton: bool) -> Iterator[KernelSet]:
    if triton:
        from quire.kernels.triton.quantized.quantize import add_rms_norm_quantize

        for name, kernels in triton_sets(device):
            yield KernelSet(name, kernels, torch.bfloat16, add_rms_norm_quantize)
        return
    facts = kernel_facts()
    if facts.native is not None:
        yield KernelSet("native", facts.native, torch.float32, None)
    yield KernelSet("reference", facts.reference, torch.float32, reference.add_rms_norm_quantize)


def attention_error(of: KernelSet, requests: Requests, device: torch.device) -> Error:
    """Of requests whose keys and values the kernels have written themselves."""
    generator = torch.Generator().manual_seed(0)
    contexts = [context for context, _ in requests]
    blocks = [-(-context // BLOCK) for context in contexts]
    tables = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    caches = [
        torch.zeros(1 + sum(blocks), *page, dtype=torch.uint8, device=device)
        for page in of.kernels.cache_page(KV_HEADS, HEAD_SIZE, True)
    ]
    order = (1 + torch.randperm(sum(blocks), generator=generator)).int()
    queries = []
    for row, (mine, (context, count)) in enumerate(zip(order.split(blocks), requests, strict=True)):
        tables[row, : len(mine)] = mine
        token = torch.arange(context)
        slots = mine[token // BLOCK].long() * BLOCK + token % BLOCK
        qkv = torch.randn(context, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, generator=generator)
        given = (tensor.to(device) for tensor in (qkv.to(of.dtype), token))
        q = of.kernels.rotary_cache(*given, None, None, None, EPS, *caches, slots.to(device))
        queries.append(q[-count:])
    q, scale = torch.cat(queries).contiguous(), HEAD_SIZE**-0.5
    start = torch.tensor([0, *(count for _, count in requests)]).cumsum(0).int()
    lengths = torch.tensor(contexts, dtype=torch.int32)
    _give_scratch(of, requests, device)
    found = of.kernels.attention(
        q, *caches, *(tensor.to(device) for tensor in (tables, start, lengths)), scale
    )
    # Keys of the CPU's kernels lie with the tokens last.
    last = caches[0].shape[2] == HEAD_SIZE + SCALE_BYTES
    keys, values = _decoded(caches[0].cpu(), last), _decoded(caches[1].cpu(), False)
    wanted, begin = [], 0
    for table, (context, count) in zip(tables.long(), requests, strict=True):
        mine = (cache[table].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (keys, values))
        wanted.append(_attention(q[begin : begin + count].cpu().double(), *mine))
        begin += count
    return error(found.cpu(), torch.cat(wanted))


def _give_scratch(of: KernelSet, requests: Requests, device: torch.device) -> None:
    if of.name.startswith("triton"):
        from quire.kernels.triton.attention.scratch import Scratch

        of.kernels.scratch = Scratch.allocate(
            len(requests), HEADS, KV_HEADS, HEAD_SIZE, device=device, dtype=of.dtype,
            total_tokens=sum(context for context, _ in requests),
            deterministic=of.kernels.deterministic,
        )  # fmt: skip


def _decoded(cache: torch.Tensor, tokens_last: bool) -> torch.Tensor:
    """float64 [blocks, Hkv, 16, D]."""
    codes, scales = codes_and_scales(cache, tokens_last)
    codes = codes.transpose(2, 3) if tokens_last else codes
    values = codes.contiguous().view(torch.float8_e4m3fn).float().double()
    return values * scales.double()[..., None]


def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """float64 [T, Hq * D] of the last queries q of one request; keys and values [Hkv, K, D]."""
    count, context = q.shape[0], keys.shape[1]
    q_HGTD = q.view(count, KV_HEADS, -1, HEAD_SIZE).permute(1, 2, 0, 3)
    scores = torch.einsum("hgtd,hkd->hgtk", q_HGTD, keys) * HEAD_SIZE**-0.5
    position = torch.arange(context - count, context)[:, None]
    scores = scores.masked_fill(torch.arange(context) > position, -torch.inf)
    mixed = torch.einsum("hgtk,hkd->thgd", scores.softmax(-1), values)
    return mixed.reshape(count, -1)


def norm_errors(of: KernelSet, device: torch.device) -> dict[str, Error]:
    """Of a residual's sum, its norm, and that in codes with a scale per token and per 128."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((NORM_TOKENS, HIDDEN), (NORM_TOKENS, HIDDEN), (HIDDEN,))
    )
    x, residual = x.to(of.dtype), residual.to(of.dtype)
    # The sum that is kept, and normed, is rounded to the dtype.
    total = (x + residual).double()
    wanted = total * torch.rsqrt(total.square().mean(1, keepdim=True) + EPS) * weight.double()
    found = {"norm": error(of.kernels.add_rms_norm(x, residual.clone(), weight, EPS), wanted)}
    if of.quantize_norm is None:
        return found
    for group, name in ((0, "per token"), (128, "per 128 columns")):
        codes, scales = of.quantize_norm(x, residual.clone(), weight, EPS, group)
        values = reference.dequantize_rows(codes, scales)
        found[f"norm, e4m3 {name}: codes and scales"] = error(values, wanted)
        rounded = wanted.to(of.dtype).double()
        found[f"norm, e4m3 {name}: beyond e4m3"] = error(values, _quantized(rounded, group))
    return found


def _quantized(values: torch.Tensor, group: int) -> torch.Tensor:
    """Rounded to e4m3 with a scale for each row, or for each `group` columns, in float64."""
    grouped = values.unflatten(1, (-1, group or values.shape[1]))
    scales = grouped.abs().amax(-1, keepdim=True) / E4M3_MAX
    codes = grouped / scales
    # Steps of e4m3: 2^-3 of the power of two below a value, no finer than 2^-9.
    step = torch.exp2(torch.floor(torch.log2(codes.abs())).clamp(min=-6.0) - 3)
    return (torch.round(codes / step) * step * scales).flatten(1)


def measure(device: torch.device, triton: bool | None = None) -> dict[str, dict[str, Error]]:
    """op -> kernel set -> error. `triton`: its kernels, which otherwise are those of a GPU."""
    triton = device.type == "cuda" if triton is None else triton
    found: dict[str, dict[str, Error]] = {}
    for each in kernel_sets(device, triton):
        cells = {
            "attention over FP8, decode": attention_error(each, DECODE, device),
            "attention over FP8, prompts": attention_error(each, PROMPT, device),
            **norm_errors(each, device),
        }
        for op, value in cells.items():
            found.setdefault(op, {})[each.name] = value
    return found
