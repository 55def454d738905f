"""What frozen attribution cannot see: the effect of a token through selection and gates, by swapping them.

A run, replayed, is a function of three things: the embeddings v, the selection c = (dt, B, C) of all layers, and the
gates g = (G, sigma, r) of all layers with the final norm. With c and g held it is affine in v, and that is all that
frozen attribution follows. Here token q is replaced, the model runs once more, and the difference between the two runs
is taken apart by swapping one thing after the other:

    T(v, c, g) - T(v', c', g') =   T(v, c, g)   - T(v', c, g)        value
                                 + T(v', c, g)  - T(v', c', g)       selection
                                 + T(v', c', g) - T(v', c', g')      gates

The terms telescope, so that they sum exactly; each depends on the order in which things are swapped, so the reverse
order (gates, selection, value) stands beside it, and the distance between the two is what only acts together. A norm
held at a run in which its input was close to nothing magnifies: such terms are large and cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import require_sums
from circuits.frozen_model import FrozenModel, frozen_of
from circuits.targets import Covector, Logit, Target
from hooked_mamba.models import HookedModel

Order = Literal["forward", "reverse"]
PARTS = ("value", "selection", "gates")


@dataclass(frozen=True)
class Split:
    """An effect in telescoped terms, for each of k positions."""

    value: Float[Tensor, " k"]
    """By what the embedding sends, all else held."""
    selection: Float[Tensor, " k"]
    """By dt, B and C of all layers."""
    gates: Float[Tensor, " k"]
    """By G, sigma and norms of all layers."""
    selection_by_layer: Float[Tensor, "k layers"] | None
    """Selection, swapped layer by layer; None unless asked for."""
    gates_by_layer: Float[Tensor, "k layers_and_final_norm"] | None

    @property
    def total(self) -> Float[Tensor, " k"]:
        """The sum of the terms."""
        return self.value + self.selection + self.gates


@dataclass(frozen=True)
class PatchEffects:
    """Effect of a position's token on a target: the target minus its value when the token is replaced."""

    label: str
    target: float
    """The number in the prompt's run."""
    positions: Int[Tensor, " k"]
    """Which tokens were replaced."""
    words: list[str]
    """What they were."""
    effect: Float[Tensor, " k"]
    """From the model's own runs; with several replacements the mean over those that differ from the token."""
    forward: Split
    """Value, then selection, then gates."""
    reverse: Split
    """Gates, then selection, then value."""

    @property
    def residual(self) -> Float[Tensor, " k"]:
        """What rounding leaves between the effect and the sum of its terms, the larger of both orders."""
        return torch.maximum(*((self.effect - split.total).abs() for split in (self.forward, self.reverse)))

    def __str__(self) -> str:
        lines = [
            f"{self.label} = {self.target:.3g}; effects as value + selection + gates, in reverse order in brackets"
        ]
        for k, word in enumerate(self.words):
            terms, back = ([float(getattr(split, part)[k]) for part in PARTS] for split in (self.forward, self.reverse))
            numbers = " ".join(f"{a:+.2f} ({b:+.2f})" for a, b in zip(terms, back, strict=True))
            lines.append(f"{word!r}@{int(self.positions[k])}: {float(self.effect[k]):+.2f} = {numbers}")
        return "\n".join(lines)


