"""Drafts of the model's own MTP module in whole engines: only the number of steps changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plan.test_gpu import plan as gpu_plan
from runner.engines import (
    FAMILIES,
    Got,
    check_mixed,
    cramped,
    engine,
    every_parameter,
    repeating,
    run,
)
from safetensors.torch import save_file

from models.deepseek_v4.oracle import TINY as V4
from quire.cli.plan_table import plan_lines
from quire.config.parse import build_options
from quire.engine.startup import Engine, start_engine
from quire.engine.wire import Add
from quire.errors import ModelError
from quire.kernels import native
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.models.registry import build_model, build_mtp
from quire.params import SamplingParams

NATIVE = pytest.mark.skipif(not native.available(), reason=native.why_not())
V4_ARCHITECTURE = {"architectures": ["DeepseekV4ForCausalLM"], "vocab_size": 320}
V4_ARCHITECTURE |= {"hc_sinkhorn_iters": 3}
V3_SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
V3_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": {**V3_SIZES, **FAMILIES["deepseek_v3"], "num_nextn_predict_layers": 1},
    "v4": {**V4, **V4_ARCHITECTURE, "eos_token_id": 2},
}
# Ends of the names of what layers add to the stream.
OUTPUTS = ("o_proj.weight", "down_proj.weight", "wo_b.weight", "w2.weight")


def mtp(drafts: int) -> dict[str, Any]:
    return {"method": "mtp", "num_speculative_tokens": drafts}


def values(config: dict[str, Any], noise: float) -> dict[str, torch.Tensor]:
    """Weights of a model whose next token is mostly the next number, and of a module that mostly
    knows it: heads look for the embedding before, and layers add `noise` only."""
    build = Build(ops)
    build_mtp(config, build_model(config, build), build)
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    hidden = config["hidden_size"]
    for info in (info for weight in build.weights for info in weight.tensors()):
        shape, name = info.shape, info.name
        if info.format == "i64":
            found[name] = torch.randint(config["n_routed_experts"], shape, generator=generator)
            continue
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if len(shape) == 1 else values / math.sqrt(shape[1])
        found[name] = values * noise if name.endswith(OUTPUTS) else values
        if name.endswith(".eh_proj.weight"):
            found[name] = torch.cat([torch.eye(hidden), noise * values[:, hidden:]], dim=1)
        elif name.endswith(".e_proj.weight"):
            found[name] = torch.eye(hidden)
        elif name.endswith(".h_proj.weight"):
            found[name] = noise * values
    embed = next(name for name in found if name in ("embed.weight", "model.embed_tokens.weight"))
    head = "head.weight" if embed == "embed.weight" else "lm_head.weight"
    found[embed] = torch.randn(found[embed].shape, generator=generator)
    found[head] = 2 * found[embed].roll(1, 0) / math.sqrt(hidden)
    return found


def write(path: Path, config: dict[str, Any], noise: float) -> str:
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(values(config, noise), path / "model.safetensors")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Checkpoints by family, and by whether the module "agrees" or is "random"."""
    made = {}
    for family, config in CONFIGS.items():
        for kind, noise in (("agrees", 0.15), ("random", 2.0)):
            made[family, kind] = write(tmp_path_factory.mktemp(f"{family}-{kind}"), config, noise)
    return made


def counts(made: Engine) -> tuple[int, int]:
    """(accepted drafts, drafts)."""
    stats = made.core.scheduler.stats()
    return sum(stats.accepted_at), stats.draft_tokens


def whole(found: dict[str, Got]) -> dict[str, Got]:
    """What was not aborted."""
    return {name: got for name, got in found.items() if got.reason != "abort"}


REAL = {"load_format": "auto", "threads": 1}


FULL = pytest.mark.full


@NATIVE
@pytest.mark.parametrize(
    ("family", "kind", "drafts"),
    [
        ("v3", "agrees", 3),
        ("v3", "random", 2),
        ("v4", "agrees", 2),
        *(pytest.param(*case, marks=FULL) for case in (("v3", "agrees", 1), ("v4", "agrees", 1))),
        pytest.param("v4", "random", 4, marks=FULL),
    ],
)
def test_no_bit_changes_in_chunks_preempted_aborted_or_after_hits(
    models: dict[tuple[str, str], str], family: str, kind: str, drafts: int
) -> None:
    model = models[family, kind]
    adds = repeating(every_parameter(14, 6), 6)
    expected = run(engine(model, "cpu", **REAL), adds)
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 112, **REAL}
    made = cramped(model, "cpu", speculative_config=mtp(drafts), **sizes)
    for seed in (1, 2):
        found = run(made, adds, seed=seed, aborts=0.02)
        check_mixed(found, expected, adds)
        assert whole(found) == {name: expected[name] for name in whole(found)}
    stats = made.core.scheduler.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert len(stats.accepted_at) == drafts
    right, proposed = counts(made)
    assert proposed > 100
    assert right > 0.6 * proposed if kind == "agrees" else right < 0.5 * proposed


