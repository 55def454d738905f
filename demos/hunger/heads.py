"""Heads: what one unit of a layer carries from a token to later ones, and the same cut out of the real model.

A unit is a channel of a mixer, or a head of attention. MLPs and experts read their own token alone and have none.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from circuits import Attribution
from circuits.interventions import CutHead, ScaleUnit
from demos.hunger.subject import Subject
from hooked_mamba.frozen.places import Part, branch_of, part_of

Head = tuple[Part, int, int, float]
"""Layer (or its branch), unit, source position, effect."""

CARRIES = ("mixer", "attn")
"""Branches that bring tokens together."""


def units(subject: Subject, layers: range) -> list[tuple[Part, int]]:
    """All units of some layers, lowest first."""
    found: list[tuple[Part, int]] = []
    for i in layers:
        branches = subject.model.block(i).branches
        for name in (name for name in CARRIES if name in branches):
            part = part_of(i, name)
            found += [(part, unit) for unit in range(branches[name].width // size(subject, part))]
    return found


def size(subject: Subject, part: Part) -> int:
    """Channels of a unit."""
    layer, name = branch_of(part)
    return 1 if name == "mixer" else subject.model.block(layer).branches[name].unit


def effects(subject: Subject, made: Attribution) -> dict[Part, Float[Tensor, "l U"]]:
    """What every unit carries from every token to the first target."""
    return {
        part: heads[0].unflatten(1, (-1, size(subject, part))).sum(2)
        for part, heads in made.token_heads.items()
        if branch_of(part)[1] in CARRIES
    }


def strongest(subject: Subject, made: Attribution, n: int | None = None) -> list[Head]:
    """The n heads of largest absolute effect, or all of them, largest first."""
    found: list[Head] = []
    for part, heads in effects(subject, made).items():
        flat, wide = heads.flatten(), heads.shape[1]
        best = flat.abs().topk(min(n or flat.numel(), flat.numel())).indices.tolist()
        found += [(part, i % wide, i // wide, float(flat[i])) for i in best]
    return sorted(found, key=lambda head: -abs(head[3]))[:n]


def cut(part: Part, unit: int, sources: Bool[Tensor, "b l"]) -> CutHead | ScaleUnit:
    """A unit without what it carries from some tokens; the selection, or the pattern, stays."""
    if branch_of(part)[1] == "mixer":
        assert isinstance(part, int)
        return CutHead(part, sources, unit, source="token")
    return ScaleUnit(part, unit, sources)


def words(part: Part, unit: int) -> str:
    """ "layer 1, channel 8" or "layer 2, attention head 3"."""
    layer, name = branch_of(part)
    return f"layer {layer}, {'channel' if name == 'mixer' else 'attention head'} {unit}"
