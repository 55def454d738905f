"""HookedHybrid: blocks of state-space mixers, attention, MLPs and experts in any arrangement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, branch_of
from hooked_mamba.mixers.attention import Attention
from hooked_mamba.mixers.base import Branch, branch_class
from hooked_mamba.mixers.gated_deltanet import GatedDeltaNet
from hooked_mamba.mixers.mamba1 import Mamba1Mixer
from hooked_mamba.mixers.mamba1_heads import HeadedMamba1Mixer
from hooked_mamba.mixers.mamba2 import Mamba2Mixer
from hooked_mamba.mixers.mamba3 import Mamba3Mixer
from hooked_mamba.mixers.mamba3_mimo import Mamba3MIMOMixer
from hooked_mamba.mixers.mlp import MLP
from hooked_mamba.mixers.moe import MoE
from hooked_mamba.mixers.short_conv import ShortConv
from hooked_mamba.model.hooked_model import HookedModel
from hooked_mamba.model.shared_block import SharedBlock
from hooked_mamba.model.stack import Block, Stages

BRANCHES = (
    *(Mamba1Mixer, HeadedMamba1Mixer, Mamba2Mixer, Mamba3Mixer, Mamba3MIMOMixer, GatedDeltaNet),
    *(ShortConv, Attention, MLP, MoE),
)
"""What may stand in the blocks of a hybrid here; further kinds join by being defined."""


class HookedHybrid(HookedModel):
    """A hybrid with a hook point at every internal site; its config says which block has which branches."""

    family = "hybrid"
    config_class = HybridConfig
    branch_classes: ClassVar[dict[str, type[Branch]]] = {}
    architecture: ClassVar[str | None] = None
    """The one architecture that a subclass takes; None: any."""
    cfg: HybridConfig

    def _build(self, cfg: Any, tokenizer: Any) -> None:
        super()._build(cfg, tokenizer)
        if self.architecture not in (None, cfg.architecture):
            raise TypeError(
                f"{type(self).__name__} takes a config of architecture {self.architecture!r}, got"
                f" {cfg.architecture!r}: use HookedHybrid or load_model"
            )
        self.embedding_multiplier, self.logit_multiplier = cfg.embedding_multiplier, cfg.logit_multiplier

    @classmethod
    def stages(cls, cfg: HybridConfig, layer: int) -> Stages:
        return tuple(tuple(branch_of(entry)[0] for entry in stage) for stage in cfg.layout[layer])

    @classmethod
    def make_block(cls, cfg: HybridConfig, layer: int) -> Block:
        stages = cls.stages(cfg, layer)
        shapes = dict(branch_of(entry) for stage in cfg.layout[layer] for entry in stage)
        branches = {name: branch_class(cfg.branches[key])(cfg.branches[key], layer) for name, key in shapes.items()}
        if cfg.shared is not None and cfg.shared[layer] is not None:
            return SharedBlock(cfg, branches)
        after = layer in cfg.norm_after
        return Block(cfg, branches, stages, cfg.in_scales, cfg.out_scales, output_sites=True, norm_after=after)

    def tie_weights(self) -> None:
        super().tie_weights()
        first: dict[int, SharedBlock] = {}
        for block, number in zip(self.blocks, self.cfg.shared or (), strict=False):
            if number is not None and isinstance(block, SharedBlock) and first.setdefault(number, block) is not block:
                block.share_with(first[number])

    def carried(
        self, carry: Mapping[str, Tensor] | None, embedded: Tensor | None, tokens: Tensor | None
    ) -> Mapping[str, Tensor] | None:
        """The embedding, if blocks read it; a pass that starts at a later layer computes it from its tokens."""
        if self.cfg.shared is None or (carry is not None and "embed" in carry):
            return carry
        if embedded is None and tokens is not None:
            embedded = self.embed_tokens(tokens.to(self.device))
        return carry if embedded is None else {**(carry or {}), "embed": embedded}


class HookedDeltaNet(HookedHybrid):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464) as the package fla builds it: the mixer, then an MLP.

    A hybrid of one kind of mixer; its config is a :class:`HybridConfig` of architecture "gated_deltanet".
    """

    architecture = "gated_deltanet"


class HookedMamba3(HookedHybrid):
    """Mamba-3 (arXiv:2603.15569), with single inputs and outputs or several (MIMO), one mixer per block.

    A hybrid of one kind of mixer; its config is a :class:`HybridConfig` of architecture "mamba3".
    """

    architecture = "mamba3"
