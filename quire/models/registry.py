"""Which file serves which architecture, and loading weights into a built model."""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Protocol

import msgspec
import torch

from quire.errors import ModelError
from quire.layers.build import Build
from quire.layers.inputs import StepInputs
from quire.weights.source import WeightSource

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v3",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV4ForCausalLM": "deepseek_v4",
}
# Later ones of a family, which its Config knows in order to refuse them by name.
REFUSED = {"DeepseekV41ForCausalLM": "deepseek_v4"}
CAUSAL = "ForCausalLM"
NO_DRAFTER = "use a checkpoint that has one, or another way to draft"
# Ends of tensor names that hold nothing new: tables that follow from config.json (as files of
# 2023 have them), and a copy of tied embeddings.
LARGEST_BIAS = 2**20  # bytes
DERIVED = ("rotary_emb.inv_freq", "lm_head.weight")


class ModelConfig(Protocol):
    """What every family's Config has."""

    vocab_size: int
    hidden: int
    max_len: int


class Model(Protocol):
    """What every family's Model does; see quire/models/llama.py. `layers` are called in turn by
    `forward`."""

    layers: list[Any]

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: StepInputs
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class MTP(Protocol):
    """A model's module for multi-token prediction, which drafts for it: `forward` takes the hidden
    states of tokens as the model's gives them, and the tokens that follow; `logits` of what it
    gives are of the token after those. See quire/models/deepseek_v3.py."""

    def forward(
        self,
        hidden: torch.Tensor,
        next_tokens: torch.Tensor,
        positions: torch.Tensor,
        step: StepInputs,
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def _module(hf: dict[str, Any]) -> Any:
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    files = ARCHITECTURES | REFUSED
    if not isinstance(name, str) or name not in files:
        raise ModelError(
            "unknown_architecture",
            f"the model's architecture {name!r} is not known",
            why="config.json: architectures",
            fix=_known(str(name)),
        )
    return import_module(f"quire.models.{files[name]}")


def _known(name: str) -> str:
    """All known architectures, after one of nearly this name. Their common end says nothing, and
    another number is another family."""
    stems = {each.removesuffix(CAUSAL): each for each in ARCHITECTURES}
    stem = name.removesuffix(CAUSAL)
    alike = [each for each in stems if re.sub(r"\D", "", each) == re.sub(r"\D", "", stem)]
    close = get_close_matches(stem, alike, n=1, cutoff=0.75)
    known = "known: " + ", ".join(sorted(ARCHITECTURES))
    return f"did you mean {stems[close[0]]!r}? {known}" if close else known


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """The family's Config. Raises ModelError for an unknown architecture or bad values."""
    config: ModelConfig = _module(hf).Config.from_hf(hf)
    return config


def config_digest(hf: dict[str, Any]) -> str:
    """Hex digest of the family and of every value that it reads from config.json."""
    config = read_config(hf)
    text = msgspec.json.encode([type(config).__module__, config], order="sorted")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def adapt_source(hf: dict[str, Any], source: WeightSource, drafting: bool = False) -> WeightSource:
    """A checkpoint's tensors under the names of the family's layers; with `drafting` those of its
    MTP module too. Raises ModelError where that is asked for and they are not there."""
    prefix = mtp_prefix(hf) if drafting else ""
    adapt = getattr(_module(hf), "adapt", None)
    more = {"drafting": True} if drafting else {}
    adapted: WeightSource = source if adapt is None else adapt(hf, source, **more)
    if prefix and not any(name.startswith(prefix) for name in adapted.names()):
        raise ModelError(
            "no_drafter",
            "the checkpoint has no weights of its MTP module",
            why=f"no tensor's name begins with {prefix!r}",
            fix=NO_DRAFTER,
        )
    return adapted


def build_model(hf: dict[str, Any], build: Build) -> Model:
    """The family's Model, without weights and caches."""
    module = _module(hf)
    model: Model = module.Model(module.Config.from_hf(hf), build)
    return model


def mtp_prefix(hf: dict[str, Any]) -> str:
    """How the names of the tensors of a model's MTP module begin. Raises ModelError where the model
    has none."""
    module, config = _module(hf), read_config(hf)
    if getattr(config, "mtp_layers", 0) < 1:
        known = hasattr(module, "Drafter")
        raise ModelError(
            "no_drafter",
            "the model has no MTP module",
            why="config.json: num_nextn_predict_layers"
            if known
            else f"no {hf['architectures'][0]} has one",
            fix=NO_DRAFTER,
        )
    prefix: str = module.Drafter.prefix(config)
    return prefix


def build_mtp(hf: dict[str, Any], model: Model, build: Build) -> MTP:
    """The MTP module of a model that was built in `build`, without weights and cache. Raises
    ModelError where it has none."""
    mtp_prefix(hf)
    drafter: MTP = _module(hf).Drafter(model, build)
    return drafter


def load_weights(
    build: Build, source: WeightSource, progress: Callable[[float], None] | None = None
) -> None:
    """Read all weights, one layer part at a time. Raises ModelError for a missing tensor, a wrong
    shape or a tensor that the model would ignore, before anything is read."""
    _check_tensors(build, source)
    for i, weight in enumerate(build.weights):
        weight.load(source)
        if progress is not None:
            progress((i + 1) / len(build.weights))
    _return_memory()


def _return_memory() -> None:
    """Give the heap's holes back to the system: merging and packing leave many, together up to a
    sixth of the weights (tests/plan/test_measured.py). Only glibc keeps them, and can do this."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _check_tensors(build: Build, source: WeightSource) -> None:
    left = set(source.names())
    for want in (tensor for weight in build.weights for tensor in weight.tensors()):
        if want.name not in left:
            raise ModelError(
                "missing_tensor",
                f"the checkpoint has no tensor {want.name!r}",
                fix="check that all files of the model are there and belong together",
            )
        left.remove(want.name)
        shape = tuple(source.info(want.name).shape)
        if shape != tuple(want.shape):
            raise ModelError(
                "wrong_shape",
                f"tensor {want.name!r} has shape {list(shape)}, the config says {list(want.shape)}",
                fix="check that config.json and weights belong together",
            )
    spare = tuple(build.spare)
    left = {name for name in left if not name.startswith(spare)}
    unknown = sorted(name for name in left if not _says_nothing(source, name))
    if unknown:
        raise ModelError(
            "unknown_tensor",
            f"the model would ignore {len(unknown)} tensors of the checkpoint, like {unknown[0]!r}",
            why="without them it is another model",
            fix="check that config.json and weights belong together",
        )


def _says_nothing(source: WeightSource, name: str) -> bool:
    """Whether a tensor can be left out: it follows from others, or it is a bias of zeros, as some
    quantising tools write for layers that have none."""
    if name.endswith(DERIVED):
        return True
    info = source.info(name)
    if not name.endswith(".bias") or len(info.shape) != 1 or info.nbytes > LARGEST_BIAS:
        return False
    values = source.read(name)
    return isinstance(values, torch.Tensor) and not values.any()
