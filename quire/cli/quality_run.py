"""One model's logits and greedy texts for `quire bench quality`, from the engine that serves it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from quire.cli.divergence import Divergence
from quire.cli.local import LocalEngine, Progress
from quire.cli.quality_text import Work
from quire.config.options import Options
from quire.engine.startup import find_model, kernel_facts, make_plan
from quire.errors import UsageError
from quire.hardware.machine import detect
from quire.params import SamplingParams
from quire.plan.memory import bytes_for_tokens
from quire.plan.plan import format_bytes
from quire.runner.watch import WatchLogits

# What the baseline's logits may take of this machine's memory, while the candidate is computed.
MOST_BYTES = 4 * 2**30
MOST_SHARE = 0.5


@dataclass
class Measured:
    """A model's plan and its greedy texts, in the order of the prompts."""

    model: str
    plan: dict[str, Any]
    texts: list[list[int]]


@dataclass
class Kept:
    """A baseline's logits in the order of the work's positions, on the CPU in their own dtype."""

    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, logits_BV: torch.Tensor, targets: list[int]) -> None:
        """Keep the logits of the next positions."""
        self.logits.append(logits_BV.to("cpu", copy=True))


class Compared:
    """Compares a candidate's logits with those kept, position by position."""

    def __init__(self, kept: Kept):
        self.divergence = Divergence()
        self._rows = (row for chunk in kept.logits for row in chunk)

    def take(self, logits_BV: torch.Tensor, targets: list[int]) -> None:
        """The candidate's logits of the next positions; pieces may be cut otherwise."""
        baseline_BV = torch.stack([next(self._rows) for _ in targets])
        self.divergence.add(baseline_BV.to(logits_BV.device), logits_BV, targets)

    def done(self) -> bool:
        """Whether nothing that was kept is left."""
        return next(self._rows, None) is None


def check_room(work: Work, vocab_size: int) -> None:
    """Raises UsageError where the baseline's logits would not fit; they are never thinned out."""
    room = min(MOST_BYTES, int(MOST_SHARE * detect(gpu=False).available_bytes))
    each = 4 * vocab_size
    if work.positions * each > room:
        raise UsageError(
            "too_many_tokens",
            f"the baseline's logits of {work.positions} positions take "
            f"{format_bytes(work.positions * each)}",
            why=f"there is room for {format_bytes(room)}: half of the memory that is free, at most "
            f"{format_bytes(MOST_BYTES)}",
            fix=f"--tokens {room // each} or fewer",
            field="--tokens",
        )


def measure(options: Options, work: Work, watch: WatchLogits, say: Progress, name: str) -> Measured:
    """Load a `sized` model, show `watch` the logits of all pieces, continue the prompts, let it go.

    Raises QuireError.
    """
    engine = LocalEngine(options, lambda phase, done: say(f"{name}: {phase}", done))
    runner = cast(Any, engine.engine.core.runner)
    runner.watch = watch
    of_prompt = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    for i, piece in enumerate(work.pieces):
        say(f"{name}: the text", i / len(work.pieces))
        generate(engine, [piece], of_prompt)
    runner.watch = None
    say(f"{name}: greedy texts", 0.0)
    greedy = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
    texts = generate(engine, work.prompts, greedy)
    measured = Measured(engine.info.model, engine.info.plan, texts)
    del engine, runner
    _free()
    return measured


def sized(options: Options, work: Work) -> Options:
    """Options with rows and KV cache for this work alone, where they were not given.

    Raises QuireError where the model cannot be planned with them.
    """
    engine = options.engine
    if engine.max_num_seqs is None:
        engine = replace(engine, max_num_seqs=len(work.prompts))
    options = replace(
        options, engine=engine, model=replace(options.model, skip_tokenizer_init=True)
    )
    if engine.kv_cache_memory is not None:
        return options
    plan = make_plan(options, find_model(options), None, kernel_facts())
    need = sum(len(prompt) + work.output for prompt in work.prompts)
    need = max(need, *(len(piece) + 1 for piece in work.pieces))
    size = bytes_for_tokens(plan.groups, need, plan.max_num_batched_tokens, plan.max_num_seqs)
    return replace(options, engine=replace(engine, kv_cache_memory=size))


def generate(
    engine: LocalEngine, prompts: Sequence[list[int]], params: SamplingParams
) -> list[list[int]]:
    """The tokens after each prompt, all prompts being answered together."""
    requests = [engine.request(prompt, params) for prompt in prompts]
    texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for news in engine.stream(requests):
        for choice in news.choices:
            texts[news.request_id] += choice.token_ids
    return list(texts.values())


def _free() -> None:
    """Return an engine's memory before the next one is planned: its parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
