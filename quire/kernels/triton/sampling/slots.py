"""What the sampler's kernels read of a slot's scalars, and the constants they share."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.device_state import Flag, RowFlag, Scalar

LENGTH = tl.constexpr(int(Scalar.LENGTH))
NUM_PROMPT = tl.constexpr(int(Scalar.NUM_PROMPT))
FLAGS = tl.constexpr(int(Scalar.FLAGS))
SEED_LOW = tl.constexpr(int(Scalar.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Scalar.SEED_HIGH))
CHOICE = tl.constexpr(int(Scalar.CHOICE))
MIN_TOKENS = tl.constexpr(int(Scalar.MIN_TOKENS))
TOP_K = tl.constexpr(int(Scalar.TOP_K))
NUM_ENDS = tl.constexpr(int(Scalar.NUM_ENDS))
NUM_BIAS = tl.constexpr(int(Scalar.NUM_BIAS))
NUM_WORDS = tl.constexpr(int(Scalar.NUM_WORDS))
LONGEST_WORD = tl.constexpr(int(Scalar.LONGEST_WORD))
NUM_LOGPROBS = tl.constexpr(int(Scalar.NUM_LOGPROBS))
TEMPERATURE = tl.constexpr(int(Scalar.TEMPERATURE))
LOG_MIN_P = tl.constexpr(int(Scalar.LOG_MIN_P))
PRESENCE = tl.constexpr(int(Scalar.PRESENCE))
FREQUENCY = tl.constexpr(int(Scalar.FREQUENCY))
REPETITION = tl.constexpr(int(Scalar.REPETITION))
TOP_P = tl.constexpr(int(Scalar.TOP_P))

IS_GREEDY = tl.constexpr(int(Flag.GREEDY))
HAS_PENALTIES = tl.constexpr(int(Flag.PENALTIES))
HAS_BIAS = tl.constexpr(int(Flag.BIAS))
HAS_ALLOWED = tl.constexpr(int(Flag.ALLOWED))
HAS_BAD_WORDS = tl.constexpr(int(Flag.BAD_WORDS))
HAS_ENDS = tl.constexpr(int(Flag.ENDS))
HAS_LOGPROBS = tl.constexpr(int(Flag.LOGPROBS))
HAS_TOP_K = tl.constexpr(int(Flag.TOP_K))
HAS_TOP_P = tl.constexpr(int(Flag.TOP_P))
HAS_MIN_P = tl.constexpr(int(Flag.MIN_P))
# These need the likeliest tokens, and so more than one look at the vocabulary.
HAS_SELECTION = tl.constexpr(int(Flag.TOP_K | Flag.TOP_P))

_SAMPLE = tl.constexpr(int(RowFlag.SAMPLE))
_DRAFTS = tl.constexpr(int(RowFlag.DRAFTS))
_BEHIND = tl.constexpr(int(RowFlag.BEHIND))

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
NO_TOKEN = tl.constexpr(2**31 - 1)  # larger than any token: gives way in a minimum


@triton.jit
def sampling_slot(rows_ptr, row):
    """The slot int64 of a row that samples, -1 of any other."""
    slot = tl.load(rows_ptr + 4 * row)
    samples = tl.load(rows_ptr + 4 * row + 3) & _SAMPLE
    return tl.where(samples != 0, slot, -1).to(tl.int64)


@triton.jit
def row_drafts(rows_ptr, row):
    """How many drafts a row's slot has."""
    return tl.load(rows_ptr + 4 * row + 3) % _BEHIND // _DRAFTS


@triton.jit
def row_behind(rows_ptr, row):
    """How many of them come before the token that the row samples."""
    return tl.load(rows_ptr + 4 * row + 3) // _BEHIND


@triton.jit
def load_float(ptr):
    """A float32 among the scalars."""
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def load_top_p(scalars_ptr):
    low = tl.load(scalars_ptr + TOP_P).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(scalars_ptr + TOP_P + 1).to(tl.int64)
    return (high << 32 | low).to(tl.float64, bitcast=True)


@triton.jit
def load_key(scalars_ptr, behind):
    """What the noise of a slot's next token depends on, `behind` so many drafts: position, choice,
    seed."""
    position = (tl.load(scalars_ptr + LENGTH) + behind).to(tl.uint32, bitcast=True)
    choice = tl.load(scalars_ptr + CHOICE).to(tl.uint32, bitcast=True)
    low = tl.load(scalars_ptr + SEED_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(scalars_ptr + SEED_HIGH).to(tl.uint32, bitcast=True)
    return position, choice, low, high


@triton.jit
def count_once(count_ptr):
    """One more of a token in the output; 15 bits count."""
    count = tl.load(count_ptr)
    tl.store(count_ptr, tl.where((count & 0x7FFF) == 0x7FFF, count, count + 1))


@triton.jit
def scaled(x, largest, temperature):
    """(x - largest) / temperature, never above 0. Fixed roundings: all kernels get equal bits."""
    return tl.div_rn(x - tl.maximum(largest, -LARGEST), temperature)