@torch.no_grad()
def patch_effects(
    model: HookedModel | FrozenModel,
    prompt: str | Sequence[Any] | Tensor | None = None,
    target: Target | str | int | None = None,
    *,
    replace_by: int | str | Sequence[int | str],
    positions: Sequence[int] | None = None,
    by_layer: bool = False,
    batch: int = 32,
) -> PatchEffects:
    """Replace tokens one at a time and divide each effect into value, selection and gates, exactly.

    Parameters
    ----------
    model, prompt
        A model and one prompt, or the FrozenModel of one prompt alone. Coders do not matter here.
    target
        A number that the run computed, or a token whose logit at the last position is meant.
    replace_by
        The token put in place of each, or several, over which effects are averaged.
    positions
        Which tokens are replaced; None: all.
    by_layer
        Whether selection and gates are swapped layer by layer: two more replays a layer and order.
    batch
        Replaced prompts that run together.

    Raises
    ------
    ValueError
        Several prompts, no target, no replacement, or a padded position.
    """
    frozen = frozen_of(model, prompt)
    if frozen.rule.name != "none":
        raise ValueError(f"patching takes a run with selection 'none', this one has {frozen.rule.name!r}")
    if frozen.batch != 1:
        raise ValueError(f"expected one prompt, got {frozen.batch}: call once for each")
    target = _one_target(frozen, target)
    require_sums(frozen, [target])
    several = [replace_by] if isinstance(replace_by, int | str) else list(replace_by)
    others = [frozen.token_id(token) for token in several]
    if not others:
        raise ValueError("no replacement: give a token, or several")
    if positions is not None and not len(positions):
        raise ValueError("no position: name at least one token to replace, or None for all")
    columns = [frozen.column(t, 0) for t in (range(frozen.length) if positions is None else positions)]
    if positions is None and frozen.mask is not None:
        columns = [t for t in columns if bool(frozen.mask[0, t])]
    padded = [t for t in columns if frozen.mask is not None and not frozen.mask[0, t]]
    if padded:
        raise ValueError(f"position {padded[0]} is padding: there is no token to replace")
    jobs = [(k, t, other) for k, t in enumerate(columns) for other in others if other != int(frozen.tokens[0, t])]
    if not jobs:  # every token is its own replacement: one job whose effect is 0
        jobs = [(0, columns[0], int(frozen.tokens[0, columns[0]]))]
    pieces = [_swaps(frozen, target, jobs[i : i + batch], by_layer) for i in range(0, len(jobs), batch)]
    where = torch.tensor([k for k, _, _ in jobs], dtype=torch.long)
    count = torch.bincount(where, minlength=len(columns)).clamp(min=1)

    def mean(rows: list[Tensor]) -> Tensor:
        joined = torch.cat(rows).cpu()
        sums = joined.new_zeros(len(columns), *joined.shape[1:]).index_add_(0, where, joined)
        return sums / count.reshape(-1, *[1] * (joined.ndim - 1))

    def split(order: Order) -> Split:
        value, selection, gates = (mean([piece[order, part] for piece in pieces]) for part in PARTS)
        layers = (selection, gates) if by_layer else (None, None)
        return Split(value.sum(1), selection.sum(1), gates.sum(1), *layers)

    return PatchEffects(
        label=target.label,
        target=float(target.covector(frozen, 0).value),
        positions=torch.tensor(columns),
        words=[frozen.words[t] for t in columns],
        effect=mean([piece["effect"] for piece in pieces]),
        forward=split("forward"),
        reverse=split("reverse"),
    )


def _one_target(frozen: FrozenModel, target: Any) -> Target:
    if target is None:
        raise ValueError("no target: give a token, a Logit, a Feature or a Direction")
    found = target if isinstance(target, Target) else Logit(target)
    if isinstance(found, Logit):  # a tuple holds one token for each row, and rows will be replaced prompts
        token = frozen.token_id(found.token) if isinstance(found.token, tuple) else found.token
        minus = frozen.token_id(found.minus) if isinstance(found.minus, tuple) else found.minus
        return replace(found, token=token, minus=minus)
    return found


@dataclass(frozen=True)
class _Swapped:
    """Which things come from the replaced prompt's run."""

    value: bool
    selection: tuple[bool, ...]
    """For each layer."""
    gates: tuple[bool, ...]
    """For each layer, and the final norm."""


def _path(n: int, by_layer: bool) -> list[tuple[str, _Swapped]]:
    """From nothing swapped to everything, in the forward order: the part that each step swaps, and where it leads."""
    ends = range(1, n + 1) if by_layer else [n]
    path = [("", _Swapped(False, (False,) * n, (False,) * (n + 1)))]
    path.append(("value", _Swapped(True, (False,) * n, (False,) * (n + 1))))
    path += [("selection", _Swapped(True, _first(i, n), (False,) * (n + 1))) for i in ends]
    ends = range(1, n + 2) if by_layer else [n + 1]
    return path + [("gates", _Swapped(True, (True,) * n, _first(i, n + 1))) for i in ends]


