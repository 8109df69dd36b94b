"""The decoder: streams, blocks of attention and experts, head."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.embedding import Embedding, Head
from quire.layers.inputs import StepInputs
from quire.layers.norm import RMSNorm
from quire.models.deepseek_v4.attention import Attention
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.moe import MoE
from quire.models.deepseek_v4.places import Places
from quire.models.deepseek_v4.streams import HyperConnection, HyperHead, Written


class Block:
    """Attention and experts, each between a reading and a writing of the streams."""

    def __init__(self, config: Config, build: Build, name: str, layer: Layer):
        self.attention_streams = HyperConnection(
            config, build, f"{name}.hc_attn", f"{name}.attn_norm"
        )
        self.attention = Attention(config, build, f"{name}.attn", layer)
        self.expert_streams = HyperConnection(config, build, f"{name}.hc_ffn", f"{name}.ffn_norm")
        self.experts = MoE(config, build, f"{name}.ffn", layer)
        # Streams before and after a layer, and one product of them with a weight.
        build.add_width(3 * config.streams * config.hidden)

    def __call__(
        self,
        streams_TND: torch.Tensor,
        written: Written | None,
        tokens_T: torch.Tensor,
        places: Places,
    ) -> tuple[torch.Tensor, Written]:
        """Streams, and what they are still to get; the same is given of the layer before."""
        streams_TND, x_TD, mix = self.attention_streams(streams_TND, written)
        written = self.attention(x_TD, places), mix
        streams_TND, x_TD, mix = self.expert_streams(streams_TND, written)
        return streams_TND, (self.experts(x_TD, tokens_T), mix)


class Model:
    """`forward` gives the streams of each token side by side, [T, n * D], which a drafter reads
    too; `logits` collapses them and gives the head's [T, V]."""

    def __init__(self, config: Config, build: Build):
        self.config, self.kernels = config, build.kernels.compressed
        build.output = config.streams * config.hidden
        self.embed = Embedding(build, "embed", config.vocab_size, config.hidden)
        self.layers = [
            Block(config, build, f"layers.{i}", layer) for i, layer in enumerate(config.layers)
        ]
        self.collapse = HyperHead(config, build)
        self.norm = RMSNorm(build, "norm", config.hidden, config.eps)
        self.head = Head(build, "head", config.vocab_size, config.hidden)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: StepInputs
    ) -> torch.Tensor:
        """tokens int64 [T], positions int64 [T] -> [T, n * D]."""
        places = Places(positions, step)
        streams_TND = self.embed(tokens)[:, None].expand(-1, self.config.streams, -1)
        written: Written | None = None
        for block in self.layers:
            streams_TND, written = block(streams_TND, written, tokens, places)
        if written is not None:
            streams_TND = self.kernels.write_streams(written[0], streams_TND, written[1])
        return streams_TND.flatten(1)

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        streams_TND = streams.view(len(streams), self.config.streams, -1)
        return self.head(self.norm(self.collapse(streams_TND)))