@NATIVE
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_drafted_does_not_depend_on_chunks_batches_preemption_or_hits(
    models: dict[tuple[str, str], str], family: str
) -> None:
    """The module's cache is whole however a request was computed: behind the same tokens it always
    guesses the same."""
    model = models[family, "random"]
    adds = every_parameter(8, 9)
    common = {"speculative_config": mtp(3), **REAL}
    sizes = {"max_num_seqs": 5, "max_num_batched_tokens": 24, "max_model_len": 112, **common}
    alone = engine(model, "cpu", enable_prefix_caching=False, **common)
    wanted: dict[tuple[str, int], list[int]] = {}
    for add in adds:
        wanted |= drafted(alone, [add])[0]
    roomy = sizes | {"max_num_seqs": 24}  # windows for as many are kept
    for made in (cramped(model, "cpu", **sizes), engine(model, "cpu", **roomy)):
        for seed in (1, 2):  # the second time with a warm prefix cache, where there is room
            found, _ = drafted(made, adds, seed)
            # Where few tokens are left, fewer are drafted behind a row that was itself longer.
            both = [(drafts, wanted[at]) for at, drafts in found.items() if at in wanted]
            alike = [a == b for drafts in both for a, b in zip(*drafts, strict=False)]
            assert len(alike) > 50 and all(alike)
        stats = made.core.scheduler.stats()
        assert stats.preemptions > 0 or stats.prefix_hit_tokens > 0
    assert stats.prefix_hit_tokens > 0


def drafted(
    made: Engine, adds: list[Add], seed: int | None = None
) -> tuple[dict[tuple[str, int], list[int]], dict[str, Got]]:
    """What is drafted in a run, by request and number of tokens before; and the answers."""
    drafting, found = made.core.scheduler._drafting, dict[tuple[str, int], list[int]]()
    assert drafting is not None
    take = drafting.take

    def note(request: Any, drafts: list[int]) -> None:
        found[request.request_id, len(request.tokens)] = drafts
        take(request, drafts)

    drafting.take = note  # type: ignore[method-assign]
    got = run(made, adds, seed=seed)
    drafting.take = take  # type: ignore[method-assign]
    return found, got