def _first(i: int, n: int) -> tuple[bool, ...]:
    return (True,) * i + (False,) * (n - i)


def _swaps(frozen: FrozenModel, target: Target, jobs: list[tuple[int, int, int]], by_layer: bool) -> dict[Any, Tensor]:
    """Steps of both orders, one row a job, one column per step of the part."""
    tokens = frozen.tokens.repeat(len(jobs), 1)
    for row, (_, t, other) in enumerate(jobs):
        tokens[row, t] = other
    replaced = _run_like(frozen, tokens)
    old = [target.covector(frozen, 0)] * len(jobs)
    new = [target.covector(replaced, row) for row in range(len(jobs))]
    found: dict[Any, Tensor] = {"effect": torch.stack([a.value - b.value for a, b in zip(old, new, strict=True)])}
    path = _path(frozen.n_layers, by_layer)
    values = [_replay(frozen, replaced, old, new, at) for _, at in path]
    # The reverse order goes through the complements, from all swapped to nothing: what went first now goes last.
    middle = [_replay(frozen, replaced, old, new, _complement(at)) for _, at in path[1:-1]]
    for order, sign in (("forward", 1), ("reverse", -1)):
        values = values if order == "forward" else [values[-1], *middle, values[0]]
        for part in PARTS:
            steps = [values[i - 1] - values[i] for i in range(1, len(path)) if path[i][0] == part]
            found[order, part] = sign * torch.stack(steps, 1)
    return found


def _complement(at: _Swapped) -> _Swapped:
    return _Swapped(not at.value, tuple(not s for s in at.selection), tuple(not g for g in at.gates))


def _run_like(frozen: FrozenModel, tokens: Int[Tensor, "k l"]) -> FrozenModel:
    """Other tokens, run as this prompt was."""
    if frozen.mask is not None:
        return FrozenModel(frozen.model, tokens, attention_mask=frozen.mask.expand(len(tokens), -1).long())
    return FrozenModel(frozen.model, tokens, initial_state=frozen.before.rows([0] * len(tokens)))


def _replay(
    frozen: FrozenModel, replaced: FrozenModel, old: list[Covector], new: list[Covector], at: _Swapped
) -> Float[Tensor, " k"]:
    """The target recomputed, from embeddings, selections and gates of either run."""
    k = replaced.batch
    own, first = torch.arange(k), torch.zeros(k, dtype=torch.long)

    def pick(swapped: bool) -> tuple[FrozenModel, Tensor]:
        return (replaced, own) if swapped else (frozen, first)

    run, rows = pick(at.value)
    x = run.resid(0)[rows]
    covectors = new if at.gates[-1] else old
    goal, given = covectors[0], dict[str, Tensor]()
    for layer in range(frozen.n_layers):
        if (goal.stream, goal.layer) == ("resid", layer):
            break
        (chooser, c_rows), (gater, g_rows) = pick(at.selection[layer]), pick(at.gates[layer])
        for stage in frozen.stages(layer):
            entering, side = x, frozen.side(layer)
            if side is not None:
                chains = {p: gater.chain(p).of(g_rows, scan_of=(chooser.chain(p), c_rows)) for p in side.parts}
                entering = x + side.apply(chains, x, run.embedded[rows])
            for part in stage:
                mixed = gater.chain(part).of(g_rows, scan_of=(chooser.chain(part), c_rows))
                inside = mixed.apply(entering, given)
                given |= {name: inside[node] for name, node in mixed.gives.items()}
                if goal.layer == part and goal.stream != "resid":
                    return _read(inside[goal.stream], covectors)
                x = x + inside["out"]
    return _read(x, covectors)


def _read(x: Float[Tensor, "k l e"], covectors: list[Covector]) -> Float[Tensor, " k"]:
    return torch.stack([c.of(x[row]) + c.offset for row, c in enumerate(covectors)])
