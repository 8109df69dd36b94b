"""The relative error of products with quantised weights against float64 on the same codes; then
that of attention over an FP8 cache and of norms that quantise (fp8_errors.py).

    python -m benchmarks.op_errors                  # the CPU's kernels
    python -m benchmarks.op_errors --device cuda    # the GPU's, where the layers use them or not

Weights and tokens are normal random numbers, the weights encoded by quire/formats. What is measured
is what a layer computes: rounding of activations, sums and results, and of weights where they are
widened to bfloat16; not what the format itself loses, which float64 has lost too. A cell is the
norm of the error over the norm of the result, the largest for 1, 64 and 256 tokens; the JSON has
the worst element's error too, over the results' root mean square.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional

from benchmarks import fp8_errors
from benchmarks.fp8_errors import Error, error
from quire.cli.bench_record import machine
from quire.cli.version import versions
from quire.engine.startup import kernel_facts
from quire.formats.blocks import BlockTensor
from quire.formats.float4 import decode_e2m1, unpack_nibbles
from quire.formats.float8 import decode_ue8m0
from quire.formats.gguf import quantize as quantize_gguf
from quire.formats.layout import FP8_BLOCK
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import (
    quantize_fp8,
    quantize_fp8_block,
    quantize_integer,
    quantize_mxfp4,
    quantize_nvfp4,
)
from quire.kernels.capabilities import GGUF_FORMATS
from quire.kernels.reference.quantized.weights import QuantizedWeight
from quire.layers.build import Build, Kernels
from quire.layers.linear import Linear
from quire.layers.moe import MoE
from quire.weights.source import TensorInfo, WeightSource

N, K, EXPERTS, INTERMEDIATE, CHOSEN = 512, 1024, 8, 256, 2
TOKENS = (1, 64, 256)
Matrix = torch.Tensor | BlockTensor | QuantTensor

ENCODERS: dict[str, Callable[[torch.Tensor], QuantTensor]] = {
    "fp8": quantize_fp8,
    "fp8_block": quantize_fp8_block,
    "nvfp4": quantize_nvfp4,
    "mxfp4": quantize_mxfp4,
    "int4": lambda values: quantize_integer(values, 4, 128, symmetric=False),
    "int8": lambda values: quantize_integer(values, 8, 128),
}


class Tensors(WeightSource):
    """Matrices of one layer by name."""

    def __init__(self, tensors: dict[str, Matrix]):
        self._tensors = tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(tensor.shape), getattr(tensor, "format", "f32"))

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Matrix:
        tensor = self._tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor[rows or slice(None), columns or slice(None)]
        tensor = tensor if rows is None else tensor.rows(rows)
        return tensor if columns is None else tensor.columns(columns)

    def sample(self, name: str) -> bytes:
        return b""

    def close(self) -> None:
        pass


def exact(tensor: Matrix) -> torch.Tensor:
    """The values in float64, where code times scale is not rounded. GGUF blocks are decoded in
    float32, as the format's own definition has it."""
    if isinstance(tensor, torch.Tensor):
        return tensor.double()
    if isinstance(tensor, BlockTensor):
        return tensor.dequantize().double()
    if tensor.format == "fp8":
        return tensor.codes.float().double() * tensor.scales.double()[:, None]
    rows, columns = tensor.shape
    if tensor.format == "fp8_block":
        wide = tensor.scales.double().repeat_interleave(FP8_BLOCK, 0)[:rows]
        return tensor.codes.float() * wide.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    zeros: torch.Tensor | None = None
    if tensor.format in ("nvfp4", "mxfp4"):
        codes = decode_e2m1(tensor.codes).double()
        scales = decode_ue8m0(tensor.scales) if tensor.format == "mxfp4" else tensor.scales.float()
    else:
        codes = (unpack_nibbles(tensor.codes) if tensor.format == "int4" else tensor.codes).double()
        scales, zeros = tensor.scales, tensor.zeros
        codes -= (8 if tensor.format == "int4" else 128) if zeros is None else 0
    group = columns // scales.shape[1]
    if zeros is not None:
        codes -= zeros.double().repeat_interleave(group, 1)
    values = codes * scales.double().repeat_interleave(group, 1)
    return values if tensor.row_scales is None else values * tensor.row_scales.double()[:, None]


def encoded(format: str, values: torch.Tensor) -> Matrix:
    return ENCODERS[format](values) if format in ENCODERS else quantize_gguf(format, values)


