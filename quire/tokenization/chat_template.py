"""Rendering of chat templates, in a process that can be killed.

A template is a program that comes with a model, and its input comes from clients: it runs in a
sandbox, in a process of its own, with a deadline and limits on memory and output.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import quire
from quire.errors import UsageError

WORKER_MODULE = "quire.tokenization.template_worker"
DEADLINE_SECONDS = 2.0
START_SECONDS = 30.0
MAX_CHARACTERS = 16 << 20
MEMORY_BYTES = 1 << 30


class TemplateRenderer:
    """Renders a model's template; safe to call from several threads, which take turns.

    `special_tokens` are visible to the template by their names (bos_token and so on).
    `tool_template` renders calls that have tools, where a model has one of its own for them. The
    worker process starts with the first `render` and lives until `close` or the end of this
    process; one that missed its deadline is killed, and the next call starts another.
    """

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str] | None = None,
        deadline: float = DEADLINE_SECONDS,
        max_characters: int = MAX_CHARACTERS,
        memory_bytes: int = MEMORY_BYTES,
        tool_template: str | None = None,
    ):
        self.template = template
        self._tool_template = tool_template
        self._special_tokens = dict(special_tokens or {})
        self._deadline = deadline
        self._max_characters = max_characters
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str | None = None,
        /,
        **kwargs: Any,
    ) -> str:
        """The prompt, rendered in the worker process within the deadline.

        `template`: another one than the renderer's own. `kwargs` are the template's other
        variables: tools, add_generation_prompt and the like; no name of theirs can replace
        messages or template. UsageError template_error if the template refuses or fails,
        template_timeout, template_too_long; chat_arguments_invalid if an argument cannot be sent
        as JSON.
        """
        request = {
            "template": self._choose(template, kwargs),
            "context": self._context(messages, kwargs),
            "max_characters": self._max_characters,
            "seconds": self._deadline,
        }
        try:
            line = json.dumps(request).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                code="chat_arguments_invalid",
                what="messages or template arguments cannot be written as JSON",
                why=str(error),
            ) from error
        return _text_of(self._ask(line))

    def render_inline(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str | None = None,
        /,
        **kwargs: Any,
    ) -> str:
        """The prompt, rendered in this process: the sandbox, but no deadline and no memory limit.

        For templates and messages of the user's own. UsageError as `render`.
        """
        from quire.tokenization.template_environment import describe, render

        template = self._choose(template, kwargs)
        try:
            return render(template, self._context(messages, kwargs), self._max_characters)
        except Exception as error:
            raise _failure(describe(error)) from error

    def knows(self, name: str) -> bool:
        """Whether the template has a variable of this name."""
        sources = self.template + " " + (self._tool_template or "")
        return re.search(rf"\b{re.escape(name)}\b", sources) is not None

    def close(self) -> None:
        """Ends the worker process; a later `render` starts another."""
        with self._lock:
            self._drop_worker()

    def _choose(self, template: str | None, kwargs: Mapping[str, Any]) -> str:
        if template is not None:
            return template
        if self._tool_template is not None and kwargs.get("tools"):
            return self._tool_template
        return self.template

    def _context(
        self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        # Templates test these two without asking whether they are there.
        defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
        return {**defaults, **self._special_tokens, **kwargs, "messages": list(messages)}

    def _ask(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            if self._worker is not None and not self._worker.alive():
                self._drop_worker()
            if self._worker is None:
                self._worker = _Worker(self._memory_bytes)
            try:
                return self._worker.ask(line, self._deadline)
            except TimeoutError:
                self._drop_worker()
                raise UsageError(
                    code="template_timeout",
                    what=f"the chat template did not finish within {self._deadline:g} seconds",
                    fix="send fewer or shorter messages, or use another template",
                ) from None
            except (OSError, EOFError, ValueError) as error:
                self._drop_worker()
                raise _failure(
                    {
                        "kind": "failed",
                        "message": f"its process ended; it may have used too much memory or "
                        f"processor time ({type(error).__name__}: {error})",
                    }
                ) from error

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class _Worker:
    """The child process and the two pipes to it. Not thread-safe: the renderer's lock guards it."""

    def __init__(self, memory_bytes: int):
        # From the directory that holds the package, so that -m finds this copy of it.
        root = Path(quire.__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER_MODULE, str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._started = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes, deadline: float) -> dict[str, Any]:
        """One request, one answer. TimeoutError at the deadline, EOFError if the child ended."""
        if not self._started:
            # Starting an interpreter is not the template's time.
            warm_up = {"template": "", "context": {}, "max_characters": 0, "seconds": deadline}
            self._exchange(json.dumps(warm_up).encode() + b"\n", START_SECONDS)
            self._started = True
        answer = json.loads(self._exchange(line, deadline))
        if not isinstance(answer, dict):
            raise ValueError("an answer that is not an object")
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        end = time.monotonic() + seconds
        unsent, answer = memoryview(line), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready and time.monotonic() >= end:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._output:
                        piece = os.read(self._output, 1 << 16)
                        if not piece:
                            raise EOFError("no answer")
                        answer += piece
                    else:
                        unsent = unsent[os.write(self._input, unsent[: 1 << 16]) :]
                        if not unsent:
                            selector.unregister(self._input)
        return bytes(answer)


def _text_of(answer: Mapping[str, Any]) -> str:
    text = answer.get("text")
    if isinstance(text, str):
        return text
    raise _failure(answer.get("error") or {"kind": "failed", "message": "an unknown answer"})


def _failure(error: Mapping[str, str]) -> UsageError:
    message = error["message"]
    if error["kind"] == "raised":
        return UsageError(code="template_error", what=message, why="the model's template says so")
    if error["kind"] == "too_long":
        return UsageError(
            code="template_too_long", what=f"the chat template wrote {message}", field="messages"
        )
    return UsageError(
        code="template_error",
        what="the chat template failed on these messages",
        why=message,
        fix="check roles and content of the messages, or give another template",
    )
