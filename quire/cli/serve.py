"""`quire serve`: the HTTP server in this process, the engine in a child process."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import quire
from quire.cli.flags import Invocation, Parser
from quire.cli.plan_table import five_numbers
from quire.cli.report import EXIT_INTERRUPTED
from quire.cli.terminal import Phases

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.config.options import Options
    from quire.dialects.dialect import Dialect
    from quire.dialects.renderer import ChatRenderer
    from quire.engine.api import EngineInfo
    from quire.server.state import Service
    from quire.tokenization.tokenizer import Tokenizer
    from quire.weights.hub import ModelFiles


def add_flags(parser: Parser) -> None:
    """Flags of all options."""
    parser.add_sections("model", "engine", "server")


def run(invocation: Invocation) -> int:
    """Serve until SIGTERM or Ctrl-C. Exit code 130 if that came before it was ready."""
    options = invocation.options(invocation.words[0] if invocation.words else None)
    from quire.cli.main import set_up_logging
    from quire.server.serve import run as run_server

    set_up_logging(options.server.log_level)
    phases = Phases(quiet=invocation.json)
    services: list[Service] = []
    ready: list[str] = []

    async def factory(progress: Callable[[str, float], None]) -> Service:
        def both(phase: str, fraction: float) -> None:
            progress(phase, fraction)
            phases(phase, fraction)

        services.append(await start_service(options, both))
        return services[0]

    def on_ready(url: str) -> None:
        took = phases.finish()
        ready.append(url)
        service = services[0]
        facts = ready_facts(options, service, url)
        if invocation.json:
            print(json.dumps({"event": "ready", "start_s": round(took, 3), **facts}), flush=True)
            return
        if phases.summary():
            print(phases.summary(), file=sys.stderr, flush=True)
        print("\n".join(ready_lines(facts, took)), flush=True)

    try:
        run_server(options, factory, on_ready)
    finally:
        phases.finish()
    return 0 if ready else EXIT_INTERRUPTED


async def start_service(options: Options, progress: Callable[[str, float], None]) -> Service:
    """Launch the engine, and load the tokenizer meanwhile. Raises QuireError."""
    from quire.dialects.dialect import check_choice
    from quire.engine.client import EngineClient
    from quire.server.state import Service

    if options.model.skip_tokenizer_init:
        check_choice(options.server.tool_call_parser, options.server.reasoning_parser, None)
    progress("starting the engine", 0.0)
    files = await asyncio.to_thread(find_files, options)
    launch = asyncio.create_task(EngineClient.launch(engine_options(options, files), progress))
    try:
        chat = None
        if not options.model.skip_tokenizer_init:
            chat = await asyncio.to_thread(load_chat, options, files)
        engine = await launch
    except BaseException:
        launch.cancel()
        await asyncio.gather(launch, return_exceptions=True)
        raise
    if chat is None:
        return Service(engine, None, None)
    tokenizer, renderer, dialect = chat
    engine.tokenizer = tokenizer
    return Service(engine, tokenizer, renderer, dialect, dialect.hidden_by(tokenizer))


def find_files(options: Options) -> ModelFiles:
    """Configuration and tokenizer of the model; the engine gets the weights itself."""
    from quire.weights.hub import resolve

    asked = options.model
    return resolve(asked.model, asked.revision, asked.offline, weights=False)


def load_chat(
    options: Options, files: ModelFiles
) -> tuple[Tokenizer, ChatRenderer | None, Dialect]:
    """The model's tokenizer, what renders its prompts, and how its answers are read; to be called
    on a thread of its own. Raises QuireError."""
    from quire.dialects.dialect import check_choice, resolve_dialect
    from quire.dialects.renderer import architectures_of, chat_renderer
    from quire.tokenization.tokenizer import Tokenizer

    tokenizer, asked = Tokenizer.from_files(files), options.server
    architectures = architectures_of(files.config())
    renderer = chat_renderer(
        architectures,
        tokenizer.chat_templates,
        tokenizer.special_tokens,
        deadline=asked.template_timeout,
    )
    check_choice(asked.tool_call_parser, asked.reasoning_parser, renderer)
    sources = " ".join(tokenizer.chat_templates.values())
    dialect = resolve_dialect(
        asked.tool_call_parser, asked.reasoning_parser, architectures, sources
    )
    return tokenizer, renderer, dialect


def engine_options(options: Options, files: ModelFiles) -> dict[str, Any]:
    """What the engine process needs, by flat name; keys stay here. A hub model is pinned to the
    commit whose tokenizer this process has."""
    flat = asdict(options.model) | asdict(options.engine)
    flat["served_model_name"] = options.server.served_model_name
    flat["log_level"] = options.server.log_level
    if files.commit is not None:
        flat["revision"] = files.commit
    return flat


def ready_facts(options: Options, service: Service, url: str) -> dict[str, Any]:
    """What the ready block says."""
    from quire.server.auth import load_keys
    from quire.settings import settings

    info: EngineInfo = service.engine.info
    plan = info.plan
    needs_key = bool(load_keys(options.server, settings().api_key))
    return {
        "url": url,
        "model": info.model,
        "device": f"{plan['device']}: {plan['device_name']}, {plan['threads']} threads, "
        f"{plan['kernels']} kernels ({plan['isa']})",
        "api_key": needs_key,
        "plan": five_numbers(plan),
        "chat": chat_facts(service),
        "curl": curl_line(url, info, service, needs_key),
    }


def chat_facts(service: Service) -> dict[str, dict[str, str]]:
    """Which parsers read answers, and why these; empty where the model has no chat."""
    if service.renderer is None:
        return {}
    dialect = service.dialect
    return {
        "tool_calls": {"parser": dialect.tools, "reason": dialect.tools_reason},
        "reasoning": {"parser": dialect.reasoning, "reason": dialect.reasoning_reason},
    }


def curl_line(url: str, info: EngineInfo, service: Service, needs_key: bool) -> str:
    """A request that works when pasted into a shell (that has QUIRE_API_KEY, with keys on)."""
    body: dict[str, Any] = {"model": info.model}
    path = "completions"
    if service.renderer is not None:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        body["prompt"] = "The capital of France is" if service.tokenizer is not None else [1, 2, 3]
    body["max_tokens"] = 64
    key = '-H "Authorization: Bearer $QUIRE_API_KEY" ' if needs_key else ""
    target = shlex.quote(f"{url}/v1/{path}")
    kind = "-H 'Content-Type: application/json'"
    return f"curl {target} {kind} {key}-d {shlex.quote(json.dumps(body))}"


def ready_lines(facts: dict[str, Any], took: float) -> list[str]:
    """The ready block, for people."""
    keys = "needed (clients send Authorization: Bearer KEY)" if facts["api_key"] else "not set"
    numbers = ", ".join(f"{name} {value}" for name, value in facts["plan"].items())
    chat = [
        f"  {name:<7} {found['parser']}: {found['reason']}"
        for name, found in zip(("tools", "think"), facts["chat"].values(), strict=False)
    ]
    return [
        f"Quire {quire.__version__} is ready in {took:.1f} s",
        f"  url     {facts['url']}",
        f"  model   {facts['model']}",
        f"  device  {facts['device']}",
        f"  api key {keys}",
        f"  plan    {numbers}",
        *chat,
        "",
        facts["curl"],
    ]
