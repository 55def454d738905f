"""The same edits on the frozen model: norms, gates and selection held at the run's, so that effects are exact sums.

The frozen model is affine in its streams, and an edited one is so too. A mixer whose sources S are cut from targets T,
and whose state is edited, h_m <- M h_m + v, gives

    y_t = C_t h_t + D u_t - (what reaches t from S, if t is in T)

with u = (u of the run) + (what the edits below have made of it); what reaches t is scaled by M on its way. The change
of its output is what these terms add to the change that passes through the mixer without edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import require_sums
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from circuits.interventions.edits import Intervention, OfState, ScaleEmbedding, ScaleUnit, checked
from circuits.interventions.parts import by_coder, coders_change, cuts_of, factors, state_changes
from circuits.push import Changes, Pushed, held_heads
from circuits.read_values import read_by
from circuits.targets import Target, chosen_targets
from hooked_mamba.analysis.cuts import Cut, Pass, StateChange, lost_reads, state_edits
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.places import Place
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.ops.interface import StateEdits
from saes.coder import SparseCoder
from saes.targets import LOCAL, stream_values, streams_of


@torch.no_grad()
def frozen_effects(
    frozen: FrozenModel,
    edits: Intervention | Iterable[Intervention],
    targets: Target | Sequence[Any],
    hold: Graph | None = None,
) -> Float[Tensor, "targets b"]:
    """How all edits together change targets on the frozen model, for each row of the run: direct effects.

    Latents and errors of coded layers are where paths end: they are what they were in the run, or what the edits make
    of that, whatever is edited below them. Where no coder stands, changes pass.

    Parameters
    ----------
    frozen
        The run. Positions are its columns.
    edits
        As for :func:`intervened`.
    targets
        One or several.
    hold
        A graph of this run whose heads hold their values, so that the effect of a single node's ablation is minus its
        edge to the target.

    Raises
    ------
    ValueError
        No target, edits that do not fit the model, a coder that writes to a site that is no stream of the frozen model,
        a state or a write of a split layer, whose local part the coder has taken out of the scan, or a run with another
        rule than "none".
    """
    if frozen.rule.name != "none":
        raise ValueError(f"effects follow the value path: this run has selection={frozen.rule.name!r}, expected 'none'")
    chosen = chosen_targets(targets)
    require_sums(frozen, chosen)
    listed = checked(frozen.model, edits)
    changes = Changes(frozen.rows_of(1), held={} if hold is None else held_heads(frozen, hold))
    changes.inside = _Inside(frozen, listed, changes)
    for edit in listed:
        if isinstance(edit, ScaleEmbedding):
            share = factors(edit.positions, edit.factor, frozen.resid(0)[..., 0], None, frozen.padding)
            embed = frozen.resid(0) + changes.streams.get(0, 0.0)
            changes.streams[0] = changes.streams.get(0, 0.0) + (share - 1).unsqueeze(-1) * embed
        if isinstance(edit, ScaleUnit):
            changes.heads[edit.part] = changes.heads.get(edit.part, 0.0) + _unit_change(frozen, edit)
    for coder, mine in by_coder(listed):
        place, change = _written(frozen, coder), _change_of(frozen, coder, mine)
        if place.stream == "u":
            if frozen.is_split(place.layer):
                raise ValueError(
                    f"what layer {place.layer} writes cannot be edited: it is a split one, use mode 'mixer' or 'write'"
                )
            change = frozen.chain(place.layer).of_site(change)
        streams: Any = {"out": changes.outs, "u": changes.heads, "resid": changes.streams}
        into = streams[place.stream]
        into[place.layer] = into.get(place.layer, 0.0) + change
    pushed = Pushed(frozen, changes)
    effects = []
    for target in chosen:
        covectors = [target.covector(frozen, row) for row in range(frozen.batch)]
        effect = torch.stack([pushed.read(c)[row] for row, c in enumerate(covectors)])
        # A coder on u reads it before its own edit, as it does in the real model.
        if covectors[0].stream == "out" and covectors[0].layer in changes.outs:
            added = changes.outs[covectors[0].layer]
            effect = effect + torch.stack([c.of(added[row]) for row, c in enumerate(covectors)])
        effects.append(effect)
    return torch.stack(effects)


def _unit_change(frozen: FrozenModel, edit: ScaleUnit) -> Float[Tensor, "b l E"]:
    """What scaling a unit adds to the values that its branch passes on."""
    chain = frozen.chain(edit.part)
    one = chain.u.new_zeros(chain.n_units)
    one[edit.index] = 1
    share = factors(edit.positions, edit.factor, frozen.resid(0)[..., 0], None, frozen.padding)
    every_row = torch.arange(frozen.batch, device=one.device)
    return (share - 1).unsqueeze(-1) * chain.u * chain.of_units(one.expand(frozen.length, -1), every_row)


def _written(frozen: FrozenModel, coder: SparseCoder) -> Place:
    """The stream that a coder's prediction is part of, "out", "u" or "resid", and whose."""
    site = streams_of(coder.cfg)[1].removesuffix(LOCAL)
    try:
        place = frozen.place_of(site)
    except ValueError:
        place = None
    if place is None or place.normed or place.stream not in ("out", "u", "resid"):
        raise ValueError(
            f"a coder that writes to {site} has no place in the frozen model: expected hook_resid_pre, hook_resid_post,"
            " a branch's output (mixer.hook_out_proj), or the value that enters a mixer's memory (mixer.hook_x, hook_v)"
        )
    return place


