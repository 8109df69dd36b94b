"""`quire bench quality`: its arithmetic, its text, the command from end to end, and errors."""

import argparse
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from quant.checkpoints import LLAMA, of_scheme, write
from tokenizers import models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from quire.cli import quality_run
from quire.cli.bench_quality import lines, make_record
from quire.cli.bench_record import _KEPT
from quire.cli.divergence import (
    Divergence,
    first_difference,
    greedy_agreement,
    kl_divergence,
    perplexity,
)
from quire.cli.flags import CommandLineError, Invocation
from quire.cli.local import LocalEngine
from quire.cli.quality_text import Sizes, Work, choose_prompts, encode, make_work
from quire.errors import UsageError
from quire.formats.scaled import quantize_fp8
from quire.quant.names import usually_dense
from quire.tokenization.tokenizer import Tokenizer

from .tools import IDS, Quire, write_model

SMALL = ["--prompts", "4", "--output-tokens", "8", "--context", "32"]


def test_kl_divergence_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]).log()
    found = kl_divergence(p.double(), q.double()).tolist()
    assert found == pytest.approx([0.5 * math.log(4 / 3), 0.0, math.log(2)], abs=1e-7)
    assert found[1] == 0.0


def test_figures_of_positions_by_hand_however_they_come() -> None:
    """Logits are log-probabilities and a constant, which says nothing."""
    baseline = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]).log() + 7
    candidate = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6], [0.4, 0.35, 0.25]]).log() - 3
    targets = [0, 2, 1]
    whole, pieces = Divergence(), Divergence()
    whole.add(baseline, candidate, targets)
    for i in range(3):
        pieces.add(baseline[i : i + 1], candidate[i : i + 1], targets[i : i + 1])
    kl = [0.25 * math.log(2), 0.0, 0.5 * math.log(5 / 4) + 0.25 * math.log(5 / 7)]
    expected = {
        "positions": 3,
        "kl_mean": sum(kl) / 3,
        "kl_worst": kl[0],
        "baseline_perplexity": (0.5 * 0.6 * 0.25) ** (-1 / 3),
        "candidate_perplexity": (0.25 * 0.6 * 0.35) ** (-1 / 3),
        "top_1_agreement": 2 / 3,
    }
    assert whole.figures() == pytest.approx(expected, abs=1e-6)
    assert pieces.figures() == pytest.approx(whole.figures(), abs=1e-12)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert perplexity([1e4]) == math.inf
    assert perplexity([math.log(8), 0.0]) == pytest.approx(math.sqrt(8))


def test_greedy_agreement_by_hand() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3
    found = greedy_agreement([[1, 2], [3, 4], [5, 6]], [[1, 2], [9, 4], [5, 7]])
    assert found == {"greedy_agreement": 1 / 3, "mean_first_difference": 1.0}


def test_a_text_is_cut_into_pieces_that_begin_alike() -> None:
    sizes = Sizes(tokens=9, context=4, output=2, prompts=2)
    work = make_work([7], [[0, 1, 2, 3], [4, 5, 6, 0, 1, 2]], sizes, 6, 8)
    assert work.pieces == [[7, 0, 1, 2], [7, 3], [7, 4, 5, 6], [7, 0, 1]]
    assert work.tokens == 9 and work.positions == 9 and work.output == 2
    assert work.prompts == [[7, 0], [7]]  # halves of the first two pieces
    bare = make_work([], [[0, 1, 2, 3, 4]], Sizes(None, 4, 2, 1), 6, 8)
    assert bare.pieces == [[0, 1, 2, 3]] and bare.positions == 3  # one token predicts nothing


def test_prompts_are_different_beginnings() -> None:
    pieces = [list(range(12)), list(range(20, 32)), [99, 98]]
    found = choose_prompts(pieces, 5)
    assert [len(p) for p in found] == [3, 3, 6, 6, 9]
    assert all(any(piece[: len(p)] == p for piece in pieces) for p in found)
    assert len({tuple(p) for p in found}) == 5


def test_what_a_tokenizer_puts_before_a_text_begins_every_piece() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, "a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert encode("b a", Tokenizer(backend)) == ([], [[1, 0]])
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    assert encode("b a", Tokenizer(backend)) == ([2], [[1, 0]])
    assert encode("1 2\n3\n", None) == ([], [[1, 2], [3]])


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        (Sizes(8, 4, 2, 1), "text_too_short"),
        (Sizes(None, 4, 2, 5), "text_too_short"),
        (Sizes(None, 4, 3, 1), "invalid_flag"),
        (Sizes(None, None, 6, 1), "invalid_flag"),
    ],
)
def test_sizes_that_text_and_models_do_not_have(sizes: Sizes, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_work([], [[0, 1, 2, 3, 4]], sizes, 6, 8)
    assert caught.value.code == code
    assert isinstance(caught.value, CommandLineError) == (code == "invalid_flag")


@pytest.mark.parametrize("text", [[[]], [[], []], [[3]]])
def test_a_text_without_a_position_is_too_short(text: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="do not make 1 prompts"):
        make_work([], text, Sizes(None, 4, 2, 1), 6, 8)


def numbers(tmp_path: Path, count: int = 100, vocab: int = 150) -> str:
    path = tmp_path / "ids.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text(
        " ".join(map(str, torch.randint(vocab, (count,), generator=generator).tolist()))
    )
    return str(path)


