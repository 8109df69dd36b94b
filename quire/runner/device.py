"""The GPU runner: requests live on the device, the host sends what changes, steps are CUDA graphs.

A step is four things on one stream, none of which waits for the device on the host: what has
changed (one copy and one kernel), the forward pass, sampling, and the copy of the sampled tokens
to pinned memory. The first three are a CUDA graph each where one that fits has been captured, and
launched kernel by kernel where not. Sampled tokens stay on the device, so the next step can be
submitted before this one's are known.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any, NamedTuple, cast

import torch

from quire.kernels.device_state import DeviceState, Flag, StepBuffers
from quire.kernels.sampling import SampleOutputs
from quire.kernels.sampling import Scratch as SamplingScratch
from quire.kernels.triton.attention.decode_short import SHORT_CONTEXT, short_rows
from quire.kernels.triton.attention.paged_attention import Scratch as AttentionScratch
from quire.kernels.triton.compile_kernels import Workers, compile_kernels
from quire.kernels.triton.launch import wanted_kernels
from quire.kernels.triton.ops import TritonKernels
from quire.kernels.triton.sampling.accept import accept
from quire.kernels.triton.sampling.logprobs_of import logprobs_of
from quire.kernels.triton.sampling.sample import sample
from quire.kernels.triton.step.apply_runs import apply_runs
from quire.kernels.triton.step.count_tokens import count_tokens
from quire.kernels.triton.step.keep_hidden import keep_hidden
from quire.kv import BLOCK_SIZE, most_blocks
from quire.layers.build import Build, CacheLayer
from quire.models.registry import MTP, Model
from quire.plan.memory import LOGIT_ROWS
from quire.plan.plan import Plan
from quire.runner.clock import DeviceClock
from quire.runner.device_drafter import DeviceDrafter
from quire.runner.device_forward import forward_table
from quire.runner.device_mtp import DeviceMTP
from quire.runner.diffs import Columns, Diffs, variant
from quire.runner.graphs import Graphs
from quire.runner.layer_kinds import one_of_a_kind, watched_layers
from quire.runner.packets import PacketRing, Run
from quire.runner.pending import DevicePending, HostOutputs, token_logprobs
from quire.runner.shapes import Guessing, Key, Reading, Sampling, Shape, Shapes, ends
from quire.runner.watch import WatchLogits
from quire.step import Batch, Decoding, Row, TokenLogprobs, written_out

# Of the attention kernels at most, beside small amounts that the number of rows decides; part of
# the plan's reserve (quire/plan/gpu.py).
SCRATCH_BYTES = 128 * 2**20
# A plain integer: it is looked at for every row of every step.
LOGPROBS = int(Flag.LOGPROBS)
# Kernels that are compiled or loaded at a time: more would wait for the interpreter's lock.
MOST_THREADS = 16
# Host copies of results: of steps in flight, and of the one being written.
RING = 4
# Of a packet that is taken over by a graph, whose grid is one size: tables of rows, and a block for
# each row of a large step.
LEAST_RUNS = 288


class Packet(NamedTuple):
    """The graph that takes over a small packet from a place in the ring."""

    place: int


@dataclass(frozen=True)
class Prompt:
    """What the host keeps of a request that wants log-probabilities of its prompt."""

    tokens: list[int]
    count: int


class Steady(NamedTuple):
    """The last step submitted, whose rows all decoded plainly: the next of the same slots differs
    in its `starts` only. `rows`: the run of its table; that of sampling is on the device."""

    columns: Columns
    shape: Shape
    rows: Run
    sampling: Sampling


class DeviceRunner:
    """Owns the slots, the steps' buffers and the graphs; the model and its caches are given
    built, loaded and allocated. What drafts: a model of its own, `draft`, or the model's `mtp`.
    `compilers`: processes for the first `warm`, which end them, or whoever gives them does.
    `submit` raises what launching raises; then call `reset`."""

    def __init__(
        self,
        model: Model,
        build: Build,
        plan: Plan,
        vocab_size: int,
        draft: tuple[Model, Build] | None = None,
        mtp: MTP | None = None,
        compilers: Workers | None = None,
    ):
        self.model, self.device = model, build.device
        self._kernels = cast(TritonKernels, build.kernels)
        rows, tokens = plan.max_num_seqs, plan.max_num_batched_tokens
        self._tokens, self._logit_rows = tokens, min(LOGIT_ROWS, rows)
        block_sizes = [group.block_size for group in plan.groups]
        groups, max_blocks = len(block_sizes), most_blocks(plan.max_model_len)
        # Tables of rows: those that are computed, those that sample, those that a drafter reads.
        sampled = self._sampled = plan.max_sampled
        graphs = plan.decode_graphs, plan.mixed_graphs
        drafting = draft is not None or mtp is not None
        self._shapes = Shapes(
            tokens, rows, sampled, *graphs, drafting, self._short_rows(build), SHORT_CONTEXT
        )
        self._short_blocks = SHORT_CONTEXT // min(block_sizes, default=BLOCK_SIZE)
        drafted = self._shapes.padded(rows) if drafting else 0
        sizes = (rows, plan.max_model_len, vocab_size, block_sizes, max_blocks)
        self.state = DeviceState.allocate(*sizes, self.device, 2 * sampled + drafted)
        self._stateful = bool(build.states)
        self._verifying = plan.speculation is not None
        # A token and its drafts are rows of one request where no state forbids that.
        self._kernels.own_requests = not self._verifying
        self._diffs = Diffs(self.state.layout)
        least = LEAST_RUNS if plan.runner == "graph" else 0
        self._packets = PacketRing(self.device, least=least)
        self._buffers = StepBuffers.allocate(sampled, tokens, groups, max_blocks, self.device)
        self._attention_scratch(build.caches + (draft[1].caches if draft else []), plan)
        self._sampling_scratch = SamplingScratch.allocate(sampled, vocab_size, self.device)
        self._outputs = SampleOutputs.allocate(sampled, self.device)
        self._hidden: torch.Tensor | None = None
        self._spoiled = torch.zeros(tokens, dtype=torch.int32, device=self.device)
        self._prompts: dict[int, Prompt] = {}
        self._logprobs: list[int | None] = [None] * rows  # how many of the top each slot wants
        self._drafter: DeviceDrafter | DeviceMTP | None = None
        table = self.state.rows[2 * sampled : 2 * sampled + drafted]
        if draft is not None:
            self._drafter = DeviceDrafter(draft[0], self.state, table, self._sampling_scratch, plan)
        elif mtp is not None:
            self._drafter = DeviceMTP(
                mtp, self.state, table, self._sampling_scratch, plan, self._kept_hidden
            )
        drafts = None if self._drafter is None else self._drafter.drafts
        self._ring = [HostOutputs(self._outputs, self._spoiled, drafts) for _ in range(RING)]
        self._submitted = 0
        self._steady: Steady | None = None
        self.clock: DeviceClock | None = None  # set by who wants to measure
        self.watch: WatchLogits | None = None  # and this
        self.replaying = True  # False: no graph is launched, the model's code runs in every step
        self._graphs = Graphs(self.device) if plan.runner == "graph" else None
        self._wanted, self._compiled = deque(self._shapes.planned()), False
        self._threads, self._compilers = min(plan.threads, MOST_THREADS), compilers

    def _attention_scratch(self, caches: Sequence[CacheLayer], plan: Plan) -> None:
        """One scratch for all layers, of the shape that takes the most."""
        common: dict[str, Any] = {
            "total_tokens": plan.context_tokens,
            "dtype": self._kernels.dtype,
            "deterministic": self._kernels.deterministic,
            "device": self.device,
        }
        shapes = {
            (self._sampled, c.heads, c.kv_heads, c.key_size, c.value_size if c.latent else 0)
            for c in caches
            if c.by_kernels
        }
        if not all(cache.by_kernels for cache in caches):
            numbers = SCRATCH_BYTES // torch.float32.itemsize
            self._kernels.compressed.scratch = torch.empty(numbers, device=self.device)
        if not shapes:
            return

        def size() -> int:
            return max(AttentionScratch.nbytes(*shape, **common) for shape in shapes)

        while common["total_tokens"] and size() > SCRATCH_BYTES:
            common["total_tokens"] //= 2  # what finds no room is computed without splitting
        largest = max(shapes, key=lambda shape: AttentionScratch.nbytes(*shape, **common))
        self._kernels.scratch = AttentionScratch.allocate(*largest, **common)

    def _short_rows(self, build: Build) -> int:
        """Rows for which attention has a kernel for short contexts, in some of the layers."""
        if self._kernels.deterministic:
            return 0
        caches = (c for c in build.caches if c.by_kernels and not c.latent)
        dtype = self._kernels.dtype
        return max((short_rows(c.heads, dtype, c.tensors[0]) for c in caches), default=0)

    # -- a step ------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, batch: Batch) -> DevicePending:
        """Launch a step; where a row is gated, all but sampling."""
        if self.clock is not None:
            self.clock.begin()
        if self._drafter is None and batch.decoding is not None and not batch.rows:
            return self._submit_plain(batch, batch.decoding)
        self._steady = None
        batch = written_out(batch)
        rows = batch.rows
        columns = Columns.of(rows, self._drafter is not None, split=not self._stateful)
        shape = self._shape(columns)
        tables = [self._diffs.rows(columns, shape.rows)]
        if self._drafter is not None:
            padded = max(self._reading(columns).rows, self._guessing_rows(columns))
            tables.append(self._diffs.whole_rows(columns, padded, 2 * self._sampled))
        if columns.drafts:
            tables += self._diffs.drafts(columns)
        if not columns.gated:
            tables.append(self._sampling_table(columns))
        self._apply(batch, tables)
        self._run(shape, lambda: self._forward(shape))
        prompts = self._prompt_logprobs(rows) if self._prompts else {}
        pending = DevicePending(batch.step, columns, self._ring[self._submitted % RING], prompts)
        self._submitted += 1
        if columns.gated:
            pending.hold(self._open)
        else:
            self._launch_sampling(pending, self._sampling(pending.rows))
        return pending

    def _submit_plain(self, batch: Batch, decoding: Decoding) -> DevicePending:
        """`submit` of a step in which all rows decode plainly: what is as in the step before is
        neither made nor sent again."""
        steady = self._steady
        if steady is not None and steady.columns.slots == decoding.slots:
            columns = steady.columns._replace(starts=decoding.starts)
            self._apply(batch, [self._diffs.next_rows(steady.rows, columns)])
            if steady.shape.short:  # until it has become too long
                steady = self._steady = steady._replace(shape=self._shape(columns))
        else:
            columns = Columns.plain(decoding)
            shape = self._shape(columns)
            table = self._diffs.rows(columns, shape.rows)
            self._apply(batch, [table, self._sampling_table(columns)])
            steady = self._steady = Steady(columns, shape, table, self._sampling(columns))
        self._run(steady.shape, lambda: self._forward(steady.shape))
        pending = DevicePending(batch.step, columns, self._ring[self._submitted % RING], {})
        self._submitted += 1
        self._launch_sampling(pending, steady.sampling)
        return pending

    @torch.inference_mode()
    def _open(self, pending: DevicePending, masks: dict[int, bytes]) -> None:
        """Launch the sampling of a step with gated rows."""
        columns = pending.rows
        runs = [
            run for i, mask in masks.items() for run in self._diffs.mask(columns.slots[i], mask)
        ]
        if any(i not in masks for i in columns.gated):
            pending.rows = columns.without({i for i in columns.gated if i not in masks})
        self._send([*runs, self._sampling_table(pending.rows)])
        self._launch_sampling(pending, self._sampling(pending.rows))

    def _sampling(self, columns: Columns) -> Sampling:
        """What samples for the rows that do."""
        flags = {self._diffs.flags[slot] for slot in columns.sampling_slots}
        size = self._shapes.padded(len(columns.sampling))
        return Sampling(size, variant(flags), any(each & LOGPROBS for each in flags))

    def _launch_sampling(self, pending: DevicePending, sampling: Sampling) -> None:
        """Sample for the rows that do, whose table is on the device, and copy what that gives."""
        columns = pending.rows
        sampled, logprobs = len(columns.sampling), sampling.logprobs
        if sampled:
            self._run(sampling, lambda: self._sample(sampling))
        if self._drafter is not None:
            self._launch_drafting(self._drafter, columns)
            pending.drafted = bool(columns.propose)
        # Logits say of a token that samples whether it is finite; of others the host must ask.
        tokens = 0 if columns.decode else columns.num_tokens
        pending.host.copy(sampled, logprobs, tokens, pending.drafted)
        if self.clock is not None:
            self.clock.end()
        if logprobs:
            pending.wanted = [self._logprobs[slot] for slot in columns.sampling_slots]

    def _launch_drafting(self, drafter: DeviceDrafter | DeviceMTP, columns: Columns) -> None:
        """Let a model read the step as it stands, and guess what follows where that is wanted."""
        reading = self._reading(columns)
        self._run(reading, self._compute(reading))
        if columns.propose:
            flags = {self._diffs.flags[columns.slots[i]] for i in columns.propose}
            guessing = Guessing(self._guessing_rows(columns), variant(flags))
            self._run(guessing, self._compute(guessing))

    def _shape(self, columns: Columns) -> Shape:
        longest = None
        if columns.num_rows <= self._shapes.short_rows:
            longest = max(map(add, columns.starts, columns.lengths), default=0)
        return self._shapes.of(columns.num_tokens, columns.num_rows, longest)

    def _reading(self, columns: Columns) -> Reading:
        # Behind each row one token more at most; and so there are more tokens than rows.
        rows = len(columns.slots)
        shape = self._shapes.of(columns.num_tokens + rows, rows)
        return Reading(shape.tokens, shape.rows)

    def _guessing_rows(self, columns: Columns) -> int:
        return self._shapes.padded(len(columns.slots))

    def _compute(self, key: Key) -> Callable[[], None]:
        """What computes a shape."""
        if isinstance(key, Shape):
            return lambda: self._forward(key)
        if isinstance(key, Sampling):
            return lambda: self._sample(key)
        drafter = self._drafter
        assert drafter is not None
        if isinstance(key, Reading):
            return lambda: drafter.read(key.rows, key.tokens)
        return lambda: drafter.draft(key.rows, key.variant)

    def _sampling_table(self, columns: Columns) -> Run:
        size = self._shapes.padded(len(columns.sampling))
        return self._diffs.sampling_rows(columns, size, first=self._sampled)

    def reset(self) -> None:
        """Forget all requests, after a step that raised."""
        self._steady = None
        self._prompts.clear()
        if self._kernels.scratch is not None:
            self._kernels.scratch.reset()

    def warm(self) -> int:
        """Prepare for one shape: capture its graph, or compute it where it gets none, so that its
        kernels are compiled and its memory is there. Returns how many shapes are left."""
        if self._wanted:
            self._prepare_next()
        return len(self._wanted)

    @torch.inference_mode()
    def _prepare_next(self) -> None:
        self._steady = None
        # What is computed is padding: it reads no request and writes nowhere.
        self.state.rows[:, 0] = -1
        if not self._compiled and self.device.type == "cuda":
            self._compile()
            self._compiled = True
            self._capture_packets()
        key = self._wanted.popleft()
        self._prepare(key, self._compute(key))
        if not self._wanted:
            count_tokens(self.state, self._slots([-1]))

    def _compile(self) -> None:
        """Compile what steps will launch, several kernels at a time: of all shapes where there are
        processors for it, else of some. Those of a model that drafts wait for their launch."""
        with wanted_kernels() as wanted:
            self._send([(0, array("i", [0]))])  # what comes before a step: see _apply
            count_tokens(self.state, self._slots([-1]))
            self._note_steps()
        compile_kernels(wanted, self._threads, self._compilers)
        self._compilers = None

    def _note_steps(self) -> None:
        """Compute steps where kernels are only noted. Layers that launch the same, down to shapes
        and numbers, for the largest and the smallest steps of each kind do so for those between,
        which one of them computes alone."""
        keys = [key for key in self._wanted if isinstance(key, Shape | Sampling)]
        some = ends(keys)
        with watched_layers(self.model) as launches:
            for key in some:
                self._compute(key)()
        if self._threads >= 8:
            with one_of_a_kind(self.model, launches):
                for key in (key for key in keys if key not in some):
                    self._compute(key)()

    def _capture_packets(self) -> None:
        """Bringing a packet over is two launches of known size: a graph saves what finding the
        arguments of a copy and of a kernel costs the host in every step."""
        if self._graphs is None:
            return
        for place in self._packets.empty():
            self._graphs.capture(Packet(place), partial(self._bring, place))

    def _prepare(self, key: Key, compute: Callable[[], None]) -> None:
        if self._graphs is None or not self._shapes.gets_graph(key):
            compute()
        elif not self._graphs.known(key):
            self._graphs.capture(key, compute)

    def _run(self, key: Key, compute: Callable[[], None]) -> None:
        """Launch the graph of a shape, or its kernels one by one where there is none yet."""
        if self._graphs is None or not self.replaying:
            compute()
        elif not self._graphs.replay(key):
            if isinstance(key, Sampling | Guessing) and not self._graphs.known(key):
                self._wanted.appendleft(key)  # captured only where a request asks for it
            compute()

    def _apply(self, batch: Batch, tables: list[Run]) -> None:
        """Bring what is new to the device, and the tables of rows."""
        runs: list[Run] = []
        counted: list[int] = []
        for slot in batch.leave:
            self._prompts.pop(slot, None)
        for enter in batch.enter:
            runs += self._diffs.enter(enter)
            if self._diffs.flags[enter.slot] & Flag.PENALTIES:
                counted.append(enter.slot)
            wanted = enter.params.logprobs
            vocabulary = self.state.layout.vocab_size
            self._logprobs[enter.slot] = None if wanted is None else min(wanted, vocabulary)
            if enter.params.prompt_logprobs is not None:
                prompt = enter.tokens[: enter.num_prompt]
                self._prompts[enter.slot] = Prompt(prompt, enter.params.prompt_logprobs)
        runs += self._diffs.blocks(batch.rows, batch.decoding)
        self._send(runs + tables)
        if counted:
            count_tokens(self.state, self._slots(counted))

    def _send(self, runs: list[Run]) -> None:
        for packet, count in self._packets.send(runs, self._replay_packet):
            apply_runs(self.state.arena, packet, count)

    def _bring(self, place: int) -> None:
        apply_runs(self.state.arena, *self._packets.small(place))

    def _replay_packet(self, place: int) -> bool:
        graphs = self._graphs
        return graphs is not None and self.replaying and graphs.replay(Packet(place))

    def _slots(self, slots: list[int]) -> torch.Tensor:
        """Slots on the device, by a copy that the host does not wait for."""
        host = torch.tensor(slots, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _forward(self, shape: Shape) -> None:
        """Hidden states of the step's tokens, from the table of rows on the device."""
        blocks = self._short_blocks if shape.short else None
        buffers = self._buffers.view(shape.rows, shape.tokens, blocks)
        table = self.state.rows[: shape.rows]
        hidden_TH = forward_table(self.model, self.state, table, buffers)
        if self._hidden is None:
            size = (self._tokens, hidden_TH.shape[1])
            self._hidden = torch.zeros(size, dtype=hidden_TH.dtype, device=self.device)
        keep_hidden(hidden_TH, self._hidden, self._spoiled)

    def _kept_hidden(self) -> torch.Tensor:
        assert self._hidden is not None, "no step was computed yet"
        return self._hidden

    def _sample(self, sampling: Sampling) -> None:
        """Sample for the second table of rows; its second column says whose hidden states."""
        assert self._hidden is not None
        rows = self.state.rows[self._sampled : self._sampled + sampling.rows]
        logits_BV = self.model.logits(self._hidden.index_select(0, rows[:, 1]))
        sample(
            logits_BV, rows, self.state, sampling.variant, self._outputs.view(sampling.rows),
            self._sampling_scratch, sampling.logprobs, append=not self._verifying,
        )  # fmt: skip
        if self._verifying:
            accept(rows, self.state, self._outputs.view(sampling.rows))

    # -- log-probabilities ---------------------------------------------------------------------

    def _prompt_logprobs(self, rows: list[Row]) -> dict[int, list[TokenLogprobs]]:
        """Of rows that ask for them, by the row's place. This waits for the device."""
        found, end = {}, 0
        for i, row in enumerate(rows):
            begin, end = end, end + len(row.tokens)
            if row.prompt_logprobs:
                prompt = self._prompts[row.slot]
                targets = prompt.tokens[row.start + 1 : row.start + 1 + len(row.tokens)]
                found[i] = self._of_targets(begin, targets, prompt.count)
        return found

    def _of_targets(self, begin: int, targets: list[int], count: int) -> list[TokenLogprobs]:
        assert self._hidden is not None
        found: list[TokenLogprobs] = []
        for start in range(0, len(targets), self._logit_rows):
            some = targets[start : start + self._logit_rows]
            hidden_RH = self._hidden[begin + start : begin + start + len(some)]
            wanted = torch.tensor(some, device=self.device)
            logits_RV = self.model.logits(hidden_RH)
            if self.watch is not None:
                self.watch(logits_RV, some)
            got = logprobs_of(logits_RV, wanted, count, self._sampling_scratch)
            values = zip(some, *(tensor.tolist() for tensor in got), strict=True)
            for token, logprob, rank, top_ids, top in values:
                found.append(token_logprobs(token, logprob, rank, top_ids, top))
        return found
