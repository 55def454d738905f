"""Names of the parts of a run: branches, streams and nodes, and the hook sites at which they stand."""

from __future__ import annotations

from typing import Literal, NamedTuple

from hooked_mamba.mixers.base import Branch
from hooked_mamba.model.hooked_model import HookedModel

Stream = Literal["resid", "in", "out", "y", "u", "p"]
"""The residual stream entering a layer (n_layers: the final norm's input), the stream that one branch's norm reads, the
branch's output alone, or a node of its chain: what its scan gives, the value u that enters its memory, or the input p
of its convolution."""


Part = int | str
"""A branch of a block: the number of its layer if it is a mixer, else as in "3.mlp"."""


def part_of(layer: int, branch: str) -> Part:
    """What a branch is called: the number of its layer for a mixer, with the branch's name for others."""
    return layer if branch == "mixer" else f"{layer}.{branch}"


def branch_of(part: Part) -> tuple[int, str]:
    """(layer, branch) of a part."""
    layer, _, branch = str(part).partition(".")
    return int(layer), branch or "mixer"


def in_order(part: Part) -> tuple[int, str]:
    """What parts are sorted by: a block's mixer first, its other branches by name."""
    layer, branch = branch_of(part)
    return layer, "" if branch == "mixer" else branch


class Place(NamedTuple):
    """A stream of a run."""

    stream: Stream
    layer: Part
    """Of "resid" the number of the layer, of all others the part."""
    normed: bool = False
    """Whether it is read through the layer's (or the part's) norm."""
    weighted: bool = True
    """Whether what is read has been multiplied with the norm's weight."""


def frozen_sites(model: HookedModel, layer: int) -> list[str]:
    """The sites of one block that its branches' affine maps are made of."""
    block, at = model.block(layer), f"blocks.{layer}."
    names = [f"{at}hook_resid_pre"]
    names += [f"{at}hook_mixer_in"] if block.beside else [f"{at}hook_resid_mid"] * (len(block.stages) > 1)
    names += [f"{at}{norm}.{site}" for norm in block.norm_names for site in ("hook_scale", "hook_out")]
    for name, branch in block.branches.items():
        names += [f"{at}{name}.{site}" for site in branch.frozen_sites]
        names.append(out_site(model, layer, name))
    return list(dict.fromkeys(names))


def out_site(model: HookedModel, layer: int, branch: str = "mixer") -> str:
    """The site of what a branch adds to the stream."""
    block = model.block(layer)
    return f"blocks.{layer}.{block.written.get(branch) or f'{branch}.{block.branches[branch].out_site}'}"


def output_sites(model: HookedModel, layer: int, branch: str) -> tuple[str, ...]:
    """Sites at which a branch's whole output stands: that of what it adds to the stream, and its own where no factor
    and no norm lie between the two."""
    block, written = model.block(layer), out_site(model, layer, branch)
    if block.out_scales.get(branch) not in (None, 1) or block.norm_after:
        return (written,)
    return written, f"blocks.{layer}.{branch}.{block.branches[branch].out_site}"


def u_site(branch: Branch) -> str | None:
    """The own name of the site of the value that enters a branch's memory (of an MLP, of its neurons)."""
    return branch.places.get("u") if branch.frozen_sites else None


def site_of(model: HookedModel, part: Part, node: str) -> str:
    """The site of a branch's output ("out") or of a node of its chain."""
    layer, name = branch_of(part)
    if name not in model.block(layer).branches:
        return given_site(model, layer, name)
    if node == "out":
        return out_site(model, layer, name)
    return f"blocks.{layer}.{name}.{model.block(layer).branches[name].site_at(node)}"


def given_site(model: HookedModel, layer: int, name: str) -> str:
    """The site of a value that a branch makes for layers above it.

    Raises
    ------
    KeyError
        None does.
    """
    branches = model.block(layer).branches
    for branch, module in branches.items():
        if name in module.hands_on:
            return f"blocks.{layer}.{branch}.{module.hands_on[name]}"
    raise KeyError(f"block {layer} has no branch {name!r}; it has {', '.join(branches)}")


def norm_name(model: HookedModel, layer: int, branch: str) -> str:
    """The norm of a block that a branch reads the stream through: "norm", "norm2", ..."""
    block = model.block(layer)
    return next(norm for norm, stage in zip(block.norm_names, block.stages, strict=True) if branch in stage)
