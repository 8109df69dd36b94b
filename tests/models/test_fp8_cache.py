"""Models with keys and values in e4m3 against the same with keys and values in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import LLAMA, write

from models.harness import KERNELS, Loaded

TOKENS = [(7 * i) % 150 + 3 for i in range(70)]
QWEN = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
GEMMA = {
    **LLAMA, "architectures": ["Gemma3ForCausalLM"], "sliding_window": 20,
    "sliding_window_pattern": 2, "query_pre_attn_scalar": 32,
}  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("config", "bound"),
    # Gemma's norms after attention bring its errors to the size of the sum that it is added to.
    [(LLAMA, 0.05), (QWEN, 0.05), (GEMMA, 0.15)],
    ids=["llama", "qwen3", "gemma3"],
)
def test_logits_stay_close_to_those_of_a_cache_in_float32(
    config: dict[str, Any], bound: float, kernels: str, tmp_path: Path
) -> None:
    _, plain = write(tmp_path, config, None, None)
    exact = Loaded(plain, kernels).logits(TOKENS)
    coded = Loaded(plain, kernels, kv_dtype="fp8")
    found = coded.logits(TOKENS)
    error = (found - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < bound, f"{error:.4f}"
    expected = exact.log_softmax(-1)
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1)
    # Half the variance of what logits differ by, where that is small.
    assert 0 < divergence.mean() < (bound * exact.std()).square()
    for chunk in (1, 16, 23):
        again = coded.logits(TOKENS, chunk)
        if kernels == "native":
            assert torch.equal(again, found)
        else:
            torch.testing.assert_close(again, found, atol=0.1, rtol=0.1)
