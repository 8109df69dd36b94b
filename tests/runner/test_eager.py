"""The eager runner on a tiny model: chunks, batches, prompt log-probabilities, errors, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.harness import TINY, Loaded, checkpoint, expected_logits, text
from transformers import Gemma3TextConfig

from quire.kv import BLOCK_SIZE
from quire.params import SamplingParams
from quire.plan.memory import LOGIT_ROWS
from quire.runner.eager import EagerRunner
from quire.runner.sampler import NAN_ERROR
from quire.step import Batch, Enter, Row, RowResult

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Loaded]:
    """Gemma with as many sliding as global layers: two groups in one pool."""
    torch.set_num_threads(1)
    path: Path = tmp_path_factory.mktemp("gemma") / "model"
    config = Gemma3TextConfig(
        **{**TINY, "num_hidden_layers": 2},
        head_dim=16,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention"],
    )
    return checkpoint(path, config), Loaded(path, "reference")


def runner(loaded: Loaded) -> EagerRunner:
    for cache in loaded.build.caches:
        for tensor in cache.tensors:
            tensor.fill_(torch.nan)
    return EagerRunner(loaded.model, loaded.build.kernels, len(loaded.groups), 4, 256)


class Blocks:
    """Hands out blocks of the one pool that both groups share."""

    def __init__(self) -> None:
        self.next = 1

    def take(self, tokens: int) -> list[list[int]]:
        count = -(-tokens // BLOCK_SIZE)
        self.next += 2 * count
        first = self.next - 2 * count
        return [list(range(first, first + count)), list(range(first + count, self.next))]


def enter(
    slot: int, tokens: list[int], blocks: list[list[int]], params: SamplingParams = GREEDY
) -> Enter:
    return Enter(slot, params, tokens, len(tokens), 0, 0, blocks, [], [])


def submit(runner: EagerRunner, *rows: Row, enter: list[Enter] | None = None) -> list[RowResult]:
    pending = runner.submit(Batch(1, [], enter or [], list(rows)))
    assert pending.done()
    return pending.result().rows


def test_groups_of_one_pool_share_its_memory(model: tuple[object, Loaded]) -> None:
    sliding, full = model[1].build.caches
    assert (sliding.group, full.group) == (0, 1)
    for one, other in zip(sliding.tensors, full.tensors, strict=True):
        assert one.data_ptr() == other.data_ptr()


def test_requests_in_one_step_get_the_tokens_they_would_get_alone(
    model: tuple[object, Loaded],
) -> None:
    reference, loaded = model
    engine, blocks = runner(loaded), Blocks()
    prompts = [text(n, seed=n) for n in (3, 30, 41)]
    enters = [enter(i, p, blocks.take(64)) for i, p in enumerate(prompts)]
    tokens = [list(p) for p in prompts]
    # Request 2 in two chunks; the others decode beside its second one.
    first = [Row(i, 0, p[:25] if i == 2 else p, [[], []], i < 2) for i, p in enumerate(prompts)]
    results = submit(engine, *first, enter=enters)
    assert results[2].tokens == []
    for i in (0, 1):
        tokens[i] += results[i].tokens
    second = [Row(i, len(tokens[i]) - 1, tokens[i][-1:], [[], []], True) for i in (0, 1)]
    results = submit(engine, *second, Row(2, 25, prompts[2][25:], [[], []], True))
    for i in range(3):
        tokens[i] += results[i].tokens
        best = expected_logits(reference, tokens[i][:-1]).argmax(-1).tolist()
        assert tokens[i][len(prompts[i]) :] == best[len(prompts[i]) - 1 :]


@pytest.mark.parametrize("chunk", [100, 70, 1 + LOGIT_ROWS, 7])
def test_prompt_log_probabilities_equal_log_softmax_in_any_chunks(
    model: tuple[object, Loaded], chunk: int
) -> None:
    reference, loaded = model
    engine, prompt = runner(loaded), text(100, seed=5)
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    entering = [enter(0, prompt, Blocks().take(112), params)]
    found = []
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        row = Row(0, start, part, [[], []], start + chunk >= len(prompt), prompt_logprobs=True)
        [result] = submit(engine, row, enter=entering)
        entering = []
        assert result.prompt_logprobs is not None
        found += result.prompt_logprobs
    expected = torch.log_softmax(expected_logits(reference, prompt), dim=-1)
    assert len(found) == len(prompt) - 1
    for position, (token, got) in enumerate(zip(prompt[1:], found, strict=True)):
        top = expected[position].topk(3)
        assert got.tokens == [token, *top.indices.tolist()]
        wanted = [float(expected[position, token]), *top.values.tolist()]
        assert torch.allclose(torch.tensor(got.logprobs), torch.tensor(wanted), atol=1e-4)
        rank = int((expected[position] > expected[position, token]).sum()) + 1
        assert got.ranks == [rank, 1, 2, 3]


def test_nan_in_one_requests_cache_is_an_error_of_that_request_only(
    model: tuple[object, Loaded],
) -> None:
    loaded, prompts = model[1], [text(20, seed=1), text(20, seed=2)]
    engine, blocks = runner(loaded), Blocks()
    enters = [enter(i, p, blocks.take(32)) for i, p in enumerate(prompts)]
    rows = [Row(i, 0, p, [[], []], True) for i, p in enumerate(prompts)]
    good = [r.tokens[0] for r in submit(engine, *rows, enter=enters)]
    poisoned = enters[0].blocks[1][0]
    loaded.build.caches[1].tensors[1][poisoned] = torch.nan
    rows = [Row(i, 20, [t], [[], []], True, prompt_logprobs=False) for i, t in enumerate(good)]
    first, second = submit(engine, *rows)
    assert (first.tokens, first.error) == ([], NAN_ERROR)
    assert second.error is None
    assert len(second.tokens) == 1


def test_nan_among_prompt_log_probabilities_is_an_error_of_that_request(
    model: tuple[object, Loaded],
) -> None:
    loaded, prompt = model[1], text(20, seed=1)
    engine = runner(loaded)
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    entering = [enter(0, prompt, Blocks().take(32), params)]
    # The first half was computed elsewhere, and its cache holds NaN.
    row = Row(0, 10, prompt[10:], [[], []], True, prompt_logprobs=True)
    [result] = submit(engine, row, enter=entering)
    assert (result.tokens, result.prompt_logprobs, result.error) == ([], None, NAN_ERROR)


def test_after_a_step_that_raised_reset_leaves_a_working_runner(
    model: tuple[object, Loaded],
) -> None:
    loaded, prompt = model[1], text(5)
    engine = runner(loaded)
    with pytest.raises(ValueError, match="ids"):
        submit(engine, Row(0, 0, [999], [[], []], True), enter=[enter(0, [999], [[1], [2]])])
    engine.reset()
    entering = [enter(0, prompt, [[1], [2]])]
    [result] = submit(engine, Row(0, 0, prompt, [[], []], True), enter=entering)
    assert len(result.tokens) == 1
