"""Tiny models on disk, and the command in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
DUMMY = ["--load-format", "dummy"]
IDS = [*DUMMY, "--skip-tokenizer-init"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(**changes: Any) -> dict[str, Any]:
    """config.json of a Llama with 2 layers."""
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 272,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    return plain | changes


def write_model(path: Path, text: bool = False, template: str | None = None, **changes: Any) -> str:
    """A directory with config.json; with `text`, a tokenizer of bytes too."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(**changes)))
    if text:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["</s>", "<user>", "<assistant>", "<system>"])
        (path / "tokenizer.json").write_text(backend.to_str())
        about = {"eos_token": "</s>"} | ({"chat_template": template} if template else {})
        (path / "tokenizer_config.json").write_text(json.dumps(about))
    return str(path)


class Ran(NamedTuple):
    """A command's end."""

    code: int
    out: str
    err: str


Quire = Callable[..., Ran]


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
    return plain | {"PYTHONPATH": str(ROOT)} | changes


def spawn(*argv: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "quire.cli.main", *argv]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(), **(pipes | options))
