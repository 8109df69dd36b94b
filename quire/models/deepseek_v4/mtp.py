"""Multi-token prediction: the module that drafts the token after the next one."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.inputs import StepInputs
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.model import Block, Model
from quire.models.deepseek_v4.places import Places
from quire.models.deepseek_v4.streams import HyperHead


class Drafter:
    """One module, `mtp.0`, with embedding and head of the target.

    Its weights and its window's cache come into `build`, the target's, whose windows have the same
    shape. Of further modules none is read.
    """

    def __init__(self, target: Model, build: Build):
        config, name = target.config, "mtp.0"
        self.target, self.config = target, config
        self.token_norm = RMSNorm(build, f"{name}.enorm", config.hidden, config.eps)
        self.stream_norm = RMSNorm(build, f"{name}.hnorm", config.hidden, config.eps)
        self.token = Linear(build, [f"{name}.e_proj"], config.hidden, [config.hidden])
        self.stream = Linear(build, [f"{name}.h_proj"], config.hidden, [config.hidden])
        self.block = Block(config, build, name, Layer(ratio=0, sparse=False, hashed=False))
        self.collapse = HyperHead(config, build, f"{name}.")
        self.norm = RMSNorm(build, f"{name}.norm", config.hidden, config.eps)
        # The target's streams stay meanwhile.
        build.add_width(4 * config.streams * config.hidden)
        build.spare += [f"mtp.{i}." for i in range(1, config.mtp_layers)]

    @staticmethod
    def prefix(config: Config) -> str:
        """How the names of the module's tensors begin."""
        return "mtp.0."

    def forward(
        self,
        streams: torch.Tensor,
        next_tokens: torch.Tensor,
        positions: torch.Tensor,
        step: StepInputs,
    ) -> torch.Tensor:
        """Streams [T, n * D] of which `logits` gives the token after the next.

        `streams`: those of each token, from the target, or from this function to draft another one
        (then with that token and the next position). `next_tokens` int64 [T]: the tokens that
        follow; `positions` those of the tokens themselves.
        """
        c = self.config
        parts_ND = self.stream_norm(streams.reshape(-1, c.hidden))
        streams_TND = self.stream(parts_ND).view(-1, c.streams, c.hidden)
        token_TD = self.token(self.token_norm(self.target.embed(next_tokens)))
        places = Places(positions, step)
        streams_TND = streams_TND + token_TD[:, None]
        streams_TND, written = self.block(streams_TND, None, next_tokens, places)
        return self.target.kernels.write_streams(written[0], streams_TND, written[1]).flatten(1)

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        streams_TND = streams.view(len(streams), self.config.streams, -1)
        return self.target.head(self.norm(self.collapse(streams_TND)))
