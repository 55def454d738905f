"""A model at one run, its norms, gates and selection held: every block is affine in the residual stream.

The model is wrapped, not changed: the run is made once with `run_with_cache`, hooks that sit on it included, and the
constants of each layer are read from the cache when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.coded_layer import CodedLayer, LayerMode
from circuits.frozen_mixer import SITES, FrozenMixer, Pulled
from circuits.rules import Rule, Selection, pull
from circuits.targets import Stream
from hooked_mamba import ActivationCache, HookedMamba, HookedMamba2
from hooked_mamba.components import at_least_fp32
from hooked_mamba.config import Mamba2Config
from hooked_mamba.hooks.names import unalias
from hooked_mamba.state import ModelState, Padding
from saes.coder import SparseCoder
from saes.naming import Coders, named_coders


class FrozenModel:
    """The linearised model for a batch of prompts.

    Parameters
    ----------
    model
        HookedMamba or HookedMamba2.
    input
        Text, a list of texts, or token ids.
    coders
        One, several, or several by name; at most one for each layer: a MambaCoder, or an SAE on a mixer's output. They
        replace their layers by features and an error; layers without one are mixers, taken apart into heads.
    mode
        "mixer", "block" or "hybrid", for all layers or layer -> mode. None: what each layer's coder was trained for
        ("block", or "hybrid" for target="local"), and "mixer" without one.
    attention_mask
        b l, for padded token ids.
    initial_state
        Memory to go on from; not together with padding.
    selection
        What paths follow beside the value path: "none", "half", "shares" (or three shares of C, B and u), "gradient";
        see `circuits.rules`. All but "none" run blocks anew, and need layers in mode "mixer" or "block".

    Raises
    ------
    ValueError
        An initial state together with padding, coders that do not fit, an unknown selection, or one that a hybrid
        layer cannot have.
    """

    def __init__(
        self,
        model: HookedMamba | HookedMamba2,
        input: str | Sequence[Any] | Tensor,
        coders: Coders | Iterable[SparseCoder] = (),
        mode: LayerMode | dict[int, LayerMode] | None = None,
        *,
        attention_mask: Tensor | None = None,
        initial_state: ModelState | None = None,
        selection: Selection = "none",
    ) -> None:
        self.model = model
        self.rule = Rule.of(selection)
        self.tokens, found = model.input_to_tokens(input)
        attention_mask = found if attention_mask is None else attention_mask
        padding = None
        if attention_mask is not None:
            padding = Padding.from_mask(torch.as_tensor(attention_mask, device=model.device), self.tokens.shape)
        self.mask: Bool[Tensor, "b l"] | None = None if padding is None else padding.mask
        if padding is not None and initial_state is not None:
            raise ValueError("an initial state together with padding cannot be traced: give rows of one length")
        self.before = initial_state if initial_state is not None else model.initial_state(self.tokens.shape[0])
        per_block = ["hook_resid_pre", "norm.hook_scale", "norm.hook_out", "mixer.hook_out_proj"]
        per_block += [f"mixer.{name}" for name in SITES]
        if isinstance(model.cfg, Mamba2Config):
            per_block.append("mixer.norm.hook_scale")
        n = model.cfg.n_layers
        names = ["hook_embed", "ln_final.hook_scale", f"blocks.{n - 1}.hook_resid_post"]
        names += [f"blocks.{i}.{name}" for i in range(n) for name in per_block]
        with torch.no_grad():
            logits, cache = model.run_with_cache(
                self.tokens, names_filter=names, attention_mask=attention_mask, initial_state=initial_state
            )
        assert isinstance(cache, ActivationCache)  # return_cache_object is its default
        self.cache = cache
        self.logits: Float[Tensor, "b l V"] = logits.detach()
        self._mixers: dict[int, FrozenMixer] = {}
        if not isinstance(coders, SparseCoder | Mapping | str):
            coders = list(coders)
        self.coded = CodedLayer.of_all(self, named_coders(coders).values() if coders else (), mode)
        hybrid = [i for i, coded in self.coded.items() if coded.mode == "hybrid"]
        if hybrid and self.rule.name != "none":
            raise ValueError(f"selection {self.rule.name!r} has no hybrid layers, and layer {hybrid[0]} is one")

    # Shapes and names ----------------------------------------------------------------------------------------

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

    def column(self, position: int) -> int:
        """A position as a column of the batch.

        Raises
        ------
        IndexError
            It is outside of the prompt.
        """
        if not -self.length <= position < self.length:
            raise IndexError(f"position {position} is out of range for {self.length} positions")
        return position % self.length

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

    # What the run had ----------------------------------------------------------------------------------------

    def resid(self, layer: int) -> Float[Tensor, "b l d"]:
        """The residual stream entering a layer; n_layers: after the last block."""
        n = self.model.cfg.n_layers
        name = f"blocks.{n - 1}.hook_resid_post" if layer == n else f"blocks.{layer}.hook_resid_pre"
        return at_least_fp32(self.cache[name])

    def out(self, layer: int) -> Float[Tensor, "b l d"]:
        """A mixer's output."""
        return at_least_fp32(self.cache[f"blocks.{layer}.mixer.hook_out_proj"])

    def value_at(self, site: str) -> Tensor:
        """A site that a coder reads."""
        site = unalias(site)
        if site in self.cache:
            return self.cache[site]
        stream, layer = self._stream_of(site)
        return self.resid(layer) if stream == "resid" else self.out(layer)

    @property
    def embeddings(self) -> Float[Tensor, "b l d"]:
        """What a covector at the bottom meets: the tokens' embeddings."""
        return self.resid(0)

    @cached_property
    def final_norm(self) -> Float[Tensor, "b l d"]:
        """w / scale of the final norm."""
        return at_least_fp32(self.model.ln_final.weight).detach() / self.cache["ln_final.hook_scale"]

    def behind_norm(self, layer: int, covectors: Float[Tensor, "... d"], at: Any) -> Float[Tensor, "... d"]:
        """Covectors on what a block's norm (n_layers: the final one) gives, as ones on the stream that it reads.

        The norm is held, but for selection "gradient", where it is differentiated.

        Parameters
        ----------
        at
            Where they are: a row and a position, or rows that have covectors at all positions.
        """
        final = layer == self.model.cfg.n_layers
        behind = covectors * (self.final_norm if final else self.mixer(layer).norm)[at]
        if self.rule.name != "gradient":
            return behind
        x = self.resid(layer)[at]
        scale = self.cache["ln_final.hook_scale" if final else f"blocks.{layer}.norm.hook_scale"][at]
        return behind - x * (behind * x).sum(-1, keepdim=True) / (x.shape[-1] * scale.square())

    def mixer(self, layer: int) -> FrozenMixer:
        """The constants of one layer."""
        if layer not in self._mixers:
            with torch.no_grad():
                self._mixers[layer] = FrozenMixer.of(self.cache, layer, self.before[layer], self.mask)
        return self._mixers[layer]

    def reading(
        self, site: str, row: int, position: int, covector: Float[Tensor, " d"]
    ) -> tuple[Stream, int, Float[Tensor, " d"]]:
        """The stream behind a site, its layer, and a covector on the site as one on the stream."""
        site = unalias(site)
        stream, layer = self._stream_of(site)
        if site.endswith("norm.hook_out"):
            covector = self.behind_norm(layer, covector, (row, position))
        return stream, layer, covector

    def _stream_of(self, site: str) -> tuple[Stream, int]:
        parts = site.split(".")
        last = ".".join(parts[2:])
        if parts[0] == "blocks" and last in ("hook_resid_pre", "norm.hook_out"):
            return "resid", int(parts[1])
        if parts[0] == "blocks" and last == "hook_resid_post":
            return "resid", int(parts[1]) + 1
        if parts[0] == "blocks" and last == "mixer.hook_out_proj":
            return "out", int(parts[1])
        raise ValueError(
            f"a coder that reads {site} cannot be traced: expected hook_resid_pre, hook_resid_post, norm.hook_out or"
            " mixer.hook_out_proj of a block"
        )

    def latents(self, layer: int) -> Float[Tensor, "b l F"]:
        """All latents of a coded layer, active or not."""
        codes = self.coded[layer].codes
        dense = codes.values.new_zeros(*codes.values.shape[:2], self.coded[layer].coder.cfg.d_sae)
        return dense.scatter_add_(-1, codes.indices, codes.values)

    # Pulling back --------------------------------------------------------------------------------------------

    def pull(
        self,
        layer: int,
        V: Float[Tensor, "n l d"],
        rows: Int[Tensor, " n"],
        through: Float[Tensor, "l E"] | None = None,
    ) -> Pulled:
        """Take covectors on a mixer's output back to the stream below, by the run's rule."""
        if self.rule.name == "none":
            return self.mixer(layer).pull(V, rows, through)
        return pull(self, layer, V, rows, through)

    def pull_u(self, layer: int, ub: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Pulled:
        """The same for covectors on the scan's input u."""
        mixer = self.mixer(layer)
        if self.rule.name != "gradient":  # the others follow the same path up to u
            return mixer.pull_u(ub, rows)
        return pull(self, layer, ub.new_zeros(*ub.shape[:2], self.model.cfg.d_model), rows, ub=ub)

    def rows_of(self, targets: int) -> Int[Tensor, " n"]:
        """The row of each of `targets` times b covectors, all rows of a target together."""
        return torch.arange(self.batch, device=self.tokens.device).repeat(targets)
