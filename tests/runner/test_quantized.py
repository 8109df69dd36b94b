"""Quantised models on the GPU runner, whose layers compute with codes.

Logits after given prompts are compared with those of the CPU runner, which computes in float32 with
the values that the codes stand for. The GPU's activations are bfloat16, and e4m3 in steps of more
than 16 tokens where the scheme says so: the bounds are what that costs. Without a GPU the kernels
run in Triton's interpreter on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import DEEPSEEK, LLAMA, QWEN3_MOE, of_scheme, write
from quant.stored import SCHEMES

from quire.engine.startup import Engine
from quire.engine.wire import Add
from quire.formats.layout import QUANT_FORMATS
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.layers.experts import StackedExperts
from quire.layers.linear import Linear
from quire.params import SamplingParams
from runner.engines import (
    DEVICE,
    GPT_OSS,
    check_deterministic,
    engine,
    every_parameter,
    requests,
    run,
)

ON_GPU = torch.cuda.is_available()
# Of the root mean square difference, as a share of the logits' spread.
BFLOAT16, E4M3 = 0.03, 0.12
# Small enough for the interpreter; 96 rows are no whole blocks of 128.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
ROOM = {"max_num_seqs": 1, "max_num_batched_tokens": 18, "max_model_len": 32}


def held(made: Engine) -> set[str]:
    """The formats of weights that are held as codes."""
    found: list[Any] = []
    for weight in made.build.weights:
        if isinstance(weight, Linear):
            found += [packed for packed, _ in weight._parts]
        elif isinstance(weight, StackedExperts):
            found += [weight.gate_up_EIH, weight.down_EHI]
    return {each.format for each in found if isinstance(each, PackedQuantized)}


def logits(made: Engine, lengths: tuple[int, ...]) -> torch.Tensor:
    """What follows prompts of these lengths, one after the other: [prompts, V]."""
    model: Any = made.core.runner.model  # type: ignore[attr-defined]
    compute, found = model.logits, []

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        computed = compute(hidden)
        found.append(computed[:1].float().cpu())
        return computed

    model.logits = recorded
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for n in lengths:
        run(made, [Add("a", [(7 * j + n) % 61 + 3 for j in range(n)], params, 0)])
    return torch.cat(found)


def check(path: str, lengths: tuple[int, ...], bound: float, **given: Any) -> Engine:
    given = {"load_format": "auto", "runner": "eager"} | given
    expected = logits(engine(path, "cpu", kernels="reference", **given), lengths)
    made = engine(path, "cuda", ON_GPU, dtype="bfloat16", **given)
    found = logits(made, lengths)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < bound, f"{error:.4f}"
    return made


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("ct fp8 channel", E4M3), ("fp8 static", E4M3), ("ct nvfp4", BFLOAT16), ("gptq", BFLOAT16)],
)
def test_a_tiny_quantised_llama_equals_the_cpu_runner(
    scheme: str, bound: float, tmp_path: Path
) -> None:
    """A prompt for the kernels of many tokens, one for those of few."""
    path, _ = of_scheme(tmp_path, scheme, {**LLAMA, **SMALL})
    made = check(str(path), (18, 2), bound, **ROOM)
    assert held(made) == {SCHEMES[scheme][2]}


def test_a_tiny_gpt_oss_equals_the_cpu_runner(write_model: Any) -> None:
    """Experts in MXFP4 with biases, attention with sinks."""
    model = write_model(**SMALL, **GPT_OSS)
    made = check(model, (3,), BFLOAT16, load_format="dummy", **ROOM | {"max_num_batched_tokens": 4})
    assert held(made) == {"mxfp4"}


@pytest.mark.full
def test_a_tiny_deepseek_equals_the_cpu_runner(tmp_path: Path) -> None:
    """Blocks of 128 by 128, of which kv_b_proj is widened; queries through a latent and a norm."""
    sizes = {"n_routed_experts": 2, "n_group": 1, "moe_intermediate_size": 128}
    sizes |= {"num_experts_per_tok": 1, "first_k_dense_replace": 0, "q_lora_rank": 64}
    path, _ = of_scheme(tmp_path, "fp8 blocks", {**DEEPSEEK, **SMALL, **sizes})
    made = check(str(path), (18, 1), E4M3, **ROOM)
    assert held(made) == {"fp8_block"}


LARGER = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 128}
MOE = {**QWEN3_MOE, "moe_intermediate_size": 128, "vocab_size": 320}
# Tokens for each kind of kernel.
COUNTS = (100, 40, 2)
# Of the norm of one layer's results: bfloat16's rounding, and that of e4m3 activations to 3 bits,
# which is 2 ** -4 at most and 2.6% in the mean.
LAYER, LAYER_E4M3 = 0.015, 0.04
# Of experts: tokens, which count twice in gate times up, and then inner values.
EXPERTS_E4M3 = 0.08


def served(scheme: str) -> set[str]:
    """What of a scheme the kernels hold: not groups of 16."""
    return {SCHEMES[scheme][2]} - ({"int4"} if scheme == "ct w4a16 zeros" else set())


def layers_agree(path: str, counts: tuple[int, ...] = COUNTS, **given: Any) -> Engine:
    """Each layer's results for random tokens are those of the CPU's layer, in float32."""
    given = {"load_format": "auto", "runner": "eager", **LARGER} | given
    cpu = engine(path, "cpu", kernels="reference", **given)
    made = engine(path, "cuda", warm=False, dtype="bfloat16", **given)
    models: list[Any] = [each.core.runner.model for each in (cpu, made)]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    for one, other in zip(*(model.layers for model in models), strict=True):
        pairs = [(one.attention.qkv, other.attention.qkv), (one.attention.out, other.attention.out)]
        if hasattr(one.mlp, "experts"):
            pairs.append((one.mlp.experts, other.mlp.experts))
        else:
            pairs += [(one.mlp.gate_up, other.mlp.gate_up), (one.mlp.down, other.mlp.down)]
        for wanted, found in pairs:
            for tokens in counts:
                _agree(wanted, found, tokens, generator)
    return made


@torch.inference_mode()
def _agree(one: Any, other: Any, tokens: int, generator: torch.Generator) -> None:
    linear = isinstance(other, Linear)
    width = other.in_features if linear else other.hidden
    x = torch.randn(tokens, width, generator=generator).bfloat16().float()
    given: tuple[torch.Tensor, ...] = ()
    if not linear:
        ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2].int().contiguous()
        given = torch.rand(tokens, 2, generator=generator) + 0.5, ids
    wanted = one(x, *given)
    found = other(x.to(DEVICE, torch.bfloat16), *(tensor.to(DEVICE) for tensor in given)).cpu()
    packed = [part for part, _ in other._parts] if linear else [other.gate_up_EIH]
    quantised = tokens > 16 and any(
        isinstance(part, PackedQuantized) and part.activation != "none" for part in packed
    )
    bound = (LAYER_E4M3 if linear else EXPERTS_E4M3) if quantised else LAYER
    error = (found.float() - wanted).norm() / wanted.norm()
    assert error < bound, (tokens, float(error))


def test_layers_of_a_tiny_model_equal_the_cpus(tmp_path: Path) -> None:
    path, _ = of_scheme(tmp_path, "modelopt fp8", {**LLAMA, **SMALL})
    assert held(layers_agree(str(path), (18, 2), **ROOM)) == {"fp8"}


@pytest.mark.gpu
@pytest.mark.parametrize("config", [LLAMA, MOE])
@pytest.mark.parametrize("scheme", [n for n in SCHEMES if "ordered" not in n])
def test_layers_of_every_scheme_equal_the_cpus(
    scheme: str, config: dict[str, Any], tmp_path: Path
) -> None:
    path, _ = of_scheme(tmp_path, scheme, config)
    assert held(layers_agree(str(path))) == served(scheme)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fp8", "nvfp4", "nvfp4-experts"])
def test_layers_that_are_quantised_while_loading_equal_the_cpus(
    method: str, tmp_path: Path
) -> None:
    path, _ = write(tmp_path, MOE, None, None)
    made = layers_agree(str(path), quantization=method)
    assert held(made) == {method.removesuffix("-experts")}


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["ct fp8 channel", "ct mxfp4"])
def test_graphs_give_the_bits_of_the_kernels_they_hold(
    scheme: str, tmp_path: Path, replayed: set[str]
) -> None:
    path, _ = of_scheme(tmp_path, scheme, MOE)
    given = {"load_format": "auto", "dtype": "bfloat16", "enable_prefix_caching": False, **LARGER}
    made = engine(str(path), "cuda", **given)
    with_graphs = run(made, requests(6, 1))
    assert replayed >= {"decode", "mixed", "sampling"}
    made.core.runner.replaying = False  # type: ignore[attr-defined]
    assert run(made, requests(6, 1)) == with_graphs


# One for each format.
EACH = ("ct fp8 channel", "fp8 blocks", "ct nvfp4", "ct mxfp4", "gptq zeros", "ct w8a8 zeros")
DENSE_MODEL = {**LLAMA, "vocab_size": 320}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "config"),
    [
        *((scheme, MOE) for scheme in EACH),
        *((scheme, DENSE_MODEL) for scheme in EACH),
        ("fp8 blocks", {**DEEPSEEK, "moe_intermediate_size": 128, "vocab_size": 320}),
    ],
)
def test_deterministic_bits_depend_on_the_request_alone(
    scheme: str, config: dict[str, Any], tmp_path: Path, replayed: set[str]
) -> None:
    """For which tiles of all widths serve; log-probabilities of some prompts, too."""
    path, _ = of_scheme(tmp_path, scheme, config)
    adds = every_parameter(16, 2)
    for i, add in enumerate(adds):
        add.params.max_tokens = 40
        add.params.prompt_logprobs = 0 if i < 4 else add.params.prompt_logprobs
    given = {"load_format": "auto", "dtype": "bfloat16", "max_model_len": 128}
    check_deterministic(str(path), adds, preempted=True, **given)
    assert replayed >= {"decode", "mixed", "sampling"}


def test_each_format_is_among_the_schemes_of_the_test_of_bits() -> None:
    assert {SCHEMES[scheme][2] for scheme in EACH} == set(QUANT_FORMATS)