def compare(quire: Quire, *argv: str) -> dict[str, Any]:
    ran = quire("bench", "quality", *argv, "--skip-tokenizer-init", "--json", *SMALL)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    record: dict[str, Any] = json.loads(ran.out)
    return record


def test_figures_equal_those_of_transformers_logits(quire: Quire, tmp_path: Path) -> None:
    """The weights decoded from e4m3 in another implementation of the model, its logits through
    torch's own divergence; pieces of 32 tokens that are computed in chunks of 24."""
    _, plain = write(tmp_path, LLAMA, None, None)
    text = numbers(tmp_path)
    record = compare(
        quire, str(plain), "--quantization", "fp8", "--text", text, "--kernels", "reference",
        "--dtype", "float32", "--max-num-batched-tokens", "24",
    )  # fmt: skip
    config = LlamaConfig(**json.loads((plain / "config.json").read_text()))
    ids = torch.tensor([int(word) for word in Path(text).read_text().split()])
    logits = []
    for quantised in (False, True):
        model = LlamaForCausalLM.from_pretrained(plain, config=config, dtype=torch.float32)
        for name, values in model.named_parameters():
            module = name.rpartition(".")[0]
            if quantised and values.dim() == 2 and not usually_dense(module):
                values.data = quantize_fp8(values.data).dequantize()
        with torch.no_grad():
            found = [model(piece[None]).logits[0, :-1] for piece in ids.split(32)]
        logits.append(torch.cat(found).double())
    p, q = (torch.log_softmax(each, 1) for each in logits)
    targets = torch.cat([piece[1:] for piece in ids.split(32)])
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    found = record["results"]
    assert found["positions"] == len(targets) == 96
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl_worst"] == pytest.approx(float(kl.max()), rel=1e-3)
    for name, each in (("baseline", p), ("candidate", q)):
        expected = math.exp(functional.nll_loss(each, targets))
        assert found[f"{name}_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["top_1_agreement"] == pytest.approx(
        float((p.argmax(1) == q.argmax(1)).double().mean())
    )
    assert float(kl.mean()) > 1e-5  # there is something to find


def test_a_checkpoint_equals_its_own_values(quire: Quire, tmp_path: Path) -> None:
    """Stored as fp8 blocks, and as what these stand for: nothing but rounding in between."""
    quantised, plain = of_scheme(tmp_path / "m", "fp8 blocks")
    text, output = numbers(tmp_path), tmp_path / "record.json"
    argv = [str(quantised), "--against", str(plain), "--text", text, "--dtype", "float32"]
    record = compare(quire, *argv, "--output", str(output))
    found = record["results"]
    assert found["kl_worst"] < 1e-9
    assert found["top_1_agreement"] == found["greedy_agreement"] == 1.0
    assert found["mean_first_difference"] == record["text"]["output_tokens"] == 8
    assert json.loads(output.read_text()) == record
    assert "fp8_block" in record["candidate"]["plan"]["weight_formats"]
    assert "fp8_block" not in record["baseline"]["plan"]["weight_formats"]
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"]


