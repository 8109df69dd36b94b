"""A tiny checkpoint of transformers with random weights, and our engine's view of the same files.

The checkpoint goes through our real loading path: config.json, safetensors or GGUF, plan, build,
load. All caches start as NaN, block tables are shuffled, and the entries that a window has passed
point to the null block, so a wrong read cannot go unseen.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire import LLM, SamplingParams
from quire.comm.group import Group
from quire.engine.startup import kernel_facts
from quire.kernels import native
from quire.kv import BLOCK_SIZE, NULL_BLOCK
from quire.layers.build import Build
from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.checkpoint import open_checkpoint
from quire.models.registry import MTP, build_model, build_mtp, load_weights
from quire.plan.facts import KV_DTYPES
from quire.plan.memory import kv_groups
from quire.runner.eager import allocate_caches, allocate_states
from quire.weights.hub import resolve

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

KERNELS = ["reference", *(["native"] if native.available() else [])]
TOLERANCE = 1e-4  # absolute, float32 against float32

# What all tiny models have in common.
TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def checkpoint(path: Path, config: PretrainedConfig, seed: int = 0) -> Any:
    """Writes a checkpoint with random weights, norms and biases; returns the transformers model."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.data.add_(torch.empty_like(weight).uniform_(-0.5, 0.5))
            else:
                weight.data.normal_(std=0.3 if weight.dim() == 1 else 0.2)
        for name, values in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of a size that changes the choice
                values.uniform_(-0.3, 0.3)
        model.tie_weights()
    model.save_pretrained(path)
    return model


