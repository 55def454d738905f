"""Which nodes of a run are kept, and the real model with all others ablated.

Mixers keep the scan's terms of chosen heads (layer, source, channel); coded layers keep chosen latents and errors. What
is ablated is replaced by what it was in a reference run, or by zero. Selection and gates are the model's own, made anew
from what the ablated model computes: nothing is frozen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from circuits.frozen_mixer import SITES, FrozenMixer
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from hooked_mamba.analysis.captured import captured
from hooked_mamba.config import Mamba2Config
from hooked_mamba.hooks.names import unalias
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.scan_view import run_scan


@dataclass(frozen=True)
class Keep:
    """Masks of what stays, by layer. Between 0 and 1 they mix a node with what it is when it is ablated."""

    heads: dict[int, Shaped[Tensor, "l E"]]
    features: dict[int, Shaped[Tensor, "l F"]]
    errors: dict[int, Shaped[Tensor, " l"]]

    @classmethod
    def nothing(cls, frozen: FrozenModel) -> Keep:
        """All masks, all False."""
        l, cfg, device = frozen.length, frozen.model.cfg, frozen.tokens.device
        mixed = [i for i in range(cfg.n_layers) if i not in frozen.coded or frozen.coded[i].mode == "hybrid"]
        return cls(
            {i: torch.zeros(l, cfg.E, dtype=torch.bool, device=device) for i in mixed},
            {
                i: torch.zeros(l, coded.coder.cfg.d_sae, dtype=torch.bool, device=device)
                for i, coded in frozen.coded.items()
            },
            {i: torch.zeros(l, dtype=torch.bool, device=device) for i in frozen.coded},
        )

    @classmethod
    def everything(cls, frozen: FrozenModel) -> Keep:
        """All masks, all True: the model as it is."""
        empty = cls.nothing(frozen)
        return cls(*({i: ~mask for i, mask in part.items()} for part in (empty.heads, empty.features, empty.errors)))

    @classmethod
    def of_graph(cls, frozen: FrozenModel, graph: Graph, errors: bool = False) -> Keep:
        """What the nodes of a graph are; its error nodes only on request."""
        kept = cls.nothing(frozen)
        for node in graph.nodes:
            if node.kind == "head":
                kept.heads[node.layer][node.position, node.index] = True
            elif node.kind == "feature":
                kept.features[node.layer][node.position, node.index] = True
            elif node.kind == "error" and errors:
                kept.errors[node.layer][node.position] = True
        return kept

    def where(self, mask: Bool[Tensor, " m"]) -> Keep:
        """Of all heads, then all features, as they stand here, those where a flat mask is True; no errors."""
        parts = [*self.heads.values(), *self.features.values()]
        pieces = iter(mask.split([part.numel() for part in parts]))
        return Keep(
            {i: next(pieces).reshape(part.shape) for i, part in self.heads.items()},
            {i: next(pieces).reshape(part.shape) for i, part in self.features.items()},
            {i: torch.zeros_like(part, dtype=torch.bool) for i, part in self.errors.items()},
        )

    def __len__(self) -> int:
        """Nodes that stay."""
        return sum(int(mask.sum()) for part in (self.heads, self.features, self.errors) for mask in part.values())


@contextmanager
def only(frozen: FrozenModel, keep: Keep, reference: FrozenModel | None = None) -> Iterator[Any]:
    """The real model with everything outside of `keep` ablated, in passes over prompts of the run's length.

    Parameters
    ----------
    frozen
        Tells the model, its coders and their modes.
    keep
        What stays.
    reference
        A run of as many positions whose mean over its rows stands in for what is ablated; None: zero.

    Raises
    ------
    ValueError
        The reference has another length or lacks a coder, or the run is padded or goes on from a memory, which these
        passes do not.
    """
    model = frozen.model
    if frozen.mask is not None:
        raise ValueError("this run is padded, and nodes are ablated in whole prompts: give the prompt alone")
    if any(bool(part.any()) for state in frozen.before for part in state):
        raise ValueError("this run goes on from an initial state, and nodes are ablated in whole prompts: give one")
    if reference is not None and reference.length != frozen.length:
        raise ValueError(f"the reference has {reference.length} positions, this run {frozen.length}")
    if reference is not None and (lacking := sorted(frozen.coded.keys() - reference.coded.keys())):
        raise ValueError(f"the reference is not read through the coders of layers {lacking}: give it the run's coders")
    n = model.cfg.n_layers
    per_block = ("hook_resid_pre", "norm.hook_scale", "norm.hook_out", *(f"mixer.{site}" for site in SITES))
    names = [f"blocks.{i}.{site}" for i in range(n) for site in per_block]
    if isinstance(model.cfg, Mamba2Config):
        names += [f"blocks.{i}.mixer.norm.hook_scale" for i in range(n)]
    before = model.initial_state(1)

    def cut_scan(y: Tensor, hook: HookPoint) -> Tensor:
        layer = hook.layer()
        view = cache.scan_view(layer)
        mask = keep.heads[layer].to(view.u.dtype).reshape(view.u.shape[1:])
        usual = 0.0 if reference is None else reference.mixer(layer).u.mean(0).reshape(view.u.shape[1:])
        u = view.u * mask + usual * (1 - mask)
        return run_scan(view.with_input(u.to(view.u.dtype))).reshape(y.shape).to(y.dtype)

    def cut_output(out: Tensor, hook: HookPoint) -> Tensor:
        layer = hook.layer()
        coded = frozen.coded[layer]
        read = unalias(coded.coder.cfg.in_site)
        x = out if read == hook.name else cache[read]  # an SAE reads what is here, not yet in the cache
        z = coded.coder.encode(x)
        mask, stays = keep.features[layer].to(z.dtype), keep.errors[layer].to(out.dtype).unsqueeze(-1)
        usual_z: Tensor | float = 0.0
        usual_error: Tensor | float = 0.0
        if reference is not None:
            usual_z = reference.latents(layer).mean(0)
            usual_error = reference.coded[layer].error.mean(0)
        said = coded.coder.decode(z * mask + usual_z * (1 - mask), x)
        true, moved = out, torch.zeros_like(out)
        if coded.mode == "hybrid":
            mixer = FrozenMixer.of(cache, layer, before[layer], None)
            rows = torch.arange(out.shape[0], device=out.device)
            heads = keep.heads[layer].to(mixer.p.dtype)
            usual_p = 0.0 if reference is None else reference.mixer(layer).p.mean(0)
            true = mixer.local(mixer.p - mixer.b_x, rows)
            constant = out - mixer.moved(mixer.p, rows) - true
            moved = mixer.moved(mixer.p * heads + usual_p * (1 - heads), rows) + constant
        error = true - coded.coder(x)
        return (said + error * stays + usual_error * (1 - stays) + moved).to(out.dtype)

    hooks: list[tuple[str, Any]] = []
    for i in range(n):
        hooks.append(
            (f"blocks.{i}.mixer.hook_out_proj", cut_output)
            if i in frozen.coded
            else (f"blocks.{i}.mixer.hook_y", cut_scan)
        )
    with captured(model, names) as cache, model.hooks(hooks):
        yield model