@pytest.mark.parametrize("family", CONFIGS)
def test_accepted_drafts_save_steps(models: dict[tuple[str, str], str], family: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    adds = [Add("a", [7, 8, 9], params, seed=0)]
    steps = {}
    for config in (None, mtp(4)):
        kernels = {"kernels": "reference"} if family == "v3" else {}
        made = engine(models[family, "agrees"], "cpu", speculative_config=config, **REAL, **kernels)
        steps[config is None] = run(made, adds)["a"], made.core.scheduler.stats().steps
    (drafted, few), (plain, many) = steps[False], steps[True]
    assert drafted == plain and many == 40
    assert few < 20


@pytest.mark.parametrize("family", CONFIGS)
def test_the_module_is_planned_beside_the_model(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    without, made = (
        engine(str(tmp_path), "cpu", speculative_config=config).plan for config in (None, mtp(2))
    )
    assert made.weight_bytes == without.weight_bytes and made.draft_bytes > 0
    parts = {part.name: part for part in made.draft_parts}
    assert sum(part.nbytes for part in parts.values()) == made.draft_bytes
    assert (parts["experts"].layers, parts["head"].values) == (1, 0)  # the head is the model's
    assert without.draft_parts == ()
    assert made.total_bytes - made.kv_bytes - made.activation_bytes == (
        without.total_bytes - without.kv_bytes - without.activation_bytes + made.draft_bytes
    ) + (made.graph_bytes - without.graph_bytes)
    # Its layer shares the block tables of those with the same cache.
    assert len(made.groups) == len(without.groups)
    grown = [
        len(a.layers) - len(b.layers) for a, b in zip(made.groups, without.groups, strict=True)
    ]
    assert sorted(grown) == [0] * (len(grown) - 1) + [1]
    assert made.cache_fingerprint != without.cache_fingerprint, "its blocks hold more"
    said = {choice.what: choice for choice in made.choices}
    assert said["speculation"].chosen == "mtp, 2 drafts a row"
    assert "MTP module" in said["speculation"].reason
    assert said["async scheduling"].chosen == "off"
    assert any(line.strip().startswith("MTP module") for line in plan_lines(made.to_dict()))


def test_a_model_without_module_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path,
) -> None:
    for config in (
        {**CONFIGS["v3"], "num_nextn_predict_layers": 0},
        {**V3_SIZES, "architectures": ["LlamaForCausalLM"]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError) as caught:
            start_engine(build_options({"model": str(tmp_path), "speculative_config": mtp(1)}))
        assert caught.value.code == "no_drafter"


# One layer and the module's, neither with experts: small enough for the interpreter.
TINY = {
    **CONFIGS["v3"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "first_k_dense_replace": 2,
}  # fmt: skip


# As the kernels of V4 have been tested, with its module.
V4_ON_GPU = {
    **FAMILIES["deepseek_v4"], "vocab_size": 320, "hidden_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "eos_token_id": 2,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
ON_GPU = {"v3": CONFIGS["v3"], "v4": V4_ON_GPU}
TINY_V4 = {
    **V4_ON_GPU, "vocab_size": 64, "num_hidden_layers": 1,
    "layer_types": ["compressed_sparse_attention"],
}  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize(
    ("config", "noise"),
    [
        pytest.param(TINY, 1.3, id="v3"),
        pytest.param(TINY, 2.0, id="v3, mostly wrong", marks=FULL),
        pytest.param(TINY_V4, 3.0, id="v4", marks=FULL),
    ],
)
def test_a_tiny_model_drafts_on_the_gpu_runner_as_on_the_cpus(
    config: dict[str, Any], noise: float, tmp_path: Path
) -> None:
    """In the interpreter: a prompt in chunks, drafts right and wrong, requests that want fewer."""
    model = write(tmp_path, config, noise)
    common = {"max_tokens": 5, "ignore_eos": True}
    adds = [
        Add("a", list(range(3, 8)), SamplingParams(**common, temperature=0.0, logprobs=1), seed=0),
        Add("b", [7, 9], SamplingParams(**(common | {"max_tokens": 3}), temperature=1.0), seed=5),
    ]
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 5, "max_model_len": 16, **REAL}
    plain = run(engine(model, "cpu", kernels="reference", **sizes), adds)
    given: dict[str, Any] = {"speculative_config": mtp(2), **sizes}
    wanted, _ = drafted(engine(model, "cpu", kernels="reference", **given), adds)
    made = engine(model, "cuda", warm=False, **given)
    drafts, found = drafted(made, adds)
    assert drafts == wanted
    stats = made.core.scheduler.stats()
    assert 0 < sum(stats.accepted_at) < stats.draft_tokens
    for name, want in plain.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["graph", "eager"])
@pytest.mark.parametrize("noise", [0.15, 2.0])
@pytest.mark.parametrize("family", ON_GPU)
def test_the_gpu_gives_the_cpu_runners_tokens(
    family: str, noise: float, runner: str, tmp_path: Path
) -> None:
    """Chunks, preemption, prefix hits, all sampling parameters, arrivals and aborts."""
    model = write(tmp_path, ON_GPU[family], noise)
    adds = repeating(every_parameter(24, 12), 12)
    expected = run(engine(model, "cpu", kernels="reference", load_format="auto"), adds)
    given = {"max_num_seqs": 6, "max_num_batched_tokens": 40, "runner": runner}
    given |= {"speculative_config": mtp(3), "load_format": "auto"}
    for made in (engine(model, "cuda", **given), cramped(model, "cuda", **given)):
        for seed in (12, 13):
            check_mixed(run(made, adds, seed=seed, aborts=0.02), expected, adds)
            while made.core.warm():  # graphs that requests have asked for
                pass
        right, proposed = counts(made)
        assert proposed > 100 and (right > 0.6 * proposed or noise > 1)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ON_GPU)
def test_deterministic_bits_do_not_depend_on_the_module(family: str, tmp_path: Path) -> None:
    model, adds = write(tmp_path, ON_GPU[family], 0.15), every_parameter(16, 4)
    common = {"deterministic": True, "dtype": "bfloat16", "max_num_seqs": 5, "load_format": "auto"}
    expected = run(engine(model, "cuda", **common), adds)
    for runner in ("graph", "eager"):
        made = engine(model, "cuda", runner=runner, speculative_config=mtp(2), **common)
        assert run(made, adds, seed=4) == expected
        assert counts(made)[0] > 20


def test_the_module_is_planned_on_a_gpu(tmp_path: Path) -> None:
    hf = CONFIGS["v3"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    without, made = (gpu_plan(hf, speculative_config=config) for config in (None, mtp(2)))
    assert made.weight_bytes == without.weight_bytes and made.draft_bytes > 0
    assert sum(part.nbytes for part in made.draft_parts) == made.draft_bytes
    assert [len(group.layers) for group in made.groups] == [3]
    assert made.graph_bytes > without.graph_bytes and made.state_bytes > without.state_bytes
    assert made.kv_bytes < without.kv_bytes and not made.async_scheduling
    with pytest.raises(ModelError, match="no MTP module"):
        gpu_plan({**hf, "num_nextn_predict_layers": 0}, speculative_config=mtp(1))