def older_config(path: Path, changes: dict[str, Any]) -> Path:
    """A copy of the checkpoint whose config.json is as transformers 4 wrote it."""
    older = path.with_name(path.name + "-older")
    shutil.copytree(path, older)
    config = json.loads((older / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    for unknown in ("layer_types", "_sliding_window_pattern", "sliding_window_pattern"):
        config.pop(unknown, None)
    config["rope_theta"] = rope.pop("rope_theta", None)
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.update(changes)
    (older / "config.json").write_text(json.dumps(config))
    return older


def gguf_checkpoint(path: Path, model: Any, arch: gguf.MODEL_ARCH) -> Path:
    """The model in a float32 GGUF file, as llama.cpp's converter would write it."""
    import gguf

    config, name = model.config, gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        projection = key.split(".")[-2]
        if arch == gguf.MODEL_ARCH.LLAMA and projection in heads:
            # LlamaModel.permute of convert_hf_to_gguf.py: rotary pairs become neighbours.
            pairs = values.reshape(heads[projection], 2, -1, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.inference_mode()
def expected_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """What transformers computes, float32 [T, V]."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


class Loaded:
    """A checkpoint in our own model, with its MTP module where it is `drafting`, and one sequence's
    cache."""

    def __init__(
        self,
        path: Path,
        kernels: str,
        group: Group | None = None,
        max_len: int = 256,
        kv_dtype: str = "float32",
        drafting: bool = False,
    ):
        facts = kernel_facts()
        chosen = facts.native if kernels == "native" else facts.reference
        assert chosen is not None
        files = resolve(str(path))
        self.kv_dtype = KV_DTYPES[kv_dtype]
        self.build = Build(chosen, torch.float32, group or Group(), max_len, kv_dtype=kv_dtype)
        self.model = build_model(files.config(), self.build)
        self.mtp: MTP | None = None
        if drafting:
            self.mtp = build_mtp(files.config(), self.model, self.build)
        with open_checkpoint(files, drafting) as source:
            load_weights(self.build, source)
        self.blocks = -(-max_len // BLOCK_SIZE)
        self.allocate()

    def allocate(self) -> None:
        """Memory for the caches of all layers that were built."""
        self.groups = kv_groups(self.build.caches, self.kv_dtype.itemsize)
        pools = [1 + len(self.groups) * self.blocks] * len(self.groups)
        allocate_caches(self.build, self.groups, pools, self.kv_dtype)
        allocate_states(self.build, 3)

    @torch.inference_mode()
    def logits(self, tokens: list[int], chunk: int | None = None) -> torch.Tensor:
        """Logits [T, V] of one sequence, computed `chunk` tokens at a time."""
        return self.computed(tokens, chunk)[0]

    @torch.inference_mode()
    def computed(
        self, tokens: list[int], chunk: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and hidden states [T, H] before the head."""
        hidden = torch.cat(
            [
                self.model.forward(torch.tensor(tokens)[part], positions, step)
                for part, positions, step in self.steps(len(tokens), chunk)
            ]
        )
        return self.model.logits(hidden), hidden

    def steps(
        self, length: int, chunk: int | None = None
    ) -> Iterator[tuple[slice, torch.Tensor, StepInputs]]:
        """The steps of one new sequence: which of its tokens, their positions, where their KV is.
        All memory holds NaN before."""
        for cache in self.build.caches:
            for tensor in cache.tensors:
                tensor.view(torch.uint8).fill_(255)  # NaN in every format
        for state in self.build.states:
            state.tensor.fill_(torch.nan)
        ids = list(range(1, 1 + len(self.groups) * self.blocks))
        random.Random(7).shuffle(ids)
        tables = [ids[i * self.blocks : (i + 1) * self.blocks] for i in range(len(self.groups))]
        for start in range(0, length, chunk or length):
            part = slice(start, min(length, start + (chunk or length)))
            yield part, torch.arange(length)[part], self._step(part, tables)

    def _step(self, part: slice, tables: list[list[int]]) -> StepInputs:
        start, end = part.start, part.stop
        positions = torch.arange(start, end)
        inputs = []
        for group, table in zip(self.groups, tables, strict=True):
            table[: group.first_needed(start)] = [NULL_BLOCK] * group.first_needed(start)
            used = torch.tensor(table[: group.blocks_of(end)])
            size = group.block_size
            slots = used[positions // size] * size + positions % size
            inputs.append(GroupInputs(used[None].to(torch.int32), slots))
        bounds = torch.tensor([0, end - start], dtype=torch.int32)
        length = torch.tensor([end], dtype=torch.int32)
        return StepInputs(bounds, length, inputs, state_slots=torch.tensor([1]))


def text(length: int, seed: int = 0, vocab: int = TINY["vocab_size"]) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(vocab), k=length)


def check_logits(path: Path, model: Any, kernels: str, length: int = 60) -> None:
    """Our logits are transformers', computed whole, in chunks and token by token."""
    tokens = text(length)
    expected = expected_logits(model, tokens)
    assert expected.std() > 0.5, "the logits have no spread: the comparison would prove little"
    ours = Loaded(path, kernels)
    for chunk in (None, 1, 16, 23):
        difference = (ours.logits(tokens, chunk) - expected).abs().max()
        assert difference < TOLERANCE, f"chunks of {chunk}: {difference}"


def check_greedy(path: Path, model: Any, kernels: str, new_tokens: int = 48) -> None:
    """The whole engine, several prompts at once, always chooses transformers' likeliest token."""
    llm = LLM(
        str(path),
        kernels=kernels,
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=24,
        max_num_seqs=3,
        kv_cache_memory="8MiB",
        threads=1,
    )
    prompts = [text(length, seed) for seed, length in enumerate((1, 9, 40, 65))]
    params = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        got = output.outputs[0].token_ids
        assert len(got) == new_tokens
        logits = expected_logits(model, prompt + got)
        assert got == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@dataclass(frozen=True)
class Family:
    """The models that a family is tested with.

    `cases`: how the configs of models differ from `base`, by name. `older`: cases whose
    config.json is also read as transformers 4 wrote it, and what that has besides. `greedy`: cases
    that the whole engine runs. `gguf_cases` are also read from a GGUF file of `gguf_arch`.
    """

    config: type[PretrainedConfig]
    cases: dict[str, dict[str, Any]]
    older: dict[str, dict[str, Any]]
    greedy: list[str]
    base: dict[str, Any] = field(default_factory=lambda: TINY)
    gguf_arch: gguf.MODEL_ARCH | None = None
    gguf_cases: list[str] = field(default_factory=list)

    def make(self, directory: Path, case: str) -> tuple[Path, Any]:
        """A case's checkpoint, and the transformers model in it."""
        path = directory / case
        return path, checkpoint(path, self.config(**{**self.base, **self.cases[case]}))


class FamilyTests:
    """What is tested of every family: a subclass gives `family`, conftest.py the cases."""

    family: Family

    def test_logits_equal_transformers_whole_chunked_and_token_by_token(
        self, any_case: str, kernels: str, tmp_path: Path
    ) -> None:
        path, model = self.family.make(tmp_path, any_case)
        check_logits(path, model, kernels)

    def test_older_config_files_give_the_same_logits(self, older_case: str, tmp_path: Path) -> None:
        path, model = self.family.make(tmp_path, older_case)
        check_logits(older_config(path, self.family.older[older_case]), model, "reference")

    def test_greedy_tokens_of_the_engine_are_those_of_transformers(
        self, greedy_case: str, kernels: str, tmp_path: Path
    ) -> None:
        path, model = self.family.make(tmp_path, greedy_case)
        check_greedy(path, model, kernels)


class GgufFamilyTests(FamilyTests):
    """The same of a family that also comes in GGUF files."""

    def test_a_gguf_file_gives_the_same_logits(
        self, gguf_case: str, kernels: str, tmp_path: Path
    ) -> None:
        _, model = self.family.make(tmp_path, gguf_case)
        assert self.family.gguf_arch is not None
        file = gguf_checkpoint(tmp_path / "model.gguf", model, self.family.gguf_arch)
        check_logits(file, model, kernels)


# Arguments of these tests, and where a Family lists their values.
CASES = {
    "any_case": "cases",
    "older_case": "older",
    "greedy_case": "greedy",
    "gguf_case": "gguf_cases",
}
