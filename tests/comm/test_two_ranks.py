"""Two gloo ranks, each with its shard only, compute the logits of one rank."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.deepseek_v4.oracle import Oracle
from models.harness import TINY, checkpoint
from models.test_deepseek_v3 import V3
from quant.checkpoints import LLAMA, QWEN3_MOE, of_scheme
from safetensors.torch import load_file
from transformers import GptOssConfig, LlamaConfig, Qwen3MoeConfig

from comm.rank import compute, work
from quire.comm.group import Group

MOE = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "odd vocabulary": LlamaConfig(**{**TINY, "vocab_size": 161}),
    "tied": LlamaConfig(**{**TINY, "tie_word_embeddings": True}),
    "moe": Qwen3MoeConfig(**TINY, **MOE),
    "gpt-oss": GptOssConfig(
        **{**TINY, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "deepseek": V3.config(**V3.base),
}
# Quantised ones: the scheme, and the config.
QUANTIZED: dict[str, Any] = {
    "nvfp4": ("ct nvfp4", LLAMA),
    "gptq moe": ("gptq zeros", {**QWEN3_MOE, "moe_intermediate_size": 128}),
}

DEEPSEEK_V4 = "deepseek v4"
NAMES = [*MODELS, *QUANTIZED, DEEPSEEK_V4]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    directory = tmp_path_factory.mktemp("ranks")
    for name, config in MODELS.items():
        checkpoint(directory / name, config)
    Oracle(directory / "made").path.rename(directory / DEEPSEEK_V4)
    (directory / "made").rename(directory / f"{DEEPSEEK_V4} as made")
    for name, (scheme, config) in QUANTIZED.items():
        of_scheme(directory / "made", scheme, config)[0].rename(directory / name)
        (directory / "made").rename(directory / f"{name} as made")
    context = multiprocessing.get_context("spawn")
    address = f"file://{directory}/rendezvous"
    processes = [
        context.Process(target=work, args=(rank, str(directory), NAMES, address))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0]
    return directory, [load_file(directory / f"rank{rank}.safetensors") for rank in range(2)]


def test_collectives_sum_and_gather_in_rank_order(
    ranks: tuple[Path, list[dict[str, torch.Tensor]]],
) -> None:
    x = torch.arange(6.0).view(2, 3)
    for found in ranks[1]:
        assert torch.equal(found["summed"], x + x + 10)
        assert torch.equal(found["gathered"], torch.cat([x, x + 10], dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_two_ranks_equal_those_of_one(
    name: str, ranks: tuple[Path, list[dict[str, torch.Tensor]]]
) -> None:
    directory, (first, second) = ranks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, held = compute(directory / name, Group())
    torch.set_num_threads(threads)
    for i, logits in enumerate(expected):
        assert torch.equal(first[f"{name} {i}"], second[f"{name} {i}"])
        assert (first[f"{name} {i}"] - logits).abs().max() < 1e-5 * logits.abs().max()
    assert int(first[f"{name} held"]) < 0.8 * held, "a rank holds its share only"
