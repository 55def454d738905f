"""Blocks and their stack, which know nothing about what a branch does inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.components import Embed, LayerNorm, RMSNorm, Unembed, at_least_fp32
from hooked_mamba.config import ModelConfig
from hooked_mamba.documents import Documents
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.hooks.sited import SitedModule
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.states import rows_known
from hooked_mamba.names_elsewhere import advice
from hooked_mamba.state import BlockState, BranchState, Call, ModelState, Padding, columns_read
from hooked_mamba.transformerlens_names import BLOCK

Stages = Sequence[Sequence[str]]
"""What a block does in turn: each stage is one norm and the branches that read it, side by side."""


def _norm(name: str, reader: str, **more: Any) -> Child:
    return Child(name, RMSNorm, {"w": "d"}, {"hook_out": f"after the weight: what {reader} reads"}, **more)


OUTPUTS = {
    "mixer": "what the mixer adds to the stream, its factor included",
    "attn": "what attention adds to the stream, its factor included",
    "moe": "what the experts add to the stream, their factor included",
    "mlp": "what the MLP adds to the stream, its factor included",
}
"""Branches of blocks that have a site for what each adds, in which blocks of one mixer need none."""


class Block(SitedModule):
    """A list of stages: `stream += sum of branches(norm(stream))`, one stage after the other.

    The first stage reads `norm`, the second `norm2`, and so on. Branches are attributes named as in the stages
    ("mixer", "attn", "mlp").

    Parameters
    ----------
    cfg
        The model's.
    branches
        Name -> branch.
    stages
        The block's stages in order, each the names of the branches that read one norm.
    in_scales, out_scales
        Branch -> factor of what it reads, and of what it adds; 1 where absent.
    output_sites
        Whether `hook_{branch}_out` holds what each branch adds.
    norm
        The class of the norms, called with a width and an eps for each stage.
    norm_after
        Whether the norms come after the branches, one in each stage: `stream += norm(branch(stream))`.
    """

    place = "block"
    sites = (
        Site("hook_resid_pre", "b l d", "residual stream entering the block", wide=True),
        _norm("norm", "in_proj", also={"hook_normalized_input": "hook_out"}, called=("ln1",)),
        *(Site(f"hook_{name}_out", "b l d", text) for name, text in OUTPUTS.items()),
        Site("hook_resid_mid", "b l d", "residual stream between two stages of the block", wide=True),
        _norm("norm2", "the second stage", called=("ln2",)),
        Site("hook_resid_post", "b l d", "residual stream leaving the block", wide=True),
    )

    def __init__(
        self,
        cfg: ModelConfig,
        branches: Mapping[str, Branch],
        stages: Stages = (("mixer",),),
        in_scales: Mapping[str, float] | None = None,
        out_scales: Mapping[str, float] | None = None,
        output_sites: bool = False,
        norm: type[SitedModule] = RMSNorm,
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.residual_in_fp32 = cfg.residual_in_fp32
        self.stages = tuple(tuple(stage) for stage in stages)
        self.norm_names = tuple(f"norm{i}" if i > 1 else "norm" for i in range(1, len(self.stages) + 1))
        self.in_scales, self.out_scales = dict(in_scales or {}), dict(out_scales or {})
        self.output_sites, self.norm_after = output_sites, norm_after
        self.output_names = {name: f"hook_{name}_out" for name in branches}
        for name in self.norm_names:
            setattr(self, name, norm(cfg.d_model, cfg.eps))  # type: ignore[call-arg]
        for name, branch in branches.items():
            setattr(self, name, branch)
        self.add_sites()

    def site_rows(self) -> tuple[Site | Child, ...]:
        declared = {row.name: row for row in type(self).sites}
        rows: list[Site | Child] = [declared["hook_resid_pre"]]
        for i, (norm, stage) in enumerate(zip(self.norm_names, self.stages, strict=True)):
            rows += [declared["hook_resid_mid"]] if i else []
            here = [replace(declared["norm2" if i else "norm"], name=norm)]
            rows += [] if self.norm_after else here
            for name in stage:
                rows += [Child(name)]
                rows += here if self.norm_after else []
                rows += [declared[f"hook_{name}_out"]] if self.output_sites else []
        return (*rows, declared["hook_resid_post"])

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return getattr(self, self.norm_names[0]).weight.device

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules; for TransformerLens' names an error says what to use here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in BLOCK:
                raise AttributeError(advice(name, BLOCK)) from None
            raise

    @property
    def branches(self) -> dict[str, Branch]:
        """Branches by name, in order of computation."""
        return {name: getattr(self, name) for stage in self.stages for name in stage}

    @property
    def written(self) -> dict[str, str]:
        """Branch -> the site, within the block, of what it adds to the stream; their sum is what the block adds."""
        return {
            name: f"hook_{name}_out" if self.output_sites else f"{name}.{branch.out_site}"
            for name, branch in self.branches.items()
        }

    @property
    def beside(self) -> tuple[str, ...]:
        """Branches that write into another branch's input and not into the stream, in order of computation."""
        return tuple(name for name in self.branches if name not in self.written)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BlockState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], BlockState]:
        if self.residual_in_fp32:
            resid = at_least_fp32(resid)
        resid = self.hook_resid_pre(resid)
        whole = call if call is None else call.whole()
        after: dict[str, BranchState] = {}
        modules = self._modules  # many small look-ups, which count in a step of generation
        for i, (norm_name, stage) in enumerate(zip(self.norm_names, self.stages, strict=True)):
            norm = cast(nn.Module, modules[norm_name])
            resid = self.hook_resid_mid(resid) if i else resid
            here = call if i == len(self.stages) - 1 else whole
            x = resid.to(self.norm.weight.dtype) if self.norm_after else norm(resid)
            outs: list[Tensor] = []
            for name in stage:
                out, after[name] = self.through(name, scaled(x, self.in_scales.get(name)), state, here)
                out = columns_read(out, here)
                out = norm(out) if self.norm_after else out
                out = scaled(out, self.out_scales.get(name))
                out = self.__dict__[self.output_names[name]](out) if self.output_sites else out
                outs.append(out)
            resid = columns_read(resid, here) + reduce(torch.add, outs)
        return self.hook_resid_post(resid), BlockState(after)

    def through(
        self, name: str, x: Float[Tensor, "b l i"], state: BlockState | None, call: Call | None
    ) -> tuple[Float[Tensor, "b m d"], BranchState]:
        """One branch's output and state; its state hook points know the call's padding and documents."""
        branch = cast(Branch, self._modules[name])
        with rows_known(branch, call):
            return branch(x, None if state is None else state[name], call)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> BlockState:
        """The empty memory of every branch."""
        return BlockState({name: branch.initial_state(batch, device) for name, branch in self.branches.items()})

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Random weights of what is neither norm nor branch; here nothing."""


def scaled(x: Tensor, factor: float | None) -> Tensor:
    """x times a factor, if there is one."""
    return x if factor is None or factor == 1 else x * factor


class Stack(SitedModule):
    """Embedding, blocks, final norm and unembedding."""

    place = ""
    sites = (
        Site("hook_tokens", "b l", "token ids, if the input is tokens", integer=True),
        Site("hook_embed", "b l d", "token embedding"),
        Child(
            "ln_embed",
            LayerNorm,
            {"w": "d"},
            {"hook_scale": "the divisor of the norm behind the embedding, where there is one"},
        ),
        Child("blocks"),
        Child(
            "ln_final",
            RMSNorm,
            {"w": "d"},
            {"hook_scale": "the final norm's divisor", "hook_out": "what the unembedding reads"},
        ),
        Site("hook_logits", "b l V", "logits", wide=True),
    )

    embedding_multiplier: float | None = None
    """Factor of the embedding; None: 1."""
    logit_multiplier: float | None = None
    """Factor of the logits; None: 1."""

    norm_class: ClassVar[type[SitedModule]] = RMSNorm
    """The final norm's class."""
    norms_embedding: ClassVar[bool] = False
    """Whether a norm of its own follows the embedding."""

    def __init__(self, cfg: ModelConfig, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        if self.norms_embedding:
            self.ln_embed = self.norm_class(cfg.d_model, cfg.eps)  # type: ignore[call-arg]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = self.norm_class(cfg.d_model, cfg.eps)  # type: ignore[call-arg]
        self.unembed = Unembed(cfg.d_vocab, cfg.d_model)
        self.add_sites()
        self.tie_weights()

    def sizes(self) -> dict[str, int]:
        return {"d": self.cfg.d_model, "V": self.cfg.d_vocab}

    def tie_weights(self) -> None:
        """Make the unembedding the embedding's own parameter if the config ties them."""
        if self.cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids to the start of the residual stream."""
        embedded = self.hook_embed(scaled(self.embed(self.hook_tokens(tokens)), self.embedding_multiplier))
        return self.ln_embed(embedded) if self.norms_embedding else embedded

    padding: Padding | None = None
    """Of the forward pass under way, or of the last one."""

    def run_blocks(
        self,
        resid: Tensor,
        layers: range,
        state: ModelState | None,
        padding: Padding | None,
        carry: Mapping[str, Tensor] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Blocks of `layers` in order. Layers that do not run keep their state as it is.

        Raises
        ------
        ValueError
            Documents are packed, and a branch cannot keep them apart.
        """
        if documents is not None:
            self.check_packs(layers)
        call = Call(padding, None if state is None else state.seen, dict(carry or {}), documents)
        states: list[BlockState | None] = [None] * len(self.blocks) if state is None else list(state)
        for i in layers:
            resid, states[i], call = self.run_block(i, resid, states[i], call)
        batch, length, _ = resid.shape
        filled = (self.block(i).initial_state(batch) if one is None else one for i, one in enumerate(states))
        return resid, ModelState(tuple(filled), call.seen_after(batch, length, resid.device))

    def run_block(
        self, layer: int, resid: Float[Tensor, "b l d"], state: BlockState | None, call: Call
    ) -> tuple[Float[Tensor, "b m d"], BlockState, Call]:
        """One block on its own device; also the call, there."""
        block = self.block(layer)
        device = block.device
        if device != resid.device:
            resid, call = resid.to(device), call.to(device)
        if state is not None and any(part.device != device for part in state):
            state = state.map(lambda part: part.to(device))
        resid, state = block(resid, state, call)
        return resid, state, call

    def check_packs(self, layers: range) -> None:
        """Refuse packed documents if a branch would let one read another."""
        for i in layers:
            for name, branch in self.block(i).branches.items():
                if not branch.packs:
                    what = branch.title or type(branch).__name__
                    raise ValueError(
                        f"document_ids: blocks.{i}.{name} ({what}) cannot keep the documents of a row apart; give each"
                        " document its own row"
                    )

    def to_logits(self, resid: Float[Tensor, "b l d"], tokens: Sequence[int] | None = None) -> Float[Tensor, "b l v"]:
        """Final norm and unembedding; with `tokens` the logits of these alone, which `hook_logits` does not see."""
        normed = self.ln_final(resid.to(self.ln_final.weight.device)).to(self.unembed.weight.device)
        if tokens is not None:
            return scaled(self.unembed(normed, tokens), self.logit_multiplier)
        return self.hook_logits(scaled(self.unembed(normed), self.logit_multiplier))

    @property
    def causal(self) -> bool:
        """Whether every position reads only itself and earlier ones."""
        return all(branch.causal for i in range(len(self.blocks)) for branch in self.block(i).branches.values())

    def hooked_inside(self, layer: int) -> bool:
        """Whether a function is on a hook point of a block behind the first, `hook_resid_pre`."""
        points = (module for module in self.block(layer).modules() if isinstance(module, HookPoint))
        return any(point.wanted for point in points if point is not self.block(layer).hook_resid_pre)

    def handed_on(self) -> dict[str, str]:
        """Name of a value that one layer leaves for later ones -> its site, by its full name."""
        return {
            value: f"blocks.{i}.{name}.{site}"
            for i in range(len(self.blocks))
            for name, branch in self.block(i).branches.items()
            for value, site in branch.hands_on.items()
        }

    def block(self, layer: int) -> Block:
        """One block."""
        return cast(Block, self.blocks[layer])

    def mixer(self, layer: int) -> Branch:
        """The mixer of one block."""
        return self.block(layer).branches["mixer"]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> ModelState:
        """The state of a model that has read nothing yet, on the weights' device; on "meta" only its shapes."""
        seen = torch.zeros(batch, dtype=torch.long, device=self.embed.weight.device if device is None else device)
        return ModelState(tuple(self.block(i).initial_state(batch, device) for i in range(len(self.blocks))), seen)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: embeddings N(0, 0.02), norms 1, branches as their papers draw them."""
        self.embed.weight.normal_(std=0.02, generator=generator)
        if not self.cfg.tie_embeddings:
            self.unembed.weight.normal_(std=0.02, generator=generator)
        for i in range(len(self.blocks)):
            block = self.block(i)
            for name in block.norm_names:
                reset_norm(getattr(block, name))
            block.reset_own(generator)
            for branch in block.branches.values():
                branch.reset_parameters(generator)
        for norm in (self.ln_final, *([self.ln_embed] if self.norms_embedding else [])):
            reset_norm(norm)


def reset_norm(norm: nn.Module) -> None:
    """Weight 1 and bias 0."""
    for name, parameter in norm.named_parameters():
        parameter.fill_(1 if name == "weight" else 0)
