"""pack, embedding and linear against the gguf package's dequantisation and float64 arithmetic."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

native = pytest.importorskip("quire.kernels.native._native", reason="the extension is not built")
from quire.kernels.native import ops  # noqa: E402
from quire.kernels.reference import ops as reference  # noqa: E402

SMALL_BLOCKS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
SUPER_BLOCKS = ["q4_k", "q5_k", "q6_k"]
DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ROWS = [0, 1, 2, 3, 7, 17, 64]
CODES = torch.tensor(32767.0)


def gguf_weight(format: str, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks of a format as bytes, and the float32 weight they mean to the gguf package."""
    kind = gguf.GGMLQuantizationType[format.upper()]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (n, k // elements, size), dtype=np.uint8)
    # Every code may be anything; the fp16 scales must be finite, and some of them negative or zero.
    where = (
        [208] if format == "q6_k" else [0, 2] if format in ("q4_1", "q5_1", "q4_k", "q5_k") else [0]
    )
    for at in where:
        scales = (random.standard_normal((n, k // elements)) * 0.02).astype(np.float16)
        scales[random.random(scales.shape) < 0.05] = 0
        blocks[:, :, at : at + 2] = scales.view(np.uint8).reshape(n, k // elements, 2)
    data = blocks.reshape(n, -1)
    return torch.from_numpy(data), torch.from_numpy(
        gguf.quants.dequantize(data, kind).reshape(n, k)
    )


def round_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to int16 in blocks of 32, scale = largest / 32767, in float64; and the scales."""
    blocks = x.view(x.shape[0], x.shape[1] // 32, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    # A tensor divided by a tensor: torch turns c / largest into c * (1 / largest).
    inverse = torch.where(largest > 0, CODES / largest, 0.0)
    codes = (blocks * inverse).round()
    scales = largest / CODES
    return (codes.double() * scales.double()).view_as(x), scales.expand_as(blocks).reshape_as(x)


@pytest.mark.parametrize("format", SMALL_BLOCKS + SUPER_BLOCKS)
@pytest.mark.parametrize("n", [1, 16, 37])
def test_embedding_equals_the_gguf_packages_dequantisation_to_the_bit(format: str, n: int) -> None:
    data, weight = gguf_weight(format, n, 512)
    packed = ops.pack((format, data, n, 512))
    ids = torch.randint(0, n, (23,))
    assert torch.equal(ops.embedding(ids, packed), weight[ids])
    assert torch.equal(ops.unpack_rows(packed, ids), weight[ids])
    assert torch.equal(ops.embedding(ids, packed, scale=3.5), weight[ids] * 3.5)
    assert ops.embedding(ids[:0], packed).shape == (0, 512)


@pytest.mark.parametrize("format", DENSE)
def test_embedding_returns_dense_rows_exactly_also_subnormal_and_infinite_ones(format: str) -> None:
    weight = torch.randn(21, 45).to(DENSE[format])
    weight[3, :4] = torch.tensor([1e-7, -6e-8, float("inf"), -0.0]).to(DENSE[format])
    ids = torch.arange(21)
    assert torch.equal(ops.embedding(ids, ops.pack(weight)), weight.float())
    raw = (format, weight.view(torch.uint8).reshape(-1), 21, 45)
    assert torch.equal(ops.embedding(ids, ops.pack(raw)), weight.float())
    assert torch.equal(reference.embedding(ids, reference.pack(raw)), weight.float())


@pytest.mark.parametrize("format", SMALL_BLOCKS + SUPER_BLOCKS)
def test_block_linear_is_exact_on_rounded_activations(isa: str, format: str) -> None:
    """Against float64: what remains is fp32 rounding of one sum of K / 32 terms."""
    n, k = 37, 512
    data, weight = gguf_weight(format, n, k)
    packed, bias = ops.pack((format, data, n, k)), torch.randn(n)
    for rows in ROWS:
        x = torch.randn(rows, k)
        rounded, _ = round_activations(x)
        # The terms that are added up, of which the codes' and the minimum's may cancel.
        size = rounded.abs() @ weight.double().abs().T + 127 * 32 * 0.02
        expected = rounded @ weight.double().T + bias.double()
        out = torch.full((rows, n), float("nan"))
        assert ops.linear(x, packed, bias, out) is out
        assert ((out - expected).abs() <= 2e-7 * size).all()


@pytest.mark.parametrize("format", SMALL_BLOCKS + SUPER_BLOCKS)
def test_block_linear_differs_from_fp32_by_at_most_half_a_code_per_activation(
    isa: str, format: str
) -> None:
    n, k = 19, 256
    data, weight = gguf_weight(format, n, k)
    x = torch.randn(17, k)
    error = (ops.linear(x, ops.pack((format, data, n, k))) - x @ weight.T).abs()
    _, scales = round_activations(x)
    assert (error <= 0.5 * scales @ weight.abs().T + 2e-6 * x.abs() @ weight.abs().T + 1e-4).all()


def test_block_linear_of_smooth_weights_is_within_a_ten_thousandth_of_fp32(isa: str) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize((torch.randn(64, 576) * 0.05).numpy(), kind)
    weight = torch.from_numpy(gguf.quants.dequantize(data, kind))
    x = torch.randn(32, 576)
    exact = x @ weight.T
    packed = ops.pack(("q8_0", torch.from_numpy(data), 64, 576))
    assert (ops.linear(x, packed) - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("format", DENSE)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 45), (160, 300)])
def test_dense_linear_matches_float64(isa: str, format: str, n: int, k: int) -> None:
    weight, bias = torch.randn(n, k).to(DENSE[format]), torch.randn(n)
    packed = ops.pack(weight)
    for rows in ROWS:
        x = torch.randn(rows, k)
        size = x.double().abs() @ weight.double().abs().T + 1
        out = ops.linear(x, packed, bias)
        assert ((out - (x.double() @ weight.double().T + bias)).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("format", ["q4_1", "q8_0", "q6_k", "bf16", "f32"])
def test_a_row_of_a_batch_equals_the_row_alone_to_the_bit(isa: str, format: str) -> None:
    n, k = 200, 512
    weight = (
        torch.randn(n, k).to(DENSE[format])
        if format in DENSE
        else (format, gguf_weight(format, n, k)[0], n, k)
    )
    packed, bias = ops.pack(weight), torch.randn(n)
    x = torch.randn(67, k)
    ops.set_num_threads(1)
    alone = torch.cat([ops.linear(row[None], packed, bias) for row in x])
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        for rows in (*range(1, 20), 33, 67):
            assert torch.equal(ops.linear(x[-rows:], packed, bias), alone[-rows:])


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_k", "q6_k", "f16"])
def test_avx2_and_avx512_give_the_same_bits(format: str) -> None:
    chosen, found = ops.isa(), []
    n, k = 48, 512
    weight = (
        torch.randn(n, k).to(DENSE[format])
        if format in DENSE
        else (format, gguf_weight(format, n, k)[0], n, k)
    )
    packed, x = ops.pack(weight), torch.randn(9, k)
    for name in ("avx512", "avx2"):
        try:
            ops.set_isa(name)
        except ValueError:
            pytest.skip(f"no {name} here")
        found.append(ops.linear(x, packed))
    ops.set_isa(chosen)
    assert torch.equal(*found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k"])
def test_a_bad_activation_makes_its_own_row_nan_and_no_other(
    isa: str, format: str, bad: float
) -> None:
    packed = ops.pack((format, gguf_weight(format, 40, 512)[0], 40, 512))
    x = torch.randn(18, 512)
    clean = ops.linear(x, packed)
    x[11, 77] = bad
    out = ops.linear(x, packed)
    assert out[11].isnan().all()
    others = torch.arange(18) != 11
    assert torch.equal(out[others], clean[others])


def test_zero_and_tiny_rows_give_finite_outputs(isa: str) -> None:
    packed = ops.pack(("q4_1", gguf_weight("q4_1", 16, 64)[0], 16, 64))
    x = torch.zeros(3, 64)
    x[1], x[2, 0] = 1e-44, 1e-37
    assert torch.equal(ops.linear(x, packed), torch.zeros(3, 16))


def test_linear_reads_and_writes_column_slices(isa: str) -> None:
    packed = ops.pack(("q8_0", gguf_weight("q8_0", 37, 64)[0], 37, 64))
    wide_x, wide_out = torch.randn(5, 200), torch.full((5, 100), 7.0)
    x = wide_x[:, 50:114]
    ops.linear(x, packed, out=wide_out[:, 20:57])
    assert torch.equal(wide_out[:, 20:57], ops.linear(x.contiguous(), packed))
    assert (wide_out[:, :20] == 7).all() and (wide_out[:, 57:] == 7).all()


def test_packed_nbytes_is_what_pack_allocates_and_four_bits_stay_four() -> None:
    for format in SMALL_BLOCKS + SUPER_BLOCKS:
        data, _ = gguf_weight(format, 37, 768)
        assert ops.pack((format, data, 37, 768)).data.nbytes == ops.packed_nbytes(format, 37, 768)
    assert ops.packed_nbytes("q4_0", 1600, 768) == 1600 * 768 * 4.5 / 8
    assert ops.packed_nbytes("q4_1", 1600, 1024) == 1600 * 1024 * 5 / 8
    assert ops.packed_nbytes("q4_k", 1600, 1024) <= 1600 * 1024 * 4.7 / 8
    assert ops.packed_nbytes("bf16", 160, 45) == 160 * 45 * 2


def test_both_kernel_sets_accept_the_same_weights_and_agree() -> None:
    data, weight = gguf_weight("q4_k", 20, 256)
    x = torch.randn(3, 256)
    plain = reference.linear(x, reference.pack(("q4_k", data, 20, 256)))
    torch.testing.assert_close(plain, x @ weight.T)
    assert (ops.linear(x, ops.pack(("q4_k", data, 20, 256))) - plain).norm() < 1e-4 * plain.norm()


def test_bad_shapes_and_types_are_refused_by_name() -> None:
    packed = ops.pack(torch.randn(8, 32))
    x = torch.randn(2, 32)
    with pytest.raises(ValueError, match="multiple of 32"):
        ops.pack(("q4_0", torch.zeros(10, dtype=torch.uint8), 1, 40))
    with pytest.raises(ValueError, match="multiple of 256"):
        ops.packed_nbytes("q4_k", 4, 128)
    with pytest.raises(ValueError, match="not supported"):
        ops.packed_nbytes("q2_k", 4, 256)
    with pytest.raises(ValueError, match="bytes of uint8"):
        ops.pack(("q4_0", torch.zeros(17, dtype=torch.uint8), 1, 32))
    with pytest.raises(ValueError, match="weight: expected"):
        ops.pack(torch.randn(8, 32).double())
    with pytest.raises(ValueError, match="x: expected"):
        ops.linear(torch.randn(2, 31), packed)
    with pytest.raises(ValueError, match="x: expected"):
        ops.linear(x.t().contiguous().t(), packed)
    with pytest.raises(ValueError, match="x: expected"):
        ops.linear(x.double(), packed)
    with pytest.raises(ValueError, match="out: expected"):
        ops.linear(x, packed, out=torch.empty(3, 8))
    with pytest.raises(ValueError, match="bias: expected"):
        ops.linear(x, packed, torch.randn(7))
    with pytest.raises(ValueError, match="ids"):
        ops.embedding(torch.tensor([8]), packed)
    with pytest.raises(ValueError, match="ids"):
        ops.embedding(torch.tensor([1], dtype=torch.int32), packed)
