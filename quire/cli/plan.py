"""`quire plan`: what would run where, and why, without loading anything."""

from __future__ import annotations

import json

from quire.cli.flags import Invocation, Parser
from quire.cli.plan_table import five_numbers, plan_lines


def add_flags(parser: Parser) -> None:
    """Flags of the model and the engine."""
    parser.add_sections("model", "engine")


def run(invocation: Invocation) -> int:
    """Print the plan. A hub model's weights are not downloaded."""
    options = invocation.options(invocation.words[0] if invocation.words else None)
    from quire.engine.startup import kernel_facts, make_plan
    from quire.engine.weights import open_weights
    from quire.weights.hub import resolve

    asked = options.model
    files = resolve(asked.model, asked.revision, asked.offline, weights=False)
    source = open_weights(options, files)
    plan = make_plan(options, files, source, kernel_facts()).to_dict()
    if source is not None:
        source.close()
    if invocation.json:
        print(
            json.dumps(plan | {"weights_read": source is not None, "summary": five_numbers(plan)})
        )
        return 0
    print("\n".join(plan_lines(plan)))
    if source is None:
        print("no weights were looked at: formats and sizes are what config.json declares")
    return 0
