"""The attention layer against a dense computation over several requests in one step."""

import math

import pytest
import torch
from torch.nn import functional

from layers.source import load
from quire.comm.group import Group
from quire.errors import PlanError
from quire.kernels.reference import ops
from quire.kv import BLOCK_SIZE
from quire.layers.attention import Attention
from quire.layers.build import Build
from quire.layers.inputs import GroupInputs, StepInputs
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.rotary import rope_parameters

H, HEADS, KV, D = 32, 4, 2, 16


def dense(x: torch.Tensor, w: dict[str, torch.Tensor], settings: dict[str, object]) -> torch.Tensor:
    """Every query of one sequence against every key, in float64."""
    x, w = x.double(), {name: value.double() for name, value in w.items()}
    length = len(x)

    def heads(part: str, count: int) -> torch.Tensor:
        y = x @ w[f"a.{part}_proj.weight"].T + w.get(f"a.{part}_proj.bias", 0.0)
        y = y.view(length, count, D)
        if part != "v" and "a.q_norm.weight" in w:
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"a.{part}_norm.weight"]
        if part == "v":
            return y
        angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)[None]
        cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)

    q, k, v = heads("q", HEADS), heads("k", KV), heads("v", KV)
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * float(settings.get("scale") or D**-0.5)  # type: ignore[arg-type]
    if settings.get("softcap"):
        cap = float(settings["softcap"])  # type: ignore[arg-type]
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    hidden = distance < 0
    if settings.get("window"):
        hidden |= distance >= int(settings["window"])  # type: ignore[call-overload]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
    return functional.linear(mixed, w["a.o_proj.weight"], w.get("a.o_proj.bias")).float()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 5},
        {"qkv_bias": True, "out_bias": True},
        {"qk_norm": True},
        {"scale": 0.7, "softcap": 2.0},
    ],
)
def test_several_requests_in_one_step_equal_each_alone(settings: dict[str, object]) -> None:
    torch.manual_seed(1)
    build = Build(ops, max_len=64)
    layer = Attention(
        build, "a", hidden=H, heads=HEADS, kv_heads=KV, head_size=D, rope=rope_parameters({}),
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    norm = RMSNorm(build, "n", H, 1e-6)
    tensors = {t.name: torch.randn(t.shape) * 0.4 for w in build.weights for t in w.tensors()}
    load(build, dict(tensors))
    layer.cache.group = 0
    layer.cache.tensors = tuple(torch.full((9, *page), torch.nan) for page in layer.cache.page)
    sequences = [torch.randn(length, H) for length in (1, 20, 37)]
    tables = torch.tensor([[4, 0, 0], [2, 7, 0], [1, 8, 3]], dtype=torch.int32)
    found: list[list[torch.Tensor]] = [[], [], []]
    for first, last in ((0, 1), (1, 20), (20, 37)):  # of every sequence that is so long
        rows = [i for i, s in enumerate(sequences) if len(s) > first]
        x = torch.cat([sequences[i][first:last] for i in rows])
        lengths = [len(sequences[i][first:last]) for i in rows]
        positions = torch.cat([torch.arange(first, first + n) for n in lengths])
        owner = torch.repeat_interleave(torch.tensor(rows), torch.tensor(lengths))
        blocks = tables[owner, positions // BLOCK_SIZE].long()
        step = StepInputs(
            torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            torch.tensor([first + n for n in lengths], dtype=torch.int32),
            [GroupInputs(tables[rows], blocks * BLOCK_SIZE + positions % BLOCK_SIZE)],
        )
        for i, part in zip(
            rows, layer(norm, ResidualStream(x), positions, step).split(lengths), strict=True
        ):
            found[i].append(part)
    for sequence, parts in zip(sequences, found, strict=True):
        assert torch.allclose(torch.cat(parts), dense(norm(sequence), tensors, settings), atol=1e-4)


def test_kv_heads_that_ranks_cannot_share_are_an_error_for_people() -> None:
    build = Build(ops, group=Group(0, 3))
    with pytest.raises(PlanError, match="3 ranks"):
        Attention(build, "a", hidden=H, heads=6, kv_heads=2, head_size=D, rope=rope_parameters({}))
