"""Multi-token prediction: the module that drafts the token after the next one."""

from __future__ import annotations

import torch

from quire.errors import ModelError
from quire.layers.build import Build
from quire.layers.inputs import StepInputs
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.models.deepseek_v4.config import Layer
from quire.models.deepseek_v4.model import Block, Model
from quire.models.deepseek_v4.places import Places
from quire.models.deepseek_v4.streams import HyperHead


class Drafter:
    """One module, `mtp.0`, with embedding and head of the target.

    Its weights and its window's cache come into `build`, which may be the target's; its tensors are
    those of `names.adapt_drafter`. Raises ModelError where the checkpoint has no module.
    """

    def __init__(self, target: Model, build: Build):
        config, name = target.config, "mtp.0"
        if config.mtp_layers < 1:
            raise ModelError(
                "no_drafter",
                "the model has no MTP module",
                why="config.json: num_nextn_predict_layers",
                fix="use a checkpoint that has one, or another way to draft",
            )
        self.target, self.config = target, config
        self.token_norm = RMSNorm(build, f"{name}.enorm", config.hidden, config.eps)
        self.stream_norm = RMSNorm(build, f"{name}.hnorm", config.hidden, config.eps)
        self.token = Linear(build, [f"{name}.e_proj"], config.hidden, [config.hidden])
        self.stream = Linear(build, [f"{name}.h_proj"], config.hidden, [config.hidden])
        self.block = Block(config, build, name, Layer(ratio=0, sparse=False, hashed=False))
        self.collapse = HyperHead(config, build, f"{name}.")
        self.norm = RMSNorm(build, f"{name}.norm", config.hidden, config.eps)

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