class Weights:
    """Random weights of one format: of a linear layer, and of a layer's experts."""

    def __init__(self, format: str):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        self.tokens = random(max(TOKENS), K) * K**0.5
        self.stored: dict[str, Matrix] = {"w.weight": encoded(format, random(N, K))}
        self.stored["m.gate.weight"] = random(EXPERTS, K)
        shapes = {"gate": (INTERMEDIATE, K), "up": (INTERMEDIATE, K), "down": (K, INTERMEDIATE)}
        for e in range(EXPERTS):
            for part, shape in shapes.items():
                name = f"m.experts.{e}.{part}_proj.weight"
                self.stored[name] = encoded(format, random(*shape))
        self.exact = {name: exact(tensor) for name, tensor in self.stored.items()}

    def experts(
        self, x_TK: torch.Tensor, weights_TC: torch.Tensor, ids_TC: torch.Tensor
    ) -> torch.Tensor:
        """What the experts should give, in float64; C of them are chosen for each token."""
        total = torch.zeros_like(x_TK)
        for e in range(EXPERTS):
            gate, up, down = (
                self.exact[f"m.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            y = (functional.silu(x_TK @ gate.T) * (x_TK @ up.T)) @ down.T
            total += ((ids_TC == e) * weights_TC.double()).sum(1, keepdim=True) * y
        return total


class Layers:
    """The layers of one kernel set with these weights."""

    def __init__(
        self, weights: Weights, kernels: Kernels, dtype: torch.dtype, device: torch.device
    ):
        self.weights, self.device = weights, device
        self.dtype = dtype if device.type == "cuda" else torch.float32  # of tokens
        build = Build(kernels, dtype=dtype, device=device)
        self.linear = Linear(build, ["w"], K, [N])
        self.moe = MoE(
            build, "m", hidden=K, intermediate=INTERMEDIATE, experts=EXPERTS,
            experts_per_token=CHOSEN, normalize=True,
        )  # fmt: skip
        for weight in build.weights:
            weight.load(Tensors(weights.stored))

    def errors(self, count: int) -> dict[str, Error]:
        """Of `count` tokens."""
        x_TK = self.weights.tokens[:count].to(self.device, self.dtype)
        values_TK = x_TK.double().cpu()
        chosen = self.moe.choose(self.moe.router(x_TK))
        linear, experts = self.linear(x_TK).cpu(), self.moe.experts(x_TK, *chosen).cpu()
        return {
            "linear": error(linear, values_TK @ self.weights.exact["w.weight"].T),
            "experts": error(experts, self.weights.experts(values_TK, *(c.cpu() for c in chosen))),
        }


def kernel_sets(device: torch.device) -> Iterator[tuple[str, Kernels, torch.dtype]]:
    """(name, kernels, the dtype that weights are widened to)."""
    if device.type == "cuda":
        for name, kernels in fp8_errors.triton_sets(device):
            yield name, cast(Kernels, kernels), torch.bfloat16
        return
    facts = kernel_facts()
    if facts.native is not None:
        yield "native, float32", facts.native, torch.float32
        yield "native, bfloat16", facts.native, torch.bfloat16
    yield "reference, float32", facts.reference, torch.float32


def kernel_errors(format: str, device: torch.device) -> dict[str, Error]:
    """Of the GPU's products with codes, called by themselves; where tokens are e4m3 too, the
    float64 result is that of the tokens as they were rounded."""
    from quire.kernels.reference.quantized.quantize import dequantize_rows
    from quire.kernels.triton.quantized.gemm import quantized_gemm
    from quire.kernels.triton.quantized.pack import pack
    from quire.kernels.triton.quantized.quantize import GROUP, quantize
    from quire.kernels.triton.quantized.scaled_gemm import scaled_gemm
    from quire.kernels.triton.quantized.skinny import skinny

    generator = torch.Generator().manual_seed(0)
    tensor = ENCODERS[format](torch.randn(N, K, generator=generator) / K**0.5)
    x = torch.randn(max(TOKENS), K, generator=generator).to(device, torch.bfloat16)
    there = tensor.to(device)
    parts = there.codes, there.scales, there.row_scales, there.zeros
    weight, values = pack(QuantizedWeight(format, *parts)), exact(tensor).to(device)
    found = {
        "skinny, 8 tokens": error(skinny(x[:8], weight), x[:8].double() @ values.T),
        "gemm, 256 tokens": error(quantized_gemm(x, weight), x.double() @ values.T),
    }
    if format in ("fp8", "fp8_block"):
        codes, scales = quantize(x, 0 if format == "fp8" else GROUP)
        wanted = dequantize_rows(codes, scales).double() @ values.T
        found["e4m3 x e4m3, 256 tokens"] = error(scaled_gemm(codes, scales, weight), wanted)
    return found


def measure(device: torch.device, formats: Sequence[str]) -> dict[str, dict[str, Error]]:
    """format -> op -> error, the largest over the numbers of tokens."""
    found: dict[str, dict[str, Error]] = {}
    for format in formats:
        weights, cells = Weights(format), found.setdefault(format, {})
        for name, kernels, dtype in kernel_sets(device):
            layers = Layers(weights, kernels, dtype, device)
            each = [layers.errors(count) for count in TOKENS]
            for op in each[0]:
                largest = (max(values) for values in zip(*(e[op] for e in each), strict=True))
                cells[f"{op}, {name}"] = Error(*largest)
        if device.type == "cuda" and format in ENCODERS:
            cells |= kernel_errors(format, device)
    return found


def table(found: dict[str, dict[str, Error]], first: str = "format") -> str:
    """Markdown: a line for each of what `first` names, a column for each key of these."""
    columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in found.items():
        shown = [f"{cells[each].rms:.1e}" if each in cells else "" for each in columns]
        lines.append(f"| {f'`{name}`' if first == 'format' else name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plain(found: dict[str, dict[str, Error]]) -> dict[str, dict[str, dict[str, float]]]:
    return {f: {op: e._asdict() for op, e in cells.items()} for f, cells in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    with torch.inference_mode():
        found = measure(torch.device(arguments.device), (*ENCODERS, *GGUF_FORMATS))
        others = fp8_errors.measure(torch.device(arguments.device))
    print(table(found), table(others, "op"), sep="\n\n")
    if arguments.output:
        record: dict[str, Any] = {
            "command": f"python -m benchmarks.op_errors --device {arguments.device}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "results": plain(found),
            "fp8": plain(others),
        }
        if arguments.device == "cuda":
            record["machine"]["gpu"] = torch.cuda.get_device_name()
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
