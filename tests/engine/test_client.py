"""A real engine process over its socket: answers, aborts, crashes, and both sides' deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from quire import LLM, SamplingParams
from quire.engine.api import GenerateRequest
from quire.engine.client import EngineClient, _pieces
from quire.engine.collect import Collector
from quire.engine.wire import Abort, Delta
from quire.errors import EngineDead, ModelError, Overloaded, QuireError, UsageError
from quire.outputs import RequestDelta
from quire.step import TokenLogprobs

WAIT = 60.0


def options(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "async_scheduling": True,
    }


def with_client(model: str, body: Callable[[EngineClient], Awaitable[None]], **more: Any) -> None:
    """Run `body` with an engine process, bounded in time; no process is left behind."""

    async def main() -> None:
        client = await EngineClient.launch(options(model) | more)
        try:
            await asyncio.wait_for(body(client), WAIT)
        finally:
            await client.close()
        assert client._process.poll() is not None

    asyncio.run(main())


def request(name: str, prompt: list[int], **params: Any) -> GenerateRequest:
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    return GenerateRequest(name, prompt, SamplingParams(**params))


async def collect(client: EngineClient, asked: GenerateRequest) -> list[RequestDelta]:
    return [delta async for delta in client.generate(asked)]


def token_ids(deltas: list[RequestDelta], choice: int = 0) -> list[int]:
    return [t for d in deltas for c in d.choices if c.index == choice for t in c.token_ids]


async def becomes_idle(client: EngineClient) -> None:
    """No request runs and no block is held, within a few heartbeats."""
    for _ in range(200):
        stats = await client.stats()
        if stats.running == stats.waiting == stats.kv_blocks_used == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine did not become idle: {await client.stats()}")


def test_many_requests_get_what_the_python_api_gives(tiny_llama: str) -> None:
    prompts = [[3 + i] * (4 + 3 * i) for i in range(9)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)
    llm = LLM(tiny_llama, load_format="dummy", skip_tokenizer_init=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    expected = [o.outputs[0].token_ids for o in outputs]

    async def body(client: EngineClient) -> None:
        asked = [request(f"r{i}", p, max_tokens=12) for i, p in enumerate(prompts)]
        found = await asyncio.gather(*(collect(client, r) for r in asked))
        assert [token_ids(deltas) for deltas in found] == expected
        assert all(d[-1].finished and d[-1].num_output_tokens == 12 for d in found)
        several = await collect(client, request("n", prompts[5], max_tokens=12, n=3))
        assert [token_ids(several, i) for i in range(3)] == [expected[5]] * 3
        await becomes_idle(client)

    with_client(tiny_llama, body)


def test_a_second_process_begins_with_the_blocks_of_the_first_until_they_are_cleared(
    tiny_llama: str, tmp_path: Path
) -> None:
    long, found = request("a", [7] * 200, max_tokens=4), list[list[int]]()

    async def first(client: EngineClient) -> None:
        (*_, last) = deltas = await collect(client, long)
        assert last.num_cached_tokens == 0
        found.append(token_ids(deltas))
        for _ in range(200):  # stores come behind the steps
            if len(list((tmp_path / "kv" / "blocks").iterdir())) >= 12:
                break
            await asyncio.sleep(0.05)

    async def second(client: EngineClient) -> None:
        # Its index is rebuilt on a thread: a request that came earlier would not wait for long.
        for _ in range(200):
            tiers = (await client.stats()).tiers
            if len(tiers) > 1 and tiers[1].used_bytes:
                break
            await asyncio.sleep(0.05)
        (*_, last) = deltas = await collect(client, long)
        assert last.cached_tokens_by_tier == {"fs": 192}
        assert token_ids(deltas) == found[0]
        await client.clear_cache()
        for _ in range(200):  # files go behind the engine's back
            if not list((tmp_path / "kv" / "blocks").iterdir()):
                break
            await asyncio.sleep(0.02)
        (*_, last) = await collect(client, long)
        assert last.num_cached_tokens == 0

    for body in (first, second):
        with_client(tiny_llama, body, kv_tiers=f"dram:4MiB,fs:{tmp_path}/kv:1GiB")


def test_a_consumer_that_leaves_frees_everything(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        # In the middle of the stream.
        stream = client.generate(request("middle", [5] * 20, max_tokens=400))
        await anext(stream)
        await stream.aclose()
        # Before the first token, by cancellation; some of them still queued.
        tasks = [
            asyncio.create_task(collect(client, request(f"r{i}", [5] * 90, max_tokens=400)))
            for i in range(12)
        ]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await becomes_idle(client)
        assert len(token_ids(await collect(client, request("next", [5], max_tokens=3)))) == 3

    with_client(tiny_llama, body)


def test_a_slow_consumer_gets_merged_deltas(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        deltas = []
        async for delta in client.generate(request("slow", [5] * 4, max_tokens=200)):
            deltas.append(delta)
            await asyncio.sleep(0.3)
        assert len(token_ids(deltas)) == 200
        assert len(deltas) < 50

    with_client(tiny_llama, body)


def test_a_deadline_ends_a_request(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        asked = request("late", [5] * 4, max_tokens=500)
        asked = GenerateRequest(
            asked.request_id, asked.prompt_token_ids, asked.params, timeout=0.05
        )
        deltas = await collect(client, asked)
        assert deltas[-1].choices[0].finish_reason == "abort"
        await becomes_idle(client)

    with_client(tiny_llama, body)


def test_impossible_requests_are_refused_before_the_engine(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        for prompt in ([], [5] * 512, [320], [-1]):
            with pytest.raises(UsageError):
                client.check([request("bad", prompt)])
        with pytest.raises(UsageError, match="vocabulary"):
            client.check([request("bad", [5], stop_token_ids=[5000])])

    with_client(tiny_llama, body)


def test_prompts_that_do_not_fit_the_queue_together_are_refused_together(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        room = 4 + client.info.max_queue  # --max-num-seqs and the queue
        several = [request(f"r{i}", [5], n=2) for i in range(room // 2)]
        client.check(several)
        with pytest.raises(Overloaded, match=f"{client.info.max_queue + 1} would be waiting"):
            client.check([*several, request("one", [5])])

    with_client(tiny_llama, body)


@pytest.mark.parametrize("count", [0, 1, 32, 33, 64, 100])
def test_a_long_prompts_logprobs_are_taken_in_pieces(count: int) -> None:
    found = [TokenLogprobs([i], [-1.0], [1]) for i in range(count)]
    delta = Delta("r", [5], [found[0]] if found else None, found or None, "length", None, 3)
    *pieces, last = _pieces(delta)
    assert all(
        p == Delta("r", [], prompt_logprobs=p.prompt_logprobs, cached_tokens=3) for p in pieces
    )
    assert all(len(p.prompt_logprobs or []) == 32 for p in pieces)
    assert len(last.prompt_logprobs or []) <= 32
    assert [x for p in [*pieces, last] for x in p.prompt_logprobs or []] == found
    assert last == msgspec.structs.replace(delta, prompt_logprobs=last.prompt_logprobs)


def test_a_defect_in_taking_an_answer_ends_that_request_alone(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Collector.push

    def broken(self: Collector, delta: Delta) -> list[Abort]:
        if delta.request_id.startswith("bad"):
            raise KeyError("a defect")
        return push(self, delta)

    async def body(client: EngineClient) -> None:
        monkeypatch.setattr(Collector, "push", broken)
        good = asyncio.create_task(collect(client, request("good", [5], max_tokens=30)))
        with pytest.raises(QuireError) as caught:
            await collect(client, request("bad", [5], max_tokens=400, n=2))
        assert caught.value.code == "internal_error"
        assert len(token_ids(await good)) == 30
        await becomes_idle(client)

    with_client(tiny_llama, body)


def test_a_defect_in_reading_ends_every_request_instead_of_leaving_it(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: EngineClient, delta: Delta) -> None:
        raise KeyError("a defect")

    async def body(client: EngineClient) -> None:
        monkeypatch.setattr(EngineClient, "_deliver", broken)
        with pytest.raises(EngineDead, match="reading from the engine failed"):
            await collect(client, request("r", [5], max_tokens=5))

    with_client(tiny_llama, body)


def test_a_killed_engine_is_reported_to_every_consumer(tiny_llama: str) -> None:
    async def body(client: EngineClient) -> None:
        begun = asyncio.Event()

        async def consume(name: str) -> None:
            async for _ in client.generate(request(name, [5] * 9, max_tokens=500)):
                begun.set()

        tasks = [asyncio.create_task(consume(f"r{i}")) for i in range(3)]
        await begun.wait()
        client._process.kill()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDead)
        with pytest.raises(EngineDead):
            await client.stats()
        with pytest.raises(EngineDead):
            client.check([request("next", [5])])

    with_client(tiny_llama, body)


def test_a_failed_start_brings_its_cause(tmp_path: Any) -> None:
    async def main() -> None:
        with pytest.raises(ModelError) as caught:
            await EngineClient.launch({"model": str(tmp_path)})
        assert "config.json" in str(caught.value)

    asyncio.run(asyncio.wait_for(main(), WAIT))


def test_the_engine_does_not_outlive_its_frontend(tiny_llama: str) -> None:
    script = f"""
        import asyncio
        from quire import SamplingParams
        from quire.engine.api import GenerateRequest
        from quire.engine.client import EngineClient
        async def main():
            client = await EngineClient.launch({options(tiny_llama)!r})
            params = SamplingParams(max_tokens=400, ignore_eos=True)
            stream = client.generate(GenerateRequest("r", [5] * 9, params))
            await anext(stream)
            print(client._process.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine lives on without its parent"
        time.sleep(0.05)
