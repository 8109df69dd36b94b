"""What `quire bench tiers` found, as tables for people."""

from __future__ import annotations

from typing import Any

from quire.tiers.policy import POLICIES


def lines(record: dict[str, Any]) -> list[str]:
    """Tables for people."""
    results, plan = record["results"], record["plan"]
    found = [f"{record['model']} on {plan['device_name']}, {plan['context_tokens']} tokens of KV"]
    found += [f"{c['what']}: {c['chosen']}; {c['reason']}" for c in record["tiers"]]
    found += [
        "",
        "time to the first token of a prompt (ms), and where its KV came from: loaded is below, "
        "but never computed instead",
    ]
    head = f"{'tokens':>8}{'computed':>12}"
    found.append(head + "".join(f"{n:>12}" for n in ("device", "dram", "below", "loaded")))
    for row in results["returns"]:
        found.append(f"{row['tokens']:>8}" + "".join(f"{t:>12}" for t in row["ttft_ms"].values()))
        found.append(f"{'':20}" + "".join(f"{named(s):>12}" for s in row["sources"].values()))
    talk = results["conversations"]
    found += [
        "",
        f"{talk['count']} conversations of {talk['tokens']} tokens, {talk['turns']} turns each, in "
        f"{talk['order']} order: first tokens of returning turns (ms)",
    ]
    for name in ("off", *POLICIES):
        part = talk[name]
        found.append(
            f"  {'no tiers' if name == 'off' else name:>8}: {part['ttft_ms']} (worst "
            f"{part['ttft_worst_ms']}), {part['seconds']} s in all"
        )
        for source, times in sorted(part["by_source"].items()):
            found.append(f"{source:>20}: {times['ttft_ms']} in {times['turns']} turns")
        if name != "off":
            found.append(f"{'of a step':>20}: {_thread_time(part)}")
            found += [
                f"{tier:>20}: {pages['hits']} pages found, {pages['misses']} not"
                for tier, pages in part["pages"].items()
            ]
    steady = results["steady"]
    host = steady["host_ms_per_step"]
    found += [
        "",
        f"no reuse, {steady['requests']} x {steady['tokens']} tokens: {steady['tokens_s_off']} "
        f"tokens/s without tiers, {steady['tokens_s_on']} with: loss {steady['loss_percent']}%",
        f"host time of a step: {host['off']} ms without tiers, {host['on']} ms with, "
        f"of it {_thread_time(steady)}",
    ]
    if record["left_out"]:
        found.append(f"left out, longer than the context or the KV cache: {record['left_out']}")
    return found


def _thread_time(part: dict[str, Any]) -> str:
    spent = part["tiers_ms_per_step"]
    return f"lookups {spent['lookups']} ms, stores and copies {spent['copies']} ms"


def named(sources: dict[str, int]) -> str:
    """Where most of a prompt's KV came from."""
    return max(sources, key=lambda name: sources[name]) if sources else "computed"
