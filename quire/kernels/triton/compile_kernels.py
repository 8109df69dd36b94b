"""Compiling kernels before they are launched, many at a time.

What Triton's cache has is loaded by threads. The rest is compiled into the cache by processes,
since half of Triton's work is Python, for which threads wait for each other, and then loaded.
Whatever the processes do not compile, for whatever reason, this one does.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from quire.kernels.triton.compile_worker import SECONDS, described, tuples
from quire.kernels.triton.launch import INTERPRETED, Wanted, from_compiler
from quire.settings import child_environment

log = logging.getLogger("quire.kernels")

# Fewer kernels take threads less time than a process takes to import torch, or, where it has done
# so, to be told.
FEW = 48
FEW_EARLY = 4
MOST_WORKERS = 16
# Early ones are worth a processor while weights are loaded where there are some, and the cache has
# hardly more than the kernels that load weights.
FEW_THREADS = 4
FEW_CACHED = 32
END_SECONDS = 5
WORKER = (sys.executable, "-P", "-m", "quire.kernels.triton.compile_worker")
# No process can be started: no descriptors, no folder to be in, a program without python beside it.
NO_WORKERS = (OSError, TypeError, ValueError)

# A kernel that the cache lacks: what compiles it here, and what has a process do it.
Missing = dict[object, tuple[Callable[[], object], bytes | None]]
_warming = threading.local()
_hook = threading.Lock()  # Triton has one, for all engines of a process
_launchers = threading.Lock()


@contextmanager
def early_workers(threads: int) -> Iterator[Workers | None]:
    """Processes for compile_kernels, which begin to import here; they have ended behind this. None
    where Triton's cache has kernels of an earlier start, or nothing is compiled."""
    if INTERPRETED or threads < FEW_THREADS or _cached_kernels() >= FEW_CACHED:
        yield None
        return
    try:
        workers = Workers(min(threads, MOST_WORKERS))
    except NO_WORKERS:  # said when the kernels are compiled, if that is no better then
        yield None
    else:
        try:
            yield workers
        finally:
            workers.kill()
            workers.close()


def _cached_kernels() -> int:
    try:
        return len(os.listdir(triton.knobs.cache.dir))
    except OSError:
        return 0


