"""Zamba's hybrid block (Glorioso et al. 2024, arXiv:2405.16712; 2411.15242): a shared transformer, then a mixer.

    a = attention(norm_shared [stream, embedding])      m = MLP(norm2 a)      both without a residual of their own
    stream += mixer(norm(stream + W m))

The transformer's output reaches the stream only through the mixer. Blocks that use one transformer share its weights
and have their own hook points; W, and Zamba2's low-rank adapters, belong to each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.components import Linear, RMSNorm
from hooked_mamba.config import ModelConfig
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.hooks.sited import SitedModule
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.model.stack import Block
from hooked_mamba.state import BlockState, BranchState, Call, columns_read

OWN = ("adapter.", "adapters.")
"""Parameters of attention and MLP that blocks do not share."""


def _norm(name: str, text: str, width: str, called: tuple[str, ...] = ()) -> Child:
    return Child(name, RMSNorm, {"w": width}, {"hook_out": text}, called=called)


class SharedBlock(Block):
    """A block with a shared transformer in front of its mixer."""

    place = "block"
    sites = (
        Site("hook_resid_pre", "b l d", "residual stream entering the block", wide=True),
        _norm("norm_shared", "after the weight: what shared attention reads, stream and embedding side by side", "D"),
        Child("attn"),
        _norm("norm2", "after the weight: what the shared MLP reads", "d", ("ln2",)),
        Child("mlp"),
        Site("hook_shared_out", "b l d", "what the shared transformer adds to the mixer's input"),
        Site("hook_mixer_in", "b l d", "stream and shared transformer: what the mixer's norm reads", wide=True),
        _norm("norm", "after the weight: what in_proj reads", "d", ("ln1",)),
        Child("mixer"),
        Site("hook_mixer_out", "b l d", "what the mixer adds to the stream"),
        Site("hook_resid_post", "b l d", "residual stream leaving the block", wide=True),
    )

    def __init__(self, cfg: ModelConfig, branches: Mapping[str, Branch]) -> None:
        SitedModule.__init__(self)
        self.cfg, self.residual_in_fp32 = cfg, False
        self.stages = (("attn",), ("mlp",), ("mixer",))
        self.norm_names = ("norm_shared", "norm2", "norm")
        self.in_scales, self.out_scales, self.output_sites, self.norm_after = {}, {}, True, False
        self.norm_shared = RMSNorm(2 * cfg.d_model, cfg.eps)
        self.attn = branches["attn"]
        self.norm2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = branches["mlp"]
        self.linear = Linear(cfg.d_model, cfg.d_model, bias=False)
        self.norm = RMSNorm(cfg.d_model, cfg.eps)
        self.mixer = branches["mixer"]
        self.add_sites()

    def site_rows(self) -> tuple[Site | Child, ...]:
        return type(self).sites

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model, "D": 2 * self.cfg.d_model}

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BlockState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], BlockState]:
        if call is None or "embed" not in call.carry:
            raise ValueError(
                "this block's shared attention reads the embedding beside the stream: a pass that starts at a later"
                " layer needs the tokens behind it, pass tokens="
            )
        after: dict[str, BranchState] = {}
        whole = call.whole()

        def through(name: str, x: Tensor) -> Tensor:
            out, after[name] = self.through(name, x, state, call if name == "mixer" else whole)
            return out

        resid = self.hook_resid_pre(resid)
        looked = through("attn", self.norm_shared(torch.cat([resid, call.carry["embed"].to(resid.dtype)], -1)))
        shared = self.hook_shared_out(self.linear(through("mlp", self.norm2(looked))))
        mixed = through("mixer", self.norm(self.hook_mixer_in(resid + shared)))
        added = self.hook_mixer_out(columns_read(mixed, call))
        return self.hook_resid_post(columns_read(resid, call) + added), BlockState(after)

    @property
    def written(self) -> dict[str, str]:
        return {"mixer": "hook_mixer_out"}

    def shared_parameters(self) -> Iterator[tuple[nn.Module, str, str]]:
        """(owner, attribute, name in the block) of what all blocks with one transformer share."""
        for part in ("norm_shared", "attn", "norm2", "mlp"):
            for prefix, owner in self.get_submodule(part).named_modules():
                for attribute, _ in owner.named_parameters(recurse=False):
                    local = f"{prefix}.{attribute}" if prefix else attribute
                    if not local.startswith(OWN):
                        yield owner, attribute, f"{part}.{local}"

    def share_with(self, other: SharedBlock) -> None:
        """Use the other block's transformer."""
        for owner, attribute, name in list(self.shared_parameters()):
            setattr(owner, attribute, other.get_parameter(name))

    @torch.no_grad()
    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Random weights outside of branches: W, Kaiming-uniform."""
        uniform_fan_in(self.linear.weight, self.linear.in_features, generator)
