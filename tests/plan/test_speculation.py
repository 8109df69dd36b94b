"""What speculation changes in a plan, with its reasons."""

from __future__ import annotations

from typing import Any

import pytest

from quire.config.parse import build_options
from quire.errors import ModelError, PlanError
from quire.kernels.sampling import Scratch
from quire.plan.facts import ModelFacts
from quire.plan.gpu import GRAPH_BYTES
from quire.plan.plan import Plan
from quire.plan.resolve import resolve

from .test_gpu import FOUND, GIB, QWEN, reasons
from .test_gpu import MACHINE as GPU_MACHINE
from .test_gpu import plan as gpu_plan
from .test_resolve import LLAMA, MACHINE, NATIVE, plan

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
HEADS = {"head_dim": 12}
DRAFT = {"method": "draft_model", "model": "small", "num_speculative_tokens": 4}


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
    assert made.decode_graphs == (1, 2, 4, 8, 16, 20), "a draft is a row of its own"
    assert without.decode_graphs == (1, 2, 4)
    assert made.mixed_graphs == (2, 3, 4, 6, 8, *without.mixed_graphs), "one request and its drafts"
    more = Scratch.nbytes(20, 151936) - Scratch.nbytes(4, 151936)
    # 16 rows more have a block table of 40,960 tokens and a block, and three numbers.
    more += 16 * (4 * (2560 + 1) + 2 * 4 + 8)
    assert made.state_bytes - without.state_bytes == more
    assert made.graph_bytes > without.graph_bytes
    assert made.kv_bytes < without.kv_bytes


def draft_plan(draft: dict[str, Any], hf: dict[str, Any] = LLAMA, **options: Any) -> Plan:
    facts = [ModelFacts("m", hf, None), ModelFacts("small", draft, None, "its weights")]
    given = build_options({"speculative_config": DRAFT} | options)
    return resolve(given, facts[0], MACHINE, NATIVE, draft=facts[1])


def test_a_draft_models_weights_and_caches_are_planned_beside_the_models() -> None:
    small = LLAMA | {"num_hidden_layers": 1, "head_dim": 32}
    alone, made = plan(hf=small, max_num_seqs=1), draft_plan(small)
    without = plan()
    assert made.draft_bytes == alone.weight_bytes and made.draft_parts == alone.weight_parts
    assert made.weight_bytes == without.weight_bytes
    parts = (made.weight_bytes, made.kv_bytes, made.activation_bytes, made.graph_bytes)
    assert made.total_bytes == sum(parts) + made.reserve_bytes + made.draft_bytes
    # Layers of another head size are a group of their own, numbered behind the model's three.
    assert [group.layers for group in made.groups] == [(0, 1, 2), (3,)]
    assert made.kv_bytes > without.kv_bytes
    # Of the same shape they share the model's group, and its block tables.
    assert [group.layers for group in draft_plan(LLAMA).groups] == [(0, 1, 2, 3, 4, 5)]
    assert made.fingerprint != without.fingerprint, "its blocks hold more"
    assert reasons(made)["speculation"] == "draft_model, 4 drafts a row"


def test_a_model_drafts_up_to_its_own_longest_context_or_less() -> None:
    small = LLAMA | {"num_hidden_layers": 1, "max_position_embeddings": 96}

    def longest(**more: Any) -> int | None:
        made = draft_plan(small, speculative_config=DRAFT | more)
        assert made.speculation is not None
        return made.speculation.max_model_len

    assert (longest(), longest(max_model_len=40)) == (96, 40)
    with pytest.raises(PlanError, match="max_model_len 97 is more than small has") as caught:
        longest(max_model_len=97)
    assert caught.value.code == "context_too_long"


def test_a_windows_blocks_have_room_for_what_is_drafted_behind_a_step() -> None:
    window = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    sizes: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 16}
    blocks = draft_plan(window | {"num_hidden_layers": 1}, **sizes).pool_blocks
    assert blocks[1] == 1 + -(-(64 + 16 + 4) // 16) + 1


@pytest.mark.parametrize(
    ("draft", "options", "code"),
    [
        ({"vocab_size": 999}, {}, "draft_vocabulary"),
        ({"head_dim": 12}, {}, "unsupported_head_size"),
        ({"num_hidden_layers": 400, "intermediate_size": 2**20}, {}, "out_of_memory"),
        ({"architectures": ["Unknown"]}, {}, "unknown_architecture"),
    ],
)
def test_a_draft_model_that_cannot_draft_is_refused(
    draft: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    with pytest.raises((PlanError, ModelError)) as caught:
        draft_plan(LLAMA | draft, **options)
    assert caught.value.code == code


def test_a_draft_models_graphs_and_state_are_planned_on_a_gpu() -> None:
    small = QWEN | {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024}
    few = {"max_num_seqs": 4, "max_num_batched_tokens": 2048}
    options = build_options({"speculative_config": DRAFT, **few})
    facts = [ModelFacts("m", QWEN, None), ModelFacts("small", small, None)]
    made = resolve(options, facts[0], GPU_MACHINE, FOUND, draft=facts[1])
    ngram = gpu_plan(speculative_config=NGRAM, **few)
    assert made.draft_bytes == gpu_plan(small, **few).weight_bytes
    # One graph for each size of mixed steps, two of four passes each for each number of rows.
    passes = len(made.mixed_graphs) + 2 * 4 * 6
    assert made.graph_bytes - ngram.graph_bytes > GRAPH_BYTES * passes
    # Hidden states and drafts of 4 rows; of each row of the steps that draft a block table, as both
    # models' layers are one group, and three numbers; four of each of their tokens.
    rows = 4 * (512 * 2 + 4 * 4) + 4 * (4 * 2561 + 2 * 4 + 8) + 4
    assert made.state_bytes - ngram.state_bytes == rows + (2048 + 4) * 8 * 4
    assert made.total_bytes <= made.kv_bytes + 140 * GIB * 0.9
    with pytest.raises(PlanError, match="head size 12"):
        resolve(options, facts[0], GPU_MACHINE, FOUND, draft=ModelFacts("s", small | HEADS, None))


def test_answers_are_the_same_so_the_fingerprint_is() -> None:
    assert plan(speculative_config=NGRAM).fingerprint == plan().fingerprint
    options = build_options({"speculative_config": NGRAM})
    assert plan(speculative_config=options.engine.speculative_config).to_dict()["speculation"] == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5,
        "prompt_lookup_min": 5, "model": None, "revision": None, "quantization": None,
            "max_model_len": None,
    }  # fmt: skip
