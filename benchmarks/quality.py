"""`quire bench quality` of one model in every format, each against its float32 values.

    python -m benchmarks.quality MODEL --text FILE [--formats NAMES] -- [options of bench quality]
    python -m benchmarks.quality MODEL --sample 12 [--formats NAMES] -- [options]

--text is encoded with MODEL's tokenizer; --sample N makes N texts of MODEL's own at temperature 1,
seeds 0 to N - 1, from the beginning-of-sequence token, on the CPU. Files go to --directory.

The GPU's kernels, which compute with codes in bfloat16, against float32 on the GPU:

    python -m benchmarks.quality MODEL --text FILE -- \\
        --device cuda --dtype bfloat16 --baseline dtype=float32
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.quantize_checkpoint import convert
from quire import LLM, SamplingParams
from quire.cli.main import main as quire
from quire.tokenization.tokenizer import Tokenizer
from quire.weights.hub import resolve

FORMATS = "fp8,fp8_block,int8-g128,int4-g128,nvfp4,mxfp4"
ONLINE = ("fp8", "nvfp4")  # the others are written as checkpoints


def sample(model: str, count: int) -> list[list[int]]:
    """Texts of the model's own, each up to its end."""
    config = resolve(model).config()
    start, ends = config["bos_token_id"], [config["bos_token_id"], config["eos_token_id"]]
    llm = LLM(model, device="cpu", skip_tokenizer_init=True)
    length = min(256, config["max_position_embeddings"]) - 1
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=length, stop_token_ids=ends)
        for seed in range(count)
    ]
    prompts = [{"prompt_token_ids": [start]}] * count
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[start, *output.outputs[0].token_ids] for output in outputs]


def measure(
    directory: Path, formats: list[str], ids: Path, options: list[str]
) -> dict[str, dict[str, Any]]:
    """Each format's record. Raises SystemExit where the command fails."""
    base, records = directory / "float32", {}
    for format in formats:
        candidate = directory / format
        argv = [str(base), "--quantization", format]
        if format not in ONLINE:
            convert(str(base), format, candidate)
            argv = [str(candidate), "--against", str(base)]
        output = directory / f"{format}.json"
        argv += ["--skip-tokenizer-init", "--text", str(ids), "--output", str(output), *options]
        print(f"== {format}", flush=True)
        if code := quire(["bench", "quality", *argv]):
            raise SystemExit(code)
        records[format] = json.loads(output.read_text())
    return records


def table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line for each format."""
    lines = [
        "| format | KL mean | KL worst | perplexity | top-1 | greedy | first difference |",
        "|---|---|---|---|---|---|---|",
    ]
    results = [record["results"] for record in records.values()]
    lines.append(f"| float32 | 0 | 0 | {results[0]['baseline_perplexity']:.3f} | | | |")
    for name, found in zip(records, results, strict=True):
        cells = (
            f"`{name}`",
            f"{found['kl_mean']:.2g}",
            f"{found['kl_worst']:.2g}",
            f"{found['candidate_perplexity']:.3f}",
            f"{found['top_1_agreement']:.1%}",
            f"{found['greedy_agreement']:.0%}",
            f"{found['mean_first_difference']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--formats", default=FORMATS, metavar="NAMES", help=f"[{FORMATS}]")
    parser.add_argument("--directory", type=Path, default=Path("quality"))
    parser.add_argument("--output", type=Path)
    own = sys.argv[1:]
    at = own.index("--") if "--" in own else len(own)
    arguments, options = parser.parse_args(own[:at]), own[at + 1 :]
    if (arguments.text is None) == (arguments.sample is None):
        parser.error("give either --text or --sample")
    directory = arguments.directory
    convert(arguments.model, "float32", directory / "float32")
    if arguments.text is not None:
        tokenizer = Tokenizer.from_files(resolve(arguments.model))
        texts = [tokenizer.encode(arguments.text.read_text(encoding="utf-8"))]
    else:
        texts = sample(arguments.model, arguments.sample)
    ids = directory / "ids.txt"
    ids.write_text("".join(" ".join(map(str, text)) + "\n" for text in texts))
    records = measure(directory, arguments.formats.split(","), ids, options)
    print(table(records))
    if arguments.output:
        arguments.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