def compile_kernels(wanted: Wanted, threads: int, early: Workers | None = None) -> None:
    """Have all that is `wanted` compiled for the current GPU and loaded, by up to `threads` threads
    or processes at a time, `early` ones if there are. One that cannot be compiled is left for who
    launches it."""
    bind = None  # each thread has a current device of its own
    if torch.cuda.is_available():
        bind = partial(torch.cuda.set_device, torch.cuda.current_device())
        one_launcher_at_a_time(driver.active)
    with ThreadPoolExecutor(threads, initializer=bind) as pool:
        with _hook, _noting_missing() as missing:
            list(pool.map(partial(_load, missing), wanted.values()))
        jobs = [job for _, job in missing.values() if job is not None]
        if len(jobs) >= (FEW if early is None else FEW_EARLY):
            count = min(threads, len(jobs) // 4, MOST_WORKERS)
            compile_in_processes(jobs, partial(Workers, count) if early is None else lambda: early)
        list(pool.map(_compile, [compile_one for compile_one, _ in missing.values()]))


def one_launcher_at_a_time(active: Any) -> None:
    """Have all threads wait for each other where `active`, Triton's driver, loads what launches a
    kernel.

    Triton 3.6 loads those as Python modules, all of one name. Of such modules Python makes one
    object, into which each file that is loaded again is written: whoever looks a moment later
    has the launcher of another thread's kernel, which passes other arguments.
    """
    made = active.launcher_cls
    if getattr(made, "func", None) is not _under_lock:
        active.launcher_cls = partial(_under_lock, made)


def _under_lock(made: Callable[..., object], *of: object) -> object:
    with _launchers:
        return made(*of)


def compile_in_processes(jobs: Iterable[bytes], start: Callable[[], Workers]) -> int:
    """Have processes compile what they can of `jobs` into Triton's cache; how many that were. All
    have ended then."""
    left, failed = deque(jobs), list[str]()
    total = len(left)
    try:
        workers = start()
    except NO_WORKERS as error:
        failed += [str(error)] * total
        left.clear()
    else:
        with workers, ThreadPoolExecutor(len(workers.pipes)) as pool:
            try:
                list(pool.map(partial(_hand_out, left, failed), workers.pipes))
            except BaseException:
                workers.kill()  # so that no thread waits for an answer
                raise
    undone = len(failed) + len(left)
    if undone:
        log.warning("%d of %d kernels compiled without processes: %s", undone, total, failed[0])
    return total - undone


class Workers:
    """Processes of compile_worker, with a pair of `pipes` for each: its jobs, its answers. Raises
    NO_WORKERS where none can be started."""

    def __init__(self, count: int, command: Sequence[str] = WORKER):
        theirs, self.pipes = list[int](), list[tuple[BinaryIO, BinaryIO]]()
        try:
            for _ in range(count):
                their_jobs, jobs = os.pipe()
                theirs.append(their_jobs)
                ours = os.fdopen(jobs, "wb", buffering=0)
                self.pipes.append((ours, ours))  # closed, whatever fails now
                answers, their_answers = os.pipe()
                theirs.append(their_answers)
                self.pipes[-1] = ours, os.fdopen(answers, "rb")
            path = os.pathsep.join(map(os.path.abspath, sys.path))  # the same modules as here
            pairs = zip(theirs[::2], theirs[1::2], strict=True)
            self._process = subprocess.Popen(
                [*command, *(f"{jobs}:{answers}" for jobs, answers in pairs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what is wrong with a kernel is said by its launch
                start_new_session=True,
                env=child_environment(
                    PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
                ),
            )
        except BaseException:
            self.close()
            raise
        finally:
            for end in theirs:
                os.close(end)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        for end in chain(*self.pipes):
            end.close()


def _hand_out(jobs: deque[bytes], failed: list[str], pipes: tuple[BinaryIO, BinaryIO]) -> None:
    """Give a process jobs until there are none, or it is of no use."""
    while True:
        try:
            job = jobs.popleft()
        except IndexError:
            return
        try:
            error = _ask(job, *pipes).get("error")
        except (OSError, EOFError, ValueError) as lost:
            failed.append(f"{type(lost).__name__}: {lost}")
            return
        if error is not None:
            failed.append(str(error))


def _ask(job: bytes, jobs: BinaryIO, answers: BinaryIO) -> dict[str, Any]:
    jobs.write(job + b"\n")
    ready = select.poll()
    ready.register(answers, select.POLLIN)
    if not ready.poll(1000 * SECONDS):
        raise TimeoutError(f"no answer within {SECONDS} s")
    line = answers.readline()
    if not line:
        raise EOFError("a process ended")
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("an answer that is not an object")
    return said


class _NotCachedError(Exception):
    """Compiling would begin."""


class _Cached(ASTSource):  # type: ignore[misc]
    """A source that Triton finds in its cache or not at all."""

    def make_ir(self, *args: Any) -> None:
        raise _NotCachedError


@contextmanager
def _noting_missing() -> Iterator[Missing]:
    """Inside, what _load warms up is only noted where Triton's cache lacks it."""
    missing: Missing = {}

    def skips(**given: Any) -> bool:
        compile_one = getattr(_warming, "now", None)
        if compile_one is None:
            return False  # a launch in another thread
        what, kernel = given["compile"], given["fn"].jit_function
        target = driver.active.get_current_target()
        source = _Cached(kernel, what["signature"], what["constants"], what["configs"][0])
        options = tuples(json.loads(what["specialization_data"])["options"])
        try:
            triton.compile(source, target=target, options=options)
        except _NotCachedError:
            pass
        else:
            return False
        try:
            job = json.dumps(described(source, target, options)).encode()
        except TypeError:
            job = None
        missing[kernel, what["key"]] = compile_one, job
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = skips
    try:
        yield missing
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def _load(missing: Missing, compile_one: Callable[[], Any]) -> None:
    _warming.now = compile_one
    try:
        _compile(compile_one)
    except TypeError:  # Triton has no text for what the kernel is compiled for
        missing[compile_one] = compile_one, None
    finally:
        _warming.now = None


def _compile(compile_one: Callable[[], Any]) -> None:
    """Compile a kernel, or take it from Triton's cache, and load it and what launches it."""
    try:
        compiled = compile_one()
        if compiled is not None:  # else a hook has skipped it
            _ = compiled.run
    except Exception as error:
        if not from_compiler(error):
            raise
