"""The load of `bench serve`: requests made of seeded words or from a file, and one's outcome."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from quire.cli.http_stream import Client, HttpFailure, events
from quire.errors import UsageError

# Common English words of few tokens, so that a prompt's length can be foretold.
_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law car
city name president team minute idea body information back parent face others level office door
health person art war history party result change morning reason research girl guy moment air
teacher force education green large small early young important few public bad same able long
great little own other old high different next
"""
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Job:
    """One request to send."""

    text: str
    max_tokens: int


def make_jobs(count: int, words: int, output: int, shared_words: int, seed: int | str) -> list[Job]:
    """Requests of `words` words, the first `shared_words` of them the same in all."""
    numbers = random.Random(f"{seed}")
    shared = numbers.choices(WORDS, k=min(shared_words, words))
    jobs = []
    for _ in range(count):
        own = numbers.choices(WORDS, k=words - len(shared))
        jobs.append(Job(" ".join(shared + own), output))
    return jobs


def read_jobs(spec: str, count: int) -> list[Job]:
    """Requests from FILE or FILE:NAME: a JSON list of {"text", "max_tokens"}, or named lists.

    The list is repeated until there are `count`. Raises UsageError.
    """
    path, name = spec, ""
    if not Path(path).exists():
        path, _, name = spec.rpartition(":")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError("workload", f"cannot read the workload {spec}", why=str(error)) from None
    if isinstance(data, dict):
        if name not in data:
            fix = f"name one of its lists: {path}:NAME with {', '.join(map(str, data))}"
            raise UsageError("workload", f"{path} has no list {name!r}", fix=fix)
        data = data[name]
    if not isinstance(data, list) or not data:
        raise UsageError("workload", f"the workload {spec} is not a list of requests")
    jobs = [_job(item, f"{spec}[{i}]") for i, item in enumerate(data)]
    return [jobs[i % len(jobs)] for i in range(count)]


def _job(item: Any, where: str) -> Job:
    match item:
        case {"text": str(text), "max_tokens": int(most)} if most > 0 and text:
            return Job(text, most)
    raise UsageError("workload", f'{where} must be an object with "text" and "max_tokens"')


@dataclass
class Outcome:
    """What one request gave: seconds from sending, or why it failed."""

    error: str = ""
    ttft: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    short: bool = False


async def send(
    client: Client, job: Job, chat: bool, fields: dict[str, Any], keep: list[Any]
) -> None:
    """Send one request; its raw reply goes to `keep`, to be read when the clock has stopped."""
    body: dict[str, Any] = {
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if chat:
        body["messages"] = [{"role": "user", "content": job.text}]
    else:
        body["prompt"] = job.text
    try:
        keep.append((job, await client.request(path, body | fields)))
    except HttpFailure as error:
        keep.append((job, error))


def outcome(job: Job, reply: Any) -> Outcome:
    """Read a kept reply."""
    if isinstance(reply, HttpFailure):
        return Outcome(error=str(reply))
    if reply.status != 200:
        return Outcome(error=f"HTTP {reply.status}: {reply.body[:300].decode(errors='replace')}")
    try:
        stream = events(reply)
    except HttpFailure as error:
        return Outcome(error=str(error))
    result, times = Outcome(), []
    for when, event in stream:
        if "error" in event:
            return Outcome(error=json.dumps(event["error"])[:300])
        usage = event.get("usage") or {}
        result.prompt_tokens = usage.get("prompt_tokens", result.prompt_tokens)
        result.output_tokens = usage.get("completion_tokens", result.output_tokens)
        for choice in event.get("choices") or []:
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                times.append(when - reply.sent)
    if not times:
        return Outcome(error="the answer has no text", prompt_tokens=result.prompt_tokens)
    result.output_tokens = result.output_tokens or len(times)
    result.ttft, result.total = times[0], times[-1]
    result.gaps = [later - before for before, later in pairwise(times)]
    result.short = result.output_tokens < job.max_tokens
    return result