def test_a_text_for_people_and_the_same_figures_twice(
    quire: Quire, text_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("All that is said is said in bytes, of which there are 256. " * 3)
    argv = [text_model, "--load-format", "dummy", "--text", str(file), *SMALL]
    argv += ["--quantization", "nvfp4", "--tokens", "120"]
    ran = quire("bench", "quality", *argv)
    assert ran.code == 0, ran.err
    assert "120 tokens in 4 pieces, 116 positions" in ran.out
    assert "nvfp4" in ran.out and "KL divergence, mean" in ran.out
    records = [json.loads(quire("bench", "quality", *argv, "--json").out) for _ in range(2)]
    assert records[0]["results"] == records[1]["results"]
    assert records[0]["results"]["kl_mean"] > 0


def test_figures_that_are_not_finite_are_null_and_told() -> None:
    figures = {
        "positions": 3, "kl_mean": 0.5, "kl_worst": 1.0, "baseline_perplexity": 2.0,
        "candidate_perplexity": math.inf, "top_1_agreement": 0.5, "greedy_agreement": 1.0,
        "mean_first_difference": 8.0,
    }  # fmt: skip
    plan = dict.fromkeys(_KEPT.split(), "x")
    invocation = Invocation("quire bench quality", argparse.Namespace(text="t"), [])
    sides = quality_run.Measured("a", plan, []), quality_run.Measured("b", plan, [])
    record = make_record(invocation, sides, Work([[0, 1]], [[0]], 8, 2, ""), figures)
    assert record["results"]["candidate_perplexity"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert any("candidate" in line and "infinite" in line for line in lines(record))


def test_a_baseline_with_options_of_its_own(quire: Quire, ids_model: str, tmp_path: Path) -> None:
    """The native kernels are an implementation of their own, and round otherwise."""
    text = numbers(tmp_path)
    own = "kernels=reference,kv-cache-dtype=float32"
    argv = [ids_model, "--load-format", "dummy", "--text", text, "--dtype", "float32"]
    record = compare(quire, *argv, "--baseline", own, "--kv-cache-dtype", "bfloat16")
    assert record["baseline"]["plan"]["kernels"] == "reference"
    assert record["baseline"]["plan"]["kv_dtype"] == "float32"
    assert record["candidate"]["plan"]["kv_dtype"] == "bfloat16"
    assert 0 < record["results"]["kl_worst"] < 1e-2


@pytest.mark.parametrize(
    ("argv", "code", "exit_code"),
    [
        ([], "usage", 2),
        (["--text", "nowhere.txt"], "cannot_read", 2),
        (["--text", "TEXT", "--quantization", "nvfp4", "--tokens", "1"], "invalid_flag", 2),
        (["--text", "TEXT", "--baseline", "kernels"], "invalid_flag", 2),
        (["--text", "TEXT", "--baseline", "kernel=native"], "invalid_flag", 2),
        (["--text", "TEXT", "--baseline", "port=1"], "invalid_flag", 2),
        (["--text", "TEXT", "--baseline", "kernels=fast"], "invalid_option", 2),
        (["--text", "TEXT"], "nothing_to_compare", 2),
        (["--text", "TEXT", "--quantization", "fp8", "--tokens", "101"], "text_too_short", 1),
        (["--text", "TEXT", "--quantization", "fp8", "--context", "600"], "invalid_flag", 2),
        (["--text", "WORDS", "--quantization", "fp8"], "text_invalid", 1),
        (["--text", "FOREIGN", "--quantization", "fp8"], "invalid_token", 1),
        (["--text", "TEXT", "--against", "OTHER"], "vocabulary_mismatch", 1),
        (["--text", "TEXT", "--quantization", "fp8", "--load-format", "auto"], "no_weights", 1),
    ],
)
def test_what_cannot_be_compared_is_said(
    quire: Quire, ids_model: str, tmp_path: Path, argv: list[str], code: str, exit_code: int
) -> None:
    (tmp_path / "words").write_text("once upon a time")
    (tmp_path / "foreign").write_text("1 2 272 3")
    places = {
        "TEXT": numbers(tmp_path),
        "WORDS": str(tmp_path / "words"),
        "FOREIGN": str(tmp_path / "foreign"),
        "OTHER": write_model(tmp_path / "other", vocab_size=280),
    }
    argv = [places.get(word, word) for word in argv]
    ran = quire("bench", "quality", ids_model, *IDS, "--json", *argv)
    assert json.loads(ran.err)["error"]["code"] == code
    assert ran.code == exit_code and ran.out == ""


def test_tokenizers_that_differ_on_the_text_are_refused(quire: Quire, tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", text=True)
    second = write_model(tmp_path / "second", text=True)
    path = Path(second) / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(found))
    text = tmp_path / "text"
    text.write_text("a text with a and b")
    argv = [first, "--load-format", "dummy", "--against", second, "--text", str(text), "--json"]
    ran = quire("bench", "quality", *argv)
    error = json.loads(ran.err)["error"]
    assert error["code"] == "vocabulary_mismatch" and "tokenizers" in error["why"]


def test_one_model_is_in_memory_at_a_time(
    quire: Quire, ids_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[LocalEngine]] = []

    def engine(*given: Any) -> LocalEngine:
        assert all(each() is None for each in made)
        found = LocalEngine(*given)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(quality_run, "LocalEngine", engine)
    argv = [ids_model, "--load-format", "dummy", "--text", numbers(tmp_path)]
    compare(quire, *argv, "--quantization", "fp8")
    assert len(made) == 2


def test_a_candidate_that_cannot_be_is_refused_before_the_baseline_is_loaded(
    quire: Quire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_run, "LocalEngine", None)
    model = write_model(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    argv = [model, *IDS, "--text", numbers(tmp_path), "--json", *SMALL]
    ran = quire("bench", "quality", *argv, "--quantization", "fp8")
    assert json.loads(ran.err)["error"]["code"] == "already_quantized"


def test_more_logits_than_there_is_room_for_are_refused(
    quire: Quire, ids_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_run, "MOST_BYTES", 50 * 4 * 272)
    argv = [ids_model, *IDS, "--quantization", "fp8", "--text", numbers(tmp_path), "--json", *SMALL]
    ran = quire("bench", "quality", *argv)
    error = json.loads(ran.err)["error"]
    assert error["code"] == "too_many_tokens" and error["fix"] == "--tokens 50 or fewer"
    assert quire("bench", "quality", *argv, "--tokens", "50").code == 0
