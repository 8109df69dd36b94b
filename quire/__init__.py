"""Quire: an LLM inference and serving engine.

from quire import LLM, SamplingParams
print(LLM("smollm2").generate("Hello", SamplingParams(max_tokens=20))[0].outputs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.outputs import CompletionOutput, RequestOutput
    from quire.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "quire.llm",
    "SamplingParams": "quire.params",
    "RequestOutput": "quire.outputs",
    "CompletionOutput": "quire.outputs",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import quire` stays fast."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
