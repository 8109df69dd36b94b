"""Reference of quire/kernels/triton/sampling/sample.py: sorted rows, one after the other."""

from __future__ import annotations

from itertools import pairwise

import torch

from quire.kernels.device_state import DeviceState, Flag, RowFlag, Scalar
from quire.kernels.reference import ops
from quire.kernels.reference.sampling.accept import append_token
from quire.kernels.reference.sampling.logprobs_of import logprobs_of
from quire.kernels.sampling import SampleOutputs, Scratch, Status


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    state: DeviceState,
    variant: str,
    out: SampleOutputs,
    scratch: Scratch,
    logprobs: bool = False,
    append: bool = True,
) -> None:
    """`variant` and `scratch` change nothing here."""
    for i, (slot, _, _, row_flags) in enumerate(rows.tolist()):
        out.tokens[i], out.status[i] = -1, Status.SKIPPED
        if slot < 0 or not row_flags & RowFlag.SAMPLE:
            continue
        raw = logits[i].float()
        if raw.isnan().any() or raw.max().isinf():
            out.status[i] = Status.NAN
            continue
        token = _choose(raw.clone(), _Slot(state, slot, row_flags // RowFlag.BEHIND))
        if token is None:
            out.status[i] = Status.FORBIDDEN
            continue
        out.tokens[i], out.status[i] = token, Status.OK
        if append:
            append_token(state, slot, token)
        if logprobs and int(state.flags[slot]) & Flag.LOGPROBS:
            wanted = int(state.scalars[slot, Scalar.NUM_LOGPROBS])
            found = logprobs_of(raw[None], out.tokens[i : i + 1], wanted, scratch)
            out.logprob[i], out.rank[i] = found[0][0], found[1][0]
            out.top_ids[i, : found[2].shape[1]] = found[2][0]
            out.top_logprobs[i, : found[3].shape[1]] = found[3][0]


class _Slot:
    """A slot's values on the host, with so many of its drafts for output."""

    def __init__(self, state: DeviceState, slot: int, behind: int):
        scalars = state.scalars[slot].contiguous().cpu()
        self.ints = scalars.tolist()
        self.floats = scalars.view(torch.float32)
        self.top_p = float(scalars.view(torch.float64)[Scalar.TOP_P // 2])
        self.flags = Flag(self.ints[Scalar.FLAGS])
        length = self.ints[Scalar.LENGTH] + behind
        self.num_output = length - self.ints[Scalar.NUM_PROMPT]
        self.tokens = state.history[slot, :length].tolist()
        self.counts = state.counts[slot].int()
        for token in self.tokens[length - behind :]:
            self.counts[token] += int(self.counts[token]) & 0x7FFF != 0x7FFF
        self.ends = state.ends[slot, : self.ints[Scalar.NUM_ENDS]].long()
        self.bias_ids = state.bias_ids[slot, : self.ints[Scalar.NUM_BIAS]].long()
        self.bias_values = state.bias_values[slot, : self.ints[Scalar.NUM_BIAS]]
        starts = state.word_starts[slot, : self.ints[Scalar.NUM_WORDS] + 1].tolist()
        words = state.word_tokens[slot].tolist() if self.flags & Flag.BAD_WORDS else []
        self.words = [words[a:b] for a, b in pairwise(starts)] if words else []
        self.allowed = state.allowed[slot]

    @property
    def seed(self) -> int:
        low, high = self.ints[Scalar.SEED_LOW], self.ints[Scalar.SEED_HIGH]
        return int(high % 2**32 * 2**32 + low % 2**32)


def _choose(x: torch.Tensor, slot: _Slot) -> int | None:
    _constrain(x, slot)
    _penalise(x, slot)
    x.clamp_(max=torch.finfo(torch.float32).max)
    largest = x.max()
    if largest == -torch.inf:
        return None
    if not slot.flags & Flag.GREEDY:
        x = (x - largest) / slot.floats[Scalar.TEMPERATURE].to(x.device)
        x = _keep_likely(x, slot)
        position, choice = len(slot.tokens), slot.ints[Scalar.CHOICE]
        x = x + ops.gumbel(slot.seed, choice, position, len(x)).to(x.device)
    return int((x == x.max()).nonzero()[0, 0])


def _constrain(x: torch.Tensor, slot: _Slot) -> None:
    if slot.flags & Flag.ALLOWED:
        ids = torch.arange(len(x), device=x.device)
        x[slot.allowed[ids // 32] >> (ids % 32) & 1 == 0] = -torch.inf
    for *before, last in slot.words:
        count = len(before)
        if count <= slot.num_output and slot.tokens[len(slot.tokens) - count :] == before:
            x[last] = -torch.inf
    if slot.flags & Flag.ENDS and slot.num_output < slot.ints[Scalar.MIN_TOKENS]:
        x[slot.ends] = -torch.inf
    if slot.flags & Flag.BIAS:
        x[slot.bias_ids] += slot.bias_values


def _penalise(x: torch.Tensor, slot: _Slot) -> None:
    if not slot.flags & Flag.PENALTIES:
        return
    repetition, frequency, presence = (
        slot.floats[i].to(x.device) for i in (Scalar.REPETITION, Scalar.FREQUENCY, Scalar.PRESENCE)
    )
    seen, output = slot.counts != 0, slot.counts & 0x7FFF
    x[seen] = torch.where(x > 0, x / repetition, x * repetition)[seen]
    penalty = frequency * output.float() + presence
    x[output > 0] -= penalty[output > 0]


def _keep_likely(y: torch.Tensor, slot: _Slot) -> torch.Tensor:
    y = y.masked_fill(y < slot.floats[Scalar.LOG_MIN_P].to(y.device), -torch.inf)
    ordered, ids = y.sort(descending=True, stable=True)
    if slot.flags & Flag.TOP_K:
        ordered[ordered < ordered[slot.ints[Scalar.TOP_K] - 1]] = -torch.inf
    if slot.flags & Flag.TOP_P:
        probability = ordered.double().softmax(0)
        drop = probability.cumsum(0) - probability >= slot.top_p
        drop[0] = False
        ordered[drop] = -torch.inf
    return torch.empty_like(y).scatter_(0, ids, ordered)
