"""What all routes share: options, keys, metrics, and the engine once it is ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from quire.config.options import Options
from quire.dialects.dialect import Dialect
from quire.dialects.renderer import ChatRenderer
from quire.engine.api import AsyncEngine
from quire.errors import UsageError
from quire.server.auth import KeyRing
from quire.server.body import new_budget
from quire.server.errors import HttpError, not_ready
from quire.server.metrics import Metrics
from quire.server.offload import WorkPool

WORK_THREADS = 2


class TextTokenizer(Protocol):
    """What the server needs of quire.tokenization.tokenizer.Tokenizer. Thread-safe."""

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int], /, skip_special_tokens: bool = True) -> str: ...


class Service(NamedTuple):
    """A ready engine, the tokenizer and renderer of its model (None where it has none), and how
    its answers are read. `shows_markup`: the dialect's markers are special tokens, so that these
    must not be skipped."""

    engine: AsyncEngine
    tokenizer: TextTokenizer | None
    renderer: ChatRenderer | None
    dialect: Dialect = Dialect()
    shows_markup: bool = False


PREPARED = 256  # requests that may be prepared beside the queue, where --max-num-seqs is not given


class ServerState:
    """Shared by all routes. Only `serve` changes `service`, `phase` and `draining`."""

    def __init__(self, options: Options, keys: KeyRing, service: Service | None = None):
        self.options = options
        self.keys = keys
        self.service = service
        self.phase = "starting"
        self.draining = False
        self.metrics = Metrics()
        self.bodies = new_budget(options.server)
        # Preparing requests may queue as far as the engine's own queue would.
        waiting = options.engine.max_queue + (options.engine.max_num_seqs or PREPARED)
        self.tokenizing = WorkPool("tokenizer", WORK_THREADS, waiting)
        self.rendering = WorkPool("chat template", WORK_THREADS, waiting)
        self.encoding = WorkPool("encoder of answers", WORK_THREADS, waiting)

    def ready_service(self) -> Service:
        """The service. Raises HttpError 503 while it loads."""
        if self.service is None:
            raise not_ready("loading", f"the model is not ready: {self.phase}")
        return self.service

    def accepting_service(self) -> Service:
        """The service, for new work. Raises HttpError 503 while it loads or drains."""
        service = self.ready_service()
        if self.draining:
            wait = self.options.server.drain_timeout
            raise not_ready("draining", "the server is shutting down", wait)
        return service

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises UsageError where the model was loaded without one."""
        tokenizer = self.ready_service().tokenizer
        if tokenizer is None:
            raise UsageError(
                "no_tokenizer",
                "this server has no tokenizer",
                why="it was started with --skip-tokenizer-init",
                fix="send prompts as token ids",
            )
        return tokenizer

    def model_name(self) -> str:
        """The model id that clients use."""
        return self.options.server.served_model_name or self.ready_service().engine.info.model

    def check_model(self, name: str | None) -> None:
        """Raise HttpError 404 where a request names another model. None is the served one."""
        if name is not None and name != self.model_name():
            raise HttpError(
                404,
                "model_not_found",
                f"the model {name[:200]!r} does not exist",
                fix=f"this server has {self.model_name()!r}",
                field="model",
            )

    async def encode(self, large: bool, write: Callable[[], bytes]) -> bytes:
        """What `write` makes of an answer: off the event loop where it may be large."""
        return await self.encoding.run(write) if large else write()

    def close(self) -> None:
        """End the worker threads."""
        self.tokenizing.close()
        self.rendering.close()
        self.encoding.close()
