"""From config.json and hf_quant_config.json to a Scheme."""

from __future__ import annotations

from typing import Any

from quire.formats.layout import FP8_BLOCK
from quire.quant import deepseek_v4
from quire.quant.compressed_tensors import compressed_tensors
from quire.quant.errors import bad_quantization, unknown_quantization
from quire.quant.fields import choice, flag, strings, table, whole
from quire.quant.integers import Awq, Gptq
from quire.quant.modelopt import modelopt
from quire.quant.names import EXPERTS
from quire.quant.scheme import Rule, Scheme
from quire.quant.storage import Fp8, Mxfp4, Nvfp4, Storage


def read_scheme(hf: dict[str, Any], hf_quant: dict[str, Any] | None = None) -> Scheme | None:
    """The scheme of a checkpoint, None where it is not quantised.

    hf: config.json, where it may stand in `text_config` or be called `compression_config`;
    hf_quant: hf_quant_config.json. Raises ModelError for one that is not known or makes no sense.
    """
    inner = hf.get("text_config") if isinstance(hf.get("text_config"), dict) else {}
    for holder in (hf, inner or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return _parse(table(holder, key), holder)
    if hf_quant and hf_quant.get("quantization"):
        return modelopt(hf_quant)
    return None


def _parse(config: dict[str, Any], holder: dict[str, Any]) -> Scheme:
    method = config.get("quant_method")
    if not isinstance(method, str):
        raise bad_quantization(f"quant_method is {method!r}")
    if method == "modelopt" or method.startswith("modelopt_"):
        return modelopt(config)
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fbgemm_fp8,
        "compressed-tensors": compressed_tensors,
        "mxfp4": _mxfp4,
        "gptq": _gptq,
        "awq": _awq,
    }
    if method not in readers:
        raise unknown_quantization(f"quant_method {method!r}")
    if method == "fp8" and holder.get("model_type") == deepseek_v4.MODEL_TYPE:
        return deepseek_v4.complete(_fp8(deepseek_v4.with_experts(holder, config)))
    return readers[method](config)


def _fp8(config: dict[str, Any]) -> Scheme:
    """Hugging Face's and DeepSeek's fp8; `expert_dtype` fp4 is DeepSeek V4's."""
    if choice(config, "fmt", "e4m3", ("e4m3", "float8_e4m3fn")) is None:
        raise unknown_quantization(f"fp8 in {config.get('fmt')!r}")
    scheme = choice(config, "activation_scheme", "dynamic", ("dynamic", "static"))
    if scheme is None:
        raise unknown_quantization(f"activation_scheme {config['activation_scheme']!r}")
    block = config.get("weight_block_size")
    if block is not None and block != [FP8_BLOCK, FP8_BLOCK]:
        raise unknown_quantization(f"fp8 in blocks of {block!r}")
    if block is not None and scheme == "static":
        raise unknown_quantization("fp8 in blocks with static activation scales")
    storage = Fp8(block is not None, "tensor" if scheme == "static" else "token")
    rules = [Rule(("*",), storage)]
    experts = str(config.get("expert_dtype") or "fp8")
    if experts == "fp4":
        nvfp4 = str(config.get("moe_quant_algo") or "").upper() == "NVFP4"
        rules.insert(0, Rule((EXPERTS,), Nvfp4() if nvfp4 else Mxfp4()))
    elif experts != "fp8":
        raise unknown_quantization(f"expert_dtype {experts!r}")
    ignored = strings(config, "modules_to_not_convert") + strings(config, "ignored_layers")
    name = "fp8 in blocks" if storage.block else "fp8"
    return Scheme(name, tuple(rules), ignored)


def _fbgemm_fp8(config: dict[str, Any]) -> Scheme:
    return Scheme("fbgemm_fp8", (Rule(("*",), Fp8()),), strings(config, "modules_to_not_convert"))


def _mxfp4(config: dict[str, Any]) -> Scheme:
    """gpt-oss: only experts are ever quantised."""
    ignored = strings(config, "modules_to_not_convert")
    return Scheme("mxfp4", (Rule((EXPERTS,), Mxfp4()),), ignored)


def _gptq(config: dict[str, Any]) -> Scheme:
    bits = _bits(config, "gptq", (4, 8))
    kind = choice(config, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    if kind is None:
        raise unknown_quantization(f"gptq with checkpoint_format {config['checkpoint_format']!r}")
    if config.get("is_marlin_format"):
        raise unknown_quantization("gptq in marlin format")
    group = _group(config)
    # Without groups the order of columns changes nothing.
    ordered = flag(config, "desc_act", False) and group > 0
    ignored = list(strings(config, "modules_to_not_convert"))
    rules = []
    for pattern, changes in table(config, "dynamic").items():
        if pattern.startswith("-:"):
            ignored.append("re:" + pattern.removeprefix("-:"))
        elif not isinstance(changes, dict):
            raise bad_quantization(f"dynamic has {pattern!r}: {changes!r}")
        else:
            changed = {**config, **changes}
            part = _bits(changed, "gptq", (4, 8)), _group(changed)
            order = flag(changed, "desc_act", False) and part[1] > 0
            target = "re:" + pattern.removeprefix("+:")
            rules.append(Rule((target,), Gptq(*part, order, less_one=kind == "gptq")))
    storage: Storage = Gptq(bits, group, ordered, less_one=kind == "gptq")
    return Scheme(f"gptq int{bits}", (*rules, Rule(("*",), storage)), tuple(ignored))


def _awq(config: dict[str, Any]) -> Scheme:
    _bits({"bits": config.get("w_bit"), **config}, "awq", (4,))
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise unknown_quantization(f"awq version {version!r}")
    group = _group({"group_size": config.get("q_group_size"), **config})
    ignored = strings(config, "modules_to_not_convert")
    return Scheme("awq int4", (Rule(("*",), Awq(4, group)),), ignored)


def _bits(config: dict[str, Any], method: str, known: tuple[int, ...]) -> int:
    bits = config.get("bits")
    if bits not in known:
        raise unknown_quantization(f"{method} of {bits!r} bits")
    return int(bits)


def _group(config: dict[str, Any]) -> int:
    """`group_size`, where -1 (0 here) is the whole row."""
    return 0 if config.get("group_size") == -1 else whole(config, "group_size", 128)
