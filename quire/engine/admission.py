"""What a request must satisfy before it is queued, as frontends check it and the engine again."""

from __future__ import annotations

from collections.abc import Sequence

from quire.errors import UsageError
from quire.params import SamplingParams, check_tokens


def check_request(
    prompt: Sequence[int], params: SamplingParams, max_model_len: int, vocab_size: int
) -> None:
    """Raise UsageError for a prompt or parameters that this model can never run."""
    length = len(prompt)
    if length == 0:
        raise UsageError("empty_prompt", "the prompt has no tokens", field="prompt")
    if length >= max_model_len:
        raise UsageError(
            "context_length_exceeded",
            f"the prompt has {length} tokens; with at least one token of output it does not "
            f"fit the context of {max_model_len}",
            fix="shorten the prompt, or start with a larger --max-model-len",
            field="prompt",
        )
    check_tokens("prompt", prompt, vocab_size)
    params.check_vocabulary(vocab_size)


def check_timeout(timeout: float | None) -> None:
    """Raise UsageError for a timeout that is negative or not a number."""
    if timeout is not None and not timeout >= 0:
        raise UsageError(
            "invalid_value",
            f"timeout: {timeout} is not allowed",
            why="timeout must be a number of seconds of at least 0",
            field="timeout",
        )
