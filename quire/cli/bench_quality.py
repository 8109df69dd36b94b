"""`quire bench quality`: how far a model's probabilities and texts are from a baseline's."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from quire.cli.bench_offline import number
from quire.cli.bench_record import machine, plan_facts, write_json
from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.quality_text import (
    CONTEXT,
    OUTPUT,
    TOKENS,
    Sizes,
    Work,
    encode,
    make_work,
    read_text,
)
from quire.cli.terminal import Phases
from quire.cli.version import versions
from quire.config.options import all_options
from quire.config.parse import build_options
from quire.errors import UsageError
from quire.settings import settings

if TYPE_CHECKING:
    from quire.cli.quality_run import Measured
    from quire.config.options import Options

MOST = 2**31 - 1


def add_flags(parser: Parser) -> None:
    """Flags of the comparison, the model and the engine."""
    group = parser.add_argument_group(
        "comparison",
        "MODEL with these options is the candidate; the baseline has the same ones but "
        "--quantization, and what --against and --baseline say",
    )
    group.add_argument("--text", metavar="FILE", help="UTF-8 text, or token ids (see docs/cli.md)")
    group.add_argument("--against", metavar="MODEL", help="the baseline, of the same vocabulary")
    group.add_argument(
        "--baseline",
        metavar="OPTIONS",
        help="its own options, like dtype=float32,kernels=reference",
    )
    group.add_argument("--tokens", metavar="N", help=f"tokens of the text [all, at most {TOKENS}]")
    group.add_argument(
        "--context", metavar="N", help=f"tokens of a piece [{CONTEXT}, or what the models allow]"
    )
    group.add_argument("--prompts", default="16", metavar="N", help="greedy continuations [16]")
    group.add_argument(
        "--output-tokens", metavar="N", help=f"tokens of each [{OUTPUT}, or what the models allow]"
    )
    group.add_argument("--output", metavar="FILE", help="write the record as JSON")
    parser.add_sections("model", "engine")


def run(invocation: Invocation) -> int:
    """Compare and print."""
    flags = invocation.flags
    sizes = Sizes(
        _count("--tokens", flags.tokens, 2),
        _count("--context", flags.context, 2),
        _count("--output-tokens", flags.output_tokens, 1),
        _count("--prompts", flags.prompts, 1, 4096) or 1,
    )
    candidate = invocation.options(invocation.words[0] if invocation.words else None)
    text = read_text(flags.text)
    baseline = baseline_options(invocation, candidate)
    from quire.cli.main import set_up_logging

    set_up_logging(candidate.server.log_level)
    phases = Phases(quiet=invocation.json)
    phases("loading libraries")
    from quire.cli import quality_run

    work, vocab_size = prepare(candidate, baseline, text, sizes)
    quality_run.check_room(work, vocab_size)
    # Both are planned before either is loaded, so that what cannot be is said at once.
    baseline, candidate = (quality_run.sized(each, work) for each in (baseline, candidate))
    kept = quality_run.Kept()
    first = quality_run.measure(baseline, work, kept.take, phases, "baseline")
    compared = quality_run.Compared(kept)
    second = quality_run.measure(candidate, work, compared.take, phases, "candidate")
    assert compared.done(), "a position of the baseline had no counterpart"
    phases.finish()
    from quire.cli.divergence import greedy_agreement

    figures = compared.divergence.figures() | greedy_agreement(first.texts, second.texts)
    record = make_record(invocation, (first, second), work, figures)
    print(json.dumps(record) if invocation.json else "\n".join(lines(record)))
    if flags.output:
        write_json(flags.output, record)
    return 0


def _count(flag: str, text: str | None, low: int, high: int = MOST) -> int | None:
    return None if text is None else int(number(flag, text, low, high, whole=True))


def baseline_options(invocation: Invocation, candidate: Options) -> Options:
    """The candidate's options without --quantization, with what --against and --baseline name.

    Raises CommandLineError, also where nothing is left to compare.
    """
    flags, own = invocation.flags, dict[str, str]()
    for pair in filter(None, (flags.baseline or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name.replace("-", "_") not in all_options("model", "engine"):
            raise CommandLineError(
                "invalid_flag",
                f"--baseline: {pair!r} is not allowed",
                why="it must be NAME=VALUE of a model or engine option, several with commas",
                field="--baseline",
            )
        own[name.replace("-", "_")] = value
    if flags.against is not None:
        own["model"] = flags.against
    given: dict[str, Any] = {"model": candidate.model.model, "quantization": None}
    try:
        options = build_options(invocation.given() | given | own, settings().options, flags.config)
    except UsageError as error:
        raise CommandLineError(error.code, error.what, error.why, error.fix, error.field) from error
    if options == candidate:
        raise CommandLineError(
            "nothing_to_compare",
            "candidate and baseline are the same",
            fix="give --quantization, --against MODEL, or --baseline NAME=VALUE",
        )
    return options


def prepare(candidate: Options, baseline: Options, text: str, sizes: Sizes) -> tuple[Work, int]:
    """(what to compute, size of the vocabulary), before any weights are loaded.

    Raises QuireError, for a baseline of another vocabulary too.
    """
    from quire.engine.startup import find_model
    from quire.models.registry import read_config
    from quire.tokenization.tokenizer import Tokenizer

    found, tokenizers = [], list[Tokenizer | None]()
    for options in (baseline, candidate):
        files = find_model(options)
        config = read_config(files.config())
        found.append((config.vocab_size, options.model.max_model_len or config.max_len))
        skipped = options.model.skip_tokenizer_init
        tokenizers.append(None if skipped else Tokenizer.from_files(files))
    (vocab_size, first), (other, second) = found
    if vocab_size != other:
        raise _other_vocabulary(f"the baseline has {vocab_size} tokens, the candidate {other}")
    lead, texts = encode(text, tokenizers[0])
    if encode(text, tokenizers[1]) != (lead, texts):
        raise _other_vocabulary("their tokenizers give different tokens for the text")
    return make_work(lead, texts, sizes, min(first, second), vocab_size), vocab_size


def _other_vocabulary(why: str) -> UsageError:
    return UsageError(
        "vocabulary_mismatch",
        "candidate and baseline have different vocabularies",
        why=why,
        fix="compare models of one tokenizer",
        field="--against",
    )


def make_record(
    invocation: Invocation,
    measured: tuple[Measured, Measured],
    work: Work,
    figures: dict[str, float],
) -> dict[str, Any]:
    """Plain data for JSON: numbers that are not finite are null."""
    baseline, candidate = measured
    return {
        "command": invocation.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "baseline": {"model": baseline.model, "plan": plan_facts(baseline.plan)},
        "candidate": {"model": candidate.model, "plan": plan_facts(candidate.plan)},
        "text": {"file": invocation.flags.text, **work.to_dict()},
        "results": {name: _plain(value) for name, value in figures.items()},
    }


def _plain(value: float) -> float | None:
    """Six digits; None where it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def lines(record: dict[str, Any]) -> list[str]:
    """A table for people."""
    found, text = record["results"], record["text"]

    def show(name: str, form: str) -> str:
        return "infinite" if found[name] is None else format(found[name], form)

    output = text["output_tokens"]
    rows = [
        ("perplexity, baseline", show("baseline_perplexity", ".5g"), ""),
        ("perplexity, candidate", show("candidate_perplexity", ".5g"), ""),
        ("KL divergence, mean", show("kl_mean", ".3g"), "nats, KL(baseline || candidate)"),
        ("KL divergence, worst", show("kl_worst", ".3g"), "nats"),
        ("top-1 agreement", show("top_1_agreement", ".1%"), "of positions"),
        (
            "greedy agreement",
            show("greedy_agreement", ".1%"),
            f"of {text['prompts']} prompts, equal for {output} tokens",
        ),
        (
            "first difference",
            show("mean_first_difference", ".1f"),
            f"tokens in the mean, {output} where there is none",
        ),
    ]
    heads = [_head(name, record[name]) for name in ("baseline", "candidate")]
    about = f"text: {text['file']}, {text['tokens']} tokens in {text['pieces']} pieces, "
    return [
        *heads,
        about + f"{found['positions']} positions",
        "",
        *(f"{name:24}{value:>10}  {unit}".rstrip() for name, value, unit in rows),
    ]


def _head(name: str, side: dict[str, Any]) -> str:
    plan = side["plan"]
    return (
        f"{name + ':':11}{side['model']} on {plan['device_name']}, {plan['kernels']} kernels, "
        f"{plan['weight_formats']}, dtype {plan['dtype']}, KV cache {plan['kv_dtype']}"
    )
