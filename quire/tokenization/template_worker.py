"""The process in which chat templates of model repositories run.

`python -m quire.tokenization.template_worker MEMORY_BYTES` reads one JSON object per line,
{"template", "context", "max_characters", "seconds"}, and answers each with {"text"} or {"error"}.
It ends when its input ends, or by the kernel's hand when a template takes more processor time or
memory than it may; the parent kills it at the deadline.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
from typing import Any

from quire.tokenization.template_environment import describe, render


def main() -> None:
    # Signals to the process group are for the parent; the end of its pipe is for us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        answers.write(json.dumps(answer(line)).encode("ascii") + b"\n")
        answers.flush()


def answer(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        _limit_processor_time(request["seconds"])
        return {"text": render(request["template"], request["context"], request["max_characters"])}
    except Exception as error:  # a template can raise anything; the parent puts it in words
        return {"error": describe(error)}


def _limit_processor_time(seconds: float) -> None:
    """This request may use `seconds` more, rounded up, on top of what the process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))


if __name__ == "__main__":
    main()
