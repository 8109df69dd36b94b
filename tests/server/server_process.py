"""A server process over a fake engine, for tests of signals and memory.

Flags: --delay S (per token), --load S (seconds of loading), --die S (the engine ends S seconds
after it is ready), --port P, --max-body-bytes N, --drain-timeout S, --tokenizer MODEL (a real
one). Prints one JSON line when ready and one at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import replace

from fake_engine import FakeEngine, FakeRenderer, FakeTokenizer

from quire.config.options import Options, ServerOptions
from quire.errors import QuireError
from quire.server.serve import Progress, run
from quire.server.state import Service, TextTokenizer
from quire.tokenization.tokenizer import Tokenizer
from quire.weights.hub import resolve


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("--delay", "--load", "--die"):
        parser.add_argument(flag, type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-body-bytes", type=int, default=8 * 2**20)
    parser.add_argument("--drain-timeout", type=float, default=30.0)
    parser.add_argument("--tokenizer")
    given = parser.parse_args()
    engine = FakeEngine(delay=given.delay)
    tokenizer: TextTokenizer = FakeTokenizer()
    if given.tokenizer:
        tokenizer = Tokenizer.from_files(resolve(given.tokenizer))

    async def factory(progress: Progress) -> Service:
        if given.load:
            progress("loading weights", 0.5)
            print(json.dumps({"loading": True}), flush=True)
            await asyncio.sleep(given.load)
        if given.die:
            asyncio.get_running_loop().call_later(given.die, setattr, engine, "dead", True)
        return Service(engine, tokenizer, FakeRenderer())

    server = ServerOptions(
        port=given.port,
        max_body_bytes=given.max_body_bytes,
        drain_timeout=given.drain_timeout,
    )
    try:
        run(
            replace(Options(), server=server),
            factory,
            lambda url: print(json.dumps({"url": url}), flush=True),
        )
    except QuireError as error:
        print(json.dumps({"error": error.code, "what": str(error)}), flush=True)
        return 1
    end = {"closed": engine.closed, "finished": engine.finished, "aborted": len(engine.aborted)}
    print(json.dumps({**end, "torch": "torch" in sys.modules}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