def _change_of(frozen: FrozenModel, coder: SparseCoder, edits: list[Any]) -> Float[Tensor, "b l d"]:
    """What edits of a coder's latents and error add to its stream, real positions only."""
    stream = streams_of(coder.cfg)[1]
    local = stream.endswith(LOCAL)
    y = stream_values(stream, frozen.cache, frozen.model) if local else frozen.value_at(coder.cfg.out_site)
    change = coders_change(coder, edits, read_by(coder.cfg, frozen), y, padding=frozen.padding).to(frozen.dtype)
    return change if frozen.mask is None else change * frozen.mask.unsqueeze(-1)


class _Inside:
    """What cuts and edits of states add to a mixer's output, see `circuits.push.Inside`."""

    def __init__(self, frozen: FrozenModel, edits: list[Intervention], changes: Changes) -> None:
        self.frozen, self.changes = frozen, changes
        self.cuts = cuts_of(frozen.model, edits)
        states = [one for edit in edits if isinstance(edit, OfState) for one in state_changes(frozen.model, edit)]
        self.states = [replace(one, position=frozen.column(one.position)) for one in states]
        for one in states:
            if frozen.is_split(one.layer):
                raise ValueError(f"the state of layer {one.layer}, a split one, cannot be edited: use mode 'mixer'")

    def __call__(
        self, layer: int, delta: Float[Tensor, "b l d"], taken: Tensor | float, whole: bool
    ) -> Float[Tensor, "b l d"] | float:
        cuts = [cut for cut in self.cuts if layer in cut.layers]
        states = [one for one in self.states if one.layer == layer]
        if not cuts and not states:
            return 0.0
        chain, coded, rows = self.frozen.chain(layer), self.frozen.coded.get(layer), self.frozen.rows_of(1)
        mode = "mixer" if coded is None or whole else coded.mode
        scales = state_edits(states, self.frozen.length)
        run = Pass(_over(chain, chain.u), chain.path, None, self.frozen.padding, scales)
        y = -lost_reads(cuts, run)
        u, put_back = torch.zeros_like(y), torch.zeros_like(y)
        if mode == "write":  # nothing from below passes either, and what changes is no token's
            u = u + self.changes.heads.get(layer, 0.0)
            skip = self.frozen.coded[layer].push_skip(self.frozen, delta, rows)
            u = u + (chain.of_site(skip) if isinstance(skip, Tensor) else skip)
            path = replace(chain.path, p=torch.zeros_like(chain.p))
            y = y - lost_reads(cuts, Pass(_over(chain, u), path, None, self.frozen.padding, scales))
        elif mode != "block":  # there, nothing that comes from below passes
            p, sigma = chain.push(delta, rows, until="p")[0], chain.path.sigma
            through = self.changes.held.get(layer, torch.ones_like(p[0]))
            p, sigma = (p * through, sigma) if mode == "split" else (p, sigma * through)
            u = chain.push(p, rows, start="p", until="u")[0] + taken
            u = u if mode == "split" else u * through
            below = Pass(_over(chain, u), replace(chain.path, p=p, sigma=sigma), None, self.frozen.padding, scales)
            y = y - lost_reads(cuts, below)
            if mode == "split":  # a change of the local part has not passed, so none of it can be cut
                put_back = p * _cut_from_itself(cuts, below)
        if states and scales is not None:
            y = y + _kicked(chain, run.view, _over(chain, u), states, scales)
        return chain.push(y, rows, start="y")[0] + chain.push_own(put_back, rows)


def _over(chain: Chain, u: Float[Tensor, "b l E"]) -> HeldScan:
    """A chain's scan over other values, row for row."""
    return chain.scan.over(u.unflatten(2, (chain.scan.n_lanes, -1)))


def _kicked(
    chain: Chain, run: HeldScan, below: HeldScan, states: list[StateChange], scales: StateEdits
) -> Float[Tensor, "b l E"]:
    """What edits of states add to y: a change dh of the state becomes M dh + (M h + v - h), h the run's."""
    at = list(scales.at)
    h = run.out(chain.h0, states_at=at).states
    assert h is not None  # they were asked for
    new = h
    for i, t in enumerate(at):
        for one in states:
            if one.position == t:
                edited = new[:, i] * one.scale + (0.0 if one.add is None else one.add)
                new = torch.cat([new[:, :i], edited.unsqueeze(1), new[:, i + 1 :]], 1)
    # What the edits before m make of h_m is in dh, which the scan below carries.
    edits = StateEdits(at, scales.scale, new - h)
    return (below.out(edits=edits).y - below.out().y).flatten(2)


def _cut_from_itself(cuts: list[Cut], call: Pass) -> Bool[Tensor, "b l e"]:
    """Where a cut takes a position's own input from it."""
    return torch.stack([
        (call.cells(cut) & call.mask(cut.targets).unsqueeze(-1)).expand_as(call.path.p) for cut in cuts
    ]).any(0)  # fmt: skip
