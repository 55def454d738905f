"""A run, the coders that it is read through, and the rule by which covectors go down it.

By the plainest rule norms, gates and selection are held: every block is affine in the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from circuits.coded_layer import CodedLayer, LayerMode
from circuits.rules import Rule, Selection, rule_of
from hooked_mamba.frozen.chain import Chain, Pulled
from hooked_mamba.frozen.linear import Rows
from hooked_mamba.frozen.places import Part, Stream, branch_of, in_order
from hooked_mamba.frozen.run import Run
from hooked_mamba.models import HookedModel
from hooked_mamba.state import ModelState
from saes.coder import SparseCoder
from saes.naming import Coders, named_coders


class FrozenModel(Run):
    """The linearised model for a batch of prompts.

    Parameters
    ----------
    model
        A HookedMamba, HookedMamba2 or any other whose mixers have a linear form.
    input
        Text, a list of texts, or token ids.
    coders
        One, several, or several by name; at most one for each branch: a MambaCoder, an SAE on a branch's output, or a
        write dictionary, an SAE on the value that enters a mixer's memory. They replace the output, or that value, by
        features and an error; layers without one are mixers, taken apart into channels.
    mode
        "mixer", "block", "split" or "write", for all layers or part -> mode (a mixer's part is its layer's number,
        others are "3.attn", "3.mlp"). None: what each coder was trained for ("block", "split" for target="local",
        "write" for a write dictionary), and "mixer" without one.
    attention_mask
        b l, for padded token ids.
    initial_state
        Memory to continue from; not together with padding.
    selection
        What paths follow beside the value path: "none", "half", "shares" (or three shares of C, B and u), "gradient";
        see `circuits.rules`. All but "none" run blocks anew, and take no layers in mode "split".
    units
        Branches whose units may be nodes ("mixer", "attn", "mlp", "moe", RWKV-7's "v_first"): channels and attention
        heads at their sources, neurons, experts, values handed to later layers. All others pass everything. None: all;
        by a `selection`, mixers alone.
    recompute
        Whether the inside of blocks is computed again instead of kept; see :class:`~hooked_mamba.frozen.run.Run`.

    Raises
    ------
    ValueError
        An initial state together with padding, coders that do not fit, an unknown selection, or one that a split layer
        cannot have; or units of a branch that no block has.
    """

    def __init__(
        self,
        model: HookedModel,
        input: str | Sequence[Any] | Tensor,
        coders: Coders | Iterable[SparseCoder] = (),
        mode: LayerMode | Mapping[Part, LayerMode] | None = None,
        *,
        attention_mask: Tensor | None = None,
        initial_state: ModelState | None = None,
        selection: Selection = "none",
        units: Collection[str] | None = None,
        recompute: bool | None = None,
    ) -> None:
        self.rule = rule_of(selection)
        self.units = None if units is None else frozenset(units)
        super().__init__(model, input, attention_mask=attention_mask, initial_state=initial_state, recompute=recompute)
        if not isinstance(coders, SparseCoder | Mapping | str):
            coders = list(coders)
        self.coded = CodedLayer.of_all(self, named_coders(coders).values() if coders else (), mode)
        layers = range(self.n_layers)
        branches = {name for layer in layers for name in self.model.block(layer).branches}
        branches |= {branch_of(part)[1] for layer in layers for part in self.given_parts(layer)}
        if unknown := (self.units or frozenset()) - branches:
            raise ValueError(f"units of {', '.join(sorted(unknown))}: the blocks have {', '.join(sorted(branches))}")
        split = [i for i in self.coded if self.is_split(i)]
        if split and self.rule.name != "none":
            raise ValueError(f"selection {self.rule.name!r} has no split layers, and layer {split[0]} is one")

    def read_by(self, rule: Rule, coded: Mapping[Part, CodedLayer] | None = None) -> FrozenModel:
        """The same run, read by another rule (and through other coders)."""
        other = copy.copy(self)
        other.rule = rule
        other.coded = self.coded if coded is None else dict(coded)
        return other

    def upto(self, stop: int) -> FrozenModel:
        """As in a run, with what the coders found up to there."""
        other = super().upto(stop)
        assert isinstance(other, FrozenModel)  # a copy, or this one
        if other is not self:
            other.coded = {part: coded.upto(stop) for part, coded in self.coded.items()}
        return other

    # What its layers are ---------------------------------------------------------------------------------------

    def is_split(self, layer: Part) -> bool:
        """Whether a coder stands for a layer's local part alone, and the mixer for the rest."""
        return layer in self.coded and self.coded[layer].mode == "split"

    def is_written(self, part: Part) -> bool:
        """Whether a coder stands for the value that enters a branch's memory: paths end there."""
        return part in self.coded and self.coded[part].node == "u"

    def open_parts(self) -> list[Part]:
        """Branches whose units may be nodes: those that no coder replaces as a whole, as far as `units` says so."""
        among = self.units if self.units is not None or self.rule.name == "none" else frozenset({"mixer"})
        return [
            part
            for layer in range(self.n_layers)
            for part in sorted([*self.parts(layer), *self.given_parts(layer)], key=in_order)
            if (part not in self.coded or self.is_split(part)) and (among is None or branch_of(part)[1] in among)
        ]

    def mixed_layers(self) -> list[int]:
        """Layers whose mixer's channels may be nodes: those that no coder replaces as a whole."""
        return [
            layer
            for layer in range(self.n_layers)
            if "mixer" in self.model.block(layer).branches and (layer not in self.coded or self.is_split(layer))
        ]

    def channels_at(self, layer: Part) -> Literal["u", "p"]:
        """The node at which a layer's channels stand: u, the scan's input; in split layers p, the convolution's."""
        return "p" if self.is_split(layer) else "u"

    def channel_values(self, layer: Part) -> Float[Tensor, "b l E"]:
        """What the run had at this node."""
        return self.chain(layer).values[self.channels_at(layer)]

    def latents(self, part: Part) -> Float[Tensor, "b l F"]:
        """All latents of a coded branch, active or not."""
        codes = self.coded[part].codes
        dense = codes.values.new_zeros(*codes.values.shape[:2], self.coded[part].coder.cfg.d_sae)
        return dense.scatter_add_(-1, codes.indices, codes.values)

    # Pulling back, by the rule ---------------------------------------------------------------------------------

    def chain(self, part: Part) -> Chain:
        """One branch as an affine map."""
        return self.rule.chain(self, part, super().chain(part))

    def pull(
        self,
        part: Part,
        V: Float[Tensor, "n l d"],
        rows: Rows,
        through: Float[Tensor, "*n l E"] | None = None,
    ) -> Pulled:
        """Take covectors on a branch's output back to the stream below.

        Parameters
        ----------
        through
            What share of u passes on at each source and channel; None: all.
        """
        return self.rule.pull(self, part, V, rows, through)

    def pull_to_u(self, part: Part, V: Float[Tensor, "n l d"], rows: Rows) -> Pulled:
        """The same as far as the value u that enters memory: `at["u"]`. `below` is what does not pass through it."""
        return self.rule.pull_to_u(self, part, V, rows)

    def pull_u(self, part: Part, ub: Float[Tensor, "n l E"], rows: Rows) -> Pulled:
        """The same for covectors on the value u that enters memory."""
        return self.rule.pull_u(self, part, ub, rows)

    def behind_norm(
        self, layer: int, covectors: Float[Tensor, "... d"], at: Any, differentiated: bool = False
    ) -> Float[Tensor, "... d"]:
        """As in a run; by selection "gradient" norms are differentiated."""
        return super().behind_norm(layer, covectors, at, differentiated or self.rule.differentiates_norms)

    def behind_norm_of(
        self,
        part: Part,
        covectors: Float[Tensor, "... d"],
        at: Any,
        differentiated: bool = False,
        weighted: bool = True,
    ) -> Float[Tensor, "... d"]:
        """The same of a part's norm."""
        return super().behind_norm_of(part, covectors, at, differentiated or self.rule.differentiates_norms, weighted)

    def reading(
        self, site: str, row: int, columns: int | slice, covector: Float[Tensor, "*w f"]
    ) -> tuple[Stream, Part, Float[Tensor, "*w d_or_E"]]:
        """As in a run, by the rule."""
        place = self.place_of(site)
        if self.rule.reads_through_norms or not place.normed:
            return super().reading(site, row, columns, covector)
        return place.stream, place.layer, covector

    @property
    def embeddings(self) -> Float[Tensor, "b l d"]:
        """What a covector at the bottom meets: the tokens' embeddings; what the first norm makes of them, by a rule
        that does not read through norms."""
        return self.resid(0) if self.rule.reads_through_norms else self.norm(0).push(self.resid(0))


def frozen_of(
    model: HookedModel | FrozenModel,
    prompt: str | Sequence[Any] | Tensor | None,
    coders: Coders | Iterable[SparseCoder] = (),
    mode: LayerMode | Mapping[Part, LayerMode] | None = None,
    **run: Any,
) -> FrozenModel:
    """A model at a prompt, or a FrozenModel as it is.

    Raises
    ------
    ValueError
        No prompt, or a FrozenModel together with what it brings.
    """
    if not isinstance(model, FrozenModel):
        if prompt is None:
            raise ValueError("no prompt: give a model and a prompt, or a FrozenModel alone")
        return FrozenModel(model, prompt, coders, mode, **run)
    if prompt is not None or coders or mode is not None or run:
        raise ValueError(
            "a FrozenModel brings its prompt, coders, mode and run with it: give a model and a prompt, or a FrozenModel"
            " alone"
        )
    return model
