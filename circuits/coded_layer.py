"""A layer whose output is read as features and an error, by a coder.

block   o = sum_j z_j d_j + b_dec + skip + error
split   o = sum_j z_j d_j + b_dec + skip + error + (what the frozen mixer moves between positions) + its biases,
        the coder trained on the local part, so that nothing is counted twice
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.linear import Rows
from hooked_mamba.frozen.run import Run, out_site
from hooked_mamba.hooks.names import unalias
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.renamed import warn_renamed
from saes.coder import SparseCoder
from saes.sparse import Codes

LayerMode = Literal["mixer", "block", "split"]


@dataclass(frozen=True)
class CodedLayer:
    """One layer's coder at one run."""

    coder: SparseCoder
    layer: int
    mode: LayerMode
    codes: Codes
    """Active latents, b l k."""
    error: Float[Tensor, "b l d"]
    """What the coder misses."""

    @classmethod
    def of_all(
        cls, run: Run, coders: Iterable[SparseCoder], mode: LayerMode | dict[int, LayerMode] | None
    ) -> dict[int, CodedLayer]:
        """Layer -> its coder; layers in mode "mixer" are left out.

        Raises
        ------
        ValueError
            Two coders for one layer, a coder that does not predict a mixer's output, or a mode that it was not
            trained for.
        """
        by_layer: dict[int, SparseCoder] = {}
        for coder in coders:
            layer = _layer_of(coder, run)
            if layer in by_layer:
                raise ValueError(f"two coders for layer {layer}: a layer's output can be read by one only")
            by_layer[layer] = coder
        found: dict[int, CodedLayer] = {}
        for layer in range(run.n_layers):
            asked = _mode(mode.get(layer) if isinstance(mode, dict) else mode)
            coder_here = by_layer.get(layer)
            if coder_here is None:
                if asked in ("block", "split"):
                    raise ValueError(f"mode {asked!r} needs a coder for layer {layer}")
                continue
            natural: LayerMode = "split" if coder_here.cfg.target == "local" else "block"
            if asked == "mixer":
                continue
            if asked not in (None, natural):
                raise ValueError(
                    f"layer {layer}: mode {asked!r} needs a coder trained on target"
                    f" {'local' if asked == 'split' else 'block'!r}, this one's mode is {natural!r}"
                )
            found[layer] = cls._at(run, coder_here, layer, natural)
        return found

    @classmethod
    @torch.no_grad()
    def _at(cls, run: Run, coder: SparseCoder, layer: int, mode: LayerMode) -> CodedLayer:
        x = run.value_at(coder.cfg.in_site)
        codes = coder.encode_topk(x)
        said = coder.decode_sparse(codes, x).to(run.dtype)
        if mode == "split":
            chain, rows = run.chain(layer), run.rows_of(1)
            p, _ = chain.push(run.resid(layer), rows, until="p")
            true = chain.push_own(p, rows)
        else:
            true = run.out(layer)
        codes = Codes(codes.values.to(run.dtype), codes.indices)
        return cls(coder, layer, mode, codes, true - said)

    def upto(self, stop: int) -> CodedLayer:
        """The same at the first positions alone."""
        codes = Codes(self.codes.values[:, :stop], self.codes.indices[:, :stop])
        return replace(self, codes=codes, error=self.error[:, :stop])

    @property
    def W_dec(self) -> Float[Tensor, "F d"]:
        """Decoder rows."""
        return self.coder.W_dec.detach()

    def feature_effects(self, V: Float[Tensor, "n l d"], rows: Rows) -> Float[Tensor, "n l k"]:
        """z_j V . d_j of the active latents."""
        values, indices = self.codes.values[rows], self.codes.indices[rows]
        # One position at a time: rows of W_dec for all at once would be l k d numbers.
        effects = [
            torch.einsum("nd,nkd->nk", V[:, t], self.W_dec[indices[:, t]].to(V.dtype)) for t in range(V.shape[1])
        ]
        return torch.stack(effects, 1) * values

    def bias_effect(self, V: Float[Tensor, "n l d"]) -> Float[Tensor, " n"]:
        """V . b_dec, summed over positions."""
        return (V @ self.coder.b_dec.detach().to(V.dtype)).sum(1)

    def error_effects(self, V: Float[Tensor, "n l d"], rows: Rows) -> Float[Tensor, "n l"]:
        """V . error at each position."""
        return (V * self.error[rows]).sum(-1)

    def push_skip(self, delta: Float[Tensor, "n l d"], norm: Float[Tensor, "n l d"]) -> Tensor | float:
        """What the skip makes of a change of the stream entering the block."""
        if self.coder.W_skip is None:
            return 0.0
        read = delta if self.coder.cfg.reads == "resid" else delta * norm
        return read @ self.coder.W_skip.detach().to(delta.dtype)

    def pull_skip(self, run: Run, V: Float[Tensor, "n l d"], rows: Rows) -> Tensor | None:
        """What a skip adds to V below; None without one."""
        if self.coder.W_skip is None:
            return None
        below = V @ self.coder.W_skip.detach().to(V.dtype).t()
        return below if self.coder.cfg.reads == "resid" else run.behind_norm(self.layer, below, rows)


def _mode(asked: str | None) -> str | None:
    if asked == "hybrid":
        warn_renamed("mode 'hybrid'", "mode 'split'", stacklevel=5)
        return "split"
    return asked


def _layer_of(coder: SparseCoder, run: Run) -> int:
    """The layer whose mixer's output a coder predicts."""
    name = SiteName.parse(unalias(coder.cfg.out_site))
    if name.layer is None or (name.place != "mixer" and name.local != "hook_mixer_out"):
        raise ValueError(
            f"a coder that predicts {coder.cfg.out_site} replaces no layer: expected blocks.{{i}}.mixer.hook_out_proj"
        )
    if not 0 <= name.layer < run.n_layers:
        raise ValueError(f"a coder for layer {name.layer}, but the model has {run.n_layers} layers")
    site, block = out_site(run.model, name.layer), run.model.block(name.layer)
    own = f"blocks.{name.layer}.mixer.{block.branches['mixer'].out_site}" if "mixer" in block.branches else site
    unscaled = block.out_scales.get("mixer") in (None, 1) and not block.norm_after
    if str(name) != site and not (unscaled and str(name) == own):
        raise ValueError(f"a coder that predicts {name} replaces no layer: expected {site}")
    return name.layer
