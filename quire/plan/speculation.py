"""What speculation takes and changes, and why."""

from __future__ import annotations

from quire.config.options import EngineOptions
from quire.config.speculation import Speculation
from quire.plan.plan import Choice, format_bytes

# Rows of logits that a step may sample from, where that is more than there are requests. Drafts of
# many requests at once are worth little: their weights are read for many tokens anyway.
MOST_SAMPLED = 256
# Of an index on the host (quire/speculative/ngram.py), for each n-gram: a number and its place.
NGRAM_BYTES = 160


def sampled_rows(engine: EngineOptions, sequences: int, tokens: int) -> int:
    """Rows of logits of the largest step that samples."""
    asked = engine.speculation
    if asked is None:
        return sequences
    with_drafts = min(sequences * (1 + asked.num_speculative_tokens), MOST_SAMPLED)
    return max(sequences, min(with_drafts, tokens))


def describe_speculation(
    asked: Speculation,
    sampled: int,
    ahead: bool | None,
    draft_bytes: int,
    choices: list[Choice],
) -> None:
    """The plan's lines. `ahead`: whether --async-scheduling was asked for. `draft_bytes`: weights
    of the model or module that drafts."""
    if asked.method == "ngram":
        least, most = asked.prompt_lookup_min, asked.prompt_lookup_max
        sizes = f"{most}" if least == most else f"{least} to {most}"
        per_token = NGRAM_BYTES * (1 + most - least)
        reason = (
            f"asked for; n-grams of {sizes} tokens, about {per_token} bytes a token on the host"
        )
    elif asked.method == "mtp":
        weights = format_bytes(draft_bytes)
        reason = f"asked for; the model's MTP module, {weights} of weights and a layer's cache"
    else:
        weights = format_bytes(draft_bytes)
        reason = (
            f"asked for; {asked.model}, {weights} of weights, up to {asked.max_model_len} tokens"
        )
    chosen = f"{asked.method}, {asked.num_speculative_tokens} drafts a row"
    choices.append(Choice("speculation", chosen, reason))
    reason = "a row's drafts, and where it begins, depend on which of the last were accepted"
    choices.append(Choice("async scheduling", "off", reason, downgrade=bool(ahead)))
    reason = "drafts beyond it are not asked for"
    choices.append(Choice("sampled rows", f"{sampled} a step", reason))
