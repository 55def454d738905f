"""Rules by which a covector on a branch's output goes down to the stream below.

none      the value path alone: dt, B, C (whatever selects), gates and norms are held
half      the gate's product is shared evenly by its two factors, y and z, with sigma(z) held; dt, B, C are held
          (MambaLRP: Jafari et al. 2024, arXiv:2406.07592)
shares    the scan's product C B u is shared by its factors in given parts that sum to 1; dt and the gate are held
gradient  nothing is held: the first-order effect of everything, final norm included

The first three sum to the target. A gradient does not: a remainder is left, since the model is not linear. All but the
first are gradients of the model's own branch, run once more on the stream that entered it, in which hooks replace what
is held by its value; hooks that the run had inside the branch must still be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.analysis.captured import captured
from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.chain import Chain, Pulled
from hooked_mamba.frozen.linear import Rows
from hooked_mamba.frozen.places import Part, norm_name
from hooked_mamba.frozen.run import Run
from hooked_mamba.mixers.linear_form import hold
from hooked_mamba.model.stack import scaled
from hooked_mamba.state import BranchState, Call, Padding
from saes.files.checks import nearest

RULES = ("none", "half", "shares", "gradient")
_VALID = f"selection must be one of {', '.join(RULES)}, or three shares"

Selection = str | Sequence[float | int]
"""A rule; three numbers are "shares" of C, B and u other than a third each."""


class Rule:
    """The value path alone: everything else is held."""

    name = "none"
    shares: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Of C, B and u."""
    differentiates_norms = False
    """Whether norms outside of branches are differentiated and not held."""
    sums = True
    """Whether what it takes apart sums to the target."""
    reads_through_norms = True
    """Whether a norm stands between a stream and what reads it behind one."""

    def chain(self, run: Run, part: Part, exact: Chain) -> Chain:
        """A branch as this rule takes it, from its exact affine map."""
        return exact

    def pull(
        self,
        run: Run,
        part: Part,
        V: Float[Tensor, "n l d"],
        rows: Rows,
        through: Float[Tensor, "*n l E"] | None = None,
    ) -> Pulled:
        """Covectors on a branch's output as ones on the stream below; see :meth:`FrozenModel.pull`."""
        return run.chain(part).pull(V, rows, None if through is None else {"u": through})

    def pull_to_u(self, run: Run, part: Part, V: Float[Tensor, "n l d"], rows: Rows) -> Pulled:
        """The same as far as u; `below` is what does not pass through it."""
        chain = run.chain(part)
        none = V.new_zeros(()).expand(*V.shape[:2], chain.norm.factor.shape[-1])
        return replace(chain.pull(V, rows, until="u"), below=none, carried={})

    def pull_u(self, run: Run, part: Part, ub: Float[Tensor, "n l E"], rows: Rows) -> Pulled:
        """The same of covectors on u."""
        return run.chain(part).pull(ub, rows, start="u")


class Anew(Rule):
    """A rule that takes covectors back through the branch run once more, see :func:`pull_anew`."""

    def pull(
        self,
        run: Run,
        part: Part,
        V: Float[Tensor, "n l d"],
        rows: Rows,
        through: Float[Tensor, "*n l E"] | None = None,
    ) -> Pulled:
        return pull_anew(self, run, part, V, rows, through)

    def pull_to_u(self, run: Run, part: Part, V: Float[Tensor, "n l d"], rows: Rows) -> Pulled:
        return pull_anew(self, run, part, V, rows, V.new_zeros(()))


class Sharing(Anew):
    """Products shared out among their factors: "half" or "shares"."""

    def __init__(self, name: str, shares: tuple[float, float, float]) -> None:
        self.name, self.shares = name, shares


class Gradient(Anew):
    """Nothing is held."""

    name = "gradient"
    sums = False
    differentiates_norms = True

    def pull_u(self, run: Run, part: Part, ub: Float[Tensor, "n l E"], rows: Rows) -> Pulled:
        none = ub.new_zeros(*ub.shape[:2], run.resid(0).shape[-1])
        return pull_anew(self, run, part, none, rows, ub=ub)


def rule_of(selection: Selection) -> Rule:
    """The rule that a user asks for.

    Raises
    ------
    ValueError
        No such rule, or shares that are not three numbers with the sum 1.
    """
    if isinstance(selection, str):
        if selection not in RULES:
            raise ValueError(f"{_VALID}; got {selection!r}{nearest(selection, RULES)}")
        third = 1 / 3
        known = {"none": Rule(), "half": Sharing("half", Rule.shares), "gradient": Gradient()}
        return known.get(selection) or Sharing("shares", (third, third, third))
    if not isinstance(selection, Sequence):
        raise ValueError(f"{_VALID}; got {selection!r}")
    given = [float(share) for share in selection]
    if len(given) != 3 or not abs(sum(given) - 1) <= 1e-6:
        raise ValueError(f"shares must be three, of C, B and u, that sum to 1, got {given}")
    return Sharing("shares", (given[0], given[1], given[2]))


