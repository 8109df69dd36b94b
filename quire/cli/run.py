"""`quire run`: answer one prompt on stdout, or chat."""

from __future__ import annotations

import json
import sys
from typing import Any

from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.report import EXIT_INTERRUPTED
from quire.cli.sampling import add_sampling_flags, changed_fields, given_fields, make_params
from quire.cli.terminal import Phases, dim, printable


def add_flags(parser: Parser) -> None:
    """Flags of the answer, the model and the engine."""
    add_sampling_flags(parser)
    parser.add_sections("model", "engine")


def run(invocation: Invocation) -> int:
    """Load the model, then answer or chat."""
    from quire.cli.local import LocalEngine
    from quire.cli.main import set_up_logging

    words = invocation.words
    options = invocation.options(words[0] if words else None)
    fields = given_fields(invocation.flags)
    make_params({}, fields)  # a wrong value is told before the model loads
    prompt = _prompt(words[1:])
    if prompt is None and invocation.json:
        raise CommandLineError(
            "usage", "--json needs a PROMPT", fix='quire run MODEL "..." --json, or - for stdin'
        )
    set_up_logging(options.server.log_level)
    phases = Phases(quiet=invocation.json)
    engine = LocalEngine(options, phases)
    took = phases.finish()
    if not invocation.json:
        plan = engine.info.plan
        told = f"{engine.info.model} on {plan['device']} ({plan['kernels']} {plan['isa']})"
        _note(f"{told}, ready in {took:.1f} s: {phases.summary()}")
        if engine.tokenizer is not None and not engine.chats:
            _note("the model has no chat template: it continues the text as it is")
    if prompt is None:
        from quire.cli.chat import Chat

        return Chat(engine, fields, invocation.flags.system).run()
    params = make_params(engine.info.default_params, fields)
    messages = [{"role": "user", "content": prompt}]
    if invocation.flags.system is not None:
        messages.insert(0, {"role": "system", "content": invocation.flags.system})
    return _answer(engine, messages, params, took if invocation.json else None)


def _prompt(words: list[str]) -> str | None:
    """The prompt, from the command line or stdin; None asks for a chat."""
    if words and words[0] != "-":
        return words[0]
    if words or not sys.stdin.isatty():
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise CommandLineError("bad_stdin", "stdin is not text", why=str(error)) from None
        if not text.strip():
            raise CommandLineError(
                "empty_prompt", "there is no prompt on stdin", fix='quire run MODEL "..."'
            )
        return text.rstrip("\n")
    return None


def _answer(engine: Any, messages: list[dict[str, str]], params: Any, start: float | None) -> int:
    """Print the answer, as text or (with the start-up's seconds) as one JSON object."""
    from quire.cli.local import Interrupts

    def show(text: str) -> None:
        if start is None:
            sys.stdout.write(printable(text, sys.stdout))
            sys.stdout.flush()

    with Interrupts() as interrupts:
        prompt = engine.encode(messages)
        answer = engine.answer(prompt, params, show, lambda: interrupts.hit)
    if start is None:
        print(flush=True)
        _note(answer.statistics())
    else:
        result = {
            "model": engine.info.model,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "usage": answer.usage(),
            "timings": {"start_s": round(start, 4), **answer.timings()},
            "params": changed_fields(params),
            "system_fingerprint": engine.info.fingerprint,
        }
        print(json.dumps(result))
    return EXIT_INTERRUPTED if interrupts.hit else 0


def _note(text: str) -> None:
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)
