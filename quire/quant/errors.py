"""Refusals of quantised checkpoints."""

from __future__ import annotations

from quire.errors import ModelError

KNOWN = (
    "fp8, fbgemm_fp8, compressed-tensors (float-quantized, int-quantized, pack-quantized, "
    "nvfp4-pack-quantized, mxfp4-pack-quantized), modelopt (FP8, FP8_PER_CHANNEL_PER_TOKEN, "
    "FP8_PB_WO, NVFP4, W4A16_NVFP4, MIXED_PRECISION), mxfp4, gptq, awq"
)


def unknown_quantization(what: str) -> ModelError:
    return ModelError(
        "unknown_quantization",
        f"the checkpoint is quantised in a way that is not known: {what}",
        why="config.json or hf_quant_config.json asks for it",
        fix=f"known: {KNOWN}",
    )


def bad_quantization(why: str) -> ModelError:
    return ModelError(
        "bad_quantization",
        "the checkpoint's quantisation config cannot be used",
        why=why,
        fix="check config.json and hf_quant_config.json",
    )


def part_missing(module: str, wanted: tuple[str, ...]) -> ModelError:
    return ModelError(
        "quantized_part_missing",
        f"the weight of {module!r} is quantised, and a part of it is missing",
        why=f"there is no {' or '.join(wanted)}",
        fix="check that all files of the checkpoint are there and belong together",
    )


def part_mismatch(module: str, why: str) -> ModelError:
    return ModelError(
        "quantized_part_mismatch",
        f"the parts of the quantised weight of {module!r} do not fit together",
        why=why,
        fix="check that config.json and weights belong together",
    )


def contradiction(module: str, why: str) -> ModelError:
    return ModelError(
        "quantization_contradiction",
        f"the weight of {module!r} is not stored as the config says",
        why=why,
        fix="check that config.json and weights belong together",
    )


def bad_values(module: str, why: str) -> ModelError:
    return ModelError(
        "quantized_values",
        f"the quantised weight of {module!r} has values that cannot be right",
        why=why,
        fix="download the file again, or quantise the model again",
    )


def cut_group(name: str, why: str) -> ModelError:
    return ModelError(
        "quantized_shard",
        f"{name!r} cannot be shared over this many ranks",
        why=why,
        fix="use fewer ranks",
    )


def group_mismatch(module: str, why: str) -> ModelError:
    return ModelError(
        "quantized_group",
        f"the weight of {module!r} cannot have groups of this size",
        why=why,
        fix="check the group size in config.json",
    )
