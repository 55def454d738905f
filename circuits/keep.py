"""Which nodes of a run are kept, and the real model with all others ablated.

Branches keep chosen units: the scan's terms of channels (layer, source, channel), attention heads at a source, neurons,
experts; coded layers keep chosen latents and errors.
What is ablated is replaced by what it was in a reference run, or by zero. Selection and gates are the model's own, made
anew from what the ablated model computes: nothing is frozen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from circuits.coded_layer import CodedLayer
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from hooked_mamba.analysis.captured import captured
from hooked_mamba.frozen.places import Part, branch_of, frozen_sites, in_order, site_of
from hooked_mamba.frozen.run import frozen_branch
from hooked_mamba.hooks.names import unalias
from hooked_mamba.hooks.points import HookPoint
from saes.windows import windows


@dataclass(frozen=True)
class Keep:
    """Masks of what stays, by part. Between 0 and 1 they mix a node with what it is when it is ablated."""

    heads: dict[Part, Shaped[Tensor, "l U"]]
    """Of units: channels of mixers, attention heads, neurons, experts."""
    features: dict[Part, Shaped[Tensor, "l F"]]
    errors: dict[Part, Shaped[Tensor, " l"]]

    @classmethod
    def nothing(cls, frozen: FrozenModel) -> Keep:
        """All masks, all False."""
        l, device = frozen.length, frozen.tokens.device
        return cls(
            {
                part: torch.zeros(l, frozen.chain(part).n_units, dtype=torch.bool, device=device)
                for part in frozen.open_parts()
            },
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
                kept.heads[node.part][node.position, node.index] = True
            elif node.kind == "feature":
                kept.features[node.part][node.position, node.index] = True
            elif node.kind == "error" and errors:
                kept.errors[node.part][node.position] = True
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
        The reference has another length or lacks a coder, or the run is padded or continues from a memory, which these
        passes do not.
    """
    model = frozen.model
    if frozen.mask is not None:
        raise ValueError("this run is padded, and nodes are ablated in whole prompts: give the prompt alone")
    if any(bool(part.any()) for state in frozen.before for part in state):
        raise ValueError("this run continues from an initial state, and nodes are ablated in whole prompts: give one")
    if reference is not None and reference.length != frozen.length:
        raise ValueError(f"the reference has {reference.length} positions, this run {frozen.length}")
    if reference is not None and (lacking := sorted(frozen.coded.keys() - reference.coded.keys(), key=in_order)):
        raise ValueError(f"the reference is not read through the coders of layers {lacking}: give it the run's coders")
    names = [name for i in range(frozen.n_layers) for name in frozen_sites(model, i)]
    before = model.initial_state(1)

    def cut_scan(y: Tensor, part: Part, hook: HookPoint) -> Tensor:
        view = cache.scan_view(*branch_of(part))
        mask = frozen.chain(part).of_units(keep.heads[part].to(view.u.dtype)).reshape(view.u.shape[1:])
        usual = 0.0 if reference is None else reference.chain(part).u.mean(0).reshape(view.u.shape[1:])
        change = (usual - view.u) * (1 - mask)
        return y + view.over(change.to(view.u.dtype)).out().y.reshape(y.shape).to(y.dtype)

    def cut_values(u: Tensor, part: Part, hook: HookPoint) -> Tensor:
        """Of a branch that moves nothing between positions: neurons, or those of the experts that this pass chose."""
        layer, name = branch_of(part)
        chain, mask = frozen.chain(part), keep.heads[part].to(u.dtype)
        shape = u.shape[1:]
        usual: Tensor | float = 0.0
        if chain.routing is None:
            mask = chain.of_units(mask).reshape(shape)
            usual = 0.0 if reference is None else reference.chain(part).u.mean(0).to(u.dtype).reshape(shape)
        else:  # of an expert that others choose elsewhere there is no mean here
            chosen = cache[f"blocks.{layer}.{name}.hook_expert_indices"]
            mask = mask.expand(*chosen.shape[:-1], -1).gather(-1, chosen).unsqueeze(-1)
        return u * mask + usual * (1 - mask)

    def cut_coded(value: Tensor, coded: CodedLayer, hook: HookPoint) -> Tensor:
        layer, out = coded.part, value.flatten(2)
        read = unalias(coded.coder.cfg.in_site)
        x = out if read == hook.name else cache[read].flatten(2)  # an SAE reads what is here, not yet in the cache
        x = x if coded.coder.cfg.window == 1 else windows(x, coded.coder.cfg.window)[0]
        z = coded.coder.encode(x)
        mask, stays = keep.features[layer].to(z.dtype), keep.errors[layer].to(out.dtype).unsqueeze(-1)
        usual_z: Tensor | float = 0.0
        usual_error: Tensor | float = 0.0
        if reference is not None:
            usual_z = reference.latents(layer).mean(0)
            usual_error = reference.coded[layer].error.mean(0)
        said = coded.coder.decode(z * mask + usual_z * (1 - mask), x)
        true, moved = out, torch.zeros_like(out)
        if frozen.is_split(layer):
            assert isinstance(layer, int)  # mixers alone have a local part
            chain = frozen_branch(cache, layer, "mixer", before[layer]["mixer"], None)
            rows = torch.arange(out.shape[0], device=out.device)
            heads = keep.heads[layer].to(chain.p.dtype)
            usual_p = 0.0 if reference is None else reference.chain(layer).p.mean(0)
            true = chain.push_own(chain.p - chain.input_bias, rows)
            constant = out - chain.push_across(chain.p, rows) - true
            moved = chain.push_across(chain.p * heads + usual_p * (1 - heads), rows) + constant
        error = true - coded.coder(x)
        return (said + error * stays + usual_error * (1 - stays) + moved).to(out.dtype).reshape(value.shape)

    hooks: list[tuple[str, Any]] = [
        (site_of(model, coded.part, coded.node), partial(cut_coded, coded=coded)) for coded in frozen.coded.values()
    ]
    for part in keep.heads:
        if part not in frozen.coded:
            moves = frozen.chain(part).mix is not None
            cut, node = (cut_scan, "y") if moves else (cut_values, "u")
            hooks.append((site_of(model, part, node), partial(cut, part=part)))
    with captured(model, names) as cache, model.hooks(hooks):
        yield model
