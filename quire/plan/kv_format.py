"""In which number format keys and values are kept, and with which scales."""

from __future__ import annotations

from quire.config.options import Options
from quire.errors import PlanError
from quire.layers.build import Build
from quire.plan.facts import ModelFacts
from quire.plan.plan import Choice

WHAT = "kv cache format"


def choose_kv_dtype(
    options: Options, model: ModelFacts, plain: str, build: Build, choices: list[Choice]
) -> str:
    """`plain`: what is kept where nothing else is asked for; `build`: of the model, in any format.
    Raises PlanError where the layers cannot keep what was asked for."""
    asked, made_for = options.model.kv_cache_dtype, model.kv_cache
    if asked == "fp8":
        if not build.packs_fp8:
            raise PlanError(
                "unsupported_kv_dtype",
                "--kv-cache-dtype fp8: this model's layers do not pack their cache",
                why=_why_not(build),
                fix="use --kv-cache-dtype auto",
            )
        reason = "asked for with --kv-cache-dtype"
    elif asked != "auto":
        return asked
    elif not made_for:
        return plain
    elif made_for != "fp8" or not build.packs_fp8:
        why_not = _why_not(build) if made_for == "fp8" else "which no kernel here keeps"
        reason = f"the checkpoint was made for {made_for}: {why_not}"
        choices.append(Choice(WHAT, plain, reason, downgrade=True))
        return plain
    else:
        reason = "the checkpoint was made for it"
    if not all(cache.by_kernels for cache in build.caches):
        choices.append(Choice(WHAT, "fp8", reason))  # scales as the model's own code has them
    elif model.kv_scales:
        choices.append(Choice(WHAT, "fp8, the checkpoint's scales", reason))
    else:
        scales = "fp8, a scale for each head of each token"
        choices.append(Choice(WHAT, scales, f"{reason}, without scales of its own"))
    return "fp8"


def _why_not(build: Build) -> str:
    if any(cache.latent for cache in build.caches):
        return "latents, which all heads share, are kept in the model's own format"
    return "there are no kernels for it"
