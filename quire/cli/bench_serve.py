"""`quire bench serve`: clients that stream from a running OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any

from quire.cli.bench_offline import number
from quire.cli.bench_record import machine, write_json
from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.http_stream import Client, HttpFailure
from quire.cli.serve_load import Job, Outcome, make_jobs, outcome, read_jobs, send
from quire.cli.version import versions
from quire.errors import QuireError
from quire.settings import settings

CALIBRATION_WORDS = 64


def add_flags(parser: Parser) -> None:
    """Flags of the load."""
    group = parser.add_argument_group("load")

    def add(flag: str, default: str, metavar: str, text: str) -> None:
        shown = f"{text} [{default}]" if default else text
        group.add_argument(flag, default=default, metavar=metavar, help=shown)

    add("--base-url", "http://127.0.0.1:8000", "URL", "the server")
    add("--model", "", "NAME", "model id to ask for; by default the server's first")
    add("--api-key", "", "KEY", "by default QUIRE_API_KEY")
    add("--endpoint", "chat", "chat|completions", "which API")
    add("--concurrency", "8", "N", "clients; each sends its next request after the last answer")
    add("--requests", "24", "N", "requests in all")
    add("--input-len", "256", "N", "prompt tokens, nearly; made of random words")
    add("--output-len", "128", "N", "answer tokens")
    add("--shared-prefix", "0", "N", "prompt tokens that all requests have in common")
    add("--workload", "", "FILE[:NAME]", 'requests from JSON: [{"text", "max_tokens"}]')
    add("--repeat", "1", "N", "repetitions, each with new prompts")
    add("--seed", "0", "N", "of the words")
    add("--timeout", "600", "S", "seconds for one answer")
    add("--extra", "{}", "JSON", 'more request fields, like {"top_k": 20}')
    add("--output", "", "FILE", "write the record as JSON")
    group.add_argument(
        "--stop-early", action="store_true", help="let the model end answers (no ignore_eos)"
    )


def run(invocation: Invocation) -> int:
    """Send the load and print what came of it; exit code 1 where every request failed."""
    flags = invocation.flags
    if flags.endpoint not in ("chat", "completions"):
        raise CommandLineError("invalid_flag", "--endpoint must be chat or completions")
    load = Load(flags)
    try:
        client = Client(flags.base_url, flags.api_key or settings().api_key, load.timeout)
        repetitions = asyncio.run(load.run(client, None if invocation.json else _tell))
    except HttpFailure as error:
        raise QuireError(
            "server_failed",
            f"cannot measure {flags.base_url}",
            why=str(error),
            fix="start it with: quire serve",
        ) from None
    record = {
        "command": invocation.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": load.model,
        "client_machine": machine(),
        "versions": versions(),
        "endpoint": flags.endpoint,
        "concurrency": load.concurrency,
        "repetitions": repetitions,
    }
    print(json.dumps(record) if invocation.json else "\n".join(_table(repetitions)))
    if flags.output:
        write_json(flags.output, record)
    return 1 if all(r["errors"] == r["requests"] for r in repetitions) else 0


class Load:
    """The load that the flags ask for. Raises CommandLineError for flags that are wrong."""

    def __init__(self, flags: Any):
        self.flags = flags
        self.concurrency = _count("--concurrency", flags.concurrency)
        self.requests = _count("--requests", flags.requests)
        self.input = _count("--input-len", flags.input_len)
        self.output = _count("--output-len", flags.output_len)
        self.repeat = _count("--repeat", flags.repeat)
        self.shared = int(number("--shared-prefix", flags.shared_prefix, 0, self.input, whole=True))
        self.timeout = number("--timeout", flags.timeout, 0.1, 86400)
        self.model = flags.model
        try:
            extra = json.loads(flags.extra)
        except ValueError as error:
            raise CommandLineError("invalid_flag", "--extra is not JSON", str(error)) from None
        if not isinstance(extra, dict):
            raise CommandLineError("invalid_flag", "--extra must be a JSON object")
        self.fields: dict[str, Any] = ({} if flags.stop_early else {"ignore_eos": True}) | extra

    async def run(self, client: Client, tell: Any) -> list[dict[str, Any]]:
        """All repetitions, after a warm-up. Raises HttpFailure where the server is not there."""
        self.model = self.model or await _first_model(client)
        self.fields = {"model": self.model, **self.fields}
        scale = await self._words_per_token(client)
        results = []
        for i in range(self.repeat):
            if self.flags.workload:
                jobs = read_jobs(self.flags.workload, self.requests)
            else:
                words = (max(1, round(self.input * scale)), round(self.shared * scale))
                seed = f"{self.flags.seed} {i}"
                jobs = make_jobs(self.requests, words[0], self.output, words[1], seed)
            if tell is not None:
                tell(f"{i + 1} of {self.repeat}: {len(jobs)} requests, {self.concurrency} clients")
            results.append(await self._repetition(client, jobs))
        return results

    async def _words_per_token(self, client: Client) -> float:
        """Warm up with one request, and learn from it how many tokens words make."""
        job = make_jobs(1, CALIBRATION_WORDS, 2, 0, "warm-up")[0]
        short = make_jobs(1, 1, 2, 0, "warm-up")[0]
        kept: list[Any] = []
        for one in (job, short):
            await send(client, one, self.flags.endpoint == "chat", self.fields, kept)
        long_result, short_result = (outcome(one, reply) for one, reply in kept)
        for result in (long_result, short_result):
            if result.error and not result.prompt_tokens:  # an answer without text teaches too
                raise HttpFailure(result.error)
        tokens = long_result.prompt_tokens - short_result.prompt_tokens
        return (CALIBRATION_WORDS - 1) / tokens if tokens > 0 else 1.0

    async def _repetition(self, client: Client, jobs: list[Job]) -> dict[str, Any]:
        waiting, kept = iter(jobs), list[Any]()

        async def work() -> None:
            for job in waiting:
                await send(client, job, self.flags.endpoint == "chat", self.fields, kept)

        start = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(self.concurrency)])
        seconds = time.perf_counter() - start
        return summarize([outcome(job, reply) for job, reply in kept], seconds)


async def _first_model(client: Client) -> str:
    reply = await client.request("/v1/models")
    try:
        return str(json.loads(reply.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        told = reply.body[:200].decode(errors="replace")
        raise HttpFailure(f"/v1/models answered {reply.status}: {told}") from None


def summarize(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of one repetition; times in milliseconds, None where nothing was measured."""
    good = [o for o in outcomes if not o.error]
    ttft = [o.ttft * 1e3 for o in good]
    gaps = [gap * 1e3 for o in good for gap in o.gaps]
    output = sum(o.output_tokens for o in good)
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "first_error": next((o.error for o in outcomes if o.error), None),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(o.prompt_tokens for o in good),
        "output_tokens": output,
        "short_answers": sum(o.short for o in good),
        "output_tok_s": round(output / seconds, 2),
        "requests_s": round(len(good) / seconds, 3),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p99_ms": percentile(gaps, 0.99),
    }


def percentile(values: list[float], share: float) -> float | None:
    """With linear interpolation; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (ordered[high] - ordered[low]) * (place - low), 3)


def _count(flag: str, text: str) -> int:
    return int(number(flag, text, 1, 10**6, whole=True))


def _tell(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _table(repetitions: list[dict[str, Any]]) -> list[str]:
    """One line for each figure, one column for each repetition."""
    lines = []
    for name in repetitions[0]:
        values = [r[name] for r in repetitions]
        if name == "first_error" and not any(values):
            continue
        lines.append(f"{name:14}" + "".join(f"  {'-' if v is None else v!s:>10}" for v in values))
    return lines
