"""A plan as text, from the plain data that Plan.to_dict() gives (over the wire too)."""

from __future__ import annotations

from typing import Any

from quire.kv import BLOCK_SIZE
from quire.plan.plan import format_bytes


def five_numbers(plan: dict[str, Any]) -> dict[str, str]:
    """Plan.summary() of plain data: the five numbers of the ready block."""
    reserve = plan["reserve_bytes"] + plan["graph_bytes"] + plan["state_bytes"]
    return {
        "weights": format_bytes(plan["weight_bytes"]),
        "kv cache": f"{format_bytes(plan['kv_bytes'])} ({plan['context_tokens']} tokens)",
        "activations": format_bytes(plan["activation_bytes"]),
        "reserve": format_bytes(reserve),
        "context": f"{plan['max_model_len']} tokens",
    }


def _drafter(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What drafts with weights of its own, if anything does."""
    if not plan["draft_bytes"]:
        return []
    name = "MTP module" if plan["speculation"]["method"] == "mtp" else "draft model"
    return [(name, format_bytes(plan["draft_bytes"]), "weights")]


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The whole plan with its reasons."""
    device = f"{plan['device']}: {plan['device_name']}, {plan['threads']} threads"
    numbers = five_numbers(plan)
    memory = [
        ("weights", numbers["weights"], plan["weight_formats"]),
        ("kv cache", numbers["kv cache"], _groups(plan)),
        ("activations", numbers["activations"], _step(plan)),
        *_drafter(plan),
        ("reserve", numbers["reserve"], "interpreter, libraries, tokenizer"),
        ("total", format_bytes(plan["total_bytes"]), ""),
    ]
    choices = [
        (c["what"], c["chosen"], ("downgrade: " if c["downgrade"] else "") + c["reason"])
        for c in plan["choices"]
    ]
    return [
        *_table([("model", plan["model"], plan["architecture"]), ("device", device, "")]),
        "",
        "memory",
        *_table(memory),
        "",
        "choices",
        *_table(choices),
        "",
        f"fingerprint {plan['fingerprint']}",
    ]


def _groups(plan: dict[str, Any]) -> str:
    parts = []
    for group in plan["groups"]:
        window = "full attention" if group["window"] is None else f"window {group['window']}"
        if group["block_size"] > BLOCK_SIZE:
            window = f"entries in pages of {group['block_size']} tokens"
        parts.append(f"{len(group['layers'])} layers {window}")
    return f"{plan['kv_dtype']}, {', '.join(parts)}"


def _step(plan: dict[str, Any]) -> str:
    tokens, sequences = plan["max_num_batched_tokens"], plan["max_num_seqs"]
    return f"{tokens} tokens a step, {sequences} requests at once"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows if row[2]) if any(row[2] for row in rows) else 0
    return [f"  {a:{first}}  {b:{second}}  {c}".rstrip() for a, b, c in rows]
