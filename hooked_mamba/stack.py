"""Blocks and the stack of them, which know nothing about what a mixer does inside."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.components import Embed, RMSNorm, Unembed, at_least_fp32
from hooked_mamba.config import SSMConfig
from hooked_mamba.hook_points import HookPoint
from hooked_mamba.state import LayerState, ModelState, Padding


@runtime_checkable
class Mixer(Protocol):
    """What a block asks of its mixer: a new family is one module with these."""

    def __call__(
        self, resid: Tensor, state: LayerState | None = None, padding: Padding | None = None
    ) -> tuple[Tensor, LayerState]: ...

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> LayerState: ...

    def reset_parameters(self, generator: torch.Generator | None = None) -> None: ...


class Block(nn.Module):
    """resid + mixer(norm(resid))."""

    def __init__(self, cfg: SSMConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.residual_in_fp32 = cfg.residual_in_fp32
        self.norm = RMSNorm(cfg.d_model, cfg.eps)
        self.mixer = mixer
        self.hook_resid_pre = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Float[Tensor, "b l d"], state: LayerState | None = None, padding: Padding | None = None
    ) -> tuple[Float[Tensor, "b l d"], LayerState]:
        if self.residual_in_fp32:
            resid = at_least_fp32(resid)
        resid = self.hook_resid_pre(resid)
        out, state = self.mixer(self.norm(resid), state, padding)
        return self.hook_resid_post(resid + out), state


class Stack(nn.Module):
    """Embedding, blocks, final norm and unembedding."""

    def __init__(self, cfg: SSMConfig, mixers: list[nn.Module]) -> None:
        super().__init__()
        self.cfg = cfg
        self.hook_tokens = HookPoint()
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(cfg, mixer) for mixer in mixers)
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg.d_vocab, cfg.d_model)
        self.hook_logits = HookPoint()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the unembedding the embedding's own parameter where the config ties them."""
        if self.cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids to the start of the residual stream."""
        return self.hook_embed(self.embed(self.hook_tokens(tokens)))

    def run_blocks(
        self, resid: Tensor, layers: range, state: ModelState | None, padding: Padding | None
    ) -> tuple[Tensor, ModelState]:
        """Blocks of `layers` in order. Layers that do not run keep their state as it is."""
        states: list[LayerState | None] = [None] * self.cfg.n_layers if state is None else list(state)
        for i in layers:
            resid, states[i] = self.blocks[i](resid, states[i], padding)
        empty = (self.mixer(i).initial_state(resid.shape[0]) if one is None else one for i, one in enumerate(states))
        return resid, ModelState(tuple(empty))

    def to_logits(self, resid: Tensor) -> Tensor:
        """Final norm and unembedding."""
        return self.hook_logits(self.unembed(self.ln_final(resid)))

    def mixer(self, layer: int) -> Mixer:
        """The mixer of one block."""
        return cast(Mixer, self.blocks[layer].mixer)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> ModelState:
        """The memory of a model that has read nothing yet, where the weights are; on "meta" its shapes alone."""
        return ModelState(tuple(self.mixer(i).initial_state(batch, device) for i in range(self.cfg.n_layers)))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: embeddings N(0, 0.02), norms 1, mixers as their papers draw them."""
        self.embed.weight.normal_(std=0.02, generator=generator)
        if not self.cfg.tie_embeddings:
            self.unembed.weight.normal_(std=0.02, generator=generator)
        for i, block in enumerate(self.blocks):
            cast(Block, block).norm.weight.fill_(1)
            self.mixer(i).reset_parameters(generator)
        self.ln_final.weight.fill_(1)
