"""An engine in this process, and the one loop that streams answers from it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from quire.config.options import Options
from quire.errors import UsageError

if TYPE_CHECKING:
    from quire.dialects.renderer import ChatRenderer
    from quire.engine.api import EngineInfo, GenerateRequest
    from quire.engine.startup import Engine
    from quire.outputs import RequestDelta
    from quire.params import SamplingParams
    from quire.tokenization.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
Message = dict[str, str]


class LocalEngine:
    """An engine, and its model's tokenizer (None with skip_tokenizer_init)."""

    def __init__(self, options: Options, progress: Progress):
        """Load everything, telling `progress`. Raises QuireError."""
        progress("loading libraries", 0.0)
        from quire.engine.startup import start_engine

        self.engine: Engine = start_engine(options, progress)
        self.tokenizer: Tokenizer | None = None
        self._renderer: ChatRenderer | None = None
        self._requests = 0
        if not options.model.skip_tokenizer_init:
            from quire.dialects.renderer import architectures_of, chat_renderer
            from quire.tokenization.tokenizer import Tokenizer

            progress("loading the tokenizer", 0.0)
            self.tokenizer = Tokenizer.from_files(self.engine.files)
            self._renderer = chat_renderer(
                architectures_of(self.engine.files.config()),
                self.tokenizer.chat_templates,
                self.tokenizer.special_tokens,
            )

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template, or an encoder instead."""
        return self._renderer is not None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for the next answer: through the chat template, else the texts in a row.

        Without a tokenizer the last message is token ids in digits. Raises UsageError.
        """
        if self.tokenizer is None:
            return _ids(messages[-1]["content"])
        if self._renderer is None:
            return self.tokenizer.encode("\n".join(m["content"] for m in messages))
        from quire.tokenization.messages import normalize_messages

        plain = normalize_messages(messages, self._renderer.template)
        text = self._renderer.render_inline(plain, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def request(self, prompt: list[int], params: SamplingParams) -> GenerateRequest:
        """A request with an id of its own."""
        from quire.engine.api import GenerateRequest

        self._requests += 1
        return GenerateRequest(f"local-{self._requests}", prompt, params)

    def stream(
        self, requests: Sequence[GenerateRequest], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[RequestDelta]:
        """Deltas of all requests until they end. See quire/engine/inline.py."""
        from quire.engine.inline import stream

        return stream(self.engine.core, self.tokenizer, requests, stopped)

    def answer(
        self,
        prompt: list[int],
        params: SamplingParams,
        show: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Stream one answer into `show`; returns what it was and how fast. See `stream`."""
        answer = Answer(started=time.monotonic(), prompt_tokens=len(prompt))
        for news in self.stream([self.request(prompt, params)], stopped):
            answer.take(news)
            for choice in news.choices:
                if self.tokenizer is None:
                    show("".join(f"{token} " for token in choice.token_ids))
                else:
                    show(choice.text)
        return answer


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(
            "no_tokenizer",
            "a text prompt needs a tokenizer",
            why="--skip-tokenizer-init loads none",
            fix='give token ids, like "1 2 3"',
            field="prompt",
        ) from None


@dataclass
class Answer:
    """One answer and its times, in seconds of the monotonic clock."""

    started: float
    prompt_tokens: int
    cached_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None
    first: float = 0.0
    last: float = 0.0

    def take(self, news: RequestDelta) -> None:
        """Add what is new."""
        self.cached_tokens = news.num_cached_tokens
        for choice in news.choices:
            if choice.token_ids:
                self.last = time.monotonic()
                self.first = self.first or self.last
            self.text += choice.text
            self.token_ids += choice.token_ids
            self.finish_reason = choice.finish_reason or ""
            self.stop_reason = choice.stop_reason

    @property
    def ttft(self) -> float:
        """Seconds to the first token; 0 if none came."""
        return max(0.0, self.first - self.started)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first; 0 with fewer than two."""
        took = self.last - self.first
        return (len(self.token_ids) - 1) / took if took > 0 else 0.0

    def usage(self) -> dict[str, int]:
        """Token counts, by the API's names."""
        done = len(self.token_ids)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": done,
            "total_tokens": self.prompt_tokens + done,
            "cached_tokens": self.cached_tokens,
        }

    def timings(self) -> dict[str, float]:
        """Seconds and rates, for --json."""
        return {
            "ttft_s": round(self.ttft, 4),
            "decode_tokens_per_s": round(self.decode_rate, 2),
            "total_s": round(max(self.last - self.started, 0.0), 4),
        }

    def statistics(self) -> str:
        """One line for people."""
        parts = [
            f"{len(self.token_ids)} tokens",
            f"{self.decode_rate:.1f} tok/s",
            f"TTFT {self.ttft:.2f} s",
            f"prompt {self.prompt_tokens} ({self.cached_tokens} cached)",
            f"finish {self.finish_reason}",
        ]
        return ", ".join(parts)


class Interrupts:
    """While entered, the first Ctrl-C only sets `hit`; the second raises KeyboardInterrupt.

    So an answer ends between two steps, and the engine stays usable.
    """

    def __init__(self) -> None:
        self.hit = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True
