"""One tile of queries against one tile of keys: the arithmetic that both kernels share.

Online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023) in base 2. A state is, per
row, the largest score m, the sum of weights relative to it, and the sum acc of values so weighted.
A score times `factor` is a logit in log2 units.

Why bits are equal in deterministic mode. The keys are cut into pieces at fixed absolute positions,
and a piece is one tile of both kernels. `piece_state` starts from nothing, so a piece's state is a
function of one query and of the keys that it sees in there: the same MMA instructions over the same
k steps, and row reductions over the same columns in the same order of threads (the tile shapes
in tiles.py see to that). Keys that the query does not see have weight +0, whatever they hold.
States are then merged in order of pieces by one formula. A compiler may fuse a product and the sum
it goes into, or not, and a * b + c * d in two ways; so every product that is added to something is
written as a fused multiply-add, or rounds before it passes through a maximum, as part of none.
Scales of keys and values only enter products that are factors or operands of others.
A piece of which a row sees nothing merges as m, fma(weight, 1, 0) and fma(acc, 1, +-0), and the
first piece as fma(0, 0, acc * 1): both change at most the sign of a zero, and `normalised` gives
every zero the same sign. So it does not matter with which other rows, from which piece on, or by
how many programs a row is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.quantized.decode import fp8_values

# Triton's interpreter multiplies the bit patterns of bfloat16 values.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _cached(
    x, dtype: tl.constexpr, PACKED: tl.constexpr, CAST: tl.constexpr, PURE: tl.constexpr
):  # fmt: skip
    """Keys or values of the cache in `dtype`; uint8 are codes of e4m3. PURE False for values: an
    MMA takes them transposed, which shared memory does for 16 bits, but not for 8."""
    if x.dtype == tl.uint8:
        x = fp8_values(x, PACKED, CAST, PURE)
    return x.to(dtype)


@triton.jit
def capped(s, inner_scale):
    # tanh(x) = 2 sigmoid(2 x) - 1; its error of 1e-7 is far below that of s.
    return 2.0 * tl.sigmoid(s * (2.0 * inner_scale)) - 1.0


@triton.jit
def _scores(
    q, k, q_rest, k_rest, k_scale, inner_scale,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    s = _dot(q, tl.trans(_cached(k, q.dtype, PACKED, CAST, True)), None, PRECISION)
    if q_rest is not None:
        s = _dot(q_rest, tl.trans(k_rest.to(q_rest.dtype)), s, PRECISION)
    if k_scale is not None:
        s = s * k_scale[None, :]
    return capped(s, inner_scale) if SOFTCAP else s


@triton.jit
def finite(m):
    """m to subtract: a row that has seen nothing has no largest score."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _weights(s, reference, factor):
    """2 ** ((s - reference) * factor), and exactly 0 for s = -inf."""
    return tl.exp2(tl.fma(s, factor, -(reference * factor)[:, None]))


@triton.jit
def _weighted(p, v_scale):
    """Weights of values that are to be multiplied by their keys' scales."""
    return p if v_scale is None else p * v_scale[None, :]


@triton.jit
def piece_state(
    q, k, v, visible, factor, inner_scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    q_rest=None, k_rest=None, k_scale=None, v_scale=None,
    PACKED: tl.constexpr = False, CAST: tl.constexpr = False,
):  # fmt: skip
    """(m, weight, acc) of queries [rows, D] over keys and values [keys, D], from nothing.

    `visible` [rows, keys] counts where MASKED. Values of keys that nobody sees must be finite.
    q_rest, k_rest: more values of queries and keys, for which there are none of v. k_scale, v_scale
    [keys]: what k and v are to be multiplied by, where these are codes. PACKED, CAST: see
    fp8_values.
    """
    s = _scores(q, k, q_rest, k_rest, k_scale, inner_scale, SOFTCAP, PRECISION, PACKED, CAST)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m = tl.max(s, 1)
    p = _weights(s, finite(m) if MASKED else m, factor)
    total, p = tl.sum(p, 1), _weighted(p, v_scale).to(q.dtype)
    return m, total, _dot(p, _cached(v, q.dtype, PACKED, CAST, False), None, PRECISION)


@triton.jit
def merge(m, weight, acc, m_piece, weight_piece, acc_piece, factor):
    """The state of the keys so far and the piece after them together."""
    top = tl.maximum(m, m_piece)
    reference = finite(top)
    a, b = tl.exp2((m - reference) * factor), tl.exp2((m_piece - reference) * factor)
    weight = tl.fma(weight, a, weight_piece * b)
    acc = tl.fma(acc, a[:, None], acc_piece * b[:, None])
    return top, weight, acc


@triton.jit
def extend(
    q, k, v, visible, m, weight, acc, factor, inner_scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    q_rest=None, k_rest=None, k_scale=None, v_scale=None,
    PACKED: tl.constexpr = False, CAST: tl.constexpr = False,
):  # fmt: skip
    """As piece_state and merge together, but values add up within the MMA's own accumulator."""
    s = _scores(q, k, q_rest, k_rest, k_scale, inner_scale, SOFTCAP, PRECISION, PACKED, CAST)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    reference = finite(top) if MASKED else top
    p = _weights(s, reference, factor)
    shrink = tl.exp2((m - reference) * factor)
    weight = tl.fma(weight, shrink, tl.sum(p, 1))
    p = _weighted(p, v_scale).to(q.dtype)
    acc = _dot(p, _cached(v, q.dtype, PACKED, CAST, False), acc * shrink[:, None], PRECISION)
    return top, weight, acc


@triton.jit
def normalised(m, weight, acc, sinks, factor, HAS_SINKS: tl.constexpr):
    """Values [rows, D] of a finished state. `sinks`: logits [rows] that take weight, no value."""
    if HAS_SINKS:
        log2_e: tl.constexpr = 1.4426950408889634
        top = tl.maximum(m * factor, sinks * log2_e)
        shrink = tl.exp2(tl.fma(m, factor, -top))
        weight = tl.fma(weight, shrink, tl.exp2(tl.fma(sinks, log2_e, -top)))
        acc = acc * shrink[:, None]
    # Rows that see nothing are padding; they get 0.
    result = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    return tl.where(result == 0.0, 0.0, result)
