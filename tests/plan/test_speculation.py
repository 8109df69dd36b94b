"""What speculation changes in a plan, with its reasons."""

from __future__ import annotations

from typing import Any

import pytest

from quire.config.parse import build_options
from quire.errors import PlanError
from quire.kernels.sampling import Scratch

from .test_gpu import plan as gpu_plan
from .test_gpu import reasons
from .test_resolve import plan

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def test_without_it_nothing_is_said_and_rows_of_logits_are_requests() -> None:
    made = plan()
    assert made.speculation is None and made.max_sampled == made.max_num_seqs
    assert "speculation" not in reasons(made)


@pytest.mark.parametrize(
    ("sequences", "tokens", "drafts", "rows"),
    [(1, 512, 4, 5), (8, 512, 4, 40), (64, 512, 4, 256), (300, 512, 4, 300), (64, 30, 4, 64)],
)
def test_rows_of_logits_are_bounded_and_never_fewer_than_requests(
    sequences: int, tokens: int, drafts: int, rows: int
) -> None:
    given: dict[str, Any] = {"max_num_seqs": sequences, "max_num_batched_tokens": tokens}
    config = NGRAM | {"num_speculative_tokens": drafts}
    assert plan(speculative_config=config, **given).max_sampled == rows


def test_one_step_is_in_flight_and_the_plan_says_why() -> None:
    made = plan(speculative_config=NGRAM)
    assert not made.async_scheduling
    assert reasons(made)["async scheduling"] == "off"
    assert reasons(made)["speculation"] == "ngram, 4 drafts a row"
    assert not gpu_plan(speculative_config=NGRAM).async_scheduling
    with pytest.raises(PlanError, match="async scheduling"):
        plan(speculative_config=NGRAM, async_scheduling=True, strict=True)


def test_the_gpus_memory_for_rows_of_logits_and_graphs_of_verifying_steps_is_planned() -> None:
    few = {"max_num_seqs": 4, "max_num_batched_tokens": 2048}
    without, made = gpu_plan(**few), gpu_plan(speculative_config=NGRAM, **few)
    assert made.max_sampled == 20
    assert made.sampling_graphs == (1, 2, 4, 8, 16, 20)
    assert made.decode_graphs == without.decode_graphs == without.sampling_graphs
    assert set(made.mixed_graphs) - set(without.mixed_graphs) == {5, 10, 15, 20, 30, 40}
    more = Scratch.nbytes(20, 151936) - Scratch.nbytes(4, 151936)
    assert made.state_bytes - without.state_bytes == more
    assert made.graph_bytes > without.graph_bytes
    assert made.kv_bytes < without.kv_bytes


def test_answers_are_the_same_so_the_fingerprint_is() -> None:
    assert plan(speculative_config=NGRAM).fingerprint == plan().fingerprint
    options = build_options({"speculative_config": NGRAM})
    assert plan(speculative_config=options.engine.speculative_config).to_dict()["speculation"] == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5,
        "prompt_lookup_min": 5, "model": None, "revision": None,
    }  # fmt: skip
