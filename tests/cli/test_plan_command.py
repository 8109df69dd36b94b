"""`quire plan`: the plan as a table and as JSON, with and without weights."""

import json
from pathlib import Path

import pytest

from quire.cli.plan_table import five_numbers
from quire.config.parse import build_options
from quire.engine.startup import find_model, kernel_facts, make_plan

from .tools import Quire


def test_json_has_the_whole_plan_and_adds_up(quire: Quire, ids_model: str) -> None:
    ran = quire("plan", ids_model, "--json")
    plan = json.loads(ran.out)
    assert ran.code == 0
    parts = ["weight_bytes", "kv_bytes", "activation_bytes", "graph_bytes", "reserve_bytes"]
    assert sum(plan[name] for name in parts) == plan["total_bytes"]
    assert plan["architecture"] == "LlamaForCausalLM"
    assert plan["max_model_len"] == 512
    assert plan["weights_read"] is False
    assert all(set(c) == {"what", "chosen", "reason", "downgrade"} for c in plan["choices"])
    assert list(plan["summary"]) == ["weights", "kv cache", "activations", "reserve", "context"]
    # 2 layers x (4 attention matrices of heads 4/2/2/4 x 16, 3 of 128) + embedding + 5 norms, f32
    matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 272 * 64
    assert plan["weight_bytes"] == 4 * (matrices + 5 * 64)


def test_the_table_gives_reasons_and_says_that_weights_are_absent(
    quire: Quire, ids_model: str
) -> None:
    ran = quire("plan", ids_model)
    assert ran.code == 0
    for word in ("weights", "kv cache", "activations", "reserve", "total", "choices", "kernels"):
        assert word in ran.out
    assert "config.json" in ran.out.splitlines()[-1]


def test_options_change_the_plan(quire: Quire, ids_model: str) -> None:
    found = json.loads(
        quire("plan", ids_model, "--json", "--kv-cache-memory", "1MiB", "--max-num-seqs", "2").out
    )
    assert found["kv_bytes"] <= 2**20 and found["max_num_seqs"] == 2
    ran = quire("plan", ids_model, "--max-model-len", "513")
    assert ran.code == 1 and "512" in ran.err
    ran = quire("plan", ids_model, "--strict", "--kernels", "reference")
    assert ran.code == 1 and "--strict" in ran.err


def test_a_gguf_file_is_planned_from_its_header(quire: Quire) -> None:
    plan = json.loads(quire("plan", "smollm2", "--json").out)
    assert plan["weights_read"] is True
    assert "q4_1" in plan["weight_formats"]


def test_a_load_format_that_the_files_do_not_have_is_refused(quire: Quire, ids_model: str) -> None:
    for model, wanted, held in (
        ("smollm2", "safetensors", "gguf"),
        (ids_model, "gguf", "safetensors"),
    ):
        for words in (["plan", model], ["run", model, "hi"]):
            ran = quire(*words, "--load-format", wanted)
            assert ran.code == 1 and f"are {held}" in ran.err, ran
    assert quire("plan", "smollm2", "--load-format", "gguf").code == 0


def test_a_damaged_model_cannot_be_planned(quire: Quire, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"nonsense")
    ran = quire("plan", str(path))
    assert ran.code == 1 and "Traceback" not in ran.err and "m.gguf" in ran.err


@pytest.mark.parametrize("length", [None, 100])
def test_the_five_numbers_are_those_of_the_plan(ids_model: str, length: int | None) -> None:
    options = build_options({"model": ids_model, "max_model_len": length})
    plan = make_plan(options, find_model(options), None, kernel_facts())
    assert five_numbers(plan.to_dict()) == plan.summary()