def pull_anew(
    rule: Rule,
    run: Run,
    part: Part,
    V: Float[Tensor, "n l d"],
    rows: Rows,
    through: Float[Tensor, "*l_E"] | None = None,
    ub: Float[Tensor, "n l E"] | None = None,
) -> Pulled:
    """Covectors taken back through the model's own branch, run once more, by a rule's hooks.

    Parameters
    ----------
    through
        What share of u passes on, one number or l E.
    ub
        Covectors on u that go down as well.
    """
    assert isinstance(rows, Tensor)  # points are for rules that hold everything
    model, (layer, name) = run.model, run.branch_of(part)
    block = model.block(layer)
    branch = block.branches[name]
    norm = norm_name(model, layer, name)
    prefix = f"blocks.{layer}.{name}."
    biases = [(site, bias.detach()) for site, bias in branch.bias_sites() if bias is not None]
    u_site, p_site, y_site = branch.site_at("u"), branch.site_at("p"), branch.site_at("y")
    sites = dict.fromkeys((u_site, p_site, y_site, *(site for site, _ in biases), *branch.rule_sites))
    mask = None if run.mask is None else run.mask[rows]
    chain = run.chain(part)
    # A value that another layer made; only what is asked of the gradient needs its numbers.
    given = {name: run.carried_value(name)[rows].detach().requires_grad_() for name in chain.takes}
    padding = None if mask is None else Padding.from_mask(mask.long(), mask.shape)
    with torch.enable_grad(), captured(model, [prefix + site for site in sites]) as cache:
        carry = {name: value.unflatten(-1, (chain.scan.n_lanes, -1)) for name, value in given.items()}
        call = Call(padding, None if run.before.seen is None else run.before.seen[rows], carry)
        leaf = run.entering(part)[rows].detach().requires_grad_()
        memory = _with_gradient(run.before[layer][name], rows)
        remembered = [state for state in memory if state.is_floating_point()]  # not which columns are real
        hooks = [(f"{prefix}{u_site}", stopping(through))] if through is not None else []
        if not rule.differentiates_norms:
            own = branch.rule_hooks(
                rule.name, rule.shares, lambda site: cache[prefix + site], mask, branch.memory(memory)
            )
            hooks = [(f"blocks.{layer}.{norm}.hook_scale", hold), *((prefix + site, fn) for site, fn in own), *hooks]
        with model.hooks(hooks):
            x = leaf if block.norm_after else getattr(block, norm)(leaf)
            out, _ = branch(scaled(x, block.in_scales.get(name)), memory, call)
            out = scaled(getattr(block, norm)(out) if block.norm_after else out, block.out_scales.get(name))
        u, p = (cache[prefix + site] for site in (u_site, p_site))
        value = (at_least_fp32(out) * V).sum()
        if ub is not None:
            value = value + (at_least_fp32(u.flatten(2)) * ub).sum()
        # A value that several heads share counts once for each of them: what each passes on is read off y.
        grouped = u.flatten(2).shape[-1] != chain.width
        u = cache[prefix + y_site] if grouped else u
        inputs = [leaf, u, p, *remembered, *(cache[prefix + site] for site, _ in biases), *given.values()]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    found = tuple(torch.zeros_like(at) if g is None else g for g, at in zip(found, inputs, strict=True))
    at_leaf, at_u, at_p, *rest = (at_least_fp32(g) for g in found)
    n = len(remembered)
    at_memory, at_biases, at_given = rest[:n], rest[n : n + len(biases)], rest[n + len(biases) :]
    zero = V.new_zeros(len(rows))
    bias = torch.stack([zero, *((g @ at_least_fp32(b)).sum(1) for g, (_, b) in zip(at_biases, biases, strict=True))])
    initial: Tensor | float = 0.0
    for g, state in zip(at_memory, remembered, strict=True):
        initial = initial + (g * state).flatten(1).sum(1)
    at_u = at_u.flatten(2)
    if grouped:
        nodes = dict(chain.pull(at_u, rows, start="y").at)
    else:
        nodes = {"u": at_u, "p": at_p.flatten(2)[..., : at_u.shape[-1]]}
    return Pulled(
        at_leaf,
        nodes,
        bias.sum(0),
        zero + initial.detach().to(zero.dtype) if isinstance(initial, Tensor) else zero,
        carried=dict(zip(given, at_given, strict=True)),
    )


def _with_gradient(before: BranchState, rows: Tensor) -> Any:
    parts = [part[rows].detach().requires_grad_(part.is_floating_point()) for part in before]
    return type(before)(*parts) if hasattr(before, "_fields") else tuple(parts)


class _Stop(torch.autograd.Function):
    """The identity, whose gradient passes only where `stay` is 1."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, stay: Tensor) -> Tensor:
        ctx.save_for_backward(stay)
        return u.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None


def stopping(through: Float[Tensor, "*l_E"]) -> Any:
    """A hook on u by which channels that are nodes of their own get what they get, and pass nothing on.

    Parameters
    ----------
    through
        l E, or one number for all.
    """

    def stop(u: Tensor, hook: Any) -> Tensor:
        # A channel's own covector is read at what this hook returns: it must not be a view of what passes.
        stay = through if through.ndim == 0 else through.reshape(u.shape[1:])
        return _Stop.apply(u, stay.to(u.dtype))  # type: ignore[no-untyped-call]

    return stop
