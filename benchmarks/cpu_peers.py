"""Quire and llama.cpp on the same GGUF file in one run: single-stream decode and prefill.

    python benchmarks/cpu_peers.py [--model FILE.gguf] [--threads 2] [--repeat 3]

The peer is llama-cpp-python, if it is installed. Both get the same token ids, take turns within
each repetition (so that a busy machine is busy for both), and work greedily without detokenizing.
The ceiling of decode is the machine's memory bandwidth over the file's weight bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from quire.cli.bench_record import machine, read_bandwidth
from quire.cli.local import LocalEngine
from quire.cli.version import versions
from quire.cli.workload import find_scenarios, make_prompts
from quire.config.parse import build_options
from quire.params import SamplingParams
from quire.weights.hub import resolve

PEER = "llama_cpp_python"
SINGLE, PREFILL = find_scenarios("single,prefill512")
# Seconds from the start to the first token and to the last, of a prompt and a count of tokens.
Answer = Callable[[list[int], int], tuple[float, float]]


def quire_answer(engine: LocalEngine) -> Answer:
    """Answers in this process."""
    engine.tokenizer = None  # the peer does not detokenize either

    def answer(prompt: list[int], output: int) -> tuple[float, float]:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        start, first, last = time.perf_counter(), 0.0, 0.0
        for _ in engine.stream([engine.request(prompt, params)]):
            last = time.perf_counter() - start
            first = first or last
        return first, last

    return answer


def peer_answer(path: str, threads: int, context: int) -> Answer | None:
    """llama.cpp's, None where it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    model = Llama(
        path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )

    def answer(prompt: list[int], output: int) -> tuple[float, float]:
        model.reset()  # it would reuse a prompt's beginning
        start, first, last = time.perf_counter(), 0.0, 0.0
        for count, _ in enumerate(model.generate(prompt, temp=0.0, reset=True), 1):
            last = time.perf_counter() - start
            first = first or last
            if count == output:
                break
        return first, last

    return answer


def measure(answer: Answer, vocab_size: int, turn: int) -> dict[str, float]:
    """Decode and prefill rates of one repetition, on prompts of its own."""
    prompt = make_prompts(SINGLE, vocab_size, turn)[0]
    first, last = answer(prompt, SINGLE.output)
    long = make_prompts(PREFILL, vocab_size, turn)[0]
    prefill, _ = answer(long, 1)
    return {
        "decode_tok_s": (SINGLE.output - 1) / (last - first),
        "prefill512_tok_s": PREFILL.prompt / prefill,
    }


def main() -> None:
    """Measure both and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a .gguf file or an alias of one")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", help="write the record as JSON")
    flags = parser.parse_args()
    files = resolve(flags.model)
    if files.kind != "gguf":
        sys.exit(f"{flags.model} is no GGUF file: the peer reads nothing else")
    engine = LocalEngine(
        build_options({"model": flags.model, "threads": flags.threads, "kernels": flags.kernels}),
        lambda phase, fraction: None,
    )
    plan = engine.info.plan
    sides = {"quire": quire_answer(engine)}
    peer = peer_answer(str(files.path), plan["threads"], min(2048, plan["max_model_len"]))
    try:
        peer_version = version(PEER)
    except PackageNotFoundError:
        peer_version = "not installed"
    if peer is not None:
        sides["llama.cpp"] = peer
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(flags.repeat + 1):
        for name, answer in sides.items():
            found = measure(answer, engine.info.vocab_size, turn)
            if turn > 0:  # turn 0 warms up
                runs[name].append(found)
    median = {
        name: {metric: statistics.median(run[metric] for run in found) for metric in found[0]}
        for name, found in runs.items()
    }
    bandwidth = read_bandwidth()
    ceiling = bandwidth * 1e9 / plan["weight_bytes"]
    about = machine()
    kernels = f"{plan['kernels']} kernels ({plan['isa']})"
    print(f"{files.path.name} on {about['processor']}, {plan['threads']} threads, {kernels}")
    for name, values in median.items():
        print(f"{name:10}" + "".join(f"  {k} {v:8.1f}" for k, v in values.items()))
    if peer is None:
        print("no ratios: the peer is not installed (pip install llama-cpp-python)")
    else:
        for metric, value in median["quire"].items():
            print(f"{metric}: {value / median['llama.cpp'][metric]:.2f} x llama.cpp")
    print(f"ceiling of decode: {ceiling:.0f} tok/s (memory read at {bandwidth:.1f} GB/s)")
    if flags.output:
        record = {
            "command": sys.argv,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": about,
            "versions": {**versions(), "llama-cpp-python": peer_version},
            "kernels": kernels,
            "ceiling_tok_s": ceiling,
            "median": median,
            "runs": runs,
        }
        with open(flags.output, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
