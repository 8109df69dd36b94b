"""The offline benchmark's scenarios: what each asks of the engine, and the work it is made of."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from quire.cli.flags import CommandLineError
from quire.errors import suggest

# How a scenario is timed; quire.cli.bench_offline has a function for each.
DECODE, TOTAL, PREFILL, PREFIX, SINGLE = "decode", "total", "prefill", "prefix", "single"

# Ids near the ends of a vocabulary are often special tokens.
SPECIAL_IDS = 100


@dataclass(frozen=True)
class Scenario:
    """`requests` prompts of `shortest` to `prompt` tokens, of which the first `shared` are the
    same in all; each is answered with `output` tokens. With `phrase` a prompt repeats its first
    tokens, so many of them. `filled`: prompts are not computed (quire/cli/bench_filled.py)."""

    name: str
    kind: str
    requests: int
    prompt: int
    output: int
    about: str
    shared: int = 0
    shortest: int = 0
    phrase: int = 0
    filled: bool = False

    @property
    def tokens(self) -> int:
        """KV tokens of all requests together."""
        return self.requests * (self.prompt + self.output)

    def scaled(self, scale: float, longest: int) -> Scenario:
        """Smaller by `scale` in count and lengths, and cut to a context of `longest` tokens."""
        requests = max(1, round(self.requests * scale))
        output = min(max(2 if self.output > 1 else 1, round(self.output * scale)), longest // 2)
        prompt = min(max(1, round(self.prompt * scale)), longest - output)
        shared = min(round(self.shared * scale), prompt - 1)
        shortest = min(round(self.shortest * scale), prompt)
        return replace(
            self, requests=requests, prompt=prompt, output=output, shared=shared, shortest=shortest
        )


SCENARIOS = [
    Scenario("single", SINGLE, 1, 32, 128, "decode rate of one request"),
    Scenario("prefill512", PREFILL, 1, 512, 1, "prefill rate of one prompt"),
    Scenario("offline64", TOTAL, 64, 256, 64, "64 prompts of 128 to 256 tokens", shortest=128),
    Scenario("b1", DECODE, 1, 128, 257, "time between tokens, 1 request"),
    Scenario("b32", DECODE, 32, 128, 257, "time between tokens, 32 requests"),
    Scenario("b256", DECODE, 256, 128, 257, "time between tokens, 256 requests"),
    Scenario("thr", TOTAL, 512, 512, 256, "throughput, 512 requests of 512 in and 256 out"),
    Scenario("pre", PREFILL, 16, 8192, 1, "prefill rate of 16 prompts of 8192 tokens"),
    Scenario("repeat", DECODE, 1, 128, 129, "b1 of a prompt that repeats 16 tokens", phrase=16),
    Scenario("prefix", PREFIX, 64, 4160, 32, "64 prompts with 4096 tokens in common", shared=4096),
]
CPU_DEFAULT = "single,prefill512,offline64"


def find_scenarios(names: str) -> list[Scenario]:
    """Scenarios by name, comma-separated; bN, dBxC (B requests, a context of C), fBxC (the same,
    which is not computed) and prefillN are any size.

    Raises CommandLineError.
    """
    known = {s.name: s for s in SCENARIOS}
    found = []
    for name in (n.strip() for n in names.split(",")):
        batch = re.fullmatch(r"b([1-9]\d{0,3})", name)
        deep = re.fullmatch(r"([df])([1-9]\d{0,3})x([1-9]\d{0,6})", name)
        prompt = re.fullmatch(r"prefill([1-9]\d{0,6})", name)
        if name in known:
            found.append(known[name])
        elif prompt:
            about = f"prefill rate of one prompt of {prompt[1]} tokens"
            found.append(Scenario(name, PREFILL, 1, int(prompt[1]), 1, about))
        elif batch:
            about = f"time between tokens, {batch[1]} requests"
            found.append(Scenario(name, DECODE, int(batch[1]), 128, 257, about))
        elif deep:
            count, context, filled = int(deep[2]), int(deep[3]), deep[1] == "f"
            about = f"time between tokens, {count} requests after {context} tokens"
            found.append(Scenario(name, DECODE, count, context, 65, about, filled=filled))
        else:
            fix = (
                suggest(name, list(known))
                or f"scenarios: {', '.join(known)}, bN, dBxC, fBxC, prefillN"
            )
            raise CommandLineError("unknown_scenario", f"unknown scenario {name!r}", fix=fix)
    return found


def make_prompts(scenario: Scenario, vocab_size: int, seed: int) -> list[list[int]]:
    """Seeded random token ids."""
    numbers = random.Random(f"{seed} {scenario.name}")
    low = min(SPECIAL_IDS, vocab_size // 4)

    def tokens(count: int) -> list[int]:
        return numbers.choices(range(low, vocab_size - low), k=count)

    shared = tokens(scenario.shared)
    prompts = []
    for _ in range(scenario.requests):
        length = numbers.randint(scenario.shortest or scenario.prompt, scenario.prompt)
        own = tokens(min(scenario.phrase, length) or length - scenario.shared)
        prompts.append((shared + own * (length // len(own) + 1))[:length])
    return prompts
