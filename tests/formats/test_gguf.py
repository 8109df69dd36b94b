"""The block codecs against the `gguf` package, which is independent of ours."""

import gguf
import numpy as np
import pytest
import torch

from quire.formats.gguf import BLOCK_FORMATS, DENSE_TYPES, dequantize, quantize

PACKED = sorted(set(BLOCK_FORMATS) - set(DENSE_TYPES))
# Where in a block the half-precision scales lie: random bytes there would make NaN and infinity.
HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}


def oracle_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def random_rows(name: str, rows: int, blocks: int) -> np.ndarray:
    generator = np.random.default_rng(7)
    size = BLOCK_FORMATS[name].bytes_per_block
    data = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES[name]:
        halves = generator.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = halves.view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize("name", sorted(BLOCK_FORMATS))
def test_block_sizes_equal_the_gguf_packages(name: str) -> None:
    block = BLOCK_FORMATS[name]
    sizes = gguf.GGML_QUANT_SIZES[oracle_type(name)]
    assert (block.values_per_block, block.bytes_per_block) == sizes


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_every_bit_pattern_decodes_to_the_oracles_bits(name: str, rows: int) -> None:
    data = random_rows(name, rows, 3)
    columns = 3 * BLOCK_FORMATS[name].values_per_block
    ours = dequantize(name, torch.from_numpy(data), (rows, columns))
    assert ours.shape == (rows, columns)
    if rows:
        oracle = gguf.quants.dequantize(data, oracle_type(name))
        # As integers, but -0.0 and 0.0 count as one value: their sign carries no weight.
        np.testing.assert_array_equal(
            (ours.numpy() + 0.0).view(np.int32), (oracle + 0.0).view(np.int32)
        )


@pytest.mark.parametrize("name", [n for n in PACKED if not n.endswith("_k")])
def test_encoders_of_32_values_give_the_oracles_bytes(name: str) -> None:
    values = np.random.default_rng(3).normal(0, 1, (64, 96)).astype(np.float32)
    values[0] = 0
    values[1, :32] = 5
    ours = quantize(name, torch.from_numpy(values)).data.numpy()
    np.testing.assert_array_equal(ours, gguf.quants.quantize(values, oracle_type(name)))


@pytest.mark.parametrize(("name", "error"), [("q4_k", 1 / 15), ("q5_k", 1 / 31), ("q6_k", 1 / 31)])
def test_k_encoders_stay_within_a_step_of_the_values(name: str, error: float) -> None:
    values = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    values[0] = 0
    values[1] = values[1].abs() + 1
    values[2] = -values[2].abs() - 1
    packed = quantize(name, values)
    decoded = torch.from_numpy(gguf.quants.dequantize(packed.data.numpy(), oracle_type(name)))
    group = 16 if name == "q6_k" else 32
    spread = values.reshape(16, -1, group).abs().amax(2, keepdim=True)
    span = 2 * spread if name != "q6_k" else spread
    gap = (decoded - values).reshape(16, -1, group).abs()
    # Half a step of the codes, and the rounding of the 6-bit (8-bit) group scales on top.
    largest = values.reshape(16, -1, 256).abs().amax(2).repeat_interleave(256 // group, 1)
    assert bool((gap <= 0.5 * span * error + largest[:, :, None] / 40).all())


@pytest.mark.parametrize("name", sorted(DENSE_TYPES))
def test_dense_formats_round_trip(name: str) -> None:
    values = torch.randn(3, 5).to(DENSE_TYPES[name])
    packed = quantize(name, values)
    assert packed.shape == (3, 5)
    assert torch.equal(packed.dequantize(), values.float())


def test_unknown_formats_and_cut_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown block format"):
        quantize("q3_k", torch.zeros(1, 256))
    with pytest.raises(ValueError, match="whole number"):
        quantize("q4_k", torch.zeros(1, 32))
    with pytest.raises(ValueError, match="uint8 data"):
        dequantize("q8_0", torch.zeros(1, 33, dtype=torch.uint8), (1, 32))
