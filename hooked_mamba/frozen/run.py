"""One prompt's run (or a batch of them), with what its branches are as affine maps.

The model is wrapped, not changed: the run is made once with `run_with_cache`, hooks that sit on it included, and the
constants of each branch are read from the cache when they are first asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.beginning import Beginning
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.layerwise import WHOLE, Layerwise
from hooked_mamba.frozen.linear import Centred, Gain, centred, held_norm
from hooked_mamba.frozen.places import (
    Part,
    Place,
    Stream,
    branch_of,
    frozen_sites,
    norm_name,
    out_site,
    output_sites,
    part_of,
    u_site,
)
from hooked_mamba.frozen.side import Side
from hooked_mamba.hooks.names import unalias
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.linear_form import projection
from hooked_mamba.model.hooked_model import HookedModel
from hooked_mamba.model.stack import scaled
from hooked_mamba.state import ModelState, Padding


class Run:
    """A batch of prompts as the model ran them.

    Parameters
    ----------
    model
        Any model whose branches have a linear form.
    input
        Text, a list of texts, or token ids.
    attention_mask
        b l, for padded token ids.
    initial_state
        Memory to continue from; not together with padding.
    recompute
        True: what is inside a block is computed again, one block at a time, when it is read; that takes a tenth of the
        memory and another forward pass for every time that covectors go down. None: where all of it would take more
        than 0.75 GiB, and no function sits on a hook point.

    Raises
    ------
    ValueError
        An initial state together with padding, or recompute=True although functions sit on hook points.
    """

    def __init__(
        self,
        model: HookedModel,
        input: str | Sequence[Any] | Tensor,
        *,
        attention_mask: Tensor | None = None,
        initial_state: ModelState | None = None,
        recompute: bool | None = None,
    ) -> None:
        self.model = model
        self.tokens, found = model.input_to_tokens(input)
        attention_mask = found if attention_mask is None else attention_mask
        padding = None
        if attention_mask is not None:
            padding = Padding.from_mask(torch.as_tensor(attention_mask, device=model.device), self.tokens.shape)
        self.padding = padding
        self.mask: Bool[Tensor, "b l"] | None = None if padding is None else padding.mask
        if padding is not None and initial_state is not None:
            raise ValueError("an initial state together with padding cannot be traced: give rows of one length")
        self.before = initial_state if initial_state is not None else model.initial_state(self.tokens.shape[0])
        self.edited = tuple(str(point.name) for point in model.hook_points() if point.edited)
        """Sites on which functions sat when the run was made."""
        outside = ["hook_embed", "ln_final.hook_scale", f"blocks.{self.n_layers - 1}.hook_resid_post"]
        names: dict[int | None, list[str]] = {None: outside}
        names |= {layer: frozen_sites(model, layer) for layer in range(self.n_layers)}
        self.cache: ActivationCache | Beginning | Layerwise
        self._logits: Tensor | None = None
        if self._recomputes(recompute, [name for some in names.values() for name in some]):
            self.cache = Layerwise(model, self.tokens, names, attention_mask, initial_state)
        else:
            every = [name for some in names.values() for name in some]
            with torch.no_grad():
                logits, cache = model.run_with_cache(
                    self.tokens, names_filter=every, attention_mask=attention_mask, initial_state=initial_state
                )
            assert isinstance(cache, ActivationCache)  # return_cache_object is its default
            self.cache, self._logits = cache, logits.detach()
        self._chains: dict[Part, Chain] = {}

    @property
    def recomputes(self) -> bool:
        """Whether the inside of blocks is computed again when it is read."""
        return self._logits is None

    def _recomputes(self, asked: bool | None, names: list[str]) -> bool:
        if asked and self.edited:
            raise ValueError(
                f"recompute=True runs blocks again, and functions sit on {', '.join(self.edited[:3])}, which would run"
                " again too: take them off, or leave recompute out"
            )
        if asked is not None or self.edited:
            return bool(asked)
        b, l = self.tokens.shape
        itemsize = self.model.embed.weight.element_size()
        return sum(self.model.site(name).nbytes(b, l, itemsize) for name in dict.fromkeys(names)) > WHOLE

    @property
    def logits(self) -> Float[Tensor, "b l V"]:
        """What the model predicted; of a run that recomputes, formed anew each time (see :meth:`logits_at`)."""
        if self._logits is not None:
            return self._logits
        with torch.no_grad():
            return self.model.to_logits(self.cache[f"blocks.{self.n_layers - 1}.hook_resid_post"])

    def logits_at(self, row: int, position: int) -> Float[Tensor, " V"]:
        """The logits of one row at one position."""
        if self._logits is not None:
            return self._logits[row, position]
        last = self.cache[f"blocks.{self.n_layers - 1}.hook_resid_post"]
        with torch.no_grad():
            return self.model.to_logits(last[row : row + 1, position : position + 1])[0, 0]

    # Shapes and names ----------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return self.model.cfg.n_layers

    @property
    def batch(self) -> int:
        """Rows b."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Positions l, padding included."""
        return self.tokens.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 of a float64 model."""
        return at_least_fp32(self.cache["hook_embed"]).dtype

    @property
    def words(self) -> list[str]:
        """The first row's tokens as text; their ids where the model has no tokenizer."""
        ids = self.tokens[0]
        if self.model.tokenizer is None:
            return [str(int(i)) for i in ids]
        return [str(word) for word in self.model.to_str_tokens(ids)]

    def column(self, position: int, row: int | None = None) -> int:
        """A position as a column of the batch; a negative one counts from the row's own last real token.

        Parameters
        ----------
        row
            Of which row; None: of all of them.

        Raises
        ------
        IndexError
            It is outside of the prompt, or counts back further than the row has real tokens.
        ValueError
            Rows that end at different columns have no one column -1.
        """
        if not -self.length <= position < self.length:
            raise IndexError(f"position {position} is out of range for {self.length} positions")
        if position >= 0 or self.padding is None:
            return position % self.length
        first, end = self.padding.left, self.padding.ends
        if row is None:
            if bool((end != end[0]).any()):
                raise ValueError(
                    f"position {position} is another column in each row of this batch, whose rows end at different"
                    " ones: pad on the left (padding_side='left'), or give a column from 0 up"
                )
            first, end = first.max(), end[0]
        else:
            first, end = first[row], end[row]
        if int(end) + position < int(first):
            raise IndexError(f"position {position} is out of range for {int(end - first)} real tokens")
        return int(end) + position

    def columns(self, position: int) -> list[int]:
        """:meth:`column` of each row."""
        return [self.column(position, row) for row in range(self.batch)]

    def token_id(self, token: int | str | tuple[int | str, ...], row: int = 0) -> int:
        """A token's id from an id or a text of one token, or from a tuple with one for each row."""
        if isinstance(token, tuple):
            if len(token) != self.batch:
                raise ValueError(f"{len(token)} tokens for {self.batch} rows: give one, or one for each row")
            token = token[row]
        id = self.model.to_single_token(token) if isinstance(token, str) else int(token)
        if not 0 <= id < self.model.cfg.d_vocab:
            raise IndexError(f"token {id} is out of range: the vocabulary has {self.model.cfg.d_vocab} rows")
        return id

    def rows_of(self, targets: int) -> Int[Tensor, " n"]:
        """The row of each of `targets` times b covectors, all rows of a target together."""
        return torch.arange(self.batch, device=self.tokens.device).repeat(targets)

    # What the run had ----------------------------------------------------------------------------------------

    def resid(self, layer: int) -> Float[Tensor, "b l d"]:
        """The residual stream entering a layer; n_layers: after the last block."""
        n = self.n_layers
        name = f"blocks.{n - 1}.hook_resid_post" if layer == n else f"blocks.{layer}.hook_resid_pre"
        return at_least_fp32(self.cache[name])

    def out(self, layer: int, branch: str = "mixer") -> Float[Tensor, "b l d"]:
        """What a branch adds to the stream."""
        return at_least_fp32(self.cache[out_site(self.model, layer, branch)])

    def value_of(self, stream: Stream, part: Part) -> Float[Tensor, "b l e"]:
        """What the run had at a stream; of "resid" the part is the number of the layer, n_layers: after the last."""
        if stream == "resid":
            return self.resid(int(part))
        if stream == "in":
            return self.entering(part)
        if stream == "out":
            return self.out(*self.branch_of(part))
        chain = self.chain(part)
        return chain.values.get(stream, chain.u)

    def value_at(self, site: str) -> Float[Tensor, "b l f"]:
        """A site that a coder reads or predicts, its last axes side by side."""
        site = unalias(site)
        if site in self.cache:
            return self.cache[site].flatten(2)
        place = self.place_of(site)
        if place.stream == "in" and place.normed:
            return self.norm_of(place.layer, place.weighted).apply(self.entering(place.layer))
        return self.value_of(place.stream, place.layer)

    def norm(self, layer: int) -> Gain:
        """w / scale of a block's first norm; n_layers: of the final one."""
        if layer == self.n_layers:
            return self.final_norm
        block = self.model.block(layer)
        if block.norm_after:
            raise ValueError(f"block {layer} reads the stream as it is: its norms stand behind its branches")
        if not any(block.in_scales.get(name) for name in block.stages[0]):
            return self.chain(self.stages(layer)[0][0]).norm
        return held_norm(block.norm, self.cache[f"blocks.{layer}.norm.hook_scale"])

    @property
    def unembedding(self) -> Float[Tensor, "d V"]:
        """From what the final norm gives to logits, a factor of the logits included."""
        weight, _ = weights_of(self.model.unembed, "unembed")
        return scaled(weight.detach().t().to(self.dtype), self.model.logit_multiplier)

    def norm_of(self, part: Part, weighted: bool = True) -> Gain:
        """w / scale of the norm that a part reads the stream through, or 1 / scale, as the block's norm gives it."""
        layer, name = self.branch_of(part)
        block, norm = self.model.block(layer), norm_name(self.model, layer, name)
        if block.norm_after:
            raise ValueError(f"block {layer} reads the stream as it is: its norms stand behind its branches")
        scale = self.cache[f"blocks.{layer}.{norm}.hook_scale"]
        held = held_norm(getattr(block, norm), scale)
        if weighted:
            return held
        factor = (1 / scale).expand_as(held.factor)
        return Centred(factor, torch.zeros_like(held.bias)) if isinstance(held, Centred) else Gain(factor)

    def norm_factor(self, part: Part) -> Float[Tensor, "b l 1"]:
        """1 / scale of the norm that a part reads the stream through."""
        layer, name = self.branch_of(part)
        return 1 / at_least_fp32(self.cache[f"blocks.{layer}.{norm_name(self.model, layer, name)}.hook_scale"])

    @cached_property
    def final_norm(self) -> Gain:
        """w / scale of the final norm."""
        return held_norm(self.model.ln_final, self.cache["ln_final.hook_scale"])

    def stages(self, layer: int) -> list[list[Part]]:
        """The parts of a block that write into the stream, stage by stage in the order of the forward pass."""
        block = self.model.block(layer)
        written = [[self.part(layer, name) for name in stage if name in block.written] for stage in block.stages]
        return [stage for stage in written if stage]

    def parts(self, layer: int) -> list[Part]:
        """All parts of a block, those beside the stream included."""
        side = self.side(layer)
        return [*([] if side is None else side.parts), *(part for stage in self.stages(layer) for part in stage)]

    def side(self, layer: int) -> Side | None:
        """A block's transformer beside the stream, whose output joins what its mixer reads; None: there is none."""
        block: Any = self.model.block(layer)
        if not block.beside:
            return None
        return Side(tuple(f"{layer}.{name}" for name in block.beside), projection(block.linear, where="linear"))

    @property
    def embedded(self) -> Float[Tensor, "b l d"]:
        """The embeddings, as blocks read them that read them once more."""
        return at_least_fp32(self.cache["hook_embed"])

    def part(self, layer: int, branch: str) -> Part:
        """:func:`part_of`."""
        return part_of(layer, branch)

    def branch_of(self, part: Part) -> tuple[int, str]:
        """:func:`branch_of`."""
        return branch_of(part)

    def upto(self, stop: int) -> Run:
        """The run of the first `stop` positions, made of this one's values and not run again.

        It is the whole run where a position may read later ones, and where functions sat on hook points, which may
        have looked at how many there are.
        """
        if stop >= self.length or self.edited or not self.model.causal:
            return self
        other = copy.copy(self)
        other.cache = Beginning(self.cache, self.length, stop)
        other.tokens = self.tokens[:, :stop]
        other._logits = None if self._logits is None else self._logits[:, :stop]
        other.mask = None if self.mask is None else self.mask[:, :stop]
        other._chains = {}
        vars(other).pop("final_norm", None)
        return other

    def chain(self, part: Part) -> Chain:
        """One branch as an affine map of the stream that its norm reads; of "0.v_first" what makes this value."""
        if part not in self._chains:
            layer, name = self.branch_of(part)
            if name not in self.model.block(layer).branches:
                self._chains[part] = self.giving(layer, name).up_to_u()
                return self._chains[part]
            if isinstance(self.cache, Layerwise) and any(self.branch_of(other)[0] != layer for other in self._chains):
                self._chains.clear()  # of one block only
            with torch.no_grad():
                self._chains[part] = frozen_branch(self.cache, layer, name, self.before[layer][name], self.mask)
        return self._chains[part]

    def given_parts(self, layer: int) -> list[Part]:
        """The values that a block makes for layers above it, as parts: "0.v_first"."""
        branches = self.model.block(layer).branches.values()
        return [part_of(layer, name) for branch in branches for name in branch.hands_on]

    def giving(self, layer: int, name: str) -> Chain:
        """The branch of a block that makes a value for layers above it.

        Raises
        ------
        KeyError
            None does.
        """
        for part in self.parts(layer):
            if name in self.chain(part).gives:
                return self.chain(part)
        there = [*self.model.block(layer).branches, *(str(part).partition(".")[2] for part in self.given_parts(layer))]
        raise KeyError(f"block {layer} has no branch {name!r}; it has {', '.join(there)}")

    def carried_value(self, name: str) -> Float[Tensor, "b l E"]:
        """A value that one layer made for several above it.

        Raises
        ------
        KeyError
            No layer makes it.
        """
        for layer in range(self.n_layers):
            for stage in self.stages(layer):
                for part in stage:
                    chain = self.chain(part)
                    if name in chain.gives:
                        return chain.values[chain.gives[name]]
        raise KeyError(f"no layer makes {name!r} for others")

    def channels_at(self, layer: Part) -> Literal["u", "p"]:
        """The node at which a mixer's channels are followed: u, the value that enters memory."""
        return "u"

    def entering(self, part: Part) -> Float[Tensor, "b l d"]:
        """The residual stream that a part's norm reads."""
        layer, name = self.branch_of(part)
        block, at = self.model.block(layer), f"blocks.{layer}."
        if block.beside:
            if name not in block.beside:
                return at_least_fp32(self.cache[f"{at}hook_mixer_in"])
            place = block.beside.index(name)
            if place:
                return self.out(layer, block.beside[place - 1])
            return torch.cat([self.resid(layer), self.embedded], -1)
        return self.resid(layer) if name in block.stages[0] else at_least_fp32(self.cache[f"{at}hook_resid_mid"])

    def behind_norm(
        self, layer: int, covectors: Float[Tensor, "... d"], at: Any, differentiated: bool = False
    ) -> Float[Tensor, "... d"]:
        """Covectors on what a block's norm (n_layers: the final one) gives, as ones on the stream that it reads.

        Parameters
        ----------
        at
            Where they are: a row and a position, or rows that have covectors at all positions.
        differentiated
            False: the norm's divisor is held.
        """
        name = "ln_final" if layer == self.n_layers else f"blocks.{layer}.norm"
        return self._behind(self.norm(layer), name, lambda: self.resid(layer), covectors, at, differentiated)

    def behind_norm_of(
        self,
        part: Part,
        covectors: Float[Tensor, "... d"],
        at: Any,
        differentiated: bool = False,
        weighted: bool = True,
    ) -> Float[Tensor, "... d"]:
        """The same of the norm that a part reads the stream through; `weighted`: its weight included."""
        layer, branch = self.branch_of(part)
        name = f"blocks.{layer}.{norm_name(self.model, layer, branch)}"
        return self._behind(
            self.norm_of(part, weighted), name, lambda: self.entering(part), covectors, at, differentiated
        )

    def _behind(
        self, norm: Gain, name: str, entering: Callable[[], Tensor], covectors: Tensor, at: Any, differentiated: bool
    ) -> Tensor:
        behind = norm.of(at).pull(covectors).covector
        if not differentiated:
            return behind
        x = entering()[at]
        x = centred(x) if isinstance(norm, Centred) else x
        scale = self.cache[f"{name}.hook_scale"][at]
        return behind - x * (behind * x).sum(-1, keepdim=True) / (x.shape[-1] * scale.square())

    def norm_offset(self, place: int | Place, covector: Float[Tensor, "*n d"]) -> Float[Tensor, "..."]:
        """What the own bias of a layer's norm (or of the one that a stream is read through) gives to a covector on what
        it gives; 0 of a norm without."""
        if isinstance(place, Place):
            if not place.normed:
                return covector.new_zeros(())
            norm = self.norm(int(place.layer)) if place.stream == "resid" else self.norm_of(place.layer, place.weighted)
        else:
            norm = self.norm(place)
        return covector @ norm.bias.to(covector.dtype) if isinstance(norm, Centred) else covector.new_zeros(())

    def reading(
        self, site: str, row: int, columns: int | slice, covector: Float[Tensor, "*w f"]
    ) -> tuple[Stream, Part, Float[Tensor, "*w d_or_E"]]:
        """The stream behind a site, its layer or part, and covectors on the site as ones on the stream.

        Parameters
        ----------
        row, columns
            Where: at one position, or at w positions of the row, each with a covector.
        """
        place = self.place_of(site)
        if place.normed and place.stream == "resid":
            covector = self.behind_norm(int(place.layer), covector, (row, columns))
        elif place.normed:
            covector = self.behind_norm_of(place.layer, covector, (row, columns), weighted=place.weighted)
        elif place.stream == "u":
            covector = self.chain(place.layer).on_lanes(covector)
        return place.stream, place.layer, covector

    @property
    def embeddings(self) -> Float[Tensor, "b l d"]:
        """What a covector at the bottom meets: the tokens' embeddings."""
        return self.resid(0)

    def place_of(self, site: str) -> Place:
        """The stream that a site's value is.

        Raises
        ------
        ValueError
            It is no stream that can be traced.
        """
        site = unalias(site)
        name = SiteName.parse(site)
        if name.layer is not None:
            block = self.model.block(name.layer)
            if name.local == "hook_resid_pre" or (name.local == "norm.hook_out" and not block.beside):
                return Place("resid", name.layer, name.local == "norm.hook_out")
            if name.local == "hook_resid_post":
                return Place("resid", name.layer + 1)
            read = name.hook in ("hook_out", "hook_normalized") and not block.norm_after
            if name.place in block.norm_names and read:
                stage = block.stages[block.norm_names.index(name.place)]
                return Place("in", part_of(name.layer, stage[0]), True, name.hook == "hook_out")
            if name.local in ("hook_resid_mid", "hook_mixer_in"):
                return Place("in", part_of(name.layer, block.stages[-1][0]))
            for branch in block.branches:
                part = part_of(name.layer, branch)
                if site in output_sites(self.model, name.layer, branch):
                    return Place("out", part)
                if name.place == branch and name.hook == u_site(block.branches[branch]):
                    return Place("u", part)
        raise ValueError(
            f"a coder that reads {site} cannot be traced: expected hook_resid_pre, hook_resid_mid, hook_resid_post,"
            " norm.hook_out or a branch's output of a block (mixer.hook_out_proj), or the value that enters a mixer's"
            " memory (mixer.hook_x, hook_v)"
        )


def frozen_branch(
    cache: ActivationCache | Beginning | Layerwise,
    layer: int,
    name: str,
    before: tuple[Tensor, ...] | None,
    mask: Tensor | None,
) -> Chain:
    """One branch as an affine map, from a cache of its block's :func:`frozen_sites`."""
    model: Any = cache.model
    block = model.block(layer)
    read_by = norm_name(model, layer, name)
    scale = cache[f"blocks.{layer}.{read_by}.hook_scale"]
    held, in_scale, factor = getattr(block, read_by), block.in_scales.get(name), block.out_scales.get(name)
    prefix = f"blocks.{layer}.{name}."
    if block.norm_after:
        unnormed = Gain(scaled(torch.ones_like(scale), in_scale))
        chain = block.branches[name].frozen(lambda site: cache[prefix + site], before, mask, unnormed)
        return chain.followed_by(held_norm(held, scale, factor))
    chain = block.branches[name].frozen(
        lambda site: cache[prefix + site], before, mask, held_norm(held, scale, in_scale)
    )
    return chain if factor in (None, 1) else chain.with_output(factor)
