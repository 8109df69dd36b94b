"""DeepSeek V4 against transformers: logits and streams of tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.deepseek_v4.oracle import CASES, Oracle
from models.harness import KERNELS, TOLERANCE, Loaded, text


@pytest.mark.parametrize("case", CASES)
def test_logits_and_streams_equal_transformers_whole_chunked_and_token_by_token(
    case: str, kernels: str, tmp_path: Path
) -> None:
    oracle, tokens = Oracle(tmp_path, **CASES[case]), text(75)
    logits, streams = oracle.expected(tokens)
    assert logits.std() > 0.5, "the logits have no spread: the comparison would prove little"
    ours = Loaded(oracle.path, kernels)
    for chunk in (None, 1, 7, 33):
        found, hidden = ours.computed(tokens, chunk)
        assert (hidden - streams).abs().max() < TOLERANCE, f"chunks of {chunk}"
        assert (found - logits).abs().max() < TOLERANCE, f"chunks of {chunk}"


def test_an_fp8_cache_changes_little_and_is_read_as_stored_in_every_chunk(tmp_path: Path) -> None:
    oracle, tokens = Oracle(tmp_path, hc_sinkhorn_iters=2), text(60)
    _, streams = oracle.expected(tokens)
    ours = Loaded(oracle.path, KERNELS[-1], kv_dtype="fp8")
    _, whole = ours.computed(tokens)
    error = (whole - streams).square().mean().sqrt() / streams.square().mean().sqrt()
    assert 1e-3 < error < 0.1
    for chunk in (1, 7, 33):
        _, hidden = ours.computed(tokens, chunk)
        assert (hidden - whole).abs().max() < TOLERANCE, f"chunks of {chunk}"
